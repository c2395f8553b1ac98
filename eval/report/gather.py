"""All content of a report, computed once for every output format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..records import Record
from .arms import MODES, length_text
from .breakdowns import breakdowns
from .depths import DepthMap, depth_maps
from .examples import Prompts, TaskExamples, examples_of
from .failures import Failure, defects, failures
from .load import Results
from .provenance import Provenance, provenance
from .sections import LATENCY, Section, sections
from .tables import Table


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of a report.

    Attributes:
        facts: name and text, for its head.
        sections: the comparisons.
        maps: needle scores by depth and length.
        examples: of each section, the examples of its tasks.
        breakdowns: title and table of scores by length, mode and category.
        failures: errors of the cells without a result.
        provenance: the origin of the records.
    """

    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    maps: tuple[DepthMap, ...]
    examples: tuple[tuple[TaskExamples, ...], ...]
    breakdowns: tuple[tuple[str, Table], ...]
    failures: tuple[Failure, ...]
    provenance: Provenance


def gather(records: Sequence[Record], prompts: Prompts | None = None, results: Results | None = None) -> Report:
    """Compute the content of a report.

    Args:
        records: of the cells.
        prompts: the ends of the prompts, see `prompt_ends`; None: examples have no prompts.
        results: what is damaged or missing in their folder; None: nothing.

    Raises:
        ImportError: scipy is not installed.
    """
    cells = [record["cell"] for record in records]
    asked = [record for record in records if record["cell"]["task"] != LATENCY]
    complete = [record for record in asked if record["status"] == "complete"]
    counts = sorted({len(record["samples"]) for record in complete if record["samples"]}) or [0]
    lengths = sorted({cell["length"] for cell in cells if cell["length"]})
    own = [length_text(None)] if any(cell["length"] is None for cell in cells) else []
    facts = (
        ("Model", ", ".join(sorted({f"{cell['model']} ({cell['dtype']})" for cell in cells}))),
        ("Mode", ", ".join(name for mode, name in MODES.items() if any(cell["mode"] == mode for cell in cells))),
        ("Tasks", ", ".join(sorted({record["cell"]["task"] for record in asked})) or LATENCY),
        ("Lengths", ", ".join([*map(length_text, lengths), *own])),
        ("Samples", " to ".join(map(str, sorted({counts[0], counts[-1]}))) + " per task and method"),
        ("Date", max(record["provenance"]["created"] for record in records)[:10]),
    )
    compared = tuple(sections(records))
    return Report(
        facts=facts,
        sections=compared,
        maps=tuple(depth_maps(records)),
        examples=tuple(examples_of(compared, prompts or {})),
        breakdowns=tuple(breakdowns(compared)),
        failures=(*failures(records), *(defects(results) if results else ())),
        provenance=provenance(records, results.quarantined if results else ()),
    )
