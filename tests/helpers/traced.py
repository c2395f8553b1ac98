"""A run of a tiny model, traced, and made-up texts of its tokens."""

from __future__ import annotations

import rocketkv
from rocketkv.state.trace import Trace
from tiny import SMALL, build, greedy, prompt

PROMPT = 80
NEW_TOKENS = 6


def traced() -> Trace:
    """Return the trace of a run of two rows, in two layers of two KV heads; all but the last new token have a step."""
    model, trace = build(), Trace()
    with rocketkv.patch(model, **SMALL, on_step=trace):
        greedy(model, {"input_ids": prompt(PROMPT, rows=2)}, NEW_TOKENS)
    return trace


def words(count: int = PROMPT + NEW_TOKENS) -> list[str]:
    return [f" w{place}" for place in range(count)]
