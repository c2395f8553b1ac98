"""`rocketkv eval run --dry-run`: the cells of a sweep with estimates of time and memory.

Times follow from bytes and operations at the speed that this device reaches in a tenth of a second; memory is that of
weights and cache, computed from the model's configuration.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig

from ...budget import METHODS
from ...hf.loading import SMOLLM2, load_smollm2, resolve_dtype
from ...hf.plan import plan as make_plan
from ..methods import FULL
from ..records import CELLS, CellDict, digest, label, read_record
from ..sampling import card_settings
from .plan import CARD, LATENCY, Loaded, Plan, cells, shard, shared_fields

NEW_TOKENS = 64  # of an answer where the plan does not limit it
_MEBI, _GIBI = 2**20, 2**30


def dry_run(plan: Plan, results: Path, device: torch.device, part: tuple[int, int]) -> str:
    """Return the cells of a plan as a table with estimates of time and memory.

    Args:
        plan: the sweep.
        results: the folder of the results, whose cells are done.
        device: of the model.
        part: number of the shard and of all shards.
    """
    config, loaded = _configuration(plan, device)
    flops, bandwidth = _speed(device)
    lines = [f"{'task':24} {'length':>7} {'method':24} {'samples':>7} {'cache MiB':>10} {'minutes':>8}"]
    total, largest, known = 0.0, 0.0, True
    done, read = _done(results), set()
    for cell in shard(cells(plan, loaded), *part):
        row = f"{cell['task']:24} {cell['length'] or '-':>7} {label(cell):24} {cell['samples']:>7}"
        if _without_weights(cell) in done:
            lines.append(f"{row} {'':>10} {'done':>8}")
            continue
        figures = _figures(config, cell, flops, bandwidth)
        if figures is None:
            known = False
            lines.append(f"{row} {'?':>10} {'?':>8}")
            continue
        prefill, decoding, cache_bytes, peak = figures
        samples = digest(shared_fields(cell))
        seconds = decoding if samples in read and cell["task"] != LATENCY else prefill + decoding
        read.add(samples)  # by one prefill for all methods
        total, largest = total + seconds, max(largest, peak)
        lines.append(f"{row} {cache_bytes / _MEBI:>10.1f} {seconds / 60:>8.1f}")
    unknown = "" if known else " (without the cells marked ?, whose length or method is not known here)"
    lines.append(
        f"estimated: {total / 60:.0f} minutes, {largest / _GIBI:.1f} GiB at peak{unknown}; this device did "
        f"{flops / 1e9:.0f} GFLOP/s and read {bandwidth / 1e9:.0f} GB/s"
    )
    return "\n".join(lines) + "\n"


def _done(results: Path) -> set[str]:
    """Return the cells that have a record, without their weights: a run knows those, and makes a damaged one again."""
    done = set()
    for path in (results / CELLS).glob("*.json"):
        with contextlib.suppress(ValueError):
            record = read_record(path)
            if record["status"] != "failed":
                done.add(_without_weights(record["cell"]))
    return done


def _without_weights(cell: CellDict) -> str:
    return digest({name: value for name, value in cell.items() if name not in ("weights", "attention")})


def _configuration(plan: Plan, device: torch.device) -> tuple[PretrainedConfig, Loaded]:
    """Return the configuration of a plan's model, and what its cells record of it."""
    dtype = str(resolve_dtype(plan.dtype, str(device), plan.device_map)).removeprefix("torch.")
    if plan.model == SMOLLM2:
        model, tokenizer = load_smollm2()
        config, card = model.config, model.generation_config
    else:
        config = AutoConfig.from_pretrained(plan.model, revision=plan.revision)
        tokenizer = AutoTokenizer.from_pretrained(plan.model, revision=plan.revision)
        card = GenerationConfig()
        with contextlib.suppress(OSError):  # the card has no generation settings
            card = GenerationConfig.from_pretrained(plan.model, revision=plan.revision or "main")
    sampling = card_settings(card) if plan.generation == CARD else {}
    return config, Loaded(chat=tokenizer.chat_template is not None, dtype=dtype, sampling=sampling)


def _figures(
    config: PretrainedConfig, cell: CellDict, flops: float, bandwidth: float
) -> tuple[float, float, float, float] | None:
    """Return seconds of prefills and of decode steps, and bytes of a cache after its prompt and at the prefill's peak.

    None where they are not known.
    """
    length = cell["length"]
    if length is None or cell["method"] not in (*METHODS, FULL):
        return None
    answer = cell["max_new_tokens"] or NEW_TOKENS
    prompt = max(1, length - answer)
    new = answer + cell["thinking_tokens"]
    budget = cell["token_budget"] or prompt
    planned = make_plan(config, context=prompt, token_budget=budget, method=cell["method"], dtype=cell["dtype"])
    total = planned.cache.total
    layers = max(1, len(planned.cache.layers))
    itemsize = getattr(torch, cell["dtype"]).itemsize
    weights = planned.weight_bytes
    # Two operations a weight and token; for each pair of tokens, two for each channel of the key and of the value.
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    work = 2 * (weights / itemsize) * prompt + 2 * layers * heads * head_dim * prompt**2
    step = (weights + total("step_bytes")) / bandwidth
    full_layer = total("full_bytes") / layers
    seconds = cell["samples"] * work / flops, cell["samples"] * new * step
    return *seconds, planned.cache.total_bytes, weights + planned.cache.total_bytes + full_layer


def _speed(device: torch.device) -> tuple[float, float]:
    """Return float operations and bytes a second of this device, from a few short runs each."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.rand(size, size, device=device)
    line = torch.rand(2**25, device=device)  # 128 MiB: larger than processor caches
    product, total = (
        Timer(statement, globals={"x": x}, num_threads=torch.get_num_threads()).timeit(4).mean
        for statement, x in (("x @ x", matrix), ("x.sum()", line))
    )
    return 2 * size**3 / product, line.nbytes / total
