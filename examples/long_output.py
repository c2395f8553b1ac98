"""Generate a long output in memory that does not grow: python examples/long_output.py --model NAME --file TEXT."""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import rocketkv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or local folder")
parser.add_argument("--file", type=Path, default=Path(__file__), help="text to continue; this file if none is given")
parser.add_argument("--budget", type=int, default=256)
parser.add_argument("--new-tokens", type=int, default=2000)
parser.add_argument("--capacity", type=int, default=512, help="generated tokens to have room for; at least 64")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
inputs = tokenizer(args.file.read_text(encoding="utf-8"), return_tensors="pt")
length = inputs.input_ids.shape[1]

# Where the room is used up, the generated tokens are ranked as a prompt's are, and half of the room is kept.
handle = rocketkv.patch(model, token_budget=args.budget, decode_capacity=args.capacity)
for new_tokens in (args.new_tokens // 4, args.new_tokens):
    output = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    print(f"{new_tokens} new tokens: {handle.stats()}")
print(tokenizer.decode(output[0, length:], skip_special_tokens=True))
