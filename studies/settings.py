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
    dtype: str = option("auto", "of the weights; auto: float32 on a CPU", choices=("auto", "float32", "bfloat16"))
    device: str = option("cpu", "cpu, cuda, cuda:1")
    seed: int = option(0, "of the texts")

    @property
    def weights(self) -> tuple[str, str]:
        """Model and dtype, for the keys of a journal."""
        return self.model, self.dtype


def journal_of(folder: Path) -> Journal:
    """Return the journal of a study's folder, from which an interrupted run resumes."""
    return Journal(folder / "journal.jsonl")
