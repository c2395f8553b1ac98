"""Records are whole or absent, a cell has one key, journals survive a kill, and samples are prepared once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval_case import made_task, sample, tokenizer
from made_records import made_record
from rocketkv.eval.journal import Journal
from rocketkv.eval.records import (
    SCHEMA,
    CellDict,
    Record,
    cell_key,
    digest,
    finished,
    label,
    quarantine,
    read_record,
    record_path,
    records,
    write_atomically,
    write_record,
)
from rocketkv.eval.sweep.samples import prepare
from rocketkv.eval.tasks.base import Preparation, Sample, Task, Turn

CELL: CellDict = {
    "task": "niah_single_1",
    "task_version": 1,
    "method": "rocketkv",
    "token_budget": 512,
    "length": 4096,
    "mode": "aware",
    "chat": True,
    "samples": 50,
    "max_new_tokens": None,
    "seed": 0,
    "model": "smollm2",
    "revision": None,
    "dtype": "float32",
    "attention": "sdpa",
    "chat_arguments": {},
    "thinking_tokens": 0,
    "sampling": {},
    "answers": 1,
    "batch_size": 1,
    "weights": "0e9e39f2",
    "library": "0.1.0",
    "settings": {},
}
# Every record on users' disks is found by its key: one that changes makes them all be run again.
CELL_TEXT = (
    '{"answers":1,"attention":"sdpa","batch_size":1,"chat":true,"chat_arguments":{},"dtype":"float32",'
    '"length":4096,"library":"0.1.0","max_new_tokens":null,"method":"rocketkv",'
    '"mode":"aware","model":"smollm2","revision":null,"samples":50,"sampling":{},"seed":0,"settings":{},'
    '"task":"niah_single_1","task_version":1,"thinking_tokens":0,"token_budget":512,"weights":"0e9e39f2"}'
)
KEY = "b2c6d5148734ee9f"
CHANGES: dict[str, Any] = {
    "task": "niah_single_2",
    "task_version": 2,
    "method": "quest",
    "token_budget": 513,
    "length": None,
    "mode": "agnostic",
    "chat": False,
    "samples": 51,
    "max_new_tokens": 50,
    "seed": 1,
    "model": "smollm",
    "revision": "main",
    "dtype": "bfloat16",
    "attention": "eager",
    "chat_arguments": {"enable_thinking": False},
    "thinking_tokens": 1,
    "sampling": {"do_sample": True},
    "answers": 2,
    "batch_size": 2,
    "weights": "1e9e39f2",
    "library": "0.2.0",
    "settings": {"window_size": 16},
}


def changed(**fields: Any) -> CellDict:
    cell: Any = CELL | fields
    return cell  # type: ignore[no-any-return]


def test_a_cell_has_the_key_it_always_had() -> None:
    assert hashlib.sha256(CELL_TEXT.encode()).hexdigest()[:16] == KEY  # worked out without our code
    assert cell_key(CELL) == KEY
    assert cell_key(changed(**dict(reversed(CELL.items())))) == KEY
    assert record_path(Path("r"), CELL) == Path(f"r/cells/niah_single_1-4096-rocketkv-512-aware-{KEY}.json")


def test_every_field_of_a_cell_is_in_its_key() -> None:
    assert set(CHANGES) == set(CELL) == set(CellDict.__annotations__)
    keys = {cell_key(changed(**{name: value})) for name, value in CHANGES.items()}
    assert len(keys | {KEY}) == len(CHANGES) + 1


def test_a_path_has_no_separator_whatever_a_cell_is_called() -> None:
    cell = changed(task="lm-eval:a/b", method="my.module:make it", token_budget=7, length=None)
    path = record_path(Path("r"), cell)
    assert path.parent == Path("r/cells")
    assert path.name == f"lm-eval_a_b-my.module_make_it-7-aware-{cell_key(cell)}.json"
    assert (label(cell), label(changed(method="full", token_budget=None))) == ("my.module:make it 7", "full")


def test_a_record_reads_back(tmp_path: Path) -> None:
    record = made_record([100.0, 0.0], prediction="café \u2028 \U0001f680")
    path = record_path(tmp_path, record["cell"])
    write_record(path, record)
    found = read_record(path)
    whole = json.loads(path.read_text(encoding="utf-8"))
    canonical = json.dumps(whole | {"checksum": ""}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert found["checksum"] == hashlib.sha256(canonical.encode()).hexdigest()
    assert found == record | {"checksum": found["checksum"]}
    assert list(records(tmp_path)) == [found]
    assert finished(path) == found
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("moment", ["written", "on the disk", "renamed"])
def test_a_crash_while_a_record_is_written_leaves_the_old_one(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = made_record([100.0]), made_record([0.0])
    path = record_path(tmp_path, old["cell"])
    assert path == record_path(tmp_path, new["cell"])
    write_record(path, old)

    def crash(*_: Any) -> None:
        raise OSError("no space left on the device")

    def half(*_: Any, **__: Any) -> str:
        return '{"schema": 1, "key": "0'

    with monkeypatch.context() as patched:
        if moment == "written":
            patched.setattr(json, "dumps", half)
            patched.setattr("rocketkv.eval.records.digest", lambda _: "")
        patched.setattr(
            *{"written": (os, "fsync"), "on the disk": (os, "fsync"), "renamed": (Path, "replace")}[moment], crash
        )
        with pytest.raises(OSError, match="no space"):
            write_record(path, new)
    assert read_record(path)["score"] == 100.0
    assert os.listdir(path.parent) == [path.name]  # nothing half-written stays
    write_record(path, new)
    assert read_record(path)["score"] == 0.0


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, order = tmp_path / "a" / "b.txt", []
    replace = Path.replace

    def synced(_: int) -> None:
        order.append("synced")

    def renamed(self: Path, target: Path) -> Path:
        order.append(f"renamed {self.read_text()}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomically(path, "whole")
    assert order == ["synced", "renamed whole"]


def damaged(text: str, how: str) -> str:
    record = json.loads(text)
    return {
        "empty": "",
        "truncated": text[: len(text) // 2],
        "last byte": text[:-3],
        "no object": "[1]",
        "edited": json.dumps(record | {"score": 99.0}),
        "another schema": json.dumps(record | {"schema": SCHEMA + 1}),
        "no checksum": json.dumps({name: value for name, value in record.items() if name != "checksum"}),
        "not a number": text.replace('"score": 50.0', '"score": NaN', 1),
    }[how]


@pytest.mark.parametrize(
    "how",
    ["empty", "truncated", "last byte", "no object", "edited", "another schema", "no checksum", "not a number"],
)
def test_a_damaged_record_is_told_and_quarantined(how: str, tmp_path: Path) -> None:
    record = made_record([100.0, 0.0])
    path = record_path(tmp_path, record["cell"])
    write_record(path, record)
    text = damaged(path.read_text(encoding="utf-8"), how)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=path.name):
        read_record(path)
    with pytest.raises(ValueError, match=path.name):
        list(records(tmp_path))
    assert finished(path) is None
    assert not path.exists()
    assert path.with_name(f"{path.name}.damaged-1").read_text(encoding="utf-8") == text
    assert finished(path) is None  # and now there is none
    assert list(records(tmp_path)) == []


def test_a_record_that_is_not_utf8_is_damaged(tmp_path: Path) -> None:
    path = record_path(tmp_path, CELL)
    path.parent.mkdir()
    path.write_bytes(b'{"schema": 1, \xff')
    assert finished(path) is None
    assert path.with_name(f"{path.name}.damaged-1").exists()


def test_a_record_under_the_key_of_another_cell_is_refused(tmp_path: Path) -> None:
    record: Record = made_record([100.0])
    path = record_path(tmp_path, record["cell"])
    write_record(path, record | {"key": KEY})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another cell's key"):
        read_record(path)


def test_what_is_quarantined_does_not_push_out_what_was_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for number in (1, 2, 3):
        path.write_text(str(number), encoding="utf-8")
        assert quarantine(path).name == f"a.json.damaged-{number}"
    assert sorted(found.read_text() for found in tmp_path.iterdir()) == ["1", "2", "3"]


def test_a_record_that_another_process_has_quarantined_is_simply_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("{", encoding="utf-8")
    exists = Path.exists

    def while_looking(self: Path, **_: Any) -> bool:
        path.unlink(missing_ok=True)
        return exists(self)

    monkeypatch.setattr(Path, "exists", while_looking)
    assert finished(path) is None


def test_a_digest_is_of_the_text_or_of_the_one_json() -> None:
    assert digest("abc") == hashlib.sha256(b"abc").hexdigest()
    assert digest({"b": [1, None], "a": "é"}) == hashlib.sha256('{"a":"é","b":[1,null]}'.encode()).hexdigest()
    with pytest.raises(ValueError, match="JSON compliant"):
        digest([float("nan")])


def test_a_journal_keeps_what_was_put_into_it(tmp_path: Path) -> None:
    path = tmp_path / "cells" / "a.journal"
    journal = Journal(path)
    assert (len(journal), journal.get("a")) == (0, None)
    journal.put("a", {"text": "two\nlines \u2028 \x85"})
    journal.put("b", [1.5])
    again = Journal(path)
    assert (len(again), again.get("a"), again.get("b")) == (2, {"text": "two\nlines \u2028 \x85"}, [1.5])
    again.remove()
    again.remove()
    assert not path.exists()


def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    lines = [json.dumps([key, {"answer": f"é {key}"}], ensure_ascii=False).encode() + b"\n" for key in ("a", "b", "c")]
    content = b"".join(lines)
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        journal = Journal(path)
        whole = content[:cut].count(b"\n")
        assert len(journal) == whole
        journal.put("d", cut)
        again = Journal(path)
        assert (len(again), again.get("d")) == (whole + 1, cut)
        assert again.get("a") == (None if whole == 0 else {"answer": "é a"})


def preparation(**fields: Any) -> Preparation:
    known: dict[str, Any] = {"tokenizer": tokenizer(), "length": 40, "count": 3}
    return Preparation(**known | fields)


def counted(task: Task) -> tuple[Task, list[Preparation]]:
    """Return a task that notes when its samples are made."""
    asked: list[Preparation] = []

    def samples(given: Preparation) -> Sequence[Sample]:
        asked.append(given)
        return task.samples(given)

    return dataclasses.replace(task, samples=samples), asked


def test_samples_are_prepared_once(tmp_path: Path) -> None:
    task, asked = counted(made_task(turns=2))
    first = prepare(tmp_path, task, preparation())
    second = prepare(tmp_path, task, preparation())
    assert len(asked) == 1
    assert first == second
    assert first.samples == [sample(number, turns=2, length=40) for number in range(3)]
    (path,) = (tmp_path / "data").iterdir()
    checksum, _, body = path.read_text(encoding="utf-8").partition("\n")
    assert first.data == {"sha256": checksum, "source": "made up"}
    assert checksum == hashlib.sha256(body.encode()).hexdigest()


@pytest.mark.parametrize(
    "fields",
    [
        {"length": 41},
        {"count": 2},
        {"seed": 1},
        {"chat": True},
        {"max_length": 4096},
        {"tokenizer": tokenizer(chat=False)},
        {"data_dir": Path(__file__).parents[1] / "golden"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_samples_for_something_else_are_others(fields: dict[str, Any], tmp_path: Path) -> None:
    task, asked = counted(made_task())
    prepare(tmp_path, task, preparation())
    prepare(tmp_path, task, preparation(**fields))
    prepare(tmp_path, dataclasses.replace(task, version=2), preparation())
    assert len(asked) == 3


def test_samples_are_made_anew_when_their_files_change(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.jsonl").write_text("1", encoding="utf-8")
    task, asked = counted(made_task())
    for _ in range(2):
        prepare(tmp_path, task, preparation(data_dir=folder))
    (folder / "a.jsonl").write_text("12", encoding="utf-8")
    prepare(tmp_path, task, preparation(data_dir=folder))
    assert len(asked) == 2


@pytest.mark.parametrize("how", ["truncated", "edited", "empty", "not text"])
def test_damaged_samples_are_quarantined_and_made_anew(how: str, tmp_path: Path) -> None:
    task, asked = counted(made_task())
    first = prepare(tmp_path, task, preparation())
    (path,) = (tmp_path / "data").iterdir()
    content = path.read_bytes()
    broken = {
        "truncated": content[:-5],
        "edited": content.replace(b"number", b"nunber", 1),
        "empty": b"",
        "not text": content.replace(b"the", b"\xff\xfe", 1),
    }[how]
    path.write_bytes(broken)
    assert prepare(tmp_path, task, preparation()) == first
    assert len(asked) == 2
    assert path.read_bytes() == content
    assert path.with_name(f"{path.name}.damaged-1").read_bytes() == broken


def test_samples_may_have_any_text(tmp_path: Path) -> None:
    # What `str.splitlines` takes for the end of a line, and JSON leaves in it.
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh\ri \U0001f680"
    turn = Turn(question=text, answers=(text,), max_new_tokens=1, extra={"options": [text]})
    made = Sample(id="a", context=text, turns=(turn,), notes={"depth": 0.5})
    task = made_task(samples=lambda _: [made])
    assert prepare(tmp_path, task, preparation()).samples == [made]
    assert prepare(tmp_path, task, preparation()).samples == [made]


def test_a_task_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'made' has no samples for length 40"):
        prepare(tmp_path, made_task(samples=lambda _: []), preparation())
    assert not (tmp_path / "data").exists()
