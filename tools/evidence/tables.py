"""Figures as Markdown tables, between markers of README.md and docs/evidence.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rocketkv.eval.methods import FULL

from .equal_memory import SHARES
from .measure import ARMS, BUDGETS, LONG, MEMORY_ARMS, METHODS, PRESS, SHORT, TASKS

TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma270m": "Gemma-3-270M"}
TASK_TITLES = {"needle": "one number in prose", "niah_multikey_1": "RULER multi-key, generated haystack"}
SUMMARY = (FULL, "rocketkv+:256", "rocketkv:256")
MIB = 2**20
PEAKS = ("added_prefill_bytes", "added_decode_bytes")
_EQUAL_MEMORY = f"""Each method at the largest budget t with which a compressed layer stores at most this share of a
full layer, in 16 bits, after {SHORT:,} tokens; "-": no budget does. Spare capacity for generated tokens is not counted,
unlike in the table above. A decode step of `rocketkv` and `rocketkv+` reads the bytes of t tokens, the others read all
that they store."""

Evidence = dict[str, Any]


def title(evidence: Evidence) -> str:
    """Return the name of the measured model."""
    name: str = evidence["setting"]["model"]
    return TITLES.get(name, name)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|--" * len(head) + "|", *lines[1:]])


def arm_title(arm: str) -> str:
    """Return an arm's name for a table."""
    method, _, budget = arm.rpartition(":")
    return "full cache" if arm == FULL else f"`{method}` at {budget}"


def summary(evidence: Evidence) -> str:
    """Return the README's table: memory, bytes read, speed and quality of some arms."""
    short, long = (evidence["bytes"][str(tokens)]["arms"] for tokens in (SHORT, LONG))
    mean, decode, arms = evidence["divergence"]["mean"], evidence["decode"], SUMMARY[1:]

    def row(label: str, full: str, shown: Sequence[str]) -> list[str]:
        return [label, full, *shown]

    def both(what: str) -> list[str]:
        digits = 2 if what == "stored" else 3
        return [f"{short[arm][what]:.{digits}f}, {long[arm][what]:.{digits}f}" for arm in arms]

    def faster(dtype: str) -> list[str]:
        steps = {name: times["median"] for name, times in decode[dtype]["milliseconds"].items()}
        own = [steps[arm.partition(":")[0]] for arm in arms]
        return [f"{steps['stock'] / step:.1f}, {steps['dense preallocated'] / step:.1f}" for step in own]

    peaks = {arm: evidence["memory"][str(LONG)].get(arm) for arm in SUMMARY}
    shown = [", ".join(_mib(peaks[arm][name]) for name in PEAKS) if peaks[arm] else "-" for arm in SUMMARY]
    rows = [
        row("share of a full cache stored, after 4K and 8K tokens", "1, 1", both("stored")),
        row("share of it read by a decode step", "1, 1", both("read")),
        row("peak memory above the weights: prompt of 8K, decoding after it; MiB", shown[0], shown[1:]),
        row(
            "decode steps: times as fast as stock, and as a preallocated dense cache; 8K, float32",
            "1",
            faster("float32"),
        ),
        row("the same in bfloat16", "1", faster("bfloat16")),
    ]
    for task, name in TASK_TITLES.items():
        part = evidence[task]["lengths"][str(SHORT)]
        rows.append(row(f"{name}: right answers, % of {part['prompts']} prompts; 4K", *_full_and(part, arms)))
    rows.append(row("KL to the full cache, in nats; 4K", "0", [f"{mean[arm]:.3f}" for arm in arms]))
    return table([f"{title(evidence)}", *map(arm_title, SUMMARY)], rows)


def by_model(models: Sequence[Evidence]) -> str:
    """Return the README's table of KL at equal bytes read, by budget and model, and the shares stored."""
    methods = ("rocketkv", "rocketkv+")
    heads = [f"{title(evidence)}: `{methods[0]}`" for evidence in models]
    rows = []
    for budget in BUDGETS:
        cells = []
        for evidence in models:
            for arm in (f"{name}:{budget}" for name in methods):
                stored = evidence["bytes"][str(SHORT)]["arms"][arm]["stored"]
                cells.append(f"{evidence['divergence']['mean'][arm]:.3f} ({stored:.2f})")
        rows.append([str(budget), *cells])
    return table(["budget", *(head for first in heads for head in (first, f"`{methods[1]}`"))], rows)


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:.0f}"


def _full_and(part: dict[str, Any], arms: Sequence[str]) -> tuple[str, list[str]]:
    """Return the score of the full cache, and those of other arms."""
    return f"{part['score'][FULL]:.0f}", [f"{part['score'][arm]:.0f}" for arm in arms]


def section(evidence: Evidence) -> str:
    """Return a section of docs/evidence.md: all tables of a model."""
    setting, host = evidence["setting"], evidence["machine"]
    where = host.get("gpu", f"{host['processor']}, {setting['threads']} threads")
    versions = f"torch {host['torch']}, transformers {host['transformers']}"
    steps = evidence["divergence"]["steps"]
    press = evidence.get("press")
    of_press = f" `{PRESS}`: kvpress {press['kvpress']} with transformers {press['transformers']}." if press else ""
    kl = f"KL to the full cache's next token in nats, mean over six texts of {SHORT:,} tokens and {steps} steps each."
    at_equal_memory = []
    if "equal_memory" in evidence:
        at_equal_memory = ["### Divergence at equal bytes stored", _EQUAL_MEMORY, equal_memory(evidence)]
    parts = [
        f"## {title(evidence)}",
        f"{where}, {versions}; needles and memory in {setting['dtype']}, seed {evidence['needle']['seed']}.",
        "### Needles",
        "Percent of the prompts with the right answer, 95 % interval in brackets.",
        *(needles(evidence, task) for task in TASKS),
        "### Divergence and bytes",
        f"{kl} *Stored*, *read*: shares of a full cache's bytes.{of_press}",
        divergence(evidence),
        *at_equal_memory,
        "### Memory and time by prompt length",
        "Peaks above what the process held before, and bytes of the cache, in MiB; one prompt and 32 tokens.",
        memory(evidence),
    ]
    if "decode" in evidence:
        parts.append("### Decode steps on the CPU")
        parts += ["Medians of alternating rounds, least and most in brackets.", speed(evidence)]
    return "\n\n".join(parts)


def needles(evidence: Evidence, task: str) -> str:
    """Return the table of a needle task."""
    lengths = evidence[task]["lengths"]
    rows = []
    for arm in ARMS[task]:
        shown = []
        for part in lengths.values():
            low, high = part["interval"][arm]
            shown.append(f"{part['score'][arm]:.0f} ({low:.0f}-{high:.0f})")
        rows.append([arm_title(arm), *shown])
    heads = [f"{TASKS[task][int(near)]:,} tokens, {part['prompts']} prompts" for near, part in lengths.items()]
    return table([TASK_TITLES[task], *heads], rows)


def divergence(evidence: Evidence) -> str:
    """Return the table of KL and bytes by method and budget."""
    mean, by_length = evidence["divergence"]["mean"], evidence["bytes"]
    rows = []
    for budget in BUDGETS:
        for method in (*METHODS, PRESS):
            arm = f"{method}:{budget}"
            if arm not in mean:
                continue
            shown = [f"{mean[arm]:.3f}"]
            for tokens in (SHORT, LONG):
                cost = by_length[str(tokens)]["arms"].get(arm)
                shown += [f"{cost['stored']:.2f}", f"{cost['read']:.3f}"] if cost else ["-", "-"]
            rows.append([arm_title(arm), *shown])
    return table(["", "KL", *(f"{what}, {tokens:,}" for tokens in (SHORT, LONG) for what in ("stored", "read"))], rows)


def equal_memory(evidence: Evidence) -> str:
    """Return the table of KL at equal bytes stored."""
    rows = []
    for method, by_share in evidence["equal_memory"].items():
        cells = [by_share.get(str(share)) for share in SHARES]
        rows.append([f"`{method}`", *(f"{cell['kl']:.3f} ({cell['budget']})" if cell else "-" for cell in cells)])
    return table(["KL (t)", *(f"1/{share} of a full cache" for share in SHARES)], rows)


def memory(evidence: Evidence) -> str:
    """Return the table of memory and time by prompt length."""
    rows = []
    for tokens, arms in evidence["memory"].items():
        for arm in MEMORY_ARMS:
            found = arms[arm]
            peaks = [found[name] for name in (*PEAKS, "prefill_kv_bytes")]
            rows.append(
                [
                    f"{int(tokens):,}",
                    arm_title(arm),
                    *map(_mib, peaks),
                    f"{found['first_token_seconds']:.2f}",
                    f"{1000 * found['step_seconds']:.0f}",
                ]
            )
    head = ["prompt", "", "peak, prompt", "peak, decoding", "cache after the prompt", "first token, s", "step, ms"]
    return table(head, rows)


def speed(evidence: Evidence) -> str:
    """Return the table of decode steps and of one attention layer."""
    rows = []
    for dtype, part in evidence["decode"].items():
        label = f"model, {part['context']:,} tokens, t = {part['token_budget']}, {dtype}"
        rows += [[label, *_timed(name, times)] for name, times in part["milliseconds"].items()]
    part = evidence["attention"]
    label = f"one layer, {part['context']:,} tokens, t = {part['token_budget']}, {part['dtype']}"
    rows += [[label, *_timed(name, times)] for name, times in part["milliseconds"].items()]
    return table(["", "", "milliseconds"], rows)


def _timed(name: str, times: dict[str, float]) -> tuple[str, str]:
    digits = 2 if times["median"] < 10 else 0
    return name, f"{times['median']:.{digits}f} ({times['min']:.{digits}f}-{times['max']:.{digits}f})"


def with_part(text: str, name: str, part: str) -> str:
    """Return a document with a part between its markers `<!-- evidence: name -->` and `<!-- end -->`.

    Raises:
        ValueError: the document has no such markers.
    """
    before, marker, rest = text.partition(f"<!-- evidence: {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise ValueError(
            f"the document has no markers '<!-- evidence: {name} -->' and '<!-- end -->' on lines of their own"
        )
    return f"{before}{marker}{part}\n{end}{after}"
