"""A request's work on the worker thread, and the events that it reports meanwhile."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config import RocketKVConfig, make_config
from ..state.stats import CacheStats
from .contexts import ContextFile
from .errors import RequestError
from .prompts import Turns
from .schema import Compression


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on requests.

    Attributes:
        input_tokens: most tokens of a prompt, the context's included.
        output_tokens: most tokens of an answer.
        model_tokens: tokens that the model accepts, prompt and answer together.
        seconds: longest time of a request, apart from waiting.
        waiting: requests that may wait.
        methods: methods that a request may choose.
        token_budget: largest budget that a request may choose.
        max_error: least `max_error` that a request may choose; None: a request may choose none.
    """

    input_tokens: int
    output_tokens: int
    model_tokens: int
    seconds: float
    waiting: int
    methods: tuple[str, ...]
    token_budget: int
    max_error: float | None

    def new_tokens(self, asked: int | None, prompt: int) -> int:
        """Return the most tokens of an answer after a prompt.

        Args:
            asked: the request's number; None for as many as the limits allow.
            prompt: tokens of the prompt, the context's included.

        Raises:
            RequestError: the prompt is too long, or more tokens are asked for than there may be.
        """
        if asked is not None and asked > self.output_tokens:
            raise RequestError(
                400,
                f"an answer has at most {self.output_tokens} tokens on this server, got {asked}",
                param="max_tokens",
            )
        room = self.model_tokens - prompt
        if prompt > self.input_tokens or room < 1 or (asked is not None and asked > room):
            raise RequestError(
                400,
                f"a prompt has at most {self.input_tokens} tokens on this server, and prompt and answer at most "
                f"{self.model_tokens}; got a prompt of {prompt}" + (f", and max_tokens of {asked}" if asked else ""),
                code="context_length_exceeded",
            )
        return min(self.output_tokens, room) if asked is None else asked

    def settings(self, server: RocketKVConfig, asked: Compression | None) -> RocketKVConfig:
        """Return the settings of a request: the server's, with those that the request replaces.

        Raises:
            RequestError: a setting is outside of the limits, or impossible.
        """
        fields = {} if asked is None else asked.model_dump(exclude_none=True)
        if not fields:
            return server
        method, budget, error = (fields.get(name) for name in ("method", "token_budget", "max_error"))
        refused = None
        if method is not None and method not in self.methods:
            refused = "method", f"one of {', '.join(self.methods)}", method
        elif budget is not None and budget > self.token_budget:
            refused = "token_budget", f"at most {self.token_budget}", budget
        elif error is not None and (self.max_error is None or error < self.max_error):
            allowed = "left out" if self.max_error is None else f"at least {self.max_error}"
            refused = "max_error", allowed, error
        elif error is not None and budget is not None:
            refused = "max_error", "left out where there is a token_budget", error
        if refused is not None:
            name, allowed, value = refused
            raise RequestError(400, f"{name} must be {allowed} on this server, got {value!r}", param=f"rocketkv.{name}")
        if budget is not None:
            fields["max_error"] = None
        try:
            return make_config(server, fields)
        except (ValueError, TypeError) as impossible:
            raise RequestError(400, str(impossible), param="rocketkv") from impossible


@dataclass(kw_only=True)
class Usage:
    """Tokens and bytes that an answer has used so far.

    Attributes:
        prompt_tokens: tokens of the prompt, the context's included.
        prefix_tokens: those of them that were not read again, as a snapshot or a context file had them.
        completion_tokens: generated tokens, the end token included.
        cache_bytes: live bytes of the cache.
        full_bytes: bytes of a full cache of as many tokens.
        missed_mass: mean missed mass of the steps so far; None if the method does not estimate it.
        waiting_seconds: before the worker began.
        first_token_seconds: from then to the first token; None before it.
        seconds: from then on.
    """

    prompt_tokens: int = 0
    prefix_tokens: int = 0
    completion_tokens: int = 0
    cache_bytes: int = 0
    full_bytes: int = 0
    missed_mass: float | None = None
    waiting_seconds: float = 0.0
    first_token_seconds: float | None = None
    seconds: float = 0.0

    def count(self, stats: CacheStats) -> None:
        """Count the bytes of the cache."""
        self.cache_bytes, self.full_bytes = stats.total_bytes, stats.total("full_bytes")

    def document(self, config: RocketKVConfig) -> dict[str, Any]:
        """Return OpenAI's `usage`, with this server's figures under `rocketkv`."""
        budget = {"token_budget": config.token_budget} if config.max_error is None else {"max_error": config.max_error}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.prefix_tokens},
            "rocketkv": {
                "method": config.method,
                **budget,
                "prefix_tokens": self.prefix_tokens,
                "read_tokens": self.prompt_tokens - self.prefix_tokens,
                "cache_bytes": self.cache_bytes,
                "full_cache_bytes": self.full_bytes,
                "saved_bytes": self.full_bytes - self.cache_bytes,
                "missed_mass": self.missed_mass,
                "waiting_seconds": round(self.waiting_seconds, 4),
                "first_token_seconds": self.first_token_seconds and round(self.first_token_seconds, 4),
                "seconds": round(self.seconds, 4),
            },
        }


@dataclass(frozen=True)
class Piece:
    """The next text of an answer.

    Attributes:
        text: the text.
        usage: the document of the usage so far, or None.
    """

    text: str
    usage: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Done:
    """The end of an answer.

    Attributes:
        reason: `stop`, at an end token or a stop text; `length`, at a limit on tokens or time.
        usage: the document of the usage.
        prompt_ids: token ids of the prompt.
        token_ids: generated token ids, an end token included.
    """

    reason: Literal["stop", "length"]
    usage: dict[str, Any]
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Failed:
    """The end of a request without an answer."""

    error: RequestError


Event = Piece | Done | Failed


class CancelledError(Exception):
    """The client is gone, or the server stops."""


@dataclass(kw_only=True, eq=False)
class Job:
    """One request.

    Attributes:
        turns: token ids of the prompt, without the context's.
        config: settings of the compression; with a context, the file has others.
        context: the context file that the prompt continues, or None.
        new_tokens: most tokens of the answer, or None.
        sampling: arguments of `generate`.
        seed: of sampled tokens.
        stops: texts that end the answer.
        continuous: whether pieces have the usage so far.
        deliver: takes the events; called by the worker, and must not block.
        usage: what it has used so far.
        created: time of its creation (`time.monotonic`).
        deadline: time at which it must end, once it has begun.
        cancelled: set when nobody waits for it.
    """

    turns: Turns
    config: RocketKVConfig
    deliver: Callable[[Event], None]
    context: ContextFile | None = None
    new_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    stops: tuple[str, ...] = ()
    continuous: bool = False
    usage: Usage = field(default_factory=Usage)
    created: float = field(default_factory=time.monotonic)
    deadline: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Stop the work if nobody waits for it.

        Raises:
            CancelledError: it was cancelled.
        """
        if self.cancelled.is_set():
            raise CancelledError

    @property
    def overdue(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.deadline
