"""The plugin's KV cache spec, and the manager of its blocks: prompt blocks are freed when the first token is decoded.

A request's prompt is read into blocks, as in vLLM. Before its first decode step the worker runs stage 1, which copies
the kept tokens into the request's row of the slab; then the manager frees all of its blocks, also while later steps
are running, since decode steps read and write the slab alone. Freed blocks keep their hash, so they remain prefix hits
until they are recycled. Generated tokens need no block.

The manager assigns the rows, because the scheduler knows when a request ends. It tells the worker in the request's
block table: behind the prompt's blocks stands a *marker*, an id beyond all real blocks that encodes the row and the
number of the prompt's tokens. The column behind a step's last token is a marker once the prompt's last block is
allocated; before that it is the prompt's next block. A worker reads that column alone.

After a preemption, prompt and generated tokens are recomputed as one prompt. Its end, not that of the original prompt,
decides what is freed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .markers import marker
from .metrics import metrics

# vLLM adds its own specs to an empty registry only. Processes that receive a spec import this module to unpickle it.
register_all_kvcache_specs(None)


@dataclass(frozen=True, kw_only=True)
class RocketKVSpec(FullAttentionSpec):
    """Full attention whose prompts are compressed before decoding.

    Attributes:
        rows: rows of the slab: requests that are admitted at the same time.
        window_size: W; the last W tokens of a prompt are always recomputed, because their queries rank its tokens.
        max_model_len: most tokens of a request.
    """

    rows: int
    window_size: int
    max_model_len: int

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Return the columns of a block table, markers included."""
        return int(super().max_num_blocks_per_req(vllm_config, max_len)) + 2

    @classmethod
    def merge(cls, specs: list["RocketKVSpec"]) -> "RocketKVSpec":
        """Merge the specs of a group's layers.

        Raises:
            ValueError: they differ.
        """
        if any(spec != specs[0] for spec in specs):
            raise ValueError("rocketkv: the layers of a KV cache group must have the same shape and settings")
        return replace(specs[0])


class RocketKVManager(FullAttentionManager):
    """Blocks of prompts, and rows of the slab, of all requests."""

    def __init__(self, kv_cache_spec: RocketKVSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.rows: dict[str, int] = {}  # of admitted requests
        self.free_rows = list(range(kv_cache_spec.rows))[::-1]
        self.prompt_ends: dict[str, int] = {}  # tokens that a request (re)computes before it decodes

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        """Return the blocks that a request needs; more than there are if no row is free for a new one."""
        if request_id not in self.rows:
            if apply_admission_cap:  # asked with all tokens of the request, before its first chunk
                self.prompt_ends[request_id] = num_tokens
            if not self.free_rows:
                return int(self.block_pool.num_gpu_blocks) + 1
        tokens = self._tokens_in_blocks(request_id, num_tokens)
        return int(
            super().get_num_blocks_to_allocate(
                request_id, tokens, *args, apply_admission_cap=apply_admission_cap, **kwargs
            )
        )

    def _tokens_in_blocks(self, request_id: str, num_tokens: int) -> int:
        """Return the tokens to have blocks for: one block more than the chunk needs, within the prompt."""
        ahead = (cdiv(num_tokens, self.block_size) + 1) * self.block_size
        return int(min(ahead, self.prompt_ends[request_id]))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Allocate blocks for a chunk of a prompt; markers behind its last chunk, and for generated tokens."""
        if request_id not in self.rows:
            self.rows[request_id] = self.free_rows.pop()
            metrics().sequences.set(len(self.rows))
        tokens = self._tokens_in_blocks(request_id, num_tokens)
        new = list(super().allocate_new_blocks(request_id, tokens, min(tokens, num_tokens_main_model)))
        end = self.prompt_ends[request_id]
        if cdiv(num_tokens, self.block_size) >= cdiv(end, self.block_size):
            blocks = self.req_to_blocks[request_id]
            number = marker(self.rows[request_id], end, self.kv_cache_spec.max_model_len)
            missing = cdiv(num_tokens, self.block_size) + 1 - len(blocks)
            # As a null block, a marker is never freed, cached or counted.
            markers = [KVCacheBlock(number, is_null=True) for _ in range(missing)]
            blocks.extend(markers)
            new.extend(markers)
        return new

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free all blocks of a request whose prompt has been read."""
        end, blocks = self.prompt_ends.get(request_id), self.req_to_blocks.get(request_id)
        # vLLM copies blocks of partial prefix hits before the worker ends prompts: there, wait for one more step.
        copies = self.block_size != self.block_pool.hash_block_size
        if end is None or not blocks or processed_computed_tokens < end + copies or blocks[0].is_null:
            return
        self._remove_blocks_in_range(request_id, 0, cdiv(end, self.block_size))
        metrics().blocks_freed.inc(cdiv(end, self.block_size))

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Cache the full blocks of the prompt, while there are any."""
        blocks = self.req_to_blocks[request.request_id]
        if not blocks or blocks[0].is_null:
            return
        super().cache_blocks(request, min(num_tokens, self.prompt_ends[request.request_id]), *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Return the blocks of a request that ends or is preempted, and free its row."""
        self.prompt_ends.pop(request_id, None)
        row = self.rows.pop(request_id, None)
        if row is not None:
            self.free_rows.append(row)
            metrics().sequences.set(len(self.rows))
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Return 0: decode steps read no blocks, so none are shared with prompts."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: Any, kv_cache_spec: Any,
        *args: Any, **kwargs: Any,
    ) -> tuple[tuple[Sequence[KVCacheBlock], ...], int]:  # fmt: skip
        """Return the longest prefix hit that leaves the observation window to be recomputed."""
        most = max(0, max_length + 1 - kv_cache_spec.window_size)  # max_length leaves one token already
        found: tuple[tuple[Sequence[KVCacheBlock], ...], int] = super().find_longest_cache_hit(
            block_hashes, most, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        return found


KVCacheSpecRegistry.register(RocketKVSpec, RocketKVManager, uniform_type_base_spec=FullAttentionSpec)
