"""The engine's metadata of a step: its requests, and the part of it that reads prompts."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .markers import read_marker
from .metadata import StepRow


def step_rows(common: Any, block_size: int, max_model_len: int) -> list[StepRow]:
    """Return the requests of a step, from vLLM's `CommonAttentionMetadata`.

    Args:
        common: the metadata.
        block_size: tokens of a block.
        max_model_len: most tokens of a request, which markers encode.
    """
    starts = common.query_start_loc_cpu.tolist()
    known = common.seq_lens_cpu_upper_bound  # exact without speculative decoding
    stops = (common.seq_lens if known is None else known).tolist()
    rows = []
    for place, (first, last, stop) in enumerate(zip(starts, starts[1:], stops, strict=False)):
        start = stop - (last - first)
        if last == first:  # padding
            continue
        if common.req_idx is not None:
            prefilling = bool(common.is_prefilling[place])
            if start == 0 and not prefilling:  # made up, to warm up or to capture a graph
                continue
            rows.append(StepRow(place, start, stop, first, int(common.req_idx[place]), None, prefilling, None, 0))
            continue
        table = common.block_table_tensor[place]
        column = min(-(-stop // block_size), table.shape[0] - 1)
        tail, newest, mark = table[[max(start - 1, 0) // block_size, (stop - 1) // block_size, column]].tolist()
        row, end = read_marker(mark, max_model_len) or (None, None)
        prefilling = end is None or stop <= end
        rows.append(StepRow(place, start, stop, first, row, end, prefilling, tail if start else None, newest))
    return rows


def flat_tokens(rows: Sequence[StepRow], device: torch.device) -> slice | Tensor:
    """Return the rows' tokens among the batch's flat tokens: a slice if they are contiguous, else [n] integers."""
    ranges = [(row.first, row.first + row.stop - row.start) for row in rows]
    if all(stop == start for (_, stop), (start, _) in itertools.pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.cat([torch.arange(*bounds) for bounds in ranges]).to(device)


def prompts_of(common: Any, rows: Sequence[StepRow], tokens: slice | Tensor) -> Any:
    """Return the metadata of some rows of a batch alone."""
    device = common.query_start_loc.device
    places = torch.tensor([row.place for row in rows])
    here = places.to(device)
    lengths = [row.stop - row.start for row in rows]
    starts = torch.tensor([0, *lengths], dtype=common.query_start_loc_cpu.dtype).cumsum(0)
    starts = starts.to(common.query_start_loc_cpu.dtype)

    def some(tensor: Any) -> Any:
        return None if tensor is None else tensor[here if tensor.device == device else places]

    return dataclasses.replace(
        common,
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=some(common.seq_lens),
        num_reqs=len(rows),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=max(row.stop for row in rows),
        block_table_tensor=some(common.block_table_tensor),
        slot_mapping=common.slot_mapping[tokens],
        positions=None if common.positions is None else common.positions[tokens],
        is_prefilling=some(common.is_prefilling),
        seq_lens_cpu_upper_bound=some(common.seq_lens_cpu_upper_bound),
        req_idx=None if common.req_idx is None else common.req_idx[places.numpy()],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
