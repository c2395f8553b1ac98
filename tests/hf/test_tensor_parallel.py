"""Tensor parallel: two processes that share a model's heads generate what a single one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rocketkv
from tiny import SETTINGS, TRANSFORMERS, build, greedy, prompt

CHILD = Path(__file__).parents[1] / "helpers" / "tensor_parallel_child.py"
FIELDS: list[dict[str, Any]] = [
    {**SETTINGS, "method": method, "token_budget": 24} for method in ("rocketkv", "rocketkv+", "rocketkv-mt")
]


@pytest.mark.integration
@pytest.mark.skipif(TRANSFORMERS < (5,), reason="older ones shard a model on GPUs only")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_two_processes_give_the_single_ones_tokens(tmp_path: Path) -> None:
    model, ids = build(num_attention_heads=8, num_key_value_heads=4), prompt(90)
    expected = {}
    for fields in FIELDS:
        with rocketkv.patch(model, **fields):
            expected[fields["method"]] = greedy(model, ids)[0].tolist()
    assert expected["rocketkv"] != greedy(model, ids)[0].tolist()
    model.save_pretrained(tmp_path / "even")
    build(hidden_size=96, num_attention_heads=6, num_key_value_heads=3).save_pretrained(tmp_path / "uneven")
    job = tmp_path / "job"
    folders = {name: str(tmp_path / name) for name in ("even", "uneven")}
    job.write_text(json.dumps({**folders, "ids": ids.tolist(), "settings": FIELDS}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(CHILD), str(job)], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = json.loads(Path(f"{job}.{rank}").read_text())
        assert found["tokens"] == expected
        assert found["heads"] == [2] * len(FIELDS), "a rank holds half of the KV heads"
        assert found["error"] == (
            "LlamaForCausalLM cannot be patched: tensor parallel cannot divide its 3 KV heads among 2 ranks; "
            "choose a number of ranks that divides 3"
        )
