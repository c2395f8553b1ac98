"""The demo runs from the command line, on the real model, and says what it did."""

import json
from pathlib import Path

import pytest

from eval_case import save
from rocketkv.cli.main import main


@pytest.mark.real_model
def test_json_has_every_arm_beside_the_full_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--context", "1500", "--budgets", "128", "--new-tokens", "8", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    document = json.loads(printed.out)
    full, compressed, streaming = document["arms"]
    assert [arm["arm"] for arm in document["arms"]] == ["full cache", "rocketkv+ 128", "streaming 128"]
    assert full["right"]
    assert compressed["right"]
    assert not streaming["right"]
    assert full["kv_ratio"] == full["speedup"] == 1
    assert 1 < compressed["kv_ratio"] < streaming["kv_ratio"]


def test_table_is_printed_and_progress_is_quiet_when_piped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--model", str(save(tmp_path)), "--method", "snapkv"]
    capsys.readouterr()  # what saving says
    assert main(["demo", "--context", "600", "--budgets", "96", "--new-tokens", "4", *own]) == 0
    printed = capsys.readouterr()
    assert "snapkv 96" in printed.out
    assert "reading" not in printed.err  # the bar over a folder's weights is that of transformers


def test_bad_budgets_are_refused_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--budgets", "many"])
    assert "--budgets: must be an integer of at least 1, got 'many'" in capsys.readouterr().err
    assert main(["demo", "--budgets", "1"]) == 2
    assert "token_budget must be at least 35" in capsys.readouterr().err
