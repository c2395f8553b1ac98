"""Full CUDA graphs of decode steps: tensors at constant addresses, by which a graph learns what a step does.

In each layer, a graph of n tokens runs the parent backend on all tokens, then the slab's decode step on all tokens. For
a decoding token, the parent writes no key and attends to one arbitrary token; the slab's step overwrites that output. A
prompt's token, or a token that pads the batch, has no row, so the slab's step reads and writes nothing for it.

vLLM runs such graphs where every request of a step has one token. That may be a prompt's, if the rest of the prompt was
read before. Its query is one of those that rank the prompt, so graphs copy all queries to `LayerSlab.newest`, out of
which the next step takes it.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class GraphBuffers:
    """The tensors that graphs read, written before each step.

    Attributes:
        rows: [n] int32, the row of the slab in which each token decodes, or -1 for none.
        slots: [n] int64, the parent's slot mapping; -1 for none.
        seq_lens: [n] int32, the parent's.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        """Allocate buffers for steps of at most so many tokens."""
        self.rows = torch.full((most,), -1, dtype=torch.int32, device=device)
        self.slots = torch.full((most,), -1, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(most, dtype=torch.int32, device=device)

    def set_rows(self, decodes: Iterable[tuple[int, int]], count: int) -> Tensor:
        """Write the rows of a step of `count` tokens, given tokens and their rows, and return them."""
        rows = torch.full((count,), -1, dtype=torch.int32)
        for token, row in decodes:
            rows[token] = row
        own = self.rows[:count]
        own.copy_(rows.pin_memory() if own.is_cuda else rows, non_blocking=True)
        return own

    def without_decodes(self, common: Any, *, made_up: bool = False) -> Any:
        """Return a step's metadata for the parent, without tokens that decode or, if requests are made up, any."""
        count = common.num_actual_tokens
        decodes = (self.rows[:count] >= 0) | made_up
        slots, seq_lens = self.slots[:count], self.seq_lens[:count]
        slots.copy_(common.slot_mapping[:count].masked_fill(decodes, -1))
        seq_lens.copy_(common.seq_lens[:count].masked_fill(decodes, 1))
        own = {"slot_mapping": slots, "seq_lens": seq_lens}
        return dataclasses.replace(common, **own, _num_computed_tokens_cache=None, _token_to_req_indices_cache=None)
