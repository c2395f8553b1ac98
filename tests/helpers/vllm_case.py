"""vLLM engines in the tests' own process, on tiny models, beside the same models in transformers."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import rocketkv
import tiny
from rocketkv.vllm.plugin import register

BLOCK = 32  # the CPU's kernels take multiples of it

# Small enough that a prompt of 200 tokens is evicted, selected from and re-evicted.
SETTINGS: dict[str, Any] = {"token_budget": 64, "decode_reserve": 16, "window_size": 16, "decode_capacity": 48}
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 3200,
    "block_size": BLOCK,
    "enforce_eager": True,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 400,
    "disable_log_stats": True,
}


def build(name: str, **fields: Any) -> Any:
    """Build a family's tiny model with heads that vLLM's CPU kernels take."""
    wide = {"head_dim": 32, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny.build(name, max_position_embeddings=8192, **{**wide, **fields})


def saved(name: str, folder: Path) -> Path:
    """Save a family's tiny model, or SmolLM2, to a folder and return it."""
    place = folder / name
    if not place.exists():
        if name == "smollm2":
            from rocketkv.hf.loading import load_smollm2

            model, tokenizer = load_smollm2()
            tokenizer.save_pretrained(place)
        else:
            model = build(name)
        model.save_pretrained(place)
    return place


def reference(model: Any, prompt: Sequence[int], new_tokens: int, settings: dict[str, Any]) -> list[int]:
    """Return the tokens that the library's Hugging Face path generates greedily."""
    ids = torch.tensor([list(prompt)])
    with rocketkv.patch(model, **settings), torch.inference_mode():
        return tiny.greedy(model, ids, new_tokens)[0][0].tolist()


class Engine:
    """An engine, with what tests ask of it."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.engine = llm, llm.llm_engine

    @property
    def scheduler(self) -> Any:
        return self.engine.engine_core.engine_core.scheduler

    @property
    def manager(self) -> Any:
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return next(manager for manager in managers if hasattr(manager, "free_rows"))

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def builder(self) -> Any:
        executor = self.engine.engine_core.engine_core.model_executor
        return executor.driver_worker.worker.model_runner.attn_groups[0][0].get_metadata_builder(0)

    @property
    def layers(self) -> dict[str, Any]:
        found: dict[str, Any] = self.engine.vllm_config.compilation_config.static_forward_context
        return found

    def prompt_blocks(self) -> dict[str, int]:
        """Return the real blocks that each request holds."""
        held = self.manager.req_to_blocks.items()
        return {request: sum(not block.is_null for block in blocks) for request, blocks in held}

    def params(self, new_tokens: int, **fields: Any) -> Any:
        from vllm import SamplingParams

        greedy = {"temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "detokenize": False}
        return SamplingParams(**{**greedy, **fields})

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, **fields: Any) -> list[list[int]]:
        """Generate greedily for all prompts at once."""
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(given, self.params(new_tokens, **fields), use_tqdm=False)
        return [list(completion.token_ids) for output in outputs for completion in output.outputs]

    def add(self, name: str, prompt: Sequence[int], new_tokens: int, **fields: Any) -> None:
        """Add a request that `step` serves."""
        self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, self.params(new_tokens, **fields))

    def run(self, tokens: dict[str, list[int]] | None = None) -> dict[str, list[int]]:
        """Step until no request is left, and return their tokens."""
        found = {} if tokens is None else tokens
        while self.engine.has_unfinished_requests():
            self.step(found)
        return found

    def step(self, tokens: dict[str, list[int]]) -> None:
        """Run one step, and note the tokens of each request so far."""
        for output in self.engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)

    def cached_tokens(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt a request finds in the prefix cache."""
        output = self.llm.generate([{"prompt_token_ids": list(prompt)}], self.params(1), use_tqdm=False)[0]
        return int(output.num_cached_tokens)


@contextlib.contextmanager
def serve(folder: Path, settings: dict[str, Any] | None, **arguments: Any) -> Iterator[Engine]:
    """Run an engine with the plugin's settings, or without any for None."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.attention import selector

    register()
    # vLLM keeps the backend that the process's first engine chose; the plugin refuses to serve two configurations.
    selector._cached_get_attn_backend.cache_clear()
    additional = {} if settings is None else {"additional_config": {"rocketkv": settings}}
    skip = not (folder / "tokenizer.json").exists()
    llm = None
    try:
        llm = LLM(str(folder), skip_tokenizer_init=skip, **{**ARGUMENTS, **additional, **arguments})
        yield Engine(llm)
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def sources() -> list[Path]:
    """Return the folders of the installed vLLM and of another one, such as the newest wheel's, unpacked."""
    import vllm

    other = os.environ.get("ROCKETKV_VLLM_SOURCES")
    return [Path(vllm.__file__).parent, *([Path(other)] if other else [])]


def environment() -> dict[str, str]:
    """Return the environment of an engine on a CPU without network."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
