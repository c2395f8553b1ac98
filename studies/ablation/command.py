"""`python -m studies ablation`: each part of `rocketkv+` at equal bytes read.

`--joined 2` measures attention errors alone, on heads of twice the width that join the model's own. `--multi-query`
measures everything on layers of the same functions with one KV head, as wide as the layer's heads together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocketkv.eval.progress import Progress

from ..texts import KINDS, file_texts, made_texts
from .arms import ARMS, BY_NAME
from .capture import Settings
from .report import document
from .report import tables as markdown
from .run import measure

KINDS_OF_ABLATION = tuple(kind for kind in KINDS if kind not in ("dialogue", "lists"))

__all__ = ["Settings", "markdown", "study"]


def study(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Measure the arms and budgets that the folder's journal does not have.

    Raises:
        OSError: a text cannot be read.
        ValueError: an arm is unknown, or a text too short.
    """
    unknown = [name for name in settings.arms if name not in BY_NAME]
    if unknown:
        raise ValueError(f"there are no arms {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    length = settings.prompt + settings.steps
    if settings.texts:
        windows = file_texts(tokenizer, [Path(path) for path in settings.texts], length, settings.seed)
    else:
        windows = made_texts(tokenizer, length, settings.seed, KINDS_OF_ABLATION)
    arms = [arm for arm in ARMS if not settings.arms or arm.name in settings.arms]
    with Progress("beginning", total=len(arms) * len(settings.budgets)) as progress:
        records = measure(model, windows, settings, arms, settings.budgets, folder, progress)
    return document(windows, records)
