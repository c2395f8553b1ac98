"""Bounded decoding: where the room for generated tokens is used up, stage 1 runs again over those.

What the prompt kept stays. The generated tokens are ranked by the attention of the last W of them, pooled around each,
in every method; a ring of W slots remembers those queries. Half of the room is kept, so that this happens every half
room, not at every step. Buffers do not move.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N stored tokens, W observation window.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.eviction import full_precision, pooled, select_top, window_scores
from ..core.pages import gather_tokens
from .store import KVStore

# What is kept of the room for generated tokens when it is used up.
KEPT_SHARE = 0.5

# Odd width at most of the max-pooling of their ranks. A prompt's pools of 63 are for many thousands of tokens: of the
# few hundred that were generated they would keep one or two neighbourhoods.
WIDEST_POOL = 5


def kept_of(decode_capacity: int, window_size: int) -> int | None:
    """Return how many generated tokens stay when there are `decode_capacity`, or None where those are too few to rank.

    Args:
        decode_capacity: generated tokens that there is room for.
        window_size: W, of which twice as many are needed.
    """
    return int(decode_capacity * KEPT_SHARE) if decode_capacity >= 2 * window_size else None


@torch.inference_mode(False)  # buffers may be written in a later call that is not in inference mode
@torch.no_grad()
def evict_generated(
    store: KVStore,
    kept: int,
    *,
    kernel_size: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scores: Callable[..., Tensor] = window_scores,
) -> None:
    """Keep only the best of the generated tokens of every row, in place.

    Args:
        store: its prompt closed; it remembers the queries of its last tokens.
        kept: generated tokens that stay, those of the window among them.
        kernel_size: odd width of stage 1's max-pooling, of which at most `WIDEST_POOL` is used.
        scaling: factor of the logits.
        softcap: the model's soft-cap of the logits, or None.
        sinks: [H], the model's learned sinks, or None.
        scores: `eviction.window_scores`, or what stands in its place.

    Raises:
        ValueError: there are no more generated tokens than are kept, or the store remembers no queries.
    """
    count, stored = store.generated, store.stored
    query = store.last_queries()
    if store.keys is None or store.values is None or store.positions is None or store.lengths is None:
        raise ValueError("evict_generated comes after close_prompt")
    if query is None or not query.shape[2] <= kept < count:
        raise ValueError(f"there must be queries, and more generated tokens than are kept; got {count} and {kept}")
    window, device = query.shape[2], store.keys.device
    lengths = store.lengths.long()[..., None]
    # Rows of different lengths end side by side, as those of a prompt do.
    slot = torch.arange(stored, device=device) - (stored - lengths)
    valid = None if store.uniform else slot >= 0
    keys = store.keys[:, :, :stored] if valid is None else gather_tokens(slot.clamp(min=0), store.keys)[0]
    with full_precision(device):
        ranks = scores(query, keys, scaling=scaling, softcap=softcap, sinks=sinks, valid=valid)
    ranks = pooled(ranks[..., -(count - window) :].contiguous(), min(kernel_size, WIDEST_POOL))
    chosen = select_top(ranks, kept - window) if kept > window else lengths.expand(-1, -1, 0)
    last = torch.arange(count - window, count, device=device).expand(*chosen.shape[:2], -1)
    first = lengths - count  # slot of each row's first generated token
    _move(store, first, torch.cat((chosen, last), dim=-1), count)


def _move(store: KVStore, first: Tensor, chosen: Tensor, count: int) -> None:
    """Move chosen tokens of the last `count` of each row to the front of those, and empty the slots behind them."""
    keys, values, positions = store.keys, store.values, store.positions
    if keys is None or values is None or positions is None or store.lengths is None:
        raise ValueError("there is nothing to move")
    kept = chosen.shape[-1]
    store.protect_generated(count)
    source = first + chosen
    target = first + torch.arange(count, device=keys.device)
    moved = (*gather_tokens(source, keys, values), positions.gather(2, source))
    for buffer, tokens, nothing in zip((keys, values, positions), moved, (0, 0, -1), strict=True):
        rest = tokens.new_full((*tokens.shape[:2], count - kept, *tokens.shape[3:]), nothing)
        place = target.view(*target.shape, *[1] * (buffer.dim() - 3)).expand(*target.shape, *buffer.shape[3:])
        buffer.scatter_(2, place, torch.cat((tokens, rest), dim=2))
    store.lengths -= count - kept
    store.drop(count - kept)
    store.rebuild_index()
