"""docs/models.md: the rows as Markdown, and read back."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from .check import Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
VERSION = re.compile(r"transformers (\d+\.\d+\.\d+)")
LINE = re.compile(r"^\| `(?P<kind>\w+)` \| (?P<types>[^|]*) \| (?P<result>[^|]*) \| (?P<note>.*) \|$", re.MULTILINE)
HEAD = """# Supported models

`rocketkv.patch` works through transformers' attention interface, without code for single models. So this page is not a
list that somebody keeps: `python tools/support_table` writes it. It builds a tiny random model of every class, from the
default configuration with fewer layers, heads, experts and words, and compares it with itself, in float32 on a CPU:

- within the budget, patched and stock logits are the same;
- beyond the budget, for `rocketkv` and `rocketkv+`, it stores fewer tokens than the prompt has, with finite logits;
- after `unpatch` its logits are the former ones, bit for bit.

It says nothing of quality: [results](results.md) and [beyond the paper](beyond.md) do, for two models.

| result | meaning |
|--|--|
| yes | all layers are compressed |
| partly | the layers of full attention are compressed; the others, with a sliding window or a state, stay as they are |
| no effect | the patch changes nothing, since no layer is of full attention alone, or no cache is used |
| refused | `patch` raises a `ValueError` with this reason |
| not built | the script could not build a tiny model, or the stock model did not generate from it |
| fails | a fault of this library |

Numbers of layers are those of the default configuration, unless the row names another. A checkpoint of the same class
may differ: `rocketkv.plan(config, context=32768)` counts its layers, or says why it is refused, without its weights.
"""
CAUSAL = """
## Causal language models

"""
VISION = """
## Models that read images

All classes of `AutoModelForImageTextToText`, with prompts of text alone: the language model within is patched, the
vision part is not. A prompt with an image is tested for Gemma 3 (`tests/hf/test_hybrids.py`).

"""
QUANTIZED = """
## Weights in 4 or 8 bits

RocketKV works on keys and values, after the layers whose weights are quantized. A tiny Llama on a CPU:

"""


def page(causal: Mapping[str, Row], vision: Mapping[str, Row], quantized: Iterable[Row], versions: str) -> str:
    """Return the page.

    Args:
        causal: row of each model type of a causal class.
        vision: row of each model type that reads images.
        quantized: rows of the schemes of quantization.
        versions: what the rows were made with.
    """
    parts = [HEAD, f"\nMade with {versions}: {counts(causal)} of {len(by_class(causal))} causal classes.\n"]
    parts += [CAUSAL, class_table(causal), VISION, class_table(vision), QUANTIZED]
    parts += [table(("package", "result", "reason"), [(row.kind, row.result, row.note) for row in quantized])]
    return "".join(parts)


def by_class(rows: Mapping[str, Row]) -> dict[Row, list[str]]:
    """Return model types by their row, in the order of the classes; layers count only where some are not compressed."""
    found: dict[Row, list[str]] = defaultdict(list)
    for model_type, row in sorted(rows.items(), key=lambda item: (item[1].kind.lower(), item[0])):
        found[row if row.result == "partly" else Row(row.kind, row.result, note=row.note)].append(model_type)
    return found


def counts(rows: Mapping[str, Row]) -> str:
    """Return how many classes there are of each result."""
    return ", ".join(
        f"{count} {result}" for result, count in Counter(row.result for row in by_class(rows)).most_common()
    )


def class_table(rows: Mapping[str, Row]) -> str:
    """Return the table of some model types, one line for those of a class with the same result."""
    lines = []
    for row, types in by_class(rows).items():
        layers = [f"{row.compressed} of {row.layers} layers"] if row.result == "partly" else []
        lines.append((f"`{row.kind}`", ", ".join(types), row.result, ", ".join(filter(None, (*layers, row.note)))))
    return table(("class", "model types", "result", "layers, reason"), lines)


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    rows = [head, *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    text = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([text[0], "|", "--|" * len(head), "\n", *text[1:]])


def read(text: str) -> tuple[str, dict[str, tuple[str, str, str]]]:
    """Return the version of transformers, and class, result and reason of each model type of the causal table."""
    version = VERSION.search(text)
    if version is None:
        raise ValueError(f"{PAGE} names no version of transformers; write it anew by `python tools/support_table`")
    section = text.split(CAUSAL)[1].split(VISION)[0]
    found = {}
    for line in LINE.finditer(section):
        for model_type in line["types"].split(", "):
            found[model_type] = line["kind"], line["result"], line["note"]
    return version[1], found
