"""A real model finds numbers hidden in 4K tokens: with its full cache, with a compressed one, not with the control."""

import pytest
import torch

from rocketkv import RocketKVConfig
from rocketkv.eval.evidence import NEEDLE_ARMS, NEEDLE_COUNT, NEEDLE_SEED, NEEDLE_TOKENS
from rocketkv.eval.measure import measured_generate
from rocketkv.eval.models import load_smollm2
from rocketkv.eval.needle import found, needle_grid

pytestmark = pytest.mark.real_model

# Spread over depths; all twenty are asked by `make evidence`.
ASKED = (0, 4, 8, 11, 15, 18)


@pytest.fixture(scope="module")
def right() -> dict[str, list[bool]]:
    model, tokenizer = load_smollm2()
    prompts = needle_grid(tokenizer, tokens=NEEDLE_TOKENS, count=NEEDLE_COUNT, seed=NEEDLE_SEED)
    arms: dict[str, RocketKVConfig | None] = {
        name: NEEDLE_ARMS[name] for name in ("full cache", "rocketkv 512", "streaming 512")
    }
    with torch.inference_mode():
        return {
            name: [
                found(prompts[i].answer, measured_generate(model, tokenizer, prompts[i].text, config).text)
                for i in ASKED
            ]
            for name, config in arms.items()
        }


def test_the_full_cache_finds_them(right: dict[str, list[bool]]) -> None:
    assert sum(right["full cache"]) >= len(ASKED) - 1


def test_rocketkv_loses_at_most_one(right: dict[str, list[bool]]) -> None:
    assert sum(right["rocketkv 512"]) >= sum(right["full cache"]) - 1


def test_a_window_alone_does_not_find_them(right: dict[str, list[bool]]) -> None:
    assert sum(right["streaming 512"]) <= 1
