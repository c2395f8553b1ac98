"""`rocketkv eval run --tp`: processes that share a model answer as one that has all of it, and one of them writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval_case import save
from rocketkv.cli.main import main
from rocketkv.eval.measures.memory import is_out_of_memory
from rocketkv.eval.records import CELLS, Record, records
from rocketkv.eval.sweep import together
from rocketkv.eval.sweep.run import substance
from rocketkv.hf.loading import load_model
from tiny import TRANSFORMERS

FLAGS = [
    "eval", "run", "--tasks", "niah_single_1,kl", "--methods", "full,rocketkv", "--budgets", "48", "--lengths", "512",
    "--samples", "2", "--max-new-tokens", "3", "--generation", "card", "--answers", "2", "--threads", "1",
]  # fmt: skip


def by_cell(results: Path) -> dict[tuple[str, str], Record]:
    return {(record["cell"]["task"], record["cell"]["method"]): record for record in records(results)}


@pytest.mark.skipif(TRANSFORMERS < (5,), reason="older ones shard a model on GPUs only")
@pytest.mark.skipif(torch.cuda.is_available(), reason="would place both processes on GPUs")
def test_two_processes_share_a_model_and_answer_together(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    settings = folder / "generation_config.json"
    settings.write_text(settings.read_text().replace("{", '{"do_sample": true, "temperature": 0.8, ', 1))
    flags = [*FLAGS, "--model", str(folder)]
    assert main([*flags, "--device", "cpu", "-o", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "rocketkv.cli.main", *flags, "--tp", "2", "-o", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cells done") == 1  # one process leads
    one, two = by_cell(tmp_path / "one"), by_cell(tmp_path / "two")
    assert list(one) == list(two)
    for name, record in two.items():
        assert record["key"] == one[name]["key"]  # the weights have one mark, however they are divided
        assert record["provenance"]["hardware"]["ranks"] == 2
        costs: list[Any] = [one[name]["cost"], record["cost"]]
        assert costs[1]["kv_bytes"] == costs[0]["kv_bytes"]  # of both halves
        assert costs[1]["step_bytes"] == costs[0]["step_bytes"]
        if name[0] == "kl":
            assert record["score"] == pytest.approx(one[name]["score"], rel=1e-3, abs=1e-6)
        else:
            assert substance(record) == substance(one[name])
            assert record["samples"][0]["turns"][0]["kv_bytes"] == one[name]["samples"][0]["turns"][0]["kv_bytes"]
    assert len(list((tmp_path / "two" / CELLS).glob("*.json"))) == 4


def test_a_model_that_cannot_be_divided_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model")
    started = r"started by torchrun --nproc-per-node 2; got 2, and there is 1"
    with pytest.raises(ValueError, match=started):
        load_model(str(folder), tp=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="tp must divide the model's num_key_value_heads, got 3 and 2; choose another"):
        load_model(str(folder), tp=3)
    with pytest.raises(ValueError, match="leave out device_map, got 'auto'"):
        load_model(str(folder), tp=3, device_map="auto")
    with pytest.raises(ValueError, match="leave out revision, device_map and tp, got None, None and 3"):
        load_model("smollm2", tp=3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "cpu"], "leave --device out"),
        (["--tasks", "lm-eval:gsm8k"], "leave out lm-eval:gsm8k"),
        (["--methods", "full,kvpress:KnormPress"], "leave out kvpress:KnormPress"),
    ],
)
def test_what_does_not_run_on_a_divided_model_is_refused(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FLAGS, "--tp", "2", *more]) != 0
    assert message in capsys.readouterr().err


class Others:
    """Ranks whose others answer what they are told to."""

    def __init__(self, *answers: Any) -> None:
        self.answers = answers

    def tell(self, order: Any) -> None:
        pass

    def gathered(self, value: Any) -> list[Any]:
        return [value, *self.answers]


def test_the_bytes_of_all_ranks_count_and_their_tokens_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(text: str, *numbers: int) -> dict[str, Any]:
        cost = {"kv_bytes": numbers[0], "peak_decode_bytes": numbers[1], "new_tokens": 3, "peak_prefill_bytes": None}
        traces = [{"tokens": 3, "cut": True, "kv_bytes": [(0, numbers[0] - 2), (3, numbers[0])]}]
        return {"predictions": [text], "cost": cost, "traces": traces}

    def run(*others: Any) -> Any:
        monkeypatch.setattr(together, "answer_item", lambda *_: answer("a", 10, 40))
        session: Any = SimpleNamespace(ranks=Others(*others))
        return together.answer_together(session, *[None] * 4)  # type: ignore[arg-type]

    made = run(answer("a", 12, 30))
    assert made["cost"] == {"kv_bytes": 22, "peak_decode_bytes": 40, "new_tokens": 3, "peak_prefill_bytes": None}
    assert made["traces"] == [{"tokens": 3, "cut": True, "kv_bytes": [[0, 18], [3, 22]]}]
    with pytest.raises(RuntimeError, match="rank 1 generated other tokens than rank 0"):
        run(answer("b", 10, 40))
    with pytest.raises(RuntimeError, match=r"rank 1 failed: .*MemoryError: none left") as caught:
        run(together._failure(MemoryError("none left")))
    assert is_out_of_memory(caught.value)
