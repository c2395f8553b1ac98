"""Two turns of a chat on one compressed cache: python examples/chat.py --model NAME --file TEXT."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rocketkv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or local folder")
parser.add_argument("--file", type=Path, default=Path(__file__), help="text to talk about; this file if none is given")
parser.add_argument("--budget", type=int, default=256)
parser.add_argument("--new-tokens", type=int, default=64)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
rocketkv.patch(model)  # the cache below brings its own settings
cache = rocketkv.RocketKVCache(model.config, token_budget=args.budget)


def encode(text):
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def answer(ids):
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache=cache,
        max_new_tokens=args.new_tokens,
        do_sample=False,
    )
    print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    print(f"[{cache.stats()}]")
    # The template writes the end of an answer itself, and the last token of the output is not in the cache yet.
    return output[:, :-1] if output[0, -1] == tokenizer.eos_token_id else output


first = {"role": "user", "content": f"{args.file.read_text(encoding='utf-8')}\n\nWhat is this about?"}
so_far = answer(encode(tokenizer.apply_chat_template([first], tokenize=False, add_generation_prompt=True)))

# Never encode an answer again, its tokens may differ from those in the cache: add to them what the template adds.
second = {"role": "user", "content": "Say it in one sentence."}
chat = [first, {"role": "assistant", "content": "ANSWER"}, second]
text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
answer(torch.cat([so_far, encode(text.rpartition("ANSWER")[2])], dim=1))
