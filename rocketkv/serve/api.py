"""The routes of OpenAI's API: chat, completions, models; and the contexts."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from .contexts import Contexts
from .engine import Engine
from .errors import RequestError, error_body
from .jobs import Done, Event, Failed, Job, Piece
from .prompts import Prompts, Turns
from .schema import ChatRequest, CompletionRequest

_POLL_SECONDS = 0.1  # between two looks at whether the client is still there
_GONE = 499  # nobody reads this status: the client is gone


@dataclass(frozen=True)
class Api:
    """Objects that the routes use.

    Attributes:
        engine: answers jobs.
        prompts: makes turns of requests.
        contexts: the context files.
        name: name of the model in requests and responses.
    """

    engine: Engine
    prompts: Prompts
    contexts: Contexts
    name: str


def routes(api: Api) -> APIRouter:
    """Return the routes below /v1."""
    router = APIRouter(prefix="/v1")
    created = int(time.time())

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(api, created)]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _known_model(api, name)
        return _model(api, created)

    @router.get("/contexts")
    async def contexts() -> dict[str, Any]:
        found = await run_in_threadpool(api.contexts.listed)
        return {"object": "list", "data": [{"id": file.id, "object": "context", "bytes": file.size} for file in found]}

    @router.get("/contexts/{name}")
    async def context(name: str) -> dict[str, Any]:
        file = await run_in_threadpool(api.contexts.find, name)
        return {"id": file.id, "object": "context", "bytes": file.size}

    @router.post("/chat/completions")
    async def chat(request: ChatRequest, http: Request) -> Response:
        return await _answer(api, request, http)

    @router.post("/completions")
    async def complete(request: CompletionRequest, http: Request) -> Response:
        return await _answer(api, request, http)

    return router


def _model(api: Api, created: int) -> dict[str, Any]:
    limits, config = api.engine.limits, api.engine.config
    return {
        "id": api.name,
        "object": "model",
        "created": created,
        "owned_by": "rocketkv",
        "rocketkv": {
            "method": config.method,
            "token_budget": config.token_budget if config.max_error is None else None,
            "max_error": config.max_error,
            "methods": list(limits.methods),
            "input_tokens": limits.input_tokens,
            "output_tokens": limits.output_tokens,
            "chat": api.prompts.chats,
        },
    }


def _known_model(api: Api, name: str) -> None:
    if name != api.name:
        raise RequestError(
            404, f"there is no model {name!r}; this server has {api.name!r}", param="model", code="model_not_found"
        )


class _Client:
    """The side of a job that waits for its events."""

    def __init__(self, http: Request) -> None:
        self._http = http
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(self, event: Event) -> None:
        """Take an event, in the worker's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server stops
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event | None:
        """Return the next event, or None if the client is gone."""
        coming = asyncio.ensure_future(self._events.get())
        try:
            while not (await asyncio.wait((coming,), timeout=_POLL_SECONDS))[0]:
                if await self._http.is_disconnected():
                    return None
            return coming.result()
        finally:
            coming.cancel()


async def _answer(api: Api, request: ChatRequest | CompletionRequest, http: Request) -> Response:
    _known_model(api, request.model)
    client = _Client(http)
    context = None if request.context is None else await run_in_threadpool(api.contexts.find, request.context)
    if context is not None and request.rocketkv is not None:
        raise RequestError(400, "a context file has settings of its own: leave rocketkv out", param="rocketkv")
    turns = await run_in_threadpool(_turns, api.prompts, request)
    settings = api.engine.limits.settings(api.engine.config, request.rocketkv)
    api.engine.limits.new_tokens(request.new_tokens, sum(map(len, turns)))  # refuse at once what can be known now
    streamed = request.stream
    job = Job(
        turns=turns,
        config=settings,
        context=context,
        new_tokens=request.new_tokens,
        sampling=_sampling(request),
        seed=secrets.randbits(63) if request.seed is None else request.seed,
        stops=request.stops,
        continuous=streamed and request.stream_options is not None and request.stream_options.continuous_usage_stats,
        deliver=client.deliver,
    )
    form = _Form("chat" if isinstance(request, ChatRequest) else "text", api.name)
    api.engine.submit(job)
    try:
        # An error before the first text has a status of its own, also in a stream.
        first = await client.next()
        if isinstance(first, Failed):
            raise first.error
        if first is not None and streamed:
            return _Stream(api.engine, job, _lines(form, request, first, client))
        pieces = []
        event: Event | None = first
        while isinstance(event, Piece):
            pieces.append(event.text)
            event = await client.next()
        if isinstance(event, Failed):
            raise event.error
    except BaseException:
        api.engine.cancel(job)
        raise
    if event is None:
        api.engine.cancel(job)
        return Response(status_code=_GONE)
    return JSONResponse(form.whole("".join(pieces), event, request.return_token_ids))


def _turns(prompts: Prompts, request: ChatRequest | CompletionRequest) -> Turns:
    return prompts.of_chat(request) if isinstance(request, ChatRequest) else prompts.of_completion(request)


def _sampling(request: ChatRequest | CompletionRequest) -> dict[str, Any]:
    """Return arguments of `generate`; the model's generation config decides on what a request leaves out."""
    if request.temperature == 0:
        return {"do_sample": False}
    given = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
    found = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **found} if request.temperature is not None else found


@dataclass(frozen=True)
class _Form:
    """Documents of one response: of a chat, or of a completion."""

    kind: Literal["chat", "text"]
    model: str

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        object.__setattr__(self, "head", {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time())})

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head: dict[str, Any] = vars(self)["head"]
        return {**head, "object": kind, "model": self.model, "choices": choices}

    def whole(self, text: str, done: Any, with_ids: bool) -> dict[str, Any]:
        """Return a response that is not a stream."""
        said = {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": done.reason, **_ids(done, with_ids)}
        kind = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._document(kind, [choice]), "usage": done.usage}

    def chunk(self, text: str | None, reason: str | None = None, *, first: bool = False, **more: Any) -> dict[str, Any]:
        """Return a chunk of a stream; without text, its end."""
        role = {"role": "assistant"} if first else {}
        delta: dict[str, Any] = role | ({} if text is None else {"content": text})
        said = {"delta": delta} if self.kind == "chat" else {"text": text or ""}
        kind = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return self._document(kind, [{"index": 0, **said, "logprobs": None, "finish_reason": reason, **more}])

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk with the usage, which has no choices."""
        kind = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._document(kind, []), "usage": usage}


def _ids(done: Done, wanted: bool) -> dict[str, Any]:
    return {"prompt_token_ids": list(done.prompt_ids), "token_ids": list(done.token_ids)} if wanted else {}


async def _lines(
    form: _Form, request: ChatRequest | CompletionRequest, first: Event, client: _Client
) -> AsyncIterator[bytes]:
    """Yield the events of a stream."""
    options = request.stream_options
    event: Event | None = first
    began = False
    while event is not None:
        if isinstance(event, Piece):
            document = form.chunk(event.text, first=not began)
            began = True
            yield _line(document if event.usage is None else {**document, "usage": event.usage})
        elif isinstance(event, Done):
            yield _line(form.chunk(None, event.reason, **_ids(event, request.return_token_ids)))
            if options is not None and options.include_usage:
                yield _line(form.usage(event.usage))
            yield b"data: [DONE]\n\n"
            return
        else:
            yield _line(error_body(event.error.status, str(event.error), code=event.error.code))
            return
        event = await client.next()


def _line(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


class _Stream(StreamingResponse):
    """A stream of events; its job is cancelled when the response ends, however that is."""

    def __init__(self, engine: Engine, job: Job, lines: AsyncIterator[bytes]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._engine = engine
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._engine.cancel(self._job)
