"""The study of compressing before the question: the full cache loses nothing in either mode, a small budget does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chatml import CHATML, tokenizer_of
from studies.question_first import Settings, markdown, prompt_of, study
from studies.retention import fitted
from tiny import build


def test_modes_differ_by_what_is_compressed_first(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(CHATML)
    model = build("llama", vocab_size=len(tokenizer))
    settings = Settings(documents=2, facts=2, tokens=900, arms=("rocketkv:128",))
    result = study(model, tokenizer, settings, tmp_path)
    for document in result["documents"]:
        assert document["full"]["aware"]["kl"] == [0, 0]
        assert max(document["full"]["agnostic"]["kl"]) < 1e-6, "rounding of a prompt in two forwards"
        aware, agnostic = (document["rocketkv:128"][mode]["kl"] for mode in ("aware", "agnostic"))
        assert min(aware + agnostic) > 1e-4
        assert aware != agnostic
    again = study(model, tokenizer, settings, tmp_path)
    assert again == result, "the journal has the figures"
    table: dict[str, Any] = {"settings": vars(settings), **result}
    rows = [line for line in markdown(table).splitlines() if line.startswith("| `")]
    assert len(rows) == 4
    assert "0/4" in rows[0]


def test_a_prompt_is_cut_behind_the_document() -> None:
    tokenizer = tokenizer_of(CHATML)
    made = fitted(tokenizer, 0, 2, 900)
    ids, length = prompt_of(tokenizer, made.text, made.facts[0])
    assert tokenizer.decode(ids[:length]).endswith(made.text)
    assert tokenizer.decode(ids[length:]).startswith(f"\n\n{made.facts[0].question}")
    assert len(ids) <= 910
