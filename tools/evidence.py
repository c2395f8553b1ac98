"""`make evidence`: measure and write every figure that the README quotes.

Needle prompts on a real model, memory, and both speed benchmarks. The figures go to docs/evidence.json and, as tables,
between the markers of README.md. An interrupted run resumes; finished parts run again only where the code has changed
or with `--fresh`.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rocketkv.config import RocketKVConfig
from rocketkv.environment import machine
from rocketkv.eval.bench.cpu import bench_attention
from rocketkv.eval.bench.decode import bench_decode
from rocketkv.eval.generate import measured_generate
from rocketkv.eval.intervals import wilson
from rocketkv.eval.journal import Journal
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import write_atomically
from rocketkv.eval.tasks.needle import found, needle_grid, needle_prompt
from rocketkv.hf.loading import load_model

ROOT = Path(__file__).resolve().parents[1]
JSON_FILE = ROOT / "docs" / "evidence.json"
README = ROOT / "README.md"
JOURNAL = ROOT / ".evidence" / "journal.jsonl"

NEEDLE_TOKENS, NEEDLE_COUNT, NEEDLE_SEED = 4096, 20, 1
NEEDLE_ARMS: dict[str, RocketKVConfig | None] = {
    "full cache": None,
    "rocketkv 512": RocketKVConfig(token_budget=512),
    "rocketkv 256": RocketKVConfig(token_budget=256),
    "streaming 512": RocketKVConfig(method="streaming", token_budget=512),
}
MEMORY_TOKENS, MEMORY_BUDGETS = 8064, (256, 512)

# Measures a part unless the journal has it.
Result = Callable[[str, Callable[[], Any]], Any]


def measure_needle(result: Result) -> dict[str, Any]:
    """Let every arm answer the same needle prompts."""
    model, tokenizer = load_model(None)
    prompts = needle_grid(tokenizer, tokens=NEEDLE_TOKENS, count=NEEDLE_COUNT, seed=NEEDLE_SEED)
    answers: dict[str, list[bool]] = {name: [] for name in NEEDLE_ARMS}
    ratios: dict[str, float] = {}

    def generate(text: str, config: RocketKVConfig | None) -> tuple[str, float]:
        generation = measured_generate(model, tokenizer, text, config)
        return generation.text, generation.stats.memory_ratio

    with Progress("needles", total=len(prompts) * len(NEEDLE_ARMS)) as progress:
        for number, prompt in enumerate(prompts):
            for name, config in NEEDLE_ARMS.items():
                text, ratios[name] = result(f"needle {number} {name}", partial(generate, prompt.text, config))
                answers[name].append(found(prompt.answer, text))
                progress.step()
    return {
        "tokens": NEEDLE_TOKENS,
        "prompts": len(prompts),
        "seed": NEEDLE_SEED,
        "right": {name: sum(right) for name, right in answers.items()},
        "interval": {name: wilson(sum(right), len(right)) for name, right in answers.items()},
        "memory_ratio": ratios,
        "answers": answers,
    }


def measure_memory() -> dict[str, Any]:
    """Count the bytes of keys, values and index after a prompt, against a full cache of the same tokens."""
    model, tokenizer = load_model(None)
    prompt = needle_prompt(tokenizer, tokens=MEMORY_TOKENS, depth=0.5, seed=NEEDLE_SEED)
    ratios = {}
    for budget in MEMORY_BUDGETS:
        stats = measured_generate(
            model, tokenizer, prompt.text, RocketKVConfig(token_budget=budget), new_tokens=2
        ).stats
        stored = sum(stats.total(name) for name in ("key_bytes", "value_bytes", "index_bytes"))
        ratios[str(budget)] = {
            "stored_ratio": stored / stats.total("full_bytes"),
            "step_ratio": stats.total("step_bytes") / stats.total("dense_step_bytes"),
            "full_mib": stats.total("full_bytes") / 2**20,
        }
    return {"tokens": prompt.tokens, "budgets": ratios}


def tables(evidence: dict[str, Any]) -> dict[str, str]:
    """Render the README's tables, by the name of their markers."""
    needle, memory, decode, attention = (evidence[name] for name in ("needle", "memory", "decode", "attention"))
    host = evidence["machine"]
    lines = ["| cache | right of {prompts} | 95 % interval | bytes of a full cache |".format(**needle), "|--|--|--|--|"]
    for name, right in needle["right"].items():
        low, high = needle["interval"][name]
        lines.append(f"| {name} | {right} | {low:.2f}-{high:.2f} | {needle['memory_ratio'][name]:.2f} |")
    needle_table = "\n".join(lines)
    lines = ["| | K, V and index, of a full cache | read by a decode step, of a dense one |", "|--|--|--|"]
    for budget, row in memory["budgets"].items():
        lines.append(f"| budget {budget} | {row['stored_ratio']:.3f} | {row['step_ratio']:.3f} |")
    memory_table = "\n".join(lines)
    lines = ["| | against | times as fast | min-max of rounds |", "|--|--|--|--|"]
    labels = {
        "decode": f"SmolLM2-135M decode step, {decode['context']} tokens, budget {decode['token_budget']}",
        "attention": f"attention layer, {attention['context']} tokens, budget {attention['token_budget']}",
    }
    for part, label in labels.items():
        for name, ratio in evidence[part]["speedup_over"].items():
            spread = f"{ratio['min']:.1f}-{ratio['max']:.1f}"
            lines.append(f"| {label} | {name} | {ratio['median']:.1f} | {spread} |")
    lines += ["", f"float32, {host['processor']}, {host['threads']} threads, torch {host['torch']}."]
    return {"needle": needle_table, "memory": memory_table, "speed": "\n".join(lines)}


def with_tables(text: str, evidence: dict[str, Any]) -> str:
    """Return a document with the tables between its markers `<!-- evidence: name -->` and `<!-- end -->`."""
    for name, table in tables(evidence).items():
        before, marker, rest = text.partition(f"<!-- evidence: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(
                f"the document has no markers '<!-- evidence: {name} -->' and '<!-- end -->' on lines of their own"
            )
        text = f"{before}{marker}{table}\n{end}{after}"
    return text


def _revision() -> str:
    """Return a hash of the measured code: the trees of library and harness, uncommitted changes included."""
    paths = ["rocketkv", "kernels", "eval"]
    trees = subprocess.run(["git", "ls-files", "-s", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    changes = subprocess.run(["git", "diff", "HEAD", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    return hashlib.sha256((trees.stdout + changes.stdout).encode()).hexdigest()[:16]


def main() -> int:
    """Measure the missing parts and write the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.fresh:
        Journal(JOURNAL).remove()
    journal, revision = Journal(JOURNAL), _revision()

    def result(name: str, measure: Callable[[], Any]) -> Any:
        return journal.result(f"{revision} {name}", measure)

    evidence = {
        "machine": machine(),
        "attention": result("attention", partial(bench_attention, context=32768, token_budget=1024)),
        "decode": result("decode", partial(bench_decode, None, context=None, token_budget=256)),
        "memory": result("memory", measure_memory),
        "needle": result("needle", partial(measure_needle, result)),
    }
    write_atomically(JSON_FILE, json.dumps(evidence, indent=1) + "\n")
    README.write_text(with_tables(README.read_text(encoding="utf-8"), evidence), encoding="utf-8")
    sys.stdout.write("\n\n".join(tables(evidence).values()) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
