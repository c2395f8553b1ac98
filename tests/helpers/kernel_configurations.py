"""The launches that are compiled ahead of time: kernels in the shapes of known models, by name.

Letters: B batch, H query heads, Hkv KV heads, D head dim, P page size, t token budget.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rocketkv.budget import PAPER_POOL, READ_ON, SKETCH_POOL
from rocketkv.core.decode import DecodeBuffers
from rocketkv.core.params import AttentionParams
from rocketkv.core.sketch import code_bytes, encoding
from rocketkv.kernels.build_sketch import write_sketch
from rocketkv.kernels.decode import DecodeWorkspace, decode_step_triton
from rocketkv.kernels.decode_shape import TILE_PAGES, DecodeShape, SketchRule
from rocketkv.kernels.dense_decode import DenseWorkspace, dense_decode
from rocketkv.kernels.evict import compact, pool_scores, select_top, window_scores
from rocketkv.kernels.operands import RULE_FIELDS
from rocketkv.kernels.prefill import prefill_attention
from rocketkv.kernels.value_aware import value_aware
from rocketkv.kernels.value_sums import subtract_last

META = torch.device("meta")

Lengths = tuple[Callable[[int, str], object], ...]
"""Launches that differ in lengths alone."""


@dataclass(frozen=True)
class Configuration:
    """A named set of launches.

    Attributes:
        launch: launches them on meta tensors, given the number of multiprocessors and the architecture.
        kernels: those of its kernels that count, or None for all.
        main: whether it must have no spills on NVIDIA's devices, wide loads, and loops that copy while they compute.
        alone: whether some of its kernels are in no main configuration.
    """

    launch: Callable[[int, str], object]
    kernels: tuple[str, ...] | None = None
    main: bool = False
    alone: bool = False


class Rows(NamedTuple):
    """The rows of a step on a slab; see `kernels/operands.py`."""

    rows: Tensor
    rules: Tensor
    row_tokens: int
    row_slots: int
    row_lines: int


def meta(*sizes: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(sizes, dtype=dtype, device=META)


def decode(
    dtype: torch.dtype,
    *,
    index_dtype: torch.dtype | None = None,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    capacity: int,
    token_budget: int,
    page_size: int = 1,
    channels: int | None = None,
    top_k: int | None = None,
    batch: int = 1,
    ends: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    sketch_bits: int | None = None,
    slab: bool = False,
) -> Callable[[int, str], Tensor]:
    """Return a function that launches a decode step.

    Args:
        dtype: of queries, keys and values.
        index_dtype: of the index, or None for the same.
        heads: H and Hkv.
        head_dim: D.
        capacity: slots of the buffers.
        token_budget: t.
        page_size: P.
        channels: r, or None.
        top_k: k, or None.
        batch: B.
        ends: how many first tokens are kept where tokens are ranked by position, else None.
        softcap: of the logits, or None.
        sinks: whether the model has learned sinks.
        sketch_bits: bits a channel of the sketch, which has a residual with a bias, or None where pages are scored or
            nothing is.
        slab: whether the step runs on rows of a slab.
    """

    def launch(programs: int, architecture: str) -> Tensor:
        query_heads, kv_heads = heads
        rule = None if sketch_bits is None else SketchRule(sketch_bits, 256, head_dim**0.5, 1.0)
        shape = DecodeShape(
            batch=batch, heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim, capacity=capacity,
            page_size=page_size, channels=channels, top_k=top_k, token_budget=token_budget, sinks=ends,
            sketch=rule, residual=rule is not None, by_largest=rule is not None,
            pages=-(-capacity // page_size) if slab else None,
        )  # fmt: skip
        rows = head_dim if page_size == 1 else 2 * head_dim
        index: tuple[Tensor, ...] = ()
        if channels is not None:
            index = (meta(batch, kv_heads, shape.tiles, rows, TILE_PAGES, dtype=index_dtype or dtype),)
        if rule is not None:
            index = (
                meta(batch, kv_heads, capacity, sum(-(-head_dim * n // 8) for n in rule.widths), dtype=torch.uint8),
                meta(batch, kv_heads, capacity, dtype=torch.bfloat16),
                meta(batch, kv_heads, head_dim, dtype=torch.float32),
                meta(batch, kv_heads, head_dim, dtype=torch.bfloat16),
            )
        buffers = DecodeBuffers(
            keys=meta(batch, kv_heads, capacity, head_dim, dtype=dtype),
            values=meta(batch, kv_heads, capacity, head_dim, dtype=dtype),
            positions=meta(batch, kv_heads, capacity, dtype=torch.int32),
            seq_lens=meta(batch, kv_heads, dtype=torch.int32),
            index_tensors=index,
            value_sum=None if rule is None else meta(batch, kv_heads, head_dim, dtype=torch.float64),
            residual_bias=None if rule is None else meta(batch, query_heads, dtype=torch.float32),
            clock=meta(1, dtype=torch.int32),
        )
        return decode_step_triton(
            meta(batch, query_heads, head_dim, dtype=dtype),
            meta(batch, kv_heads, head_dim, dtype=dtype),
            meta(batch, kv_heads, head_dim, dtype=dtype),
            buffers,
            DecodeWorkspace(
                shape, META, programs, rotation=meta(head_dim, head_dim, dtype=dtype), architecture=architecture
            ),
            AttentionParams(head_dim**-0.5, softcap, meta(query_heads, dtype=dtype) if sinks else None),
            slab=None if not slab else Rows(
                meta(batch, dtype=torch.int32), meta(batch, RULE_FIELDS, dtype=torch.int32), 3 * kv_heads * capacity,
                kv_heads * capacity, kv_heads * shape.tiles * rows,
            ),
        )  # fmt: skip

    return launch


def evict(
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    tokens: int,
    kept: int,
    page_size: int | None,
    index_dtype: torch.dtype | None = None,
    batch: int = 1,
    softcap: float | None = None,
    sinks: bool = False,
    padded: bool = False,
) -> Callable[[int, str], object]:
    """Return a function that launches the end of a prompt, with keys and values token by token as models store them.

    Args:
        dtype: of queries, keys and values.
        heads: H and Hkv.
        head_dim: D.
        tokens: of the prompt.
        kept: tokens that stay.
        page_size: P, or None where there is no index.
        index_dtype: of the index, or None for the keys'.
        batch: B.
        softcap: of the logits, or None.
        sinks: whether the model has learned sinks.
        padded: whether prompts are padded.
    """

    def launch(programs: int, architecture: str) -> object:
        query_heads, kv_heads = heads
        keys = meta(batch, tokens, kv_heads, head_dim, dtype=dtype).transpose(1, 2)
        valid = meta(batch, 1, tokens, dtype=torch.bool) if padded else None
        scores = window_scores(
            meta(batch, query_heads, WINDOW, head_dim, dtype=dtype),
            keys,
            AttentionParams(head_dim**-0.5, softcap, meta(query_heads, dtype=dtype) if sinks else None),
            valid=valid,
        )
        # Without pages as the methods with a sketch pool.
        width, offset = (PAPER_POOL, 0) if page_size is not None else (SKETCH_POOL, READ_ON)
        slots = select_top(pool_scores(scores, WINDOW, kernel_size=width, pool_offset=offset, valid=valid), kept)
        return compact(keys, keys, slots, valid, None, kept, kept + RESERVE, page_size, index_dtype)

    return launch


def sketched_prompt(
    dtype: torch.dtype, *, heads: tuple[int, int] = (32, 8), head_dim: int = 128, tokens: int, kept: int, bits: int
) -> Callable[[int, str], object]:
    """Return a function that launches what a prompt's end needs beside `evict` for a sketch and value-aware scores.

    Args:
        dtype: of keys and values.
        heads: H and Hkv.
        head_dim: D.
        tokens: of the prompt.
        kept: tokens that stay.
        bits: of a channel of the sketch.
    """

    def launch(programs: int, architecture: str) -> object:
        kv_heads, capacity = heads[1], kept + RESERVE
        keys = meta(1, kv_heads, capacity, head_dim, dtype=dtype)
        sketch = (
            meta(1, kv_heads, capacity, code_bytes(head_dim, bits), dtype=torch.uint8),
            meta(1, kv_heads, capacity, dtype=BF16),
            meta(1, kv_heads, head_dim, dtype=FP32),
            meta(1, kv_heads, head_dim, dtype=BF16),
        )
        rotation = meta(head_dim, head_dim, dtype=FP32)
        write_sketch(encoding, sketch, keys[:, :, :kept], 0, rotation, bits)
        values = meta(1, tokens, kv_heads, head_dim, dtype=dtype).transpose(1, 2)
        return value_aware(meta(1, kv_heads, tokens - WINDOW, dtype=FP32), values)

    return launch


def crop(dtype: torch.dtype, *, capacity: int, kv_heads: int = 8, head_dim: int = 128) -> Callable[[int, str], None]:
    """Return a function that launches the end of a crop of a row's last tokens.

    Args:
        dtype: of values.
        capacity: slots of the buffers.
        kv_heads: Hkv.
        head_dim: D.
    """

    def launch(programs: int, architecture: str) -> None:
        sums, values = (
            meta(1, kv_heads, head_dim, dtype=torch.float64),
            meta(1, kv_heads, capacity, head_dim, dtype=dtype),
        )
        lengths = meta(1, kv_heads, dtype=torch.int32)
        subtract_last(sums, values, lengths, count=capacity // 1000, longest=capacity, shortest=capacity)

    return launch


def dense(
    dtype: torch.dtype, *, heads: tuple[int, int] = (32, 8), head_dim: int = 128, length: int
) -> Callable[[int, str], Tensor]:
    """Return a function that launches a decode step of dense attention.

    Args:
        dtype: of queries, keys and values.
        heads: H and Hkv.
        head_dim: D.
        length: tokens stored.
    """

    def launch(programs: int, architecture: str) -> Tensor:
        query_heads, kv_heads = heads
        keys = meta(1, kv_heads, length, head_dim, dtype=dtype)
        workspace = DenseWorkspace(1, query_heads, kv_heads, head_dim, head_dim, length, META, programs=programs)
        query = meta(1, query_heads, head_dim, dtype=dtype)
        return dense_decode(query, keys, keys, workspace=workspace, scaling=head_dim**-0.5)

    return launch


def prefill(
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    length: int,
    tokens: int,
    batch: int = 1,
    softcap: float | None = None,
    sinks: bool = False,
    window: int | None = None,
    padded: bool = False,
) -> Callable[[int, str], Tensor]:
    """Return a function that launches attention of a prompt's last `length` of `tokens` tokens.

    Args:
        dtype: of queries, keys and values.
        heads: H and Hkv.
        head_dim: D.
        length: queries.
        tokens: keys.
        batch: B.
        softcap: of the logits, or None.
        sinks: whether the model has learned sinks.
        window: of a sliding layer, or None.
        padded: whether prompts are padded.
    """

    def launch(programs: int, architecture: str) -> Tensor:
        query_heads, kv_heads = heads
        query = meta(batch, length, query_heads, head_dim, dtype=dtype).transpose(1, 2)
        keys = meta(batch, kv_heads, tokens, head_dim, dtype=dtype)
        valid = meta(batch, 1, tokens, dtype=torch.bool) if padded else None
        params = AttentionParams(head_dim**-0.5, softcap, meta(query_heads, dtype=dtype) if sinks else None)
        return prefill_attention(query, keys, keys, params, window=window, valid=valid)

    return launch


def _of_lengths(launch: Callable[..., Callable[[int, str], object]], *cases: dict[str, Any], **common: Any) -> Lengths:
    """Return launches of one kind that differ in lengths alone."""
    return tuple(launch(BF16, **common, **case) for case in cases)


WINDOW = 32
RESERVE = 128
BOTH = ("append_score_kernel", "select_attend_kernel")
SKETCHED = ("append_sketch_kernel", "select_attend_kernel")
APPEND, ATTEND = ("append_score_kernel",), ("select_attend_kernel",)
TREE, ALONE = ("select_parts_kernel",), ("select_kernel",)
WIDEST = ("window_statistics_kernel", "window_merge_kernel", "window_sums_kernel", "compact_kernel")
PADDED = (*WIDEST, "side_by_side_kernel", "pool_kernel", "tokens_first_kernel")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E5M2 = torch.float8_e5m2  # which every GPU converts

# The paper's split of 32K, 128K and 8K tokens and `RESERVE` more; Qwen3-8B has the heads of Llama-3.1-8B.
LLAMA_32K: dict[str, Any] = {"capacity": 5797, "token_budget": 1024, "page_size": 3, "channels": 67, "top_k": 512}
LLAMA_128K: dict[str, Any] = {"capacity": 6471, "token_budget": 1024, "page_size": 3, "channels": 60, "top_k": 512}
QWEN_8K: dict[str, Any] = {"capacity": 1452, "token_budget": 256, "page_size": 3, "channels": 67, "top_k": 128}
SMOLLM_8K: dict[str, Any] = {"capacity": 3742, "token_budget": 1024, "page_size": 2, "channels": 35, "top_k": 512}
SMOLLM: dict[str, Any] = {"heads": (9, 3), "head_dim": 64}
GEMMA: dict[str, Any] = {"heads": (16, 8), "head_dim": 256, "softcap": 50.0}
MQA: dict[str, Any] = {"heads": (48, 1)}
GPT_OSS: dict[str, Any] = {"heads": (64, 8), "head_dim": 64, "sinks": True}
# As Quest and SparQ would: pages of four, then of one, and the most pages that one program holds.
QUEST_4K: dict[str, Any] = {"capacity": 4096, "token_budget": 1024, "page_size": 4, "channels": 256, "top_k": 512}
SPARQ_8K: dict[str, Any] = {"capacity": 8192, "token_budget": 1024, "page_size": 1, "channels": 16, "top_k": 512}
SPARQ_32K: dict[str, Any] = {"capacity": 32896, "token_budget": 1024, "page_size": 1, "channels": 3, "top_k": 512}
# Of `rocketkv_plus_split`; then 3 bits, and more tokens than one program holds.
PLUS_32K: dict[str, Any] = {"capacity": 7702, "token_budget": 1024, "sketch_bits": 2, "top_k": 511}
PLUS_8K: dict[str, Any] = {"capacity": 8320, "token_budget": 512, "sketch_bits": 1, "top_k": 234}
PLUS_128K: dict[str, Any] = {"capacity": 15412, "token_budget": 2048, "sketch_bits": 2, "top_k": 1023}
THREE_BITS: dict[str, Any] = {"capacity": 16384, "token_budget": 1024, "sketch_bits": 3, "top_k": 512}

# No more than six a kernel: code that one of them leaves out, such as reading all tokens, is part of another's.
CONFIGURATIONS = {
    "llama-3.1-8b-32k": Configuration(decode(BF16, **LLAMA_32K), BOTH, main=True),
    "llama-3.1-8b-128k": Configuration(decode(BF16, **LLAMA_128K), BOTH, main=True),
    "qwen3-8b-8k-rows": Configuration(decode(BF16, **QWEN_8K, batch=8, slab=True), BOTH, main=True),
    # Nothing evicted: more pages than one program holds.
    "llama-3.1-8b-128k-mt": Configuration(decode(BF16, **{**LLAMA_128K, "capacity": 131200}), TREE, main=True),
    "llama-3.1-8b-128k-sketch": Configuration(decode(BF16, **PLUS_128K), TREE, main=True),
    # More tokens read than several programs' candidates may be.
    "llama-3.1-8b-128k-oracle": Configuration(
        decode(BF16, capacity=131200, token_budget=16384, channels=128, top_k=16384), ALONE, main=True
    ),
    "smollm2-135m-8k": Configuration(decode(FP16, index_dtype=E5M2, **SMOLLM_8K, **SMOLLM), APPEND),
    "gemma-2-9b-quest-4k": Configuration(decode(BF16, **QUEST_4K, **GEMMA), BOTH),
    "mqa-fp32-sparq-8k": Configuration(decode(FP32, **SPARQ_8K, **MQA), BOTH),
    "mqa-fp32-sparq-32k": Configuration(decode(FP32, **SPARQ_32K, **MQA), TREE),
    "gpt-oss-20b-streaming": Configuration(
        decode(BF16, capacity=1151, token_budget=1024, top_k=1024, ends=4, **GPT_OSS), ATTEND
    ),
    "llama-3.1-8b-32k-sketch": Configuration(decode(BF16, **PLUS_32K), SKETCHED, main=True),
    "gemma-2-9b-sketch-8k": Configuration(decode(BF16, **PLUS_8K, **GEMMA), SKETCHED[:1]),
    "smollm2-135m-fp32-sketch-rows": Configuration(
        decode(FP32, **THREE_BITS, **SMOLLM, slab=True), (*SKETCHED[:1], *TREE)
    ),
    "llama-3.1-8b-prompt-128k": Configuration(evict(BF16, tokens=131072, kept=6343, page_size=3), main=True),
    "smollm2-135m-prompt-8k": Configuration(
        evict(FP16, tokens=8192, kept=3614, page_size=2, index_dtype=E5M2, batch=8, padded=True, **SMOLLM),
        PADDED,
        alone=True,
    ),
    "gemma-2-9b-prompt-8k": Configuration(evict(BF16, tokens=8192, kept=3614, page_size=1, **GEMMA), WIDEST),
    "mqa-fp32-prompt-8k": Configuration(evict(FP32, tokens=8192, kept=1024, page_size=None, **MQA), WIDEST),
    "llama-3.1-8b-sketched-prompt-128k": Configuration(
        sketched_prompt(BF16, tokens=131072, kept=7574, bits=2), main=True
    ),
    "gemma-2-9b-sketched-prompt-8k": Configuration(
        sketched_prompt(BF16, tokens=8192, kept=8192, bits=1, heads=(16, 8), head_dim=256)
    ),
    "smollm2-135m-fp32-sketched-prompt": Configuration(sketched_prompt(FP32, tokens=8192, kept=3614, bits=3, **SMOLLM)),
    "llama-3.1-8b-crop": Configuration(crop(BF16, capacity=7702), main=True),
    "llama-3.1-8b-dense-32k": Configuration(dense(BF16, length=32768), main=True),
    "smollm2-135m-dense-8k": Configuration(dense(FP16, length=8191, **SMOLLM)),
    "gpt-oss-20b-chunk-8k": Configuration(prefill(BF16, length=2048, tokens=8192, **GPT_OSS), main=True),
    "gemma-2-9b-sliding-8k": Configuration(
        prefill(BF16, length=8192, tokens=8192, window=4096, batch=8, padded=True, **GEMMA)
    ),
    "smollm2-135m-fp32-chunk": Configuration(prefill(FP32, length=512, tokens=2048, batch=4, padded=True, **SMOLLM)),
    "gpt-oss-20b-prompt-8k": Configuration(evict(BF16, tokens=8192, kept=3614, page_size=2, **GPT_OSS), WIDEST),
}

_PROMPTS = ({"tokens": 4096, "kept": 1000, "page_size": 2}, {"tokens": 70001, "kept": 6343, "page_size": 3})
# Launches that share their compiled kernels: what differs is no constant.
OF_LENGTHS = {
    "prompts": _of_lengths(evict, *_PROMPTS),
    "padded prompts": _of_lengths(evict, *_PROMPTS, batch=2, padded=True),
    "sketched prompts": _of_lengths(
        sketched_prompt, {"tokens": 4096, "kept": 1008}, {"tokens": 70001, "kept": 7575}, bits=2
    ),
    "crops": _of_lengths(crop, {"capacity": 7702}, {"capacity": 16000}),
    "chunks": _of_lengths(prefill, {"length": 512, "tokens": 2048}, {"length": 777, "tokens": 70001}, **GPT_OSS),
    # Of as many tiles, pages and parts when padded.
    "steps": _of_lengths(
        decode, LLAMA_32K, {**LLAMA_32K, "capacity": 5900, "page_size": 3, "channels": 66, "top_k": 499}
    ),
    "steps on a sketch": _of_lengths(decode, PLUS_32K, {**PLUS_32K, "capacity": 7601, "top_k": 500}),
}
