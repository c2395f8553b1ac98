"""Settings of a study: a dataclass whose fields are options of the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rocketkv.eval.journal import Journal
from rocketkv.hf.loading import SMOLLM2


def option(default: Any, text: str, **arguments: Any) -> Any:
    """Return a field with a default, a help text and further arguments of `add_argument`; a tuple takes several."""
    return field(default=default, metadata={"help": text, **arguments})


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Options of every study."""

    model: str = option(SMOLLM2, "a hub name, a local folder, or smollm2")
    seed: int = option(0, "of the texts")


def journal_of(folder: Path) -> Journal:
    """Return the journal of a study's folder, from which an interrupted run resumes."""
    return Journal(folder / "journal.jsonl")
