"""The records of a sweep's cells, and a sweep in which memory runs out, a method fails, or the disk is full."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from eval_case import know_tasks, made_cells, made_task, make_session, sample, save, words
from eval_children import journals
from presses import module
from rocketkv.eval import prefill as prefill_module
from rocketkv.eval.generate import DecodeLoop
from rocketkv.eval.journal import Journal
from rocketkv.eval.methods import Full
from rocketkv.eval.prefill import Prefills, read_prompt
from rocketkv.eval.records import CELLS, CellDict, read_record, record_path, records
from rocketkv.eval.sweep import run as run_module
from rocketkv.eval.sweep import work as work_module
from rocketkv.eval.sweep.cells import Session
from rocketkv.eval.sweep.locks import try_lock
from rocketkv.eval.sweep.run import Counts, run_cells, substance

OWN = "rocketkv_test_method"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def session(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    know_tasks(monkeypatch, made_task(turns=2), made_task("other"))
    return make_session(folder, tmp_path / "results")


def test_a_cell_has_a_record_of_all_its_answers(session: Session) -> None:
    full, other = made_cells()
    assert str(run_cells(session, [full, other])) == "2 cells done, 0 were before"
    record = read_record(record_path(session.results, full))
    assert (record["cell"], record["status"], record["metric"]) == (full, "complete", "letters")
    assert [sample["id"] for sample in record["samples"]] == ["s0", "s1"]
    for number, made in enumerate(record["samples"]):
        assert [turn["answers"] for turn in made["turns"]] == [[f"{number}0"], [f"{number}1"]]
        scores = [turn["score"] for turn in made["turns"]]
        assert made["score"] == pytest.approx(sum(scores) / 2)
        assert made["notes"] == {"words": 60}
    assert record["score"] == pytest.approx(sum(made["score"] for made in record["samples"]) / 2)
    assert record["cost"]["prompt_tokens"] == sum(s["cost"]["prompt_tokens"] for s in record["samples"]) / 2
    assert record["provenance"]["versions"]["torch"] == torch.__version__
    assert record["data"] == read_record(record_path(session.results, other))["data"]
    assert str(run_cells(session, [full, other])) == "0 cells done, 2 were before"


def test_what_a_journal_has_is_not_asked_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = made_cells(methods=("full",), samples=4)
    run_cells(session, [cell])
    undisturbed = read_record(record_path(session.results, cell))
    record_path(session.results, cell).unlink()
    asked: list[str] = []
    answer_sample = work_module.answer_sample

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[3].id)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer_sample(*args, **kwargs)

    monkeypatch.setattr(work_module, "answer_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cells(session, [cell])
    paths = journals(session.results)
    assert [len(Journal(path)) for path in paths] == [1, 1]
    paths[1].write_bytes(paths[1].read_bytes()[:-10])  # the kill came while the second one was written
    asked.append("between")
    assert run_cells(session, [cell]).done == 1
    assert asked == ["s0", "s1", "s2", "between", "s1", "s2", "s3"]
    assert substance(read_record(record_path(session.results, cell))) == substance(undisturbed)
    assert not journals(session.results)


def test_a_hold_ends_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "cells" / "a.json"
    with try_lock(path) as first, try_lock(path) as second:
        assert (first, second) == (True, False)
    with contextlib.suppress(ValueError), try_lock(path):
        raise ValueError
    with try_lock(path) as third:
        assert third


class Starving(Full):
    """A method for whose prompts there is no memory."""

    error: Exception = MemoryError("no memory for that prompt")

    def attached(self, model: PreTrainedModel) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory for that prompt"),
        torch.OutOfMemoryError("no memory for that prompt"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: no memory for that prompt"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_recorded_and_the_sweep_goes_on(
    error: Exception, session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mine(Starving):
        pass

    Mine.error = error
    module(monkeypatch, OWN, make=lambda budget: Mine(name=f"{OWN}:make", token_budget=budget))
    found = made_cells(methods=("full", f"{OWN}:make", "streaming"))
    counts = run_cells(session, found)
    assert counts == Counts(done=2, out_of_memory=1)
    assert str(counts) == "2 cells done, 0 were before, 1 out of memory"
    record = read_record(record_path(session.results, found[1]))
    assert (record["status"], record["score"], record["samples"]) == ("out_of_memory", None, [])
    assert "no memory for that prompt" in record["message"]
    assert f"{OWN}:make 24: out of memory" in capsys.readouterr().err
    assert run_cells(session, found) == Counts(done_before=3)


def test_another_error_is_recorded_with_its_traceback_and_the_sweep_goes_on(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mine(Starving):
        error = RuntimeError("a bug of the method")

    module(monkeypatch, OWN, make=lambda budget: Mine(name=f"{OWN}:make", token_budget=budget))
    found = made_cells(methods=("full", f"{OWN}:make", "streaming"))
    counts = run_cells(session, found)
    assert counts == Counts(done=2, failed=1)
    assert str(counts) == "2 cells done, 0 were before, 1 failed"
    record = read_record(record_path(session.results, found[1]))
    assert (record["status"], record["score"], record["samples"]) == ("failed", None, [])
    assert "in attached" in record["message"]
    assert f"{OWN}:make 24: failed: RuntimeError: a bug of the method" in capsys.readouterr().err
    assert run_cells(session, found) == Counts(failed=1, done_before=2)
    module(monkeypatch, OWN, make=lambda budget: Full(name=f"{OWN}:make", token_budget=budget))
    assert run_cells(session, found) == Counts(done=1, done_before=2)  # once the method is mended
    assert not journals(session.results)
    scores = {record["cell"]["method"]: record["score"] for record in records(session.results)}
    assert scores["full"] == scores[f"{OWN}:make"]


class Breaking(Full):
    """A method that one sample breaks."""

    samples: int = 0
    error: Exception = RuntimeError("a bug of the method")

    def attached(self, model: PreTrainedModel) -> Any:
        type(self).samples += 1
        if type(self).samples == 2:
            raise self.error
        return super().attached(model)


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("a bug")], ids=["memory", "bug"])
def test_answers_before_an_error_are_kept(error: Exception, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Breaking):
        dense_prefill = False

    Mine.error = error
    module(monkeypatch, OWN, make=lambda budget: Mine(name=f"{OWN}:make", token_budget=budget))
    found = made_cells(methods=("full", f"{OWN}:make"), samples=4)
    counts = run_cells(session, found)
    assert (counts.done, counts.out_of_memory + counts.failed, Mine.samples) == (1, 1, 2)
    whole, broken = (read_record(record_path(session.results, cell)) for cell in found)
    assert [made["id"] for made in broken["samples"]] == ["s0"]
    assert broken["samples"][0]["turns"] == whole["samples"][0]["turns"]
    retrying = dataclasses.replace(session, retry_out_of_memory=True)
    assert run_cells(retrying, found) == Counts(done=1, done_before=1)
    assert Mine.samples == 5  # the first sample is not asked again
    mended = read_record(record_path(session.results, found[1]))
    assert substance(mended) == substance(whole)
    assert not journals(session.results)


def test_memory_that_runs_out_beside_a_shared_prefill_suffices_alone(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: Prefills, ids: list[int]) -> Any:
        raise torch.OutOfMemoryError("no memory for a prompt of full size")

    found = made_cells(methods=("full", "streaming"))
    before = run_again(session, found)
    monkeypatch.setattr(Prefills, "read", read)
    assert run_cells(session, found) == Counts(done=2)
    assert [substance(read_record(record_path(session.results, cell))) for cell in found] == before


def run_again(session: Session, found: list[CellDict]) -> list[list[object]]:
    """Run cells and remove their records; return what was in them."""
    run_cells(session, found)
    paths = [record_path(session.results, cell) for cell in found]
    before = [substance(read_record(path)) for path in paths]
    for path in paths:
        path.unlink()
    return before


def test_every_prompt_is_read_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[list[int]] = []

    def counted(model: PreTrainedModel, ids: list[list[int]]) -> Any:
        reads.extend(ids)
        return read_prompt(model, ids)

    monkeypatch.setattr(prefill_module, "read_prompt", counted)
    monkeypatch.setattr(DecodeLoop, "prefill", lambda self, ids: pytest.fail("a method has read a prompt itself"))
    know_tasks(monkeypatch, made_task(turns=1))
    counts = run_cells(session, made_cells(methods=("full", "rocketkv", "streaming", "quest"), budgets=(192, 300)))
    assert counts == Counts(done=7)
    assert len(reads) == 2
    assert reads[0] != reads[1]


def test_a_full_disk_ends_a_sweep_and_loses_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made_cells(samples=3)
    before = run_again(session, found)
    append = Journal._append
    written: list[str] = []

    def full_disk(self: Journal, key: str, value: Any) -> None:
        written.append(key)
        if len(written) == 4:
            with self._path.open("ab") as file:
                file.write(b'["half a li')
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, key, value)

    monkeypatch.setattr(Journal, "_append", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        run_cells(session, found)
    assert not list((session.results / CELLS).glob("*.json"))
    assert run_cells(session, found) == Counts(done=2)
    assert [substance(read_record(record_path(session.results, cell))) for cell in found] == before
    assert len(written) == 4 + 3  # the three answers that were whole are not asked again


def test_a_disk_without_room_for_a_record_keeps_its_answers(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made_cells(samples=3)
    before = run_again(session, found)
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(run_module, "write_record", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match="No space left on device"):
            run_cells(session, found)
    monkeypatch.setattr(work_module, "answer_sample", lambda *_, **__: pytest.fail("a sample is answered again"))
    assert run_cells(session, found) == Counts(done=2)
    assert [substance(read_record(record_path(session.results, cell))) for cell in found] == before


@pytest.mark.parametrize("mode", ["aware", "agnostic"])
def test_at_a_full_budget_a_method_answers_as_the_full_cache(mode: str, session: Session) -> None:
    found = made_cells(methods=("full", "rocketkv", "streaming"), budgets=(4096,), agnostic=mode == "agnostic")
    run_cells(session, found)
    made = [read_record(record_path(session.results, cell)) for cell in found]
    assert {cell["mode"] for cell in found} == {mode}
    assert substance(made[0]) == substance(made[1]) == substance(made[2])


def test_a_text_with_any_character_is_asked_and_recorded(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = dataclasses.replace(sample(), context=f"{words(0, 40)}\u2028 \x85 café {{{{ curly }}}} {{% raw %}}")
    know_tasks(monkeypatch, made_task(samples=lambda _: [odd]))
    (cell,) = made_cells(methods=("full",))
    assert run_cells(session, [cell]).done == 1
    assert len(read_record(record_path(session.results, cell))["samples"]) == 1


def test_latency_needs_room_for_what_it_generates(session: Session) -> None:
    (cell,) = made_cells(tasks=("latency",), methods=("full",), lengths=(32,), max_new_tokens=None)
    assert run_cells(session, [cell]).failed == 1
    message = read_record(record_path(session.results, cell))["message"]
    assert "length must be above the 32 tokens that latency generates, got 32" in message
