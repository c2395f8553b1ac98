"""Tiny models that think before they answer, with tokenizers and chat templates in the form of real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

import eval_case
import tiny

# As Qwen3's: without thinking, an empty block stands before the answer.
QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As DeepSeek-R1's: the prompt ends inside the block.
OPEN = QWEN3.replace("{% if enable_thinking is defined", "<think>\n{% if enable_thinking is defined")
# As GPT-OSS's: channels, an effort, and the date.
GPT_OSS = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}\nReasoning: "
    "{{ reasoning_effort | default('medium') }}<|end|>"
    "{% for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_ADDED = {
    "qwen3": (["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]),
    "gpt-oss": (["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"], []),
}
TEMPLATES = {"qwen3": QWEN3, "gpt-oss": GPT_OSS}


def tokenizer(family: str, template: str | None = None) -> Any:
    """Return a byte-level tokenizer with a family's tokens and chat template."""
    made = eval_case.tokenizer(chat=False)
    special, plain = _ADDED[family]
    made.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    made.chat_template = template or TEMPLATES[family]
    return made


def save(folder: Path, family: str) -> Path:
    """Save a family's tiny model and tokenizer into a folder; return it."""
    words = tokenizer(family)
    model = tiny.build(family, vocab_size=len(words), eos_token_id=1)
    model.generation_config.eos_token_id = 1
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
