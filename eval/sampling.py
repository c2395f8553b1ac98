"""Sampling of new tokens by the settings of a model's card, the same random numbers for every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .records import digest

# Setting, its class, and the value that changes nothing; in the order in which transformers applies them.
_PROCESSORS: Mapping[str, tuple[Any, float]] = {
    "repetition_penalty": (RepetitionPenaltyLogitsProcessor, 1.0),
    "temperature": (TemperatureLogitsWarper, 1.0),
    "top_k": (TopKLogitsWarper, 0),
    "top_p": (TopPLogitsWarper, 1.0),
    "min_p": (MinPLogitsWarper, 0.0),
}
_UNKNOWN: Mapping[str, Any] = {  # settings that change what is generated, with the value that does not
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "penalty_alpha": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": None,
}


def card_settings(config: GenerationConfig) -> dict[str, Any]:
    """Return the generation settings of a model's card (`generation_config.json`); empty: greedy.

    Raises:
        ValueError: the card has a setting that is not known here.
    """
    for name, neutral in _UNKNOWN.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            raise ValueError(
                f"--generation card knows {', '.join(_PROCESSORS)}; the model's card sets {name} to {value!r}: use"
                " --generation greedy"
            )
    sampled = bool(config.do_sample)
    found: dict[str, Any] = {"do_sample": True} if sampled else {}
    for name, (_, neutral) in _PROCESSORS.items():
        value = getattr(config, name, None)
        if value not in (None, neutral) and (sampled or name == "repetition_penalty"):
            found[name] = value
    return found


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        settings: see `card_settings`.
        prompt: tokens before the answer, which a repetition penalty counts.
        seed: of the random numbers, any value of JSON's types.
    """

    def __init__(self, settings: Mapping[str, Any], prompt: Sequence[int], seed: Any) -> None:
        chosen = [kind(settings[name]) for name, (kind, _) in _PROCESSORS.items() if name in settings]
        self._processors = LogitsProcessorList(chosen)
        self._sampled = bool(settings.get("do_sample", False))
        self._ids = list(prompt)
        # On the CPU, so that every device draws the same numbers.
        self._generator = torch.Generator().manual_seed(int(digest([seed]), 16) % 2**63)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next token [1, 1] int64 from logits [1, vocabulary]."""
        ids: Any = torch.tensor([self._ids])
        scores: Any = logits.float().cpu()
        scores = self._processors(ids, scores)
        if self._sampled:
            token: Tensor = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        self._ids.append(int(token))
        return token.to(logits.device)
