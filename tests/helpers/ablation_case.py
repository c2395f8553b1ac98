"""What the tests of the ablation run on: two texts of random tokens, a tiny model's layers, and their steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rocketkv.eval.measures.kl import Window
from rocketkv.eval.progress import Progress
from studies.ablation.capture import Layer, Settings, capture
from studies.ablation.fit import WIDEST_WINDOW, Case
from tiny import prompt

PROMPT, STEPS, BUDGET = 500, 4, 100
SETTINGS = Settings(model="tiny", prompt=PROMPT, steps=STEPS)
CASE = Case(prompt=PROMPT, steps=STEPS, head_dim=16, budget=BUDGET, group=2)


def windows() -> list[Window]:
    return [Window(str(seed), prompt(PROMPT + STEPS, seed=seed)[0].tolist(), {}) for seed in (0, 1)]


def captured(model: Any) -> list[Layer]:
    with Progress("", total=1) as progress:
        return capture(model, windows(), SETTINGS, progress)


def step_at(layer: Layer, step: int) -> tuple[Tensor, Tensor, Tensor]:
    return layer.query[:, :, WIDEST_WINDOW + step], layer.key[:, :, PROMPT + step], layer.value[:, :, PROMPT + step]
