"""`make evidence`, or `python tools/evidence --model FOLDER`: measure the figures of README.md and docs/evidence.md.

Needles, divergence, bytes, memory and time, with intervals. The figures of a model go to docs/evidence/MODEL.json, and
tables and pictures are made from these files. An interrupted run resumes; finished parts run again only where the code
has changed or with `--fresh`. `--render` measures nothing. `--kvpress-python` adds a press of kvpress, run by a Python
whose transformers kvpress supports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rocketkv.eval.bench.cpu import bench_attention
from rocketkv.eval.bench.decode import bench_decode
from rocketkv.eval.journal import Journal
from rocketkv.eval.records import write_atomically
from rocketkv.hf.loading import SMOLLM2

from .equal_memory import equal_memory, equal_memory_studies
from .measure import (
    BUDGETS,
    LONG,
    MEMORY_ARMS,
    MEMORY_LENGTHS,
    METHODS,
    PRESS,
    SHORT,
    TASKS,
    Setting,
    decoder_config,
    described,
    divergence,
    divergence_study,
    head_dim_of,
    measure_bytes,
    measure_memory,
    needle_study,
    needles,
)
from .picture import draw
from .studies import press_versions, run_studies
from .tables import by_model, section, summary, with_part

_ROOT = Path(__file__).resolve().parents[2]
FIGURES, PAGE, README = _ROOT / "docs" / "evidence", _ROOT / "docs" / "evidence.md", _ROOT / "README.md"
PROMPTS = {SHORT: 100, LONG: 30}


def revision() -> str:
    """Return a hash of the measured code: the modules of library, harness and studies, uncommitted changes included."""
    paths = [f"{folder}/*.py" for folder in ("rocketkv", "kernels", "eval", "studies")]
    trees = subprocess.run(
        ["git", "ls-files", "-s", "--", *paths], cwd=_ROOT, capture_output=True, text=True, check=True
    )
    changes = subprocess.run(
        ["git", "diff", "HEAD", "--", *paths], cwd=_ROOT, capture_output=True, text=True, check=True
    )
    return hashlib.sha256((trees.stdout + changes.stdout).encode()).hexdigest()[:16]


def measure(setting: Setting, folder: Path, kvpress_python: str | None) -> dict[str, Any]:
    """Return all figures of a model; parts that the folder's journals have are not measured again.

    On a CPU studies run side by side; what is timed runs after them, alone.
    """
    asked = {task: {near: needle_study(folder, setting, task, near) for near in TASKS[task]} for task in TASKS}
    diverging = [divergence_study(folder / "divergence", setting, METHODS, BUDGETS)]
    if kvpress_python is not None:
        diverging.append(divergence_study(folder / "divergence-press", setting, (PRESS,), BUDGETS, kvpress_python))
    config = decoder_config(setting.model)
    if kvpress_python is not None and set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise ValueError(f"a press prunes sliding-window layers too, which {setting.model} has: no --kvpress-python")
    versions = None if kvpress_python is None else press_versions(kvpress_python)
    head_dim = head_dim_of(config)
    at_equal_memory = equal_memory_studies(folder, setting, head_dim, kvpress_python)
    studies = [study for by_length in asked.values() for study in by_length.values()]
    run_studies([*studies, *diverging, *at_equal_memory.values()], setting.threads if setting.device == "cpu" else 1)
    scores = {
        task: needles(setting, task, {near: study.result for near, study in by_length.items()})
        for task, by_length in asked.items()
    }
    journal = Journal(folder / "journal.jsonl")

    def memory(arm: str, tokens: int) -> Any:
        return journal.result(f"memory {arm} {tokens}", partial(measure_memory, setting, arm, tokens))

    evidence = {
        **described(setting),
        **({} if versions is None else {"press": versions}),
        **scores,
        "divergence": divergence([study.result for study in diverging]),
        "equal_memory": equal_memory({method: study.result for method, study in at_equal_memory.items()}, head_dim),
        "bytes": {
            str(tokens): journal.result(f"bytes {tokens}", partial(measure_bytes, setting, tokens))
            for tokens in (SHORT, LONG)
        },
        "memory": {str(tokens): {arm: memory(arm, tokens) for arm in MEMORY_ARMS} for tokens in MEMORY_LENGTHS},
    }
    if setting.device != "cpu":
        return evidence
    name = None if setting.model == SMOLLM2 else setting.model
    return {
        **evidence,
        "decode": {
            dtype: journal.result(
                f"decode {dtype}", partial(bench_decode, name, context=None, token_budget=256, dtype=dtype)
            )
            for dtype in ("float32", "bfloat16")
        },
        "attention": journal.result("attention", partial(bench_attention, context=32768, token_budget=1024)),
    }


def render() -> None:
    """Write tables and pictures from the files of all models."""
    models = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FIGURES.glob("*.json"))}
    first = models.pop(SMOLLM2)
    sections = []
    for name, evidence in {SMOLLM2: first, **models}.items():
        draw(evidence, FIGURES / f"{name}.svg")
        head, _, rest = section(evidence).partition("\n\n")
        sections.append(f"{head}\n\n![KL and bytes stored against the budget](evidence/{name}.svg)\n\n{rest}")
    parts = (
        (README, "summary", summary(first)),
        (README, "by model", by_model([first, *models.values()])),
        (PAGE, "models", "\n\n".join(sections)),
    )
    for path, part, text in parts:
        path.write_text(with_part(path.read_text(encoding="utf-8"), part, text), encoding="utf-8")


def main() -> int:
    """Measure the missing parts and write the figures; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python tools/evidence", description=(__doc__ or "").split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--model", default=SMOLLM2, help="a hub name or a folder (default smollm2)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights, but for divergence on a CPU")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, and studies at a time (default 2)")
    for tokens, count in PROMPTS.items():
        parser.add_argument(
            f"--prompts-{tokens}", type=int, default=count, metavar="N", help=f"of that length (default {count})"
        )
    parser.add_argument(
        "--kvpress-python", metavar="PATH", help="a Python with kvpress and this checkout's rocketkv[demo]"
    )
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--render", action="store_true", help="write tables and pictures from the files of figures")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # so that the studies are stopped, too
    if not args.render:
        prompts = {tokens: getattr(args, f"prompts_{tokens}") for tokens in PROMPTS}
        setting = Setting(model=args.model, dtype=args.dtype, device=args.device, threads=args.threads, prompts=prompts)
        name = Path(args.model).name
        folder = _ROOT / ".evidence" / revision() / name
        if args.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            evidence = {"revision": revision(), **measure(setting, folder, args.kvpress_python)}
        except (ValueError, RuntimeError, OSError) as error:
            sys.stderr.write(f"{parser.prog}: error: {error}\n")
            return 1
        write_atomically(FIGURES / f"{name}.json", json.dumps(evidence, indent=1) + "\n")
    render()
    sys.stdout.write(f"written: {FIGURES}, {PAGE}, {README}\n")
    return 0
