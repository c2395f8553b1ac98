"""An engine without settings is vLLM's own; one that cannot be served does not start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from vllm.exceptions import VLLMValidationError
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.kv_cache_interface import FullAttentionSpec

import tiny
import vllm_case
from rocketkv.vllm.backend import _take_from_space
from rocketkv.vllm.builder import _check_full_attention


def test_without_settings_nothing_changes(models: Path) -> None:
    folder = vllm_case.saved("llama", models)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tiny.prompt(200, seed=5)
    with vllm_case.serve(folder, None) as engine:
        assert type(engine.builder) is cpu_attn.CPUAttentionMetadataBuilder
        for layer in engine.layers.values():
            assert layer.get_attn_backend() is cpu_attn.CPUAttentionBackend
            assert type(layer.impl) is cpu_attn.CPUAttentionBackendImpl
        config = engine.scheduler.kv_cache_config
        assert [type(group.kv_cache_spec) for group in config.kv_cache_groups] == [FullAttentionSpec]
        assert engine.engine.vllm_config.cache_config.kv_cache_memory_bytes == 2**30
        assert engine.generate([ids[0].tolist()], 12)[0] == tiny.greedy(model, ids, 12)[0][0].tolist()


ENGINE = """
import importlib.metadata as metadata, json, sys
found = metadata.entry_points
others = lambda points: metadata.EntryPoints(point for point in points if point.name != "rocketkv")
if sys.argv[1] == "without":
    metadata.entry_points = lambda **of: others(found(**of)) if of else found()
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[2], skip_tokenizer_init=True, **json.loads(sys.argv[3]))
params = SamplingParams(temperature=1, seed=3, max_tokens=12, ignore_eos=True, detokenize=False)
tokens = llm.generate([{"prompt_token_ids": json.loads(sys.argv[4])}], params, use_tqdm=False)[0].outputs[0].token_ids
config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
print(json.dumps([list(tokens), config.num_blocks, [tensor.size for tensor in config.kv_cache_tensors]]))
print(json.dumps([name.removeprefix("rocketkv") for name in sys.modules if name.startswith("rocketkv")]))
"""


def test_without_settings_an_engine_is_one_without_the_plugin(models: Path) -> None:
    """Of processes that find the plugin, and that do not: sampled tokens and the memory for caches are the same."""
    folder, ids = vllm_case.saved("llama", models), tiny.prompt(200, seed=5)[0].tolist()
    arguments = {**vllm_case.ARGUMENTS, "num_gpu_blocks_override": None}
    environment = {**os.environ, **vllm_case.environment()}
    running = []
    for kind in ("with", "without"):
        command = [sys.executable, "-P", "-c", ENGINE, kind, str(folder), json.dumps(arguments), json.dumps(ids)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    printed = []
    for process in running:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        printed.append([json.loads(line) for line in out.splitlines()[-2:]])
    assert printed[0][0] == printed[1][0]
    light = {"", *("._version", ".budget", ".config", ".vllm")}
    assert set(printed[0][1]) == light | {
        f".vllm.{name}" for name in ("choice", "plugin", "requests", "settings", "versions")
    }
    assert not printed[1][1]


def test_models_without_full_attention_are_refused() -> None:
    windowed = SimpleNamespace(impl=SimpleNamespace(slab=None))
    layers = {"model.layers.0.attn": windowed, "model.layers.1.mixer": SimpleNamespace()}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    with pytest.raises(ValueError, match="does not support models without full attention"):
        _check_full_attention(config)
    windowed.impl.slab = object()
    _check_full_attention(config)


def test_the_slab_is_part_of_the_space_for_caches(models: Path) -> None:
    folder = vllm_case.saved("llama", models)
    with vllm_case.serve(folder, vllm_case.SETTINGS, num_gpu_blocks_override=None) as engine:
        slab = sum(layer.impl.slab.nbytes for layer in engine.layers.values())
        pool = sum(layer.kv_cache.nbytes for layer in engine.layers.values())
        assert 0 <= 2**30 - slab - pool < pool // engine.scheduler.kv_cache_config.num_blocks
    with pytest.raises(ValueError, match="leaves none for prompts; lower max_sequences"):
        _take_from_space(SimpleNamespace(kv_cache_memory_bytes=slab), slab)


def test_requests_wait_for_a_row_and_have_no_settings(models: Path) -> None:
    folder = vllm_case.saved("llama", models)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    given = [tiny.prompt(100 + i, seed=i)[0].tolist() for i in range(5)]
    with vllm_case.serve(folder, {**vllm_case.SETTINGS, "max_sequences": 2}) as engine:
        with pytest.raises(VLLMValidationError, match="a request cannot carry settings of its own"):
            engine.generate(given[:1], 4, extra_args={"rocketkv": {"token_budget": 128}})
        for i, ids in enumerate(given):
            engine.add(f"r{i}", ids, 10 + i)
        tokens: dict[str, list[int]] = {}
        while engine.engine.has_unfinished_requests():
            engine.step(tokens)
            assert len(engine.scheduler.running) <= 2
        assert not engine.manager.rows
    for i, ids in enumerate(given):
        assert tokens[f"r{i}"] == vllm_case.reference(model, ids, 10 + i, vllm_case.SETTINGS)


def test_speculative_decoding_is_refused(models: Path) -> None:
    """In a process of its own: the drafter imports Numba, after which vLLM 0.32 starts no engine in a process."""
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    folder = str(vllm_case.saved("llama", models))
    given = f"Path({folder!r}), {vllm_case.SETTINGS!r}, speculative_config={drafts!r}"
    code = f"import vllm_case; from pathlib import Path; vllm_case.serve({given}).__enter__()"
    path = os.pathsep.join([str(Path(vllm_case.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **vllm_case.environment(), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ValueError: rocketkv does not support speculative decoding: leave out" in done.stderr


@pytest.mark.real_model
@pytest.mark.parametrize(("method", "chunk"), [("rocketkv", 128), ("rocketkv+", 8192)])
def test_smollm2(method: str, chunk: int, models: Path) -> None:
    folder = vllm_case.saved("smollm2", models)
    settings = {"token_budget": 256, "decode_capacity": 64, "method": method}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = " ".join(f"The code of box {i} is {i * i % 97}." for i in range(400))
    ids = tokenizer(text)["input_ids"]
    given = [ids[:37], ids[:900], [*ids[:2990], *tokenizer(" The code of box 17 is")["input_ids"]]]
    expected = [vllm_case.reference(model, prompt, 16, settings) for prompt in given]
    with vllm_case.serve(folder, settings, max_num_batched_tokens=chunk) as engine:
        assert engine.generate(given, 16) == expected
        if chunk == 128:
            assert engine.cached_tokens(given[2]) >= 2900
