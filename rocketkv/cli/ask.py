"""`rocketkv ask`: a question about a text that `rocketkv compress` has read; the text itself is not read again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ..hf.cache import rocketkv_layers
from ..hf.files import load_cache, load_inputs
from ..hf.loading import load_model
from ..hf.models import CACHE_ARGUMENT
from ..hf.patch import patch
from ..hf.prompts import continued
from .compress import add_model_arguments, question_prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_model_arguments(parser)
    parser.add_argument("--cache", type=Path, required=True, metavar="FILE", help="what compress wrote; it stays as is")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="of the answer at most (default 128)")
    parser.add_argument("question", help="about the text")


def run(args: argparse.Namespace) -> int:
    """Print the model's greedy answer; returns the exit code.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, or of another model, dtype or version.
    """
    model, tokenizer = load_model(args.model, getattr(torch, args.dtype))
    read = load_inputs(args.cache)["input_ids"]
    cache = load_cache(args.cache, model)
    # As `compress` encoded the text: apart from any question.
    tail = continued(tokenizer, question_prompt(tokenizer, "", args.question).tail)
    ids = torch.cat((read, torch.tensor([tail])), dim=1).to(model.device)
    settings: dict[str, Any] = {"max_new_tokens": args.new_tokens, "do_sample": False}
    if tokenizer.pad_token_id is not None:
        settings["pad_token_id"] = tokenizer.pad_token_id
    with patch(model, rocketkv_layers(cache)[0].config), torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), **{CACHE_ARGUMENT: cache}, **settings
        )
    sys.stdout.write(f"{tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)}\n")
    return 0
