"""Figures of `rocketkv serve`, through the `openai` client: `python tools/serve_figures.py -o FOLDER`.

Questions on one document, and a conversation, to a server in this process. Each answer is compared with that of
`generate` with the same turns, over a cache of its own that returns to the same state.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import openai
import torch
import uvicorn

import rocketkv
from rocketkv.eval.tasks.text import prose
from rocketkv.hf.loading import SMOLLM2, load_model
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.hf.prompts import continued
from rocketkv.serve.server import ServerSettings, build

NAME = "model"
SYSTEM = "You answer in one sentence."
ASKED = ("What is said of the harbour?", "Who works there?", "What happens in the morning?", "Which place is quiet?")


def document_of(tokenizer: Any, tokens: int) -> str:
    """Return prose of about so many tokens."""
    text = prose(1, tokens // 5)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    return str(tokenizer.decode(ids))


def question(number: int) -> str:
    """Return a question, each of a number another one."""
    return f"{ASKED[number % len(ASKED)]} Give {number + 2} details."


class Reference:
    """`generate` over one cache, turn after turn."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = rocketkv.RocketKVCache(model.config, model._rocketkv.config)
        self._ids: list[int] = []

    def read(self, turn: list[int]) -> None:
        """Read a turn's prompt; the cache is then at its end."""
        self._ids += turn
        self._generate(self._cache, 1)

    def answer(self, turn: list[int], count: int) -> list[int]:
        """Return the answer after a turn's prompt; the state stays as it was."""
        before, self._ids = self._ids, self._ids + turn
        found = self._generate(copy.deepcopy(self._cache), count)
        self._ids = before
        return found

    def _generate(self, cache: Any, count: int) -> list[int]:
        ids = torch.tensor([self._ids])
        given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), CACHE_ARGUMENT: cache}
        out = self._model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, **given)
        return list(out[0, len(self._ids) :].tolist())


def asked(client: openai.OpenAI, messages: Any, count: int) -> dict[str, Any]:
    """Return the text and the token ids of a streamed answer, its usage, and the seconds to its first text."""
    begun, first, text = time.perf_counter(), None, ""
    ids: list[int] = []
    usage: dict[str, Any] = {}
    stream = client.chat.completions.create(
        model=NAME,
        messages=messages,
        max_tokens=count,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    for chunk in stream:
        usage = chunk.usage.model_dump() if chunk.usage else usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            first = time.perf_counter() - begun if first is None and text else first
            ids = getattr(choice, "token_ids", ids)
    return {
        "text": text,
        "ids": ids,
        "first": first,
        "seconds": time.perf_counter() - begun,
        "usage": usage["rocketkv"],
    }


def row(found: dict[str, Any], equal: bool) -> dict[str, Any]:
    """Return the figures of an answer."""
    return {
        "equal": equal,
        "first_text_seconds": found["first"],
        "seconds": found["seconds"],
        **found["usage"],
        "tokens": len(found["ids"]),
    }


def measure(client: openai.OpenAI, model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of the document and of the conversation."""
    opening = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    closing = "<|im_end|>\n<|im_start|>assistant\n"
    between = "<|im_end|>\n<|im_start|>user\n"

    def ids(text: str) -> list[int]:
        return continued(tokenizer, text)

    system: dict[str, Any] = {"role": "system", "content": SYSTEM}
    text = document_of(tokenizer, args.tokens)
    results: dict[str, Any] = {"document": [], "conversation": []}
    found = []
    for number in range(args.questions):
        parts = [{"type": "text", "text": text}, {"type": "text", "text": f"\n\n{question(number)}"}]
        found.append(asked(client, [system, {"role": "user", "content": parts}], args.new_tokens))
    reference = Reference(model)
    reference.read(ids(opening))
    reference.read(ids(text))
    for number, each in enumerate(found):
        expected = reference.answer(ids(f"\n\n{question(number)}{closing}"), args.new_tokens)
        results["document"].append(row(each, each["ids"] == expected))
    messages, reference = [system], Reference(model)
    reference.read(ids(opening))
    said = ""
    for number in range(args.turns):
        messages.append({"role": "user", "content": question(number)})
        each = asked(client, messages, args.new_tokens)
        turn = ids(f"{said + between if number else ''}{question(number)}{closing}")
        results["conversation"].append(row(each, each["ids"] == reference.answer(turn, args.new_tokens)))
        reference.read(turn)
        said = each["text"]
        messages.append({"role": "assistant", "content": said})
    return results


def main() -> int:
    """Measure, print and write; returns 1 if an answer differs."""
    parser = argparse.ArgumentParser(description="Figures of rocketkv serve.")
    parser.add_argument("--tokens", type=int, default=6000, help="of the document")
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--method", default="rocketkv+")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model, tokenizer = load_model(SMOLLM2)
    handle = rocketkv.patch(model, method=args.method, token_budget=args.budget)
    app = build(model, tokenizer, handle.config, ServerSettings(name=NAME, seconds=7200))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=7200, max_retries=0
        ) as client:
            results = measure(client, model, tokenizer, args)
    finally:
        server.should_exit = True
        thread.join()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "serve.json").write_text(json.dumps({"load": os.getloadavg(), **results}, indent=1) + "\n")
    for name, rows in results.items():
        print(f"{name}: {sum(each['equal'] for each in rows)} of {len(rows)} answers equal")
        for each in rows:
            prompt = each["read_tokens"] + each["prefix_tokens"]
            print(
                f"  read {each['read_tokens']:5d} of {prompt:5d} tokens, first text after "
                f"{each['first_text_seconds']:.2f} s, {each['seconds']:.2f} s in all, cache "
                f"{each['cache_bytes'] / each['full_cache_bytes']:.2f} of full"
            )
    return 0 if all(each["equal"] for rows in results.values() for each in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
