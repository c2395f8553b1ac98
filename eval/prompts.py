"""Token counts of a task's prompts."""

from __future__ import annotations

from ..hf.prompts import encode, render
from .tasks.base import Preparation, Sample


def sample_tokens(prepared: Preparation, sample: Sample) -> int:
    """Return the number of tokens of a sample's first prompt, chat template included if there is one."""
    turn = sample.turns[0]
    prompt = render(prepared.tokenizer, sample.context, turn.question, turn.answer_prefix, chat=prepared.chat)
    return len(encode(prepared.tokenizer, prompt)[0])
