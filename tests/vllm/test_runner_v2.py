"""Model runner V2's way, which no CPU runs: made-up metadata, the kernels in Triton's interpreter, and signatures."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

import vllm_case
from rocketkv.core.params import AttentionParams
from rocketkv.dispatch import Workspaces
from rocketkv.vllm.blocks import plain_order, read_packed
from rocketkv.vllm.metadata import RequestTable
from rocketkv.vllm.settings import parse
from rocketkv.vllm.sizes import LayerShape
from rocketkv.vllm.slab import LayerSlab, decode_row
from rocketkv.vllm.steps import flat_tokens, prompts_of, step_rows

BLOCK, HEADS, KV_HEADS, DIM, LONGEST = 16, 4, 2, 32, 256
PARAMS = AttentionParams(DIM**-0.5, None, None)
SETTINGS = {"token_budget": 32, "decode_reserve": 16, "window_size": 8, "decode_capacity": 16}


def step(chunks: list[tuple[int, int, int, bool]], tables: torch.Tensor) -> CommonAttentionMetadata:
    """Return V2's metadata of a step; a chunk is row of the request table, start, stop and whether it is a prompt's."""
    lengths = [stop - start for _, start, stop, _ in chunks]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    stops = torch.tensor([stop for _, _, stop, _ in chunks]).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=stops,
        seq_lens_cpu_upper_bound=stops,
        num_reqs=len(chunks),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=int(stops.max()),
        block_table_tensor=tables[[row for row, *_ in chunks]],
        slot_mapping=torch.arange(sum(lengths)),
        is_prefilling=torch.tensor([prompt for *_, prompt in chunks]),
        req_idx=np.array([row for row, *_ in chunks]),
    )


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+"])
def test_made_up_steps_on_the_kernels(method: str) -> None:
    """Two prompts in chunks, then decode steps: with the kernels as with PyTorch."""
    shape = LayerShape(HEADS, KV_HEADS, DIM, DIM, torch.float32)
    lengths = {2: 70, 0: 45}
    query, key, value = (torch.randn(2, 80, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    tables = torch.arange(24).view(3, 8).flip(1).int()
    cache = torch.zeros(24, KV_HEADS, BLOCK, 2 * DIM)
    for number, (row, length) in enumerate(lengths.items()):
        for token in range(length):
            place = cache[tables[row, token // BLOCK], :, token % BLOCK]
            place[:] = torch.cat((key[number, token], value[number, token]), -1)
    steps = [
        [(2, 0, 40, True)],
        [(2, 40, 70, True), (0, 0, 20, True)],
        [(2, 70, 71, False), (0, 20, 45, True)],
        [(2, 71, 72, False), (0, 45, 46, False)],
        [(0, 46, 47, False), (2, 72, 73, False)],
    ]
    found: dict[str, list[torch.Tensor]] = {}
    for backend in ("torch", "triton"):
        config = parse({**SETTINGS, "method": method, "backend": backend}).config
        slab = LayerSlab([config], shape, rows=3, max_prompt=LONGEST, device=torch.device("cpu"))
        table, shared, out = RequestTable(3), Workspaces(), found.setdefault(backend, [])
        for chunks in steps:
            common = step(chunks, tables)
            rows = step_rows(common, BLOCK, LONGEST)
            plan = table.plan(rows)
            for closing in plan.closings:
                blocks = common.block_table_tensor[closing.place, : -(-closing.tokens // BLOCK)]
                parts = read_packed(cache, blocks, closing.tokens, plain_order(BLOCK, DIM))
                queries = closing.prompt.queries["layer"]
                assert queries.shape[2] == config.window_size
                closing.sequence.stores["layer"] = slab.close(
                    closing.sequence.row, config, *parts, queries, PARAMS, shared
                )
            numbers = {row: number for number, row in enumerate(lengths)}
            flat = [
                torch.cat([tensor[numbers[row], start:stop] for row, start, stop, _ in chunks])
                for tensor in (query, key, value)
            ]
            for first, last, prompt in plan.chunks:
                prompt.remember("layer", flat[0][first:last], config.window_size)
            for token, sequence in plan.decodes:
                new = [tensor[token : token + 1] for tensor in flat]
                out.append(decode_row(sequence.stores["layer"], config, *new, PARAMS, shared))
            prompts = [row for row in rows if row.prefilling]
            if 0 < len(prompts) < len(rows):
                tokens = flat_tokens(prompts, torch.device("cpu"))
                part = prompts_of(common, prompts, tokens)
                assert part.num_actual_tokens == 25
                assert part.seq_lens.tolist() == [45]
                assert part.req_idx.tolist() == [0]
                assert torch.equal(part.slot_mapping, common.slot_mapping[1:])
    assert len(found["torch"]) == 5
    for own, reference in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)


# What the plugin overrides or calls, and the arguments that it relies on.
USED: list[tuple[str, str, str, set[str]]] = [
    (
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager",
        "get_num_blocks_to_allocate",
        {"request_id", "num_tokens", "apply_admission_cap"},
    ),
    (
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager",
        "allocate_new_blocks",
        {"request_id", "num_tokens", "num_tokens_main_model"},
    ),
    (
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager",
        "remove_skipped_blocks",
        {"request_id", "processed_computed_tokens", "num_prompt_tokens"},
    ),
    (
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager",
        "_remove_blocks_in_range",
        {"request_id", "first_block", "last_block"},
    ),
    ("v1/core/single_type_kv_cache_manager.py", "SingleTypeKVCacheManager", "pop_blocks_for_free", {"request_id"}),
    ("v1/core/single_type_kv_cache_manager.py", "FullAttentionManager", "cache_blocks", {"request", "num_tokens"}),
    (
        "v1/core/single_type_kv_cache_manager.py",
        "FullAttentionManager",
        "find_longest_cache_hit",
        {"block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec"},
    ),
    ("v1/kv_cache_interface.py", "AttentionSpec", "max_num_blocks_per_req", {"vllm_config", "max_len"}),
    ("v1/kv_cache_interface.py", "FullAttentionSpec", "merge", {"specs"}),
    (
        "v1/kv_cache_spec_registry.py",
        "KVCacheSpecRegistry",
        "register",
        {"kvcache_spec_cls", "manager_class", "uniform_type_base_spec"},
    ),
    ("v1/attention/backend.py", "AttentionBackend", "customize_spec", {"spec"}),
    ("v1/attention/backend.py", "AttentionBackend", "supports_kv_connector", set()),
    (
        "v1/attention/backend.py",
        "AttentionMetadataBuilder",
        "build",
        {"common_prefix_len", "common_attn_metadata", "fast_build"},
    ),
    (
        "v1/attention/backend.py",
        "AttentionMetadataBuilder",
        "__init__",
        {"kv_cache_spec", "layer_names", "vllm_config", "device"},
    ),
    (
        "v1/attention/backend.py",
        "AttentionMetadataBuilder",
        "get_cudagraph_support",
        {"vllm_config", "kv_cache_spec"},
    ),
    *(
        (
            f"v1/attention/backends/{file}.py",
            kind,
            "do_kv_cache_update",
            {"layer", "key", "value", "kv_cache", "slot_mapping"},
        )
        for file, kind in (
            ("cpu_attn", "CPUAttentionBackendImpl"),
            ("flash_attn", "FlashAttentionImpl"),
            ("triton_attn", "TritonAttentionImpl"),
        )
    ),
    *(
        (
            f"v1/attention/backends/{file}.py",
            kind,
            "forward",
            {"layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"},
        )
        for file, kind in (
            ("cpu_attn", "CPUAttentionBackendImpl"),
            ("flash_attn", "FlashAttentionImpl"),
            ("triton_attn", "TritonAttentionImpl"),
        )
    ),
]
FIELDS = {
    ("v1/attention/backend.py", "CommonAttentionMetadata"): {
        *("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len"),
        *("max_seq_len", "block_table_tensor", "slot_mapping", "positions", "is_prefilling"),
        *("seq_lens_cpu_upper_bound", "req_idx", "_num_computed_tokens_cache", "_token_to_req_indices_cache"),
    },
    ("v1/core/kv_cache_utils.py", "KVCacheBlock"): {"block_id", "is_null", "ref_cnt"},
}


def class_of(root: Path, file: str, name: str) -> ast.ClassDef:
    tree = ast.parse((root / file).read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


@pytest.mark.parametrize("root", vllm_case.sources(), ids=lambda path: path.parent.name)
def test_signatures(root: Path) -> None:
    for file, kind, method, wanted in USED:
        body: list[Any] = class_of(root, file, kind).body
        function = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == method)
        found = {argument.arg for argument in [*function.args.args, *function.args.kwonlyargs]}
        assert wanted <= found, (kind, method)
    for (file, kind), wanted in FIELDS.items():
        body = class_of(root, file, kind).body
        assert wanted <= {node.target.id for node in body if isinstance(node, ast.AnnAssign)}, kind
    for name in ("flash_attn", "triton_attn"):
        text = (root / f"v1/attention/backends/{name}.py").read_text(encoding="utf-8")
        assert "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)" in text  # [blocks, Hkv, b, 2D]
