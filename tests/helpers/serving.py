"""A server of a tiny model with a chat template, at a port of its own, and what `generate` answers in its place."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import uvicorn

import rocketkv
from chatml import CHATML, tokenizer_of
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.serve.server import ServerSettings, build
from tiny import SETTINGS
from tiny import build as build_model

NAME = "tiny"
FIELDS: dict[str, Any] = {**SETTINGS, "method": "rocketkv+", "token_budget": 48}
PLACES = ("library", "mill", "harbour", "market", "school", "quarry", "inn", "forge", "chapel", "bridge")
TEXT = "".join(f"The {place} of the town has {number} doors. " for number, place in enumerate(PLACES * 3))


def tokenizer() -> Any:
    made = tokenizer_of(CHATML)
    made.eos_token = "<|im_end|>"
    return made


def model(**fields: Any) -> Any:
    """Return a tiny model that has a token for each byte, and ends at none of them unless told."""
    return build_model("llama", vocab_size=len(tokenizer()), **fields)


@contextlib.contextmanager
def serving(model: Any, tokenizer: Any, patched: dict[str, Any] | None = None, **settings: Any) -> Iterator[str]:
    """Serve a model until the block ends; yield the address."""
    handle = rocketkv.patch(model, **(patched or FIELDS))
    app = build(model, tokenizer, handle.config, ServerSettings(**{"name": NAME, **settings}))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has ended"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        rocketkv.unpatch(model)


def split_generate(
    model: Any, turns: Sequence[Sequence[int]], count: int, cache: Any = None, before: Sequence[int] = ()
) -> list[int]:
    """Return the greedy tokens of `generate` that reads turn after turn; tokens in between are dropped."""
    ids = list(before)
    cache = rocketkv.RocketKVCache(model.config, model._rocketkv.config) if cache is None else cache
    for number, turn in enumerate(turns):
        ids += turn
        given = torch.tensor([ids])
        last = number + 1 == len(turns)
        out = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count if last else 1,
            do_sample=False,
            **{CACHE_ARGUMENT: cache},
        )
    return list(out[0, len(ids) :].tolist())


class Gate:
    """Holds a model's decode steps, the forwards of one token, once some have passed."""

    def __init__(self, model: Any) -> None:
        self.held = False
        self._left = 0
        self._open = threading.Event()
        self._open.set()
        self._hook = model.register_forward_pre_hook(self._wait, with_kwargs=True)

    def _wait(self, module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            self._left -= 1
            if self._left < 0:
                self.held = not self._open.is_set()
                assert self._open.wait(60), "nobody has opened the gate"
                self.held = False

    def close(self, after: int = 0) -> None:
        """Hold the steps after so many."""
        self._left = after
        self._open.clear()

    def open(self) -> None:
        self._open.set()


def until(holds: Any, seconds: float = 30) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
