"""What the package offers, and what importing it does not do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import rocketkv

pytestmark = pytest.mark.integration

NAMES = {"BudgetSplit", "CacheStats", "METHODS", "PatchHandle", "RocketKVCache", "RocketKVConfig", "patch", "unpatch"}
NAMES |= {
    "Audit",
    "Method",
    "StepReport",
    "Trace",
    "load_cache",
    "load_inputs",
    "plan",
    "register_method",
    "save_cache",
}
METHODS = {
    *("full", "rocketkv", "rocketkv+", "rocketkv-mt", "rocketkv-mt+", "snapkv", "quest", "sparq"),
    *("streaming", "exact-topk", "stored-topk"),
}
IMPORTING = """
import json, sys
import torch

modules, threads, generator = set(sys.modules), torch.get_num_threads(), torch.get_rng_state()
import rocketkv
parts = "budget config core.attention core.eviction core.pages dispatch state.snapshot state.stats state.store"
for part in parts.split():
    __import__("rocketkv." + part)
assert rocketkv.BudgetSplit(token_budget=1) and rocketkv.METHODS and rocketkv.RocketKVConfig()
own = set(sys.modules) - modules
import transformers
from transformers import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

functions = dict(ALL_ATTENTION_FUNCTIONS.items())
masks = dict(AttentionMaskInterface().items())
modules = set(sys.modules)
for name in dir(rocketkv):
    getattr(rocketkv, name)
print(json.dumps({
    "parts": sorted(own),
    "modules": sorted(own | (set(sys.modules) - modules)),
    "functions": functions == dict(ALL_ATTENTION_FUNCTIONS.items()) and "rocketkv" not in functions,
    "masks": masks == dict(AttentionMaskInterface().items()) and "rocketkv" not in masks,
    "threads": threads == torch.get_num_threads(),
    "generator": bool(torch.equal(generator, torch.get_rng_state())),
}))
"""


def run(code: str) -> str:
    # Isolated from the folder that this happens to run in, as an installed package is.
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_exports() -> None:
    assert set(rocketkv.__all__) == NAMES | {"__version__"}
    assert set(dir(rocketkv)) == set(rocketkv.__all__)
    for name in NAMES - {"METHODS"}:
        assert getattr(rocketkv, name).__doc__
    assert set(rocketkv.METHODS) == METHODS
    with pytest.raises(AttributeError, match="has no attribute 'patches'"):
        rocketkv.patches  # noqa: B018  # asking is the test


def test_importing_does_nothing_else_and_parts_do_not_need_transformers() -> None:
    found = json.loads(run(IMPORTING))
    assert "rocketkv.state.store" in found["parts"]
    assert "transformers" not in found["parts"]
    assert found["functions"]
    assert found["masks"]
    assert found["threads"]
    assert found["generator"]
    assert "rocketkv.hf.patch" in found["modules"]
    tops = {name.partition(".")[0] for name in found["modules"]}
    assert tops.isdisjoint({"kernels", "eval", "tests", "triton", "peft", "accelerate", "gguf"})
    assert not [name for name in found["modules"] if name.startswith("rocketkv.eval")]
