"""Tokenizers of one token a byte, with a chat template."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<|turn|>", "<|/turn|>"]


def tokenizer_of(template: str | None, merges: list[tuple[str, str]] | None = None) -> Any:
    """Return a tokenizer of one token a byte, but for merges, with a chat template."""
    pairs = merges or []
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs)]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=made)
    fast.chat_template = template
    return fast


def ids_of(tokenizer: Any, chat: list[dict[str, str]], answer: bool = True) -> list[int]:
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
