"""Ask five questions about one document, read once and saved: python examples/document_qa.py --model NAME --file TEXT.

First every question reads the document anew; then one compressed cache is rolled back after each question; then that
cache comes from a file, as it would on another day. The answers are the same.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rocketkv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or local folder")
parser.add_argument("--file", type=Path, default=Path(__file__), help="the document; this file if none is given")
parser.add_argument("--budget", type=int, default=256)
parser.add_argument("--new-tokens", type=int, default=64)
args = parser.parse_args()

QUESTIONS = [
    "What is this about?",
    "Who wrote it?",
    "What is its first sentence?",
    "Which word matters most in it?",
    "Say it in five words.",
]

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
handle = rocketkv.patch(model, token_budget=args.budget)


def encode(text):
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


document = encode(args.file.read_text(encoding="utf-8"))


def read():
    cache = rocketkv.RocketKVCache(model.config, handle.config, prompt_length=document.shape[1])
    with torch.inference_mode():
        model(document, cache=cache, logits_to_keep=1)
    return cache


def answer(question, cache):
    ids = torch.cat([document, encode(f"\n\nQuestion: {question}\nAnswer:")], dim=1)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=args.new_tokens, do_sample=False
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def answers(cache):
    snapshot = cache.snapshot()
    for question in QUESTIONS:
        yield answer(question, cache)
        cache.rollback(snapshot)


start = time.perf_counter()
anew = [answer(question, read()) for question in QUESTIONS]
print(f"a new cache for each question: {time.perf_counter() - start:.2f} s")

start = time.perf_counter()
cache = read()
once = list(answers(cache))
print(f"one cache, rolled back: {time.perf_counter() - start:.2f} s")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "document.safetensors"
    rocketkv.save_cache(cache, path, model=model, ids=document)
    start = time.perf_counter()
    saved = list(answers(rocketkv.load_cache(path, model)))
    print(f"from a file of {path.stat().st_size / 2**20:.1f} MiB: {time.perf_counter() - start:.2f} s")

for question, given, *others in zip(QUESTIONS, anew, once, saved, strict=True):
    print(f"{question} {given} [{'the same each time' if others == [given, given] else f'also: {others}'}]")
print(cache.stats())
