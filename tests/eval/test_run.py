"""A sweep survives whatever happens to it: kills, neighbours, shards, merges, memory that runs out, other errors."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from eval_case import know_tasks, made_cells, made_task, make_session, sample, save, words
from made_records import made_record
from presses import module
from rocketkv.eval import prefill as prefill_module
from rocketkv.eval.generate import DecodeLoop
from rocketkv.eval.journal import Journal
from rocketkv.eval.methods import Full
from rocketkv.eval.prefill import Prefills, read_prompt
from rocketkv.eval.records import (
    CELLS,
    CellDict,
    Record,
    cell_key,
    finished,
    read_record,
    record_path,
    records,
    write_record,
)
from rocketkv.eval.sweep import work as work_module
from rocketkv.eval.sweep.cells import Session, mean_cost
from rocketkv.eval.sweep.locks import try_lock
from rocketkv.eval.sweep.plan import Loaded, Plan, cells, shard
from rocketkv.eval.sweep.provenance import weights_mark
from rocketkv.eval.sweep.run import Counts, merge, run_cells, substance
from rocketkv.eval.sweep.units import FOLDER, group_folder
from rocketkv.hf.loading import load_model

OWN = "rocketkv_test_method"
FLAGS = [
    "--tasks", "niah_single_1,kl", "--methods", "full,rocketkv", "--budgets", "48,64", "--lengths", "512,576",
    "--samples", "3", "--max-new-tokens", "3", "--device", "cpu", "--threads", "1",
]  # fmt: skip
PLAN = Plan(
    tasks=("niah_single_1", "kl"), methods=("full", "rocketkv"), budgets=(48, 64), lengths=(512, 576),
    samples=3, max_new_tokens=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def session(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    know_tasks(monkeypatch, made_task(turns=2), made_task("other"))
    return make_session(folder, tmp_path / "results")


class Children:
    """Processes that run `rocketkv eval run`, each its own."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "helpers" / "eval_child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )

    def _tell(self, *order: Any) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        while not line.strip().isdigit() and line:  # what children say of their scores
            line = self._server.stdout.readline()
        return int(line)

    def start(self, folder: Path, results: Path, *more: str) -> int:
        return self._tell("start", ["eval", "run", "--model", str(folder), *FLAGS, "-o", str(results), *more])

    def hold(self, path: Path) -> int:
        pid = self._tell("hold", str(path))
        said, patience = path.with_suffix(".held"), time.monotonic() + 60
        while not (said.exists() and said.read_text()) and time.monotonic() < patience:
            time.sleep(0.002)
        assert said.read_text() == "True"
        return pid

    def wait(self, pid: int) -> int:
        return self._tell("wait", pid)

    def close(self) -> str:
        return self._server.communicate()[1]


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    made = Children()
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(children: Children, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a sweep that nothing happens to."""
    results = tmp_path_factory.mktemp("undisturbed")
    assert children.wait(children.start(folder, results)) == 0
    return results


def wanted(folder: Path) -> list[CellDict]:
    weights = weights_mark(load_model(str(folder))[0])
    return cells(dataclasses.replace(PLAN, model=str(folder)), Loaded(chat=True, weights=weights))


def by_key(results: Path) -> dict[str, list[object]]:
    return {record["key"]: substance(record) for record in records(results)}


def identities(results: Path) -> dict[str, tuple[int, int]]:
    """Return what changes when a record is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (results / CELLS).glob("*.json")}


def progress(results: Path) -> int:
    """Return how many answers and records there are."""
    found = len(list((results / CELLS).glob("*.json"))) * 4
    for path in journals(results):
        with contextlib.suppress(FileNotFoundError):
            found += path.read_bytes().count(b"\n")
    return found


def journals(results: Path) -> list[Path]:
    """Return the files of unfinished answers."""
    return sorted((results / FOLDER).rglob("*.journal"))


def test_a_sweep_killed_five_times_ends_as_an_undisturbed_one(
    children: Children, folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    total = len(wanted(folder)) * 4
    assert progress(undisturbed) == total
    rng = random.Random(7)
    moments = sorted(rng.sample(range(1, total - 8), 5))  # of all the answers and records, when so many are there
    before: dict[str, tuple[int, int]] = {}
    unfinished = 0
    for moment in moments:
        pid = children.start(folder, tmp_path)
        patience = time.monotonic() + 60
        while progress(tmp_path) < moment and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert children.wait(pid) == signal.SIGKILL  # it was still at work
        now = identities(tmp_path)
        assert {name: now.get(name) for name in before} == before  # no finished cell was run again
        unfinished += len(journals(tmp_path))
        before = now
    assert unfinished  # some kills came in the middle of a cell
    assert 0 < len(before) < len(wanted(folder))

    torn = min((tmp_path / CELLS).glob("*.json"))  # as a disk that lost its end leaves it
    torn.write_bytes(torn.read_bytes()[:-200])
    del before[torn.name]
    assert children.wait(children.start(folder, tmp_path)) == 0
    now = identities(tmp_path)
    assert {name: now[name] for name in before} == before
    assert torn.with_name(f"{torn.name}.damaged-1").exists()
    assert {read_record(path)["status"] for path in (tmp_path / CELLS).glob("*.json")} == {"complete"}
    assert by_key(tmp_path) == by_key(undisturbed)
    assert len(now) == len(wanted(folder))
    assert not list((tmp_path / FOLDER).iterdir())

    left = group_folder(tmp_path, wanted(folder)[0]) / "00000.journal"  # by a kill between a record and this
    left.parent.mkdir()
    left.touch()
    assert children.wait(children.start(folder, tmp_path)) == 0  # and once more: there is nothing to do
    assert identities(tmp_path) == now
    assert not left.exists()


def test_two_processes_on_one_folder_share_its_cells(
    children: Children, folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    pids = [children.start(folder, tmp_path) for _ in range(2)]
    written: dict[str, tuple[int, int]] = {}
    patience = time.monotonic() + 60
    while len(written) < len(wanted(folder)) and time.monotonic() < patience:
        for name, identity in identities(tmp_path).items() if (tmp_path / CELLS).exists() else ():
            assert written.setdefault(name, identity) == identity  # written once
        time.sleep(0.002)
    assert [children.wait(pid) for pid in pids] == [0, 0]
    assert identities(tmp_path) == written
    assert by_key(tmp_path) == by_key(undisturbed)


def test_shards_in_two_folders_are_the_whole_once_merged(
    children: Children, folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    parts = [tmp_path / "one", tmp_path / "two"]
    for number, part in enumerate(parts, 1):
        assert children.wait(children.start(folder, part, "--shard", f"{number}/2")) == 0
        keys = {record["key"] for record in records(part)}
        assert keys == {cell_key(cell) for cell in shard(wanted(folder), number, 2)}
    merged = tmp_path / "merged"
    assert merge(parts, merged) == len(wanted(folder))
    assert by_key(merged) == by_key(undisturbed)
    assert merge([*parts, undisturbed], merged) == 0  # all are there, and say the same


def test_torchruns_processes_share_the_samples(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m",
        "rocketkv.cli.main", "eval", "run", "--model", str(folder), *FLAGS, "-o", str(tmp_path),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert by_key(tmp_path) == by_key(undisturbed)
    counted = re.findall(r"(\d+) cells done, \d+ were before", done.stderr)
    assert len(counted) == 2  # a process that starts late may find some, or all, done before
    assert sum(map(int, counted)) == len(wanted(folder))  # none was written twice
    assert done.stdout.count("niah_single_1") > 0  # one process says what came out, once all have ended


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


def test_a_cell_that_another_process_holds_is_left_to_it(children: Children, session: Session) -> None:
    first, second = made_cells()
    path = record_path(session.results, first)
    holder = children.hold(path)
    counts = run_cells(session, [first, second])
    assert counts == Counts(done=1, locked=1)
    assert str(counts) == "1 cells done, 0 were before, 1 locked by another process"
    assert finished(path) is None
    os.kill(holder, signal.SIGKILL)
    assert children.wait(holder) == signal.SIGKILL
    assert run_cells(session, [first, second]) == Counts(done=1, done_before=1)  # its hold has ended with it


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


def changed(record: Record, **fields: Any) -> Record:
    found: Any = json.loads(json.dumps(record)) | fields
    return found  # type: ignore[no-any-return]


def folder_of(path: Path, *made: Record) -> Path:
    for record in made:
        write_record(record_path(path, record["cell"]), record)
    return path


def test_merge_refuses_two_different_records_of_a_cell(tmp_path: Path) -> None:
    record = made_record([100.0, 0.0])
    one = folder_of(tmp_path / "one", record)
    later = changed(record, provenance=record["provenance"] | {"created": "2030-01-01T00:00:00+00:00"}, cost={})
    assert merge([one, folder_of(tmp_path / "same", later)], tmp_path / "merged") == 1
    different = {
        "score": changed(made_record([100.0, 100.0])),
        "prompt": made_record([100.0, 0.0], prompts={"0000": "another"}),
        "answer": made_record([100.0, 0.0], prediction="another"),
        "data": changed(record, data={"sha256": "0", "source": "another"}),
    }
    for name, other in different.items():
        target = tmp_path / f"{name} merged"
        with pytest.raises(ValueError, match=r"two records of the cell niah.* differ.*remove one of them"):
            merge([one, folder_of(tmp_path / name, other)], target)
        assert list(records(target)) == list(records(one))  # what was there stays


def test_merge_prefers_a_record_of_a_machine_with_enough_memory(tmp_path: Path) -> None:
    whole, short = made_record([100.0, 0.0]), made_record([100.0, 0.0], status="out_of_memory")
    for first, second in ((whole, short), (short, whole)):
        folders = [
            folder_of(tmp_path / first["status"] / name, record) for name, record in (("a", first), ("b", second))
        ]
        target = tmp_path / first["status"] / "merged"
        merge(folders, target)
        assert [record["status"] for record in records(target)] == ["complete"]


def test_merge_takes_no_damaged_record(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "one", made_record([100.0]))
    (path,) = (one / CELLS).iterdir()
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="is not a whole record"):
        merge([one], tmp_path / "merged")
    assert path.exists()  # it is not ours to move
    with pytest.raises(ValueError, match="is no folder of results: it has no folder cells"):
        merge([tmp_path / "none"], tmp_path / "merged")


def test_a_mean_cost_is_of_those_that_have_it() -> None:
    found = mean_cost(
        [
            {"kv_bytes": 10, "step_seconds": 1.0, "peak_decode_bytes": 5, "compression_seconds": None},
            {"kv_bytes": 20, "peak_decode_bytes": 7, "compression_seconds": None},
        ]
    )
    assert found == {"kv_bytes": 15, "step_seconds": 1.0, "peak_decode_bytes": 7, "compression_seconds": None}
    assert mean_cost([]) == {}
