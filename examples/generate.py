"""Generate with a compressed KV cache and see what it saved: python examples/generate.py --model NAME --file TEXT."""

import argparse
from pathlib import Path

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
inputs = tokenizer(args.file.read_text(encoding="utf-8"), return_tensors="pt")

handle = rocketkv.patch(model, token_budget=args.budget)
output = model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False)

print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
print(handle.stats())
