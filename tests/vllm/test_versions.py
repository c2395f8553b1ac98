"""On a vLLM that the plugin does not support, its entry points change nothing; an engine with settings does not start.

Also on another vLLM, whose sources ROCKETKV_VLLM_SOURCES names, such as the newest (`make test-vllm-newest`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.v1.attention.backends import cpu_attn

import tiny
import vllm_case
from rocketkv.vllm.plugin import register

UNKNOWN = "0.99.0"
REFUSED = "rocketkv supports vLLM 0.32 and 0.33, got "

# Through vLLM's own loaders: what an engine asks of the plugin when it starts, and when a request comes.
DOORS = """
import json, sys
from types import SimpleNamespace
from unittest import mock
import vllm
from vllm import plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.sample.logits_processor import loader
from rocketkv.vllm import choice, versions
if sys.argv[1] != "{}" and versions.is_supported():
    vllm.__version__ = sys.argv[2]
model = SimpleNamespace(is_attention_free=False)
config = SimpleNamespace(model_config=model, additional_config=json.loads(sys.argv[1]))
choice.get_current_vllm_config_or_none = lambda: config
params = SimpleNamespace(extra_args=None)
doors = {
    "plugin": plugins.load_general_plugins,
    "backends": lambda: [backend.get_class() for backend in AttentionBackendEnum if backend.is_overridden()],
    "request": lambda: loader.build_custom_logits_processors_params_validator(None)(params),
    "worker": lambda: loader.build_custom_logits_processors(config, mock.Mock(), False),
}
for name, door in doors.items():
    try:
        found = door()
        print(json.dumps([name, [getattr(kind, "__module__", "") for kind in found or ()]]))
    except Exception as error:
        print(json.dumps([name, str(error)]))
"""


def doors(root: Path, additional_config: str, **environment: str) -> dict[str, Any]:
    """Return the modules of the classes that each loader of a vLLM finds, or its error."""
    path = os.pathsep.join(filter(None, [str(root.parent), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, **vllm_case.environment(), "PYTHONPATH": path, **environment}
    command = [sys.executable, "-P", "-c", DOORS, additional_config, UNKNOWN]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))


@pytest.mark.parametrize("root", vllm_case.sources(), ids=lambda path: path.parent.name)
def test_entry_points(root: Path) -> None:
    found = doors(root, "{}")
    assert found["plugin"] == found["request"] == []
    assert found["worker"] == ["rocketkv.vllm.requests"]
    assert found["backends"]
    assert all(module.startswith("vllm.") for module in found["backends"])
    found = doors(root, '{"rocketkv": {}}')
    assert found["plugin"] == found["request"] == []
    assert all(found[name].startswith(REFUSED) for name in ("backends", "worker"))
    found = doors(root, '{"another": 1}', ROCKETKV_VLLM="{}")
    assert found["plugin"].startswith(REFUSED)


def test_engines_of_an_unknown_version(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = vllm_case.saved("llama", models)
    monkeypatch.setattr(vllm, "__version__", UNKNOWN)
    with vllm_case.serve(folder, None) as engine:
        assert type(engine.builder) is cpu_attn.CPUAttentionMetadataBuilder
        assert len(engine.generate([tiny.prompt(200, seed=5)[0].tolist()], 4)[0]) == 4
    with pytest.raises(ValueError, match=f"{REFUSED}{UNKNOWN}: install"), vllm_case.serve(folder, vllm_case.SETTINGS):
        pass


def test_a_registry_that_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    with pytest.raises(ImportError):
        register()
    monkeypatch.setattr(vllm, "__version__", UNKNOWN)
    register()
