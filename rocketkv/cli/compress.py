"""`rocketkv compress`: read a long text once and save its compressed cache for `rocketkv ask`."""

import argparse
import sys
from pathlib import Path

from ..options import add_method_options, add_model_options, loading

MEBI = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("text", type=Path, metavar="TEXT", help="text file in UTF-8")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="(default TEXT.safetensors)")
    add_model_options(parser)
    add_method_options(parser, budget=512)


def run(args: argparse.Namespace) -> int:
    """Read the text and write the file; returns the exit code.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the text is empty or not UTF-8, or the budget is too small.
    """
    import torch

    from ..config import RocketKVConfig
    from ..hf.cache import RocketKVCache
    from ..hf.files import save_cache
    from ..hf.loading import load_model
    from ..hf.models import CACHE_ARGUMENT, find_decoder
    from ..hf.patch import patch
    from ..hf.prompts import encode, question_prompt

    config = RocketKVConfig(method=args.method, token_budget=args.budget)
    output = args.output or args.text.with_name(f"{args.text.name}.safetensors")
    text = args.text.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{args.text} is empty")
    model, tokenizer = load_model(args.model, args.dtype, args.device, **loading(args))
    tokens, length = encode(tokenizer, question_prompt(tokenizer, text, ""), apart=True)
    ids = torch.tensor([tokens[:length]], device=model.device)
    cache = RocketKVCache(model.config, config, prompt_length=length)
    with patch(model, config), torch.inference_mode():
        # Only the decoder: the logits of the text are not needed.
        find_decoder(model)[0](input_ids=ids, **{CACHE_ARGUMENT: cache}, use_cache=True)
    save_cache(cache, output, model=model, ids=ids)
    sys.stdout.write(f"{cache.stats()}\n{output}: {output.stat().st_size / MEBI:.1f} MiB\n")
    return 0
