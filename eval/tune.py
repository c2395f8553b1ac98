"""The largest `max_error` whose decode divergence stays within a target, and a certificate from held-out windows.

A window of a text is a prompt and a continuation, teacher-forced, as in `measures.kl`. The first half of each text is
for calibration, the second half is held out; no two windows overlap. A candidate is within the target if the upper end
of the 95 % interval of its mean KL over the calibration windows is. The held-out windows see the chosen one alone.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._version import __version__
from ..config import RocketKVConfig
from ..hf.cache import cache_stats
from ..hf.tuned import fingerprint, sealed
from ..state.stats import CacheStats
from .intervals import at_least, mean_interval
from .journal import Journal
from .measures.kl import Window, divergence, following, start_tokens, text_tokens
from .methods import Compressed, Full, Method
from .prefill import ReadPrompt, read_prompt, start
from .progress import Progress
from .records import digest

VERSION = 1
LADDER = (0.4, 0.28, 0.2, 0.14, 0.1, 0.07, 0.05, 0.035, 0.025)  # candidates for max_error, largest first

# Shorter prompts are not compressed with max_error (state/fit.py), so there would be nothing to choose.
LEAST_PROMPT = 128

# Keys, values and log-probabilities of prompts that stay in memory for the next candidate; others are read again.
KEPT_BYTES = 4 * 2**30

# A small candidate may leave layers uncompressed: here that shows in the bytes, and is no cause for concern.
_UNCOMPRESSED = "RocketKV: no budget up to"


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """Settings of the measurement, and the target.

    Attributes:
        model: name of the model, for the file alone.
        target_kl: largest mean KL(full || method), in nats a token.
        method: a method that ranks tokens by attention.
        prompt: tokens of a prompt.
        steps: tokens that follow it, of which all but the first count, as in task `kl`.
        windows: of all texts together, half of them for calibration.
        seed: of the windows' places.

    Raises:
        ValueError: a number is too small, or the method takes no `max_error`.
    """

    model: str
    target_kl: float
    method: str = "rocketkv+"
    prompt: int = 2048
    steps: int = 32
    windows: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.target_kl < float("inf"):
            raise ValueError(f"target_kl must be a number above 0, in nats a token, got {self.target_kl}")
        if self.prompt < LEAST_PROMPT:
            raise ValueError(
                f"prompt must be at least {LEAST_PROMPT} tokens, got {self.prompt}; shorter ones are not compressed"
            )
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, of which all but the first count, got {self.steps}")
        if self.windows < 4 or self.windows % 2:
            raise ValueError(f"windows must be even and at least 4, half of them held out, got {self.windows}")
        self.config(LADDER[0])

    def config(self, max_error: float) -> RocketKVConfig:
        """Return the settings of a candidate."""
        return RocketKVConfig(method=self.method, max_error=max_error)


class Text(NamedTuple):
    """A text and the name under which the file lists it."""

    name: str
    content: str


class Measured(NamedTuple):
    """A candidate on some windows.

    Attributes:
        max_error: the candidate.
        kl: mean KL(full || method) of each window, in nats a token.
        stored_share: bytes of each window's cache at its end, as a share of a full cache's.
    """

    max_error: float
    kl: list[float]
    stored_share: list[float]

    def figures(self) -> dict[str, Any]:
        """Return the candidate, its means and the 95 % interval of the mean KL, as JSON values."""
        return {
            "max_error": self.max_error,
            "mean_kl": fmean(self.kl),
            "interval": list(mean_interval(self.kl, percent=False) or ()),
            "stored_share": fmean(self.stored_share),
        }


class Tuned(NamedTuple):
    """The result of `tune`.

    Attributes:
        calibration: figures of each candidate that was measured, largest `max_error` first.
        document: the file's, sealed; None if no candidate is within the target.
    """

    calibration: list[dict[str, Any]]
    document: dict[str, Any] | None


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    settings: TuneSettings,
    journal: Journal,
) -> Tuned:
    """Find the largest candidate within the target on the calibration windows, and measure it on those held out.

    Args:
        model: a model to which no method is attached.
        tokenizer: its tokenizer.
        texts: see `cut_windows`.
        settings: settings of the measurement.
        journal: keeps the figures of every window and candidate; a later call with the same journal resumes.

    Raises:
        ValueError: see `cut_windows` and `rocketkv.hf.tuned.fingerprint`.
        ImportError: scipy is not installed.
    """
    calibration, held_out = cut_windows(tokenizer, texts, settings)
    measure = Measurer(model, settings, journal)
    tried: dict[float, dict[str, Any]] = {}
    with Progress("beginning", total=len(LADDER).bit_length() * len(calibration) + len(held_out)) as progress:

        def within(max_error: float) -> bool:
            tried[max_error] = measure(calibration, max_error, progress).figures()
            return bool(tried[max_error]["interval"][1] <= settings.target_kl)

        chosen = largest_within(LADDER, within)
        measure.forget()
        found = None if chosen is None else measure(held_out, chosen, progress)
    figures = [tried[max_error] for max_error in sorted(tried, reverse=True)]
    if found is None:
        return Tuned(figures, None)
    document = {
        "rocketkv": __version__,
        "model": measure.model_mark,
        "settings": asdict(settings.config(found.max_error)),
        "target_kl": settings.target_kl,
        "measured_with": {
            **{name: value for name, value in asdict(settings).items() if name != "target_kl"},
            **measure.place,
            "texts": [
                {"name": text.name, "sha256": hashlib.sha256(text.content.encode()).hexdigest()} for text in texts
            ],
        },
        "calibration": {"windows": len(calibration), "candidates": figures},
        "certificate": certificate(found, settings.target_kl),
    }
    return Tuned(figures, sealed(document))


def cut_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], settings: TuneSettings
) -> tuple[list[Window], list[Window]]:
    """Return windows for calibration, from the first half of each text, and held-out ones, from the second half.

    Each text gives as many windows as the others, or one more. Its halves are divided into as many parts of equal
    length as they give windows; a window lies anywhere in its part, so windows never overlap.

    Args:
        tokenizer: the model's tokenizer.
        texts: different texts with different names.
        settings: lengths and counts.

    Raises:
        ValueError: there are no texts, more than half the windows, or two alike; or one is too short.
    """
    half = settings.windows // 2
    if not 1 <= len(texts) <= half:
        raise ValueError(
            f"texts must be from 1 to {half}, half the windows, got {len(texts)}; join some or ask for more windows"
        )
    if min(len(set(column)) for column in zip(*texts, strict=True)) < len(texts):
        raise ValueError(
            f"texts must have different names and contents, got {', '.join(text.name for text in texts)}; windows of "
            "the same text would be both for calibration and held out"
        )
    start = start_tokens(tokenizer)
    room = settings.prompt + settings.steps - len(start)
    each, more = divmod(half, len(texts))
    windows: tuple[list[Window], list[Window]] = ([], [])
    for place, text in enumerate(texts):
        count = each + (place < more)
        tokens = text_tokens(tokenizer, text.content)
        part = len(tokens) // (2 * count)
        if part < room:
            raise ValueError(
                f"{text.name} must have at least {2 * count * room} tokens for {2 * count} windows of {room}, got "
                f"{len(tokens)}; give a longer text, or lower prompt, steps or windows"
            )
        for number in range(2 * count):
            rng = random.Random(f"tune {settings.seed} {text.name} {number}")
            offset = number * part + rng.randint(0, part - room)
            made = Window(f"{text.name} {offset}", start + tokens[offset : offset + room], {"text": text.name})
            windows[number >= count].append(made)
    return windows


def largest_within(ladder: Sequence[float], within: Callable[[float], bool]) -> float | None:
    """Return the largest candidate within the target by bisection, or None.

    It asks of about log2 of the candidates, the returned one among them. If a larger candidate may be within the target
    where a smaller one is not, the returned one need not be the largest.

    Args:
        ladder: candidates, largest first.
        within: whether a candidate is within the target.
    """
    low, high = 0, len(ladder)  # the answer's place; `len(ladder)`: there is none
    while low < high:
        middle = (low + high) // 2
        if within(ladder[middle]):
            high = middle
        else:
            low = middle + 1
    return None if low == len(ladder) else ladder[low]


def certificate(held_out: Measured, target_kl: float) -> dict[str, Any]:
    """Return the certificate of a candidate from windows that had no part in its choice, as JSON values.

    `within_target` is the number of windows whose mean KL is at most the target. `share_at_least` is the one-sided 95 %
    lower bound of the share of such windows (Clopper and Pearson).
    """
    within = sum(kl <= target_kl for kl in held_out.kl)
    figures = held_out.figures()
    return {
        "windows": len(held_out.kl),
        "within_target": within,
        "share_at_least": at_least(within, len(held_out.kl)),
        "confidence": 0.95,
        **{name: figures[name] for name in ("mean_kl", "interval", "stored_share")},
        "largest_kl": max(held_out.kl),
    }


class _Read(NamedTuple):
    """A window's prompt, and the full cache's log-probabilities [steps, vocabulary] float32."""

    shared: ReadPrompt
    logprobs: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both, without the layers that no method changes."""
        return self.logprobs.nbytes + self.shared.nbytes


class Measurer:
    """Measures candidates on windows; a prompt that is in memory or a figure in the journal is not made again.

    Attributes:
        model_mark: the model's fingerprint.
        place: dtype, device and versions, on which the figures depend too.
    """

    def __init__(self, model: PreTrainedModel, settings: TuneSettings, journal: Journal) -> None:
        self._model, self._settings, self._journal = model, settings, journal
        self._read: dict[str, _Read] = {}
        self.model_mark = fingerprint(model)
        self.place = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "attention": model.config._attn_implementation,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def __call__(self, windows: Sequence[Window], max_error: float, progress: Progress) -> Measured:
        """Measure a candidate on every window."""
        config = self._settings.config(max_error)
        rows = []
        for number, window in enumerate(windows, 1):
            progress.say(f"max_error {max_error}: window {number} of {len(windows)}")
            key = digest(
                [VERSION, __version__, self.model_mark, self.place, asdict(config), self._settings.steps, window.ids]
            )
            rows.append(self._journal.result(key, partial(self._figures, window, config)))
            progress.step()
        return Measured(max_error, *(list(column) for column in zip(*rows, strict=True)))

    def forget(self) -> None:
        """Free the prompts in memory."""
        self._read.clear()

    def _figures(self, window: Window, config: RocketKVConfig) -> tuple[float, float]:
        """Return the mean KL of a window and the share of a full cache that is stored at its end."""
        read = self._read.get(window.id) or self._prefill(window)
        continuation = window.ids[self._settings.prompt :]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_UNCOMPRESSED)
            logprobs, stats = self._continued(Compressed(config), read.shared, continuation)
        return divergence(read.logprobs, logprobs, continuation)["kl"], stats.memory_ratio

    def _prefill(self, window: Window) -> _Read:
        """Read a window's prompt, and keep it if there is room."""
        prompt, continuation = window.ids[: self._settings.prompt], window.ids[self._settings.prompt :]
        shared = read_prompt(self._model, [prompt])
        read = _Read(shared, self._continued(Full(), shared, continuation)[0])
        # The first ones stay: of windows that are visited in turns, the least recently used is needed next.
        if sum(kept.nbytes for kept in self._read.values()) + read.nbytes <= KEPT_BYTES:
            self._read[window.id] = read
        return read

    def _continued(self, method: Method, shared: ReadPrompt, continuation: Sequence[int]) -> tuple[Tensor, CacheStats]:
        """Return the log-probabilities [steps, vocabulary] float32 of each token of a continuation, and the cache's."""
        with method.attached(self._model):
            loop = start(self._model, method, shared)
            rows = torch.cat(list(following(loop, continuation)))
        return rows, cache_stats(loop.cache)
