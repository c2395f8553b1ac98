"""Full decode graphs, which no CPU runs: a graph's replay is its captured metadata run again, after the eager `build`.

The parent backend is attention to blocks in PyTorch, which reads nothing but tensors that a graph would read.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.forward_context import override_forward_context
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from rocketkv.vllm.backend import RocketKVImpl
from rocketkv.vllm.builder import EngineFacts, RocketKVBuilder, RocketKVMetadata
from rocketkv.vllm.settings import parse
from rocketkv.vllm.sizes import LayerShape
from rocketkv.vllm.slab import LayerSlab
from rocketkv.vllm.spec import RocketKVSpec

BLOCK, HEADS, KV_HEADS, DIM, LONGEST, ROWS, CAPTURED = 16, 4, 2, 16, 128, 4, 4
SETTINGS = {"token_budget": 32, "decode_reserve": 16, "window_size": 4, "decode_capacity": 8}
NAME = "model.layers.0.attn"


class PagedImpl:
    """Attention to a cache [blocks, Hkv, b, 2D]; tokens without a slot are not written."""

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                cache[slot // BLOCK, :, slot % BLOCK] = torch.cat((key[token], value[token]), -1)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: Any, output: Tensor
    ) -> Tensor:
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        for place, length in enumerate(lengths):
            first, last = starts[place], starts[place + 1]
            stored = cache[metadata.block_table_tensor[place, : -(-length // BLOCK)].long()]
            stored = stored.transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(HEADS // KV_HEADS, 0)
            logits = query[first:last].transpose(0, 1) @ stored[..., :DIM].transpose(1, 2) * DIM**-0.5
            hidden = torch.ones_like(logits, dtype=torch.bool).triu(length - (last - first) + 1)
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            output[first:last] = (weights @ stored[..., DIM:]).transpose(0, 1)
        return output


class PagedBuilder:
    """Its metadata are vLLM's own."""

    def __init__(self, *args: Any) -> None:
        pass

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.ALWAYS

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        return common

    def build_for_cudagraph_capture(self, common: Any) -> Any:
        return common


class Engine:
    """One layer of an engine under model runner V2, with its device tensors at constant addresses."""

    def __init__(self, method: str, backend: str) -> None:
        settings = parse({**SETTINGS, "method": method, "backend": backend})
        shape = LayerShape(HEADS, KV_HEADS, DIM, DIM, torch.float32)
        self.impl: Any = object.__new__(type("Impl", (RocketKVImpl, PagedImpl), {}))
        sizes: dict[str, Any] = {"rows": ROWS, "max_prompt": LONGEST, "device": torch.device("cpu")}
        self.impl.slab = LayerSlab([settings.config], shape, **sizes)
        self.impl.config, self.impl.scale = settings.config, DIM**-0.5
        self.cache = torch.zeros(1 + ROWS * 8, KV_HEADS, BLOCK, 2 * DIM)
        self.layer = SimpleNamespace(layer_name=NAME, impl=self.impl, kv_cache=self.cache)
        self.config: Any = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={NAME: self.layer}),
            model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 1),
            scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
            use_v2_model_runner=True,
        )
        self.spec = RocketKVSpec(
            block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.float32, rows=ROWS, window_size=4,
            max_model_len=LONGEST,
        )  # fmt: skip
        facts = EngineFacts(settings, ROWS, LONGEST)
        kind: Any = type("Builder", (RocketKVBuilder, PagedBuilder), {"facts": facts})
        self.builder = kind(self.spec, [NAME], self.config, torch.device("cpu"))
        self.tables = 1 + torch.arange(ROWS * 8).view(ROWS, 8).flip(1).int()
        self.table = torch.zeros(CAPTURED, 8, dtype=torch.int32)
        self.graph: RocketKVMetadata | None = None

    def common(self, chunks: list[tuple[int, int, int, bool]], padded: int | None = None) -> CommonAttentionMetadata:
        """Return V2's metadata; a chunk is row, start, stop and whether it is a prompt's."""
        lengths = [stop - start for _, start, stop, _ in chunks]
        count = padded or len(chunks)
        starts = torch.tensor([0, *lengths, *[0] * (count - len(chunks))]).cumsum(0).int()
        stops = torch.tensor([stop for _, _, stop, _ in chunks] + [0] * (count - len(chunks))).int()
        for place, (row, *_) in enumerate(chunks):
            self.table[place] = self.tables[row]
        slots = torch.full((padded or sum(lengths),), -1)
        for place, (row, start, stop, _) in enumerate(chunks):
            token = torch.arange(start, stop)
            own = slice(int(starts[place]), int(starts[place + 1]))
            # Of generated tokens, vLLM computes slots out of markers.
            slots[own] = (
                self.tables[row][token // BLOCK].long() if chunks[place][3] else 1 << 30
            ) * BLOCK + token % BLOCK
        return CommonAttentionMetadata(
            query_start_loc=torch.arange(count + 1).int() if padded else starts,
            query_start_loc_cpu=starts,
            seq_lens=stops,
            seq_lens_cpu_upper_bound=stops,
            num_reqs=count,
            num_actual_tokens=padded or sum(lengths),
            max_query_len=max(lengths),
            max_seq_len=int(stops.max()),
            block_table_tensor=self.table[:count],
            slot_mapping=slots,
            is_prefilling=torch.tensor([prompt for *_, prompt in chunks]),
            req_idx=np.array([row for row, *_ in chunks]),
        )

    def capture(self) -> None:
        made_up = self.common([(row, 0, 1, False) for row in range(CAPTURED)], CAPTURED)
        assert self.builder.build(0, made_up).decodes is None  # piecewise graphs run it eagerly
        self.graph = self.builder.build_for_cudagraph_capture(made_up)
        self.run(self.graph, *(torch.randn(CAPTURED, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)))

    def run(self, metadata: RocketKVMetadata, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.full_like(query, torch.nan)
        slots = torch.full((len(query),), 1 << 40) if metadata is self.graph else self.slots
        context: Any = SimpleNamespace(attn_metadata={NAME: metadata})
        with override_forward_context(context), torch.inference_mode():
            self.impl.do_kv_cache_update(self.layer, key, value, self.cache, slots)
            self.impl.forward(self.layer, query, key, value, self.cache, metadata, out)
        return out

    def step(self, chunks: list[tuple[int, int, int, bool]], new: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Run a step: by the graph where there is one and each request has one token, with noise as padding."""
        if self.graph is None or any(stop - start > 1 for _, start, stop, _ in chunks):
            common = self.common(chunks)
            self.slots = common.slot_mapping
            return self.run(self.builder.build(0, common), *new)
        self.builder.build(0, self.common(chunks, CAPTURED))
        more = CAPTURED - len(chunks)
        padded = [torch.cat((tensor, torch.randn(more, *tensor.shape[1:]))) for tensor in new]
        return self.run(self.graph, *padded)[: len(chunks)]


def chunks_of_steps() -> list[list[tuple[int, int, int, bool]]]:
    """Return a prompt that begins later than another, and whose last chunk is one token; then both decode."""
    steps = [[(0, 0, 45, True)], [(0, 45, 46, False), (2, 0, 69, True)], [(2, 69, 70, True), (0, 46, 47, False)]]
    # Until generated tokens of both are re-evicted.
    return steps + [[(0, 47 + i, 48 + i, False), (2, 70 + i, 71 + i, False)] for i in range(10)]


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+"])
def test_replays_are_the_eager_steps(method: str) -> None:
    torch.manual_seed(0)
    captured, eager = Engine(method, "triton"), Engine(method, "torch")
    captured.capture()
    assert all(bool((tensor == 0).all()) for tensor in captured.impl.slab.memory.values())
    for chunks in chunks_of_steps():
        count = sum(stop - start for _, start, stop, _ in chunks)
        new = tuple(torch.randn(count, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        found, expected = (engine.step(chunks, new) for engine in (captured, eager))  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(captured.cache, eager.cache)  # of prompts alone
    own, other = captured.impl.slab, eager.impl.slab
    assert own.clock.tolist() == other.clock.tolist() == [57, 0, 80, 0]
    assert torch.equal(own.memory["positions"], other.memory["positions"])
    for name, tensor in own.memory.items():
        assert bool((tensor[[1, 3]] == 0).all()), name


def test_what_may_be_captured() -> None:
    engine, reference = Engine("rocketkv", "triton"), Engine("rocketkv", "torch")
    ask = engine.builder.get_cudagraph_support
    assert ask(engine.config, engine.spec) == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert ask(engine.config, object()) == AttentionCGSupport.ALWAYS  # of a layer that is not compressed
    assert reference.builder.get_cudagraph_support(reference.config, reference.spec) == AttentionCGSupport.NEVER
    engine.config.use_v2_model_runner = False
    assert ask(engine.config, engine.spec) == AttentionCGSupport.NEVER
    del engine.config.use_v2_model_runner
    with pytest.raises(AttributeError):
        ask(engine.config, engine.spec)
