"""A sweep survives what happens to its processes: kills, neighbours, shards, a disk that is full."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval_case import know_tasks, made_cells, made_task, make_session, save
from eval_children import FLAGS, Children, by_key, identities, journals, progress, wanted
from rocketkv.eval.records import CELLS, cell_key, finished, label, read_record, record_path, records
from rocketkv.eval.report.write import write_report
from rocketkv.eval.sweep.plan import shard
from rocketkv.eval.sweep.run import Counts, merge, run_cells
from rocketkv.eval.sweep.units import FOLDER, group_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


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


def report(results: Path) -> str:
    """Write the report of a folder of results and return the page."""
    path = results / "report.html"
    write_report(results, path)
    return path.read_text(encoding="utf-8")


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
        patience = time.monotonic() + 300
        while progress(tmp_path) < moment and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert children.wait(pid) == signal.SIGKILL  # it was still at work
        now = identities(tmp_path)
        assert {name: now.get(name) for name in before} == before  # no finished cell was run again
        unfinished += len(journals(tmp_path))
        before = now
    page = report(tmp_path)
    missing = {f"{cell['task']}, {label(cell)}, {cell['length']} tokens" for cell in wanted(folder)}
    missing -= {f"{r['cell']['task']}, {label(r['cell'])}, {r['cell']['length']} tokens" for r in records(tmp_path)}
    assert len(missing) == len(wanted(folder)) - len(before)
    assert all(f"<li>{name}, query-aware</li>" in page for name in missing)
    assert unfinished  # some kills came in the middle of a cell
    assert 0 < len(before) < len(wanted(folder))

    torn = min((tmp_path / CELLS).glob("*.json"))  # as a disk that lost its end leaves it
    torn.write_bytes(torn.read_bytes()[:-200])
    assert f"{torn.name} is not a whole record" in report(tmp_path)
    del before[torn.name]
    assert children.wait(children.start(folder, tmp_path)) == 0
    now = identities(tmp_path)
    assert {name: now[name] for name in before} == before
    assert torn.with_name(f"{torn.name}.damaged-1").exists()
    page = report(tmp_path)
    assert f"made again: {torn.name}.damaged-1." in page
    assert 'id="failures"' not in page
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


def test_a_disk_that_is_full_anywhere_ends_a_sweep_and_loses_nothing(
    children: Children, folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    done: list[int] = []
    # No file may have more bytes: samples, the list of cells and the full cache's predictions are too large in turn.
    for limit, code in ((2100, 2), (4300, 2), (40_000, 2), (0, 0)):
        assert children.wait(children.start(folder, tmp_path, limit=limit)) == code << 8
        done.append(len(list((tmp_path / CELLS).glob("*.json"))))
        if limit == 40_000:
            assert "asked for, but without a record" in report(tmp_path)
    assert done == [0, 0, 6, len(wanted(folder))]
    assert not list((tmp_path / FOLDER).iterdir())
    assert by_key(tmp_path) == by_key(undisturbed)


def test_two_processes_on_one_folder_share_its_cells(
    children: Children, folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    pids = [children.start(folder, tmp_path) for _ in range(2)]
    written: dict[str, tuple[int, int]] = {}
    patience = time.monotonic() + 300
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
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert by_key(tmp_path) == by_key(undisturbed)
    counted = re.findall(r"(\d+) cells done, \d+ were before", done.stderr)
    assert len(counted) == 2  # a process that starts late may find some, or all, done before
    assert sum(map(int, counted)) == len(wanted(folder))  # none was written twice
    assert done.stdout.count("niah_single_1") > 0  # one process says what came out, once all have ended


def test_a_cell_that_another_process_holds_is_left_to_it(
    children: Children, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know_tasks(monkeypatch, made_task(turns=2))
    session = make_session(folder, tmp_path)
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
