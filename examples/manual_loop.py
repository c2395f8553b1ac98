"""Decode greedily in a loop of your own: python examples/manual_loop.py --model NAME --file TEXT."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rocketkv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or local folder")
parser.add_argument("--file", type=Path, default=Path(__file__), help="text to continue; this file if none is given")
parser.add_argument("--budget", type=int, default=256)
parser.add_argument("--new-tokens", type=int, default=64)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
ids = tokenizer(args.file.read_text(encoding="utf-8"), return_tensors="pt").input_ids

rocketkv.patch(model)  # the cache below brings its own settings
# Told where the prompt ends, each layer evicts inside the first forward; without prompt_length, at the second.
cache = rocketkv.RocketKVCache(model.config, prompt_length=ids.shape[1], token_budget=args.budget)

with torch.no_grad():
    for _ in range(args.new_tokens):
        logits = model(ids, cache=cache, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        if ids.item() == tokenizer.eos_token_id:
            break
        print(tokenizer.decode(ids[0]), end="", flush=True)
print()
print(cache.stats())
