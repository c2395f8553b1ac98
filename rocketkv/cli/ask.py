"""`rocketkv ask`: answer a question about a text that `rocketkv compress` has read, without reading the text again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import add_model_options, loading, positive

if TYPE_CHECKING:
    from ..state.monitor import OnStep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("file", type=Path, metavar="FILE", help="file of `rocketkv compress`; it is only read")
    parser.add_argument("question", metavar="QUESTION", help="question about the text, in quotes")
    add_model_options(parser)
    parser.add_argument(
        "--new-tokens", type=positive, default=128, metavar="N", help="longest answer, in tokens (default %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the model's greedy answer while it is generated; returns the exit code.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, or is for another model, dtype or version.
    """
    answer(args)
    return 0


def answer(args: argparse.Namespace, *, on_step: OnStep | None = None) -> tuple[Any, Any, int]:
    """Print the model's greedy answer while it is generated.

    Args:
        args: the command's options.
        on_step: called after each decode step, as that of `rocketkv.patch`.

    Returns:
        The tokenizer, the token ids of text, question and answer [1, S], and the number of those before the answer.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, or is for another model, dtype or version.
    """
    import torch
    from transformers import TextStreamer

    from ..hf.files import load_cache, load_inputs
    from ..hf.layer import rocketkv_layers
    from ..hf.loading import load_model
    from ..hf.models import CACHE_ARGUMENT
    from ..hf.patch import patch
    from ..hf.prompts import continued, question_prompt

    read = load_inputs(args.file)["input_ids"]
    model, tokenizer = load_model(args.model, args.dtype, args.device, **loading(args))
    cache = load_cache(args.file, model)
    # Encoded separately, as `compress` encoded the text.
    tail = continued(tokenizer, question_prompt(tokenizer, "", args.question).tail)
    ids = torch.cat((read, torch.tensor([tail])), dim=1).to(model.device)
    settings: dict[str, Any] = {"max_new_tokens": args.new_tokens, "do_sample": False, CACHE_ARGUMENT: cache}
    if tokenizer.pad_token_id is not None:
        settings["pad_token_id"] = tokenizer.pad_token_id
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with patch(model, rocketkv_layers(cache)[0].config, on_step=on_step), torch.inference_mode():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings)  # type: ignore[operator]  # typed as a Tensor
    return tokenizer, made, ids.shape[1]
