"""templates.json: the texts of the installed lm-eval, from which they were copied, have not changed."""

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rocketkv.eval.records import digest
from rocketkv.eval.tasks.sources import templates

COPIED = {
    f"{benchmark}-{name}": entry["lm_eval_sha256"]
    for benchmark in ("longbench", "ruler")
    for name, entry in templates(benchmark).items()
}


def strings(path: Path) -> Iterator[str]:
    """Yield the strings of a YAML file or of a Python program, whose modules would download on import."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        yield from (event.value for event in yaml.parse(text) if isinstance(event, yaml.ScalarEvent))
    else:
        constants = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
        yield from (value for value in constants if isinstance(value, str))


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `eval`")
@pytest.mark.parametrize("hashes", COPIED.values(), ids=COPIED)
def test_lm_eval_still_has_the_texts_that_were_copied(hashes: dict[str, list[str]]) -> None:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    assert hashes
    for file, wanted in hashes.items():
        present = {hashlib.sha256(text.encode()).hexdigest() for text in strings(Path(spec.origin).parent / file)}
        assert set(wanted) <= present, f"lm-eval's {file} has changed: compare it with templates.json and NOTICE"


@pytest.mark.parametrize("entry", templates("scbench").values(), ids=templates("scbench"))
def test_templates_of_scbench_name_their_origin(entry: dict[str, Any]) -> None:
    texts = [entry["first"], "{pre_ans}\n\n" + entry["later"], entry["later"]]
    assert (digest(texts) == entry["official_sha256"]) == (entry["origin"] == "official")


def test_the_notice_lies_beside_the_templates() -> None:
    spec = importlib.util.find_spec("rocketkv.eval.tasks.sources")
    assert spec is not None
    assert spec.origin is not None
    notice = Path(spec.origin).with_name("NOTICE").read_text(encoding="utf-8")
    for name in ("LongBench", "RULER", "MIT", "Apache License", "lm-eval 0.4.13"):
        assert name in notice
