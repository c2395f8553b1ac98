"""docs/models.md has every causal class of its version of transformers, and rows of each kind hold when made anew."""

from __future__ import annotations

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tools.support_table.check import Row, check_class
from tools.support_table.table import CAUSAL, PAGE, QUANTIZED, VISION, page, read

VERSION, ROWS = read(PAGE.read_text(encoding="utf-8"))
same_version = pytest.mark.skipif(
    transformers.__version__ != VERSION, reason=f"the table is of transformers {VERSION}: `python tools/support_table`"
)


@same_version
def test_the_table_has_every_causal_class() -> None:
    assert {name: kind for name, (kind, _, _) in ROWS.items()} == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def test_no_class_fails() -> None:
    assert not [name for name, (_, result, _) in ROWS.items() if result == "fails"]


@same_version
@pytest.mark.parametrize(
    "model_type",
    ["llama", "mistral", "gemma2", "ministral", "minimax_m3_vl_text", "dots3_note_text", "git", "gemma4_assistant"],
)
def test_a_row_holds(model_type: str) -> None:
    kind, result, note = ROWS[model_type]
    row = check_class(kind, model_type, decoder=True)
    layers = [f"{row.compressed} of {row.layers} layers"] if row.result == "partly" else []
    assert (row.kind, row.result, ", ".join(filter(None, [*layers, row.note]))) == (kind, result, note)


def test_rows_of_a_class_are_one_line_unless_they_differ() -> None:
    yes, no = Row("LlamaForCausalLM", "yes", 32, 32), Row("GitForCausalLM", "refused", note="a | b")
    rows = {"llama": yes, "exaone": Row("LlamaForCausalLM", "yes", 40, 40), "git": no}
    text = page(rows, {}, [], "transformers 1.2.3")
    assert all(part in text for part in (CAUSAL, VISION, QUANTIZED))
    assert "| `LlamaForCausalLM` | exaone, llama | yes |  |" in text
    assert read(text) == (
        "1.2.3",
        {"llama": ("LlamaForCausalLM", "yes", ""), "exaone": ("LlamaForCausalLM", "yes", ""),
         "git": ("GitForCausalLM", "refused", r"a \| b")},
    )  # fmt: skip
