"""Without settings the plugin is inert under any vLLM; with settings, one that it does not support is refused at start.

The newest release has no build for CPUs. Its own loaders run out of its wheel, which `make test-vllm-newest` unpacks
into the folder that ROCKETKV_VLLM_SOURCES names; only `vllm/__init__.py`, which loads a GPU's libraries, is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = os.environ.get("ROCKETKV_VLLM_SOURCES")
# A vLLM that shares nothing with those that are known, but for the place from which it is loaded.
STRANGE = {
    "vllm/__init__.py": "__version__ = '9.1.0'\n",
    "vllm/loader.py": """
import abc
from importlib.metadata import entry_points

class LogitsProcessor(abc.ABC):
    @classmethod
    def validate_params(cls, params): ...
    @abc.abstractmethod
    def surprise(self): ...

def load():
    (entry,) = (found for found in entry_points(group="vllm.logits_processors") if found.name == "rocketkv")
    found = entry.load()
    assert issubclass(found, LogitsProcessor)
    return found
""",
}
PROGRAM = """
import importlib, json, sys, types
from types import SimpleNamespace
root, version, loader, call, additional = sys.argv[1:]
package = types.ModuleType("vllm")
package.__path__, package.__version__ = [root + "/vllm"], version
sys.modules["vllm"] = package
found = getattr(importlib.import_module(loader), call)()
check = found[-1] if isinstance(found, list) else found
ours = [name for name in sys.modules if name.startswith("rocketkv.vllm.")]
from rocketkv.vllm.plugin import register
register(), register()
model = SimpleNamespace(is_attention_free=False)
config = SimpleNamespace(additional_config=json.loads(additional), model_config=model)
own = check(config, object())
logits = object()
assert own.apply(logits, object()) is logits and not own.add_request(0, None)
check.validate_params(SimpleNamespace(extra_args=None))
print(json.dumps(sorted(ours)))
"""
LOADER = ("vllm.v1.worker.gpu.sample.logits_processor.loader", "_load_v2_logitsprocs_plugins")
KNOWN_BY_PATH = ["rocketkv.vllm.requests", "rocketkv.vllm.settings", "rocketkv.vllm.versions"]


@pytest.fixture(params=["strange", "newest"])
def release(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ...]:
    """Return the folder of a vLLM, its version, and the module and function that load logits processors."""
    if request.param == "newest":
        if SOURCES is None:
            pytest.skip("needs the newest vLLM's wheel: make test-vllm-newest")
        (info,) = Path(SOURCES).parent.glob("vllm-*.dist-info")
        return str(Path(SOURCES).parent), info.name.removesuffix(".dist-info").removeprefix("vllm-"), *LOADER
    for name, text in STRANGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path), "9.1.0", "vllm.loader", "load"


def start(release: tuple[str, ...], additional: dict[str, object], **environment: str) -> tuple[int, str, str]:
    env = {name: value for name, value in os.environ.items() if name != "ROCKETKV_VLLM"} | environment
    command = [sys.executable, "-P", "-c", PROGRAM, *release, json.dumps(additional)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_without_settings_nothing_happens(release: tuple[str, ...]) -> None:
    code, out, err = start(release, {})
    assert code == 0, err
    assert json.loads(out.splitlines()[-1]) == KNOWN_BY_PATH


@pytest.mark.parametrize(
    ("additional", "environment"),
    [({"rocketkv": {"token_budget": 512}}, {}), ({}, {"ROCKETKV_VLLM": '{"token_budget": 512}'})],
    ids=["--additional-config", "ROCKETKV_VLLM"],
)
def test_with_settings_it_is_refused_in_a_sentence(
    release: tuple[str, ...], additional: dict[str, object], environment: dict[str, str]
) -> None:
    code, _, err = start(release, additional, **environment)
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last == (
        f"ValueError: rocketkv supports vLLM 0.32 and 0.33, got {release[1]}: install one of those (pip install "
        "'rocketkv[vllm]'), or leave rocketkv's settings out of --additional-config and ROCKETKV_VLLM"
    )
