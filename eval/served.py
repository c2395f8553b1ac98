"""Answers of a server with vLLM's OpenAI interface (`--engine openai`), so that accuracy is measured on what is served.

The server has the model and the method; this process has the tokenizer and the tasks. Prompts and answers are token
ids, and each question of a conversation sends the whole conversation again.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache

from ..hf.loading import SMOLLM2, load_model
from .records import CostDict

TIMEOUT = 3600  # seconds for one answer


@dataclass(frozen=True, kw_only=True)
class Served:
    """The method that a server runs, as a method of the harness.

    Attributes:
        name: the method's name in records; the server decides what it is.
        token_budget: likewise.
        url: of the server, such as http://127.0.0.1:8000.
    """

    name: str
    token_budget: int | None
    url: str

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()

    def new_cache(self, model: PreTrainedModel, prompt_length: int | None) -> Cache:
        """Refuse: the cache is the server's.

        Raises:
            ValueError: always.
        """
        raise ValueError("--engine openai answers questions; tasks that read a cache need the engine of transformers")

    def loop(self, ids: list[int]) -> ServedLoop:
        """Return a loop over a sequence of one prompt."""
        return ServedLoop(self.url, list(ids))


@dataclass
class ServedLoop:
    """Answers to one sequence, with the methods of `generate.DecodeLoop` that answer questions.

    Attributes:
        url: of the server.
        sequence: tokens of the prompt so far.
        seconds: a token of each answer, on average: the prompt's time is part of it.
    """

    url: str
    sequence: list[int]
    seconds: list[float] = field(default_factory=list)

    def prefill(self, ids: list[list[int]]) -> None:
        """Append the tokens of the next question."""
        self.sequence = [*self.sequence, *ids[0]]

    def snapshot(self) -> list[int]:
        """Return the sequence, for `rollback`."""
        return self.sequence

    def rollback(self, taken: list[int]) -> None:
        """Return to an earlier sequence."""
        self.sequence = taken

    def greedy(
        self, count: int, ends: Collection[int] = (), choose: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[int]:
        """Yield at most `count` greedy tokens, up to an end token, which is left out.

        Raises:
            ValueError: tokens are to be sampled, or the server returns no token ids.
        """
        if choose is not None:
            raise ValueError("--engine openai generates greedily; leave out --generation card")
        start = time.perf_counter()
        body = {
            "model": served_name(self.url),
            "prompt": self.sequence,
            "max_tokens": count,
            "temperature": 0,
            "stop_token_ids": sorted(ends),
            "return_token_ids": True,
        }
        tokens = request(self.url, "completions", body)["choices"][0].get("token_ids")
        if tokens is None:
            raise ValueError(f"the server at {self.url} returns no token_ids; --engine openai needs one of vLLM")
        self.seconds.append((time.perf_counter() - start) / max(1, len(tokens)))
        for token in tokens:
            if token in ends:
                return
            yield token

    def cost(self) -> CostDict:
        """Return nothing: the server's metrics have its memory."""
        return {}


def request(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send a request to a server's /v1 and return its answer.

    Raises:
        ValueError: the server cannot be reached, or refuses the request.
    """
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(f"{url.rstrip('/')}/v1/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=TIMEOUT) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise ValueError(f"the server at {url} refuses a request: {error.read().decode()}") from error
    except urllib.error.URLError as error:
        raise ValueError(f"there is no server at {url}: {error.reason}; start one, docs/vllm.md says how") from error
    return found


def served_name(url: str) -> str:
    """Return the name of the server's first model."""
    return str(request(url, "models")["data"][0]["id"])


def load_outline(name: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model without weights, for its configuration, and its tokenizer.

    Raises:
        OSError: there is no such model.
    """
    if name == SMOLLM2:
        return load_model(name)
    config = AutoConfig.from_pretrained(name, revision=revision)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        model.generation_config = GenerationConfig.from_pretrained(name, **options)
    except OSError:  # a model without one ends where its configuration says
        model.generation_config = GenerationConfig.from_model_config(config)
    return model, AutoTokenizer.from_pretrained(name, revision=revision)
