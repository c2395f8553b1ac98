"""Records of cells that no model was run for: exact ones for checks by hand, and a sweep as a real one looks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rocketkv.eval.intervals import mean_interval
from rocketkv.eval.records import (
    SCHEMA,
    CellDict,
    CostDict,
    Record,
    SampleDict,
    cell_key,
    digest,
    record_path,
    write_record,
)

HARDWARE = {"processor": "AMD EPYC 7763", "cores": 16, "threads": 16, "device": "NVIDIA H100 80GB HBM3"}
VERSIONS = {"python": "3.12.4", "torch": "2.13.0", "transformers": "5.24.0", "lm_eval": "0.4.13"}

METHODS = {
    # share of the answers that it keeps right at budgets 512, 1024, 2048; time of a step and bytes beside K and V
    "rocketkv": (0.90, 0.97, 0.99),
    "snapkv": (0.66, 0.80, 0.90),
    "quest": (0.70, 0.86, 0.95),
    "streaming": (0.25, 0.34, 0.45),
    "exact-topk": (0.97, 0.99, 1.00),
    "kvpress:expected-attention": (0.58, 0.72, 0.85),
}
BUDGETS = (512, 1024, 2048)
TASKS = {"niah_single_2": 1.0, "niah_multikey_1": 0.96, "niah_multivalue": 0.88, "ruler_vt": 0.83, "ruler_fwe": 0.78}
TOKEN_BYTES = 131072  # keys and values of a token, Llama-3.1-8B in 16 bits


def made_record(
    scores: Sequence[float],
    *,
    task: str = "niah",
    method: str = "full",
    token_budget: int | None = None,
    length: int | None = 4096,
    mode: Literal["aware", "agnostic"] = "agnostic",
    ids: Sequence[str] | None = None,
    prompts: Mapping[str, str] | None = None,
    notes: Sequence[Mapping[str, Any]] | None = None,
    cost: CostDict | None = None,
    status: Literal["complete", "out_of_memory", "failed"] = "complete",
    metric: str = "string match",
    higher_is_better: bool = True,
    interval: list[float] | None = None,
    values: Mapping[str, float | None] | None = None,
    prediction: str = "1234567",
    source: str = "synthetic",
    settings: Mapping[str, Any] | None = None,
    hardware: Mapping[str, Any] | None = None,
    git_hash: str = "0123abcd",
    model: str = "meta-llama/Llama-3.1-8B-Instruct",
    **cell_changes: Any,
) -> Record:
    """Return a record with these scores, one per sample; prompts differ from sample to sample unless given by id.

    Where memory runs out, it knows neither samples nor metric nor data, as a real one.
    """
    cell: CellDict = {
        "task": task,
        "task_version": 1,
        "method": method,
        "token_budget": token_budget,
        "length": length,
        "mode": mode,
        "chat": True,
        "samples": len(scores),
        "max_new_tokens": None,
        "seed": 0,
        "model": model,
        "revision": None,
        "dtype": "bfloat16",
        "attention": "sdpa",
        "chat_arguments": {},
        "thinking_tokens": 0,
        "sampling": {},
        "answers": 1,
        "batch_size": 1,
        "weights": "0e9e39f2",
        "library": "0.5.0",
        "settings": dict(settings or {}),
    }
    cell.update(cell_changes)  # type: ignore[typeddict-item]
    names = [f"{number:04d}" for number in range(len(scores))] if ids is None else list(ids)
    samples: list[SampleDict] = [
        {
            "id": name,
            "prompt_sha256": digest((prompts or {}).get(name, f"{task} {length} {name}")),
            "score": score,
            "turns": [{"prediction": prediction, "answers": ["1234567"], "score": score}],
            "cost": cost or {},
            "notes": dict(notes[place]) if notes else {},
        }
        for place, (name, score) in enumerate(zip(names, scores, strict=True))
    ]
    whole = status == "complete"
    return {
        "schema": SCHEMA,
        "key": cell_key(cell),
        "cell": cell,
        "status": status,
        "message": "" if whole else "CUDA out of memory. Tried to allocate 4.00 GiB",
        "metric": metric if whole else "",
        "higher_is_better": higher_is_better or not whole,
        "score": fmean(scores) if whole else None,
        "interval": interval if whole else None,
        "values": dict(values or {}) if whole else {},
        "samples": samples if whole else [],
        "cost": (cost or {}) if whole else {},
        "data": {"sha256": digest(f"{task} {length}"), "source": source} if whole else {"sha256": "", "source": ""},
        "details": {},
        "provenance": {
            "created": "2026-03-14T09:26:53+00:00",
            "rocketkv": "0.5.0",
            "git_hash": git_hash,
            "versions": VERSIONS,
            "hardware": dict(hardware or HARDWARE),
        },
        "checksum": "",
    }


def made_cost(method: str, budget: int | None, length: int, *, noise: float = 0.0) -> CostDict:
    """Return costs such as an 8B model has on a large GPU."""
    full = TOKEN_BYTES * length
    kept = {"rocketkv": (length * budget) ** 0.5 * 1.1, "snapkv": budget, "streaming": budget} if budget else {}
    stored = min(1.0, kept.get(method, length) / length)
    index = 0.06 * full * stored if method in ("rocketkv", "quest") else 0.0
    read = TOKEN_BYTES * budget if budget else full
    read = min(full, read) * (2.4 if method == "exact-topk" else 1.0)
    step = 0.0068 + read / 1.6e12 + (0.0009 if method in ("rocketkv", "quest", "exact-topk") else 0.0)
    prefill = length * 4.1e-5 + (length / 1e5) ** 2 * 9
    stage_1 = prefill * {"rocketkv": 0.04, "snapkv": 0.04, "kvpress:expected-attention": 0.11}.get(method, 0.0)
    return {
        "prompt_tokens": float(length - 96),
        "new_tokens": 96.0,
        "first_token_seconds": (prefill + stage_1) * (1 + noise),
        "compression_seconds": stage_1 or None,
        "step_seconds": step * (1 + noise),
        "step_seconds_p95": step * 1.07 * (1 + noise),
        "kv_bytes": full * stored + index,
        "index_bytes": index,
        "full_kv_bytes": float(full),
        "step_bytes": read,
        "dense_step_bytes": float(full),
        "nominal_step_bytes": read,
        "nominal_dense_step_bytes": float(full),
        "peak_prefill_bytes": 16.1e9 + 2.2 * full,
        "peak_decode_bytes": 16.1e9 + full * stored + index,
    }


def made_sweep(*, samples: int = 50, lengths: Sequence[int] = (8192, 32768)) -> list[Record]:
    """Return the records of a sweep: tasks, needles by depth, distances and times, with holes as real ones have."""
    rng = random.Random(3)
    records: list[Record] = []
    arms: list[tuple[str, int | None, float]] = [("full", None, 1.0)]
    arms += [(m, budget, share) for m, shares in METHODS.items() for budget, share in zip(BUDGETS, shares, strict=True)]
    for length in lengths:
        for mode in ("agnostic", "aware") if length == lengths[0] else ("agnostic",):
            luck = {(task, n): rng.random() for task in TASKS for n in range(samples)}
            for method, budget, share in arms:
                harder = 1.0 if mode == "aware" else 0.95 if method in ("rocketkv", "exact-topk", "full") else 0.88
                keeps = 1.0 if method == "full" else share * harder * (1.0 if length == lengths[0] else 0.97)
                cell: dict[str, Any] = {"method": method, "token_budget": budget, "length": length, "mode": mode}
                cost = made_cost(method, budget, length, noise=rng.uniform(-0.01, 0.01))
                for task, base in TASKS.items():
                    if (method, budget, task) == ("streaming", 512, "ruler_fwe") and length != lengths[0]:
                        continue
                    scores = [
                        100.0 * (luck[task, n] < base and rng.random() < keeps) if method != "full"
                        else 100.0 * (luck[task, n] < base)
                        for n in range(samples)
                    ]  # fmt: skip
                    if (method, budget, task, length) == ("quest", 512, "ruler_vt", lengths[0]):
                        scores = scores[: -max(1, samples // 5)]
                    gone = length != lengths[0] and method.startswith("kvpress") and budget == 2048
                    records.append(
                        made_record(
                            scores,
                            task=task,
                            cost=cost,
                            status="out_of_memory" if gone else "complete",
                            interval=list(mean_interval(scores) or ()) or None,
                            **cell,
                        )
                    )
                if mode == "agnostic":
                    records.append(_needles(rng, keeps, cost, cell))
                    records.append(_distance(rng, 1 - keeps, cost, cell))
                    records.append(
                        made_record(
                            [cost["step_seconds"]] * 5,
                            task="latency",
                            metric="seconds a token",
                            higher_is_better=False,
                            cost=cost,
                            **cell,
                        )
                    )
    return records


def _needles(rng: random.Random, keeps: float, cost: CostDict, cell: dict[str, Any]) -> Record:
    depths = [0.0, 0.25, 0.5, 0.75, 1.0] * 4
    scores = [100.0 * (rng.random() < min(1.0, keeps + (0.25 if depth in (0.0, 1.0) else 0))) for depth in depths]
    return made_record(scores, task="needle_grid", cost=cost, notes=[{"depth": depth} for depth in depths], **cell)


def _distance(rng: random.Random, lost: float, cost: CostDict, cell: dict[str, Any]) -> Record:
    scores = [0.4 * lost * rng.uniform(0.7, 1.3) for _ in range(8)]
    values = {"perplexity": 8.1 * (1 + 0.3 * lost)}
    return made_record(
        scores, task="decode_kl", metric="KL to full, nats", higher_is_better=False, cost=cost, values=values, **cell
    )


def write_all(folder: Path, records: Sequence[Record]) -> Path:
    """Write records as a run does; return the folder of the results."""
    for record in records:
        write_record(record_path(folder, record["cell"]), record)
    return folder
