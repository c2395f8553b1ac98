"""`rocketkv bench model`: decode steps of a whole model on a GPU, dense and compressed, each as a CUDA graph.

A step is a forward and the greedy choice of the next token, captured and replayed; every arm does the same.
Arms: `static`, the stock model with transformers' StaticCache; `flash-attn`, the same with flash-attn's attention over
a cache, where it is installed; `full`, our kernels over all tokens, in the same buffers; `rocketkv` and `rocketkv+`.
The dense figure is the fastest of the first three; the goals are for `rocketkv`. The time to the first token is that of
a whole prompt, stage 1 and index included, of the stock model with its growing cache and of both methods.

The last line is JSON: `device`, `versions`, `shape`, `dtype`, `rounds`, `steps` (of a round), `passed` (every goal met
by its median), `left_out`, and for each of `cases`:

    case, batch, context, token_budget
    milliseconds        of one step, by arm: median, min, max over the rounds
    tokens_per_second   of the whole batch, by arm, by the median
    first_token         milliseconds of a prompt's first token, by arm: median, min, max over the rounds
    bytes               that a step reads: `weights`, and keys, values and index, `dense`, `rocketkv` and `rocketkv+`
    byte_ceiling        speed-up that the bytes allow, weights included, by method
    absent              arms that do not fit, cannot run or cannot be captured, and why
    clocks              of the device when the case ends
    best_dense, speedup, share_of_ceiling, goals        as in `bench kernels`
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ...hf.cache import cache_stats
from ..checks import require_near_logits
from .first_token import first_token
from .gpu_run import report, time_cases
from .gpu_timing import (
    CannotCaptureError,
    alternate,
    card,
    clocks,
    event_seconds,
    ratios,
    require_rounds,
    spread,
    try_capture,
    verdict_lines,
)
from .kernel_cases import METHODS, Case
from .model_arms import DECODE_CAPACITY, TINY, ModelArm, build_model, check_arms, model_arms, restore

STEPS = 16
PROMPT_ROUNDS = 3
CASES = (Case(1, 32768, 1024), Case(1, 131072, 1024), Case(8, 32768, 1024), Case(32, 8192, 1024), Case(1, 512, 1024))
QUICK = (Case(1, 512, 1024), Case(1, 32768, 1024))
TINY_CASES = (Case(1, 400, 64), Case(2, 300, 64), Case(1, 40, 64))

SPEEDUP_GOALS = {Case(1, 131072, 1024): 1.8, Case(8, 32768, 1024): 2.4}
SHORT_GOAL = 0.97  # of the dense tokens a second, where a prompt is within the budget

NO_GPU = (
    "rocketkv bench model measures on a GPU, and this machine has none that torch can use; --check runs the steps of a "
    "tiny model, without timing"
)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark, or its checks alone, and print it; returns the exit code."""
    if not torch.cuda.is_available() and not args.check:
        sys.stderr.write(f"{NO_GPU}\n")
        return 2
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    given = [Case.parse(text) for text in args.cases.split(",")] if args.cases else None
    if args.check:
        return report(args, partial(check_model, args.shape, given or TINY_CASES, device), table)
    cases = given or (QUICK if args.quick else CASES)
    return report(args, partial(bench_model, args.shape, cases, device, rounds=args.rounds), table)


def check_model(shape: str, cases: Sequence[Case], device: torch.device) -> dict[str, Any]:
    """Run the steps of a tiny model of the same kind and compare the arms.

    Raises:
        WrongResultError: a result is wrong.
    """
    longest = max(case.context for case in cases) + DECODE_CAPACITY
    model = build_model(shape, longest, torch.float32, device, **TINY)
    checked = []
    for case in cases:
        arms, absent = model_arms(model, case)
        try:
            absent |= check_arms(case, arms)
        finally:
            restore(model)
        first, _ = first_token(model, case, 1)
        ran = [name for name in arms if name not in absent]
        checked.append({"case": str(case), "arms": ran, "first_token": list(first), "absent": absent})
    return {"bench": "model", "shape": shape, "checked": checked, "dtype": "float32", **card(device)}


def bench_model(
    shape: str, cases: Sequence[Case], device: torch.device, *, rounds: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Check and time every case that fits into the device's memory.

    Raises:
        WrongResultError: a result is wrong.
        ValueError: there are too few rounds, or too many for the cache's room.
    """
    require_rounds(rounds)
    if 2 + (rounds + 1) * STEPS > DECODE_CAPACITY:
        raise ValueError(f"rounds must be at most {(DECODE_CAPACITY - 2) // STEPS - 1}, got {rounds}")
    longest = max(case.context for case in cases) + DECODE_CAPACITY
    model = build_model(shape, longest, dtype, device)
    timed = time_cases(
        cases, lambda case: _too_large(model, case, device), lambda case: _bench_case(model, case, rounds)
    )
    return {
        "bench": "model",
        "shape": shape,
        **card(device),
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "steps": STEPS,
        **timed,
    }


def _too_large(model: PreTrainedModel, case: Case, device: torch.device) -> str | None:
    """Return why a case does not fit, or None if the full cache and two layers more do."""
    config: Any = model.config
    token = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    needed = case.batch * (case.context + DECODE_CAPACITY) * token * (config.num_hidden_layers + 2)
    free, _ = torch.cuda.mem_get_info(device)
    return f"needs {needed / 1e9:.1f} GB beside the weights, {free / 1e9:.1f} are free" if needed > free else None


def _bench_case(model: PreTrainedModel, case: Case, rounds: int) -> dict[str, Any]:
    first, absent = first_token(model, case, PROMPT_ROUNDS)
    absent = {f"first token of {name}": reason for name, reason in absent.items()}
    try:
        arms, missing = model_arms(model, case)
        missing |= check_arms(case, arms)
        captures = {name: partial(_captured, arm, case) for name, arm in arms.items() if name not in missing}
        graphs, failed = try_capture(captures, {"rocketkv"})
    finally:
        restore(model)
    if not set(graphs) - set(METHODS):
        raise CannotCaptureError("no dense arm can be captured")
    seconds = alternate({name: partial(event_seconds, replay, STEPS) for name, replay in graphs.items()}, rounds)
    methods = [name for name in METHODS if name in graphs]
    read = {name: cache_stats(arms[name].cache).total("step_bytes") for name in ("full", *methods)}
    return {
        "case": str(case),
        "batch": case.batch,
        "context": case.context,
        "token_budget": case.token_budget,
        "absent": absent | missing | failed,
        "clocks": clocks(model.device) if model.device.type == "cuda" else None,
        "first_token": first,
        **summary(case, seconds, step_weights(model), read),
    }


def _captured(arm: ModelArm, case: Case) -> Callable[[], Any]:
    """Return the replay of one captured step at the end of the prompt, checked against a plain step."""
    arm.ready()
    start = arm.token.clone()
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # PyTorch's own is not typed
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        arm.step()
        plain = arm.step().clone()
    torch.cuda.current_stream().wait_stream(aside)
    arm.rewind(start, case.context)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = arm.step()
    graph.replay()
    graph.replay()
    require_near_logits(f"case {case}: logits of a CUDA graph's second step", logits, plain)
    return graph.replay


def step_weights(model: PreTrainedModel) -> int:
    """Return the bytes of weights that a step reads: all but the embedding, of which it reads a row a token."""
    embedding = model.get_input_embeddings().weight
    return sum(weight.nbytes for weight in model.parameters() if weight is not embedding)


def summary(case: Case, seconds: dict[str, list[float]], weights: int, read: dict[str, int]) -> dict[str, Any]:
    """Return times, rates, ratios and goals of a case.

    Args:
        case: the case.
        seconds: of one step, by arm and round.
        weights: bytes of weights that a step reads.
        read: bytes of keys, values and index that it reads, of `full` and each method.
    """
    milliseconds = {name: spread(times, 1e3) for name, times in seconds.items()}
    methods = [name for name in METHODS if name in seconds]
    best = min((name for name in seconds if name not in METHODS), key=lambda name: milliseconds[name]["median"])
    speedup = {name: ratios(seconds[best], seconds[name]) for name in methods}
    ceiling = {name: (weights + read["full"]) / (weights + read[name]) for name in methods}
    goal = SPEEDUP_GOALS.get(case, SHORT_GOAL if case.context <= case.token_budget else None)
    found = []
    if goal is not None:
        what, got = "times the dense tokens a second, at least", speedup["rocketkv"]["median"]
        found.append({"what": what, "goal": goal, "got": got, "met": got >= goal})
    return {
        "milliseconds": milliseconds,
        "tokens_per_second": {name: 1e3 * case.batch / times["median"] for name, times in milliseconds.items()},
        "bytes": {"weights": weights, "dense": read["full"], **{name: read[name] for name in methods}},
        "byte_ceiling": ceiling,
        "best_dense": best,
        "speedup": speedup,
        "share_of_ceiling": {name: speedup[name]["median"] / ceiling[name] for name in methods},
        "goals": found,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result of a benchmark or check as text."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [f"{result['shape']}, {result['dtype']}; {result['device']['name']}; {versions}"]
    lines += [f"case {one['case']}: {', '.join(one['arms'])} agree" for one in result.get("checked", ())]
    for one in result.get("cases", ()):
        lines += ["", f"case {one['case']}"]
        for name, times in one["milliseconds"].items():
            rate, low, high = one["tokens_per_second"][name], times["min"], times["max"]
            lines.append(f"  {name:10} {times['median']:9.3f} ms ({low:.3f}-{high:.3f}) {rate:10.1f} tokens/s")
        for name, times in one["first_token"].items():
            lines.append(f"  first token, {name:10} {times['median']:9.1f} ms ({times['min']:.1f}-{times['max']:.1f})")
        lines += verdict_lines(one)
    lines += [f"left out: case {one['case']}: {one['reason']}" for one in result.get("left_out", ())]
    return "\n".join(lines)
