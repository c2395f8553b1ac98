"""Records of several folders in one, and costs of several generations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from made_records import made_record
from rocketkv.eval.records import CELLS, Record, record_path, records, write_record
from rocketkv.eval.sweep.cells import mean_cost
from rocketkv.eval.sweep.run import merge


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
