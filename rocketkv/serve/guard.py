"""Middleware before the application: host names, the API key, and limits on a request's body."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Collection, MutableMapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_body

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """Refuses a request before the application sees it.

    Args:
        app: the application.
        key: the API key, or None.
        hosts: host names that a request may address; None: all. A page of another site can make a browser send requests
            to a loopback address, but under that site's name.
        public: paths that need no key.
        body_bytes: most bytes of a body.
        body_seconds: longest time in which a body must arrive.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        hosts: Collection[str] | None,
        public: Collection[str],
        body_bytes: int,
        body_seconds: float,
    ) -> None:
        self._app = app
        self._key = None if key is None else _digest(key.encode())
        self._hosts = None if hosts is None else frozenset(hosts)
        self._public = frozenset(public)
        self._body_bytes = body_bytes
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._hosts is not None and _host(headers) not in self._hosts:
            await _refuse(send, 421, "this server answers under its loopback address alone", "wrong_host")
            return
        if self._key is not None and scope["path"] not in self._public and not self._knows_key(headers):
            await _refuse(send, 401, "the API key is missing or wrong", "invalid_api_key")
            return
        if scope["method"] == "POST" and not headers.get(b"content-type", b"").startswith(b"application/json"):
            # Other types are those that a browser sends for a page of another site without asking.
            await _refuse(send, 415, "the body must be JSON, with Content-Type: application/json", "not_json")
            return
        length = headers.get(b"content-length", b"0")
        too_long = f"a request has at most {self._body_bytes} bytes on this server"
        if length.isdigit() and (len(length) > 18 or int(length) > self._body_bytes):
            await _refuse(send, 413, too_long, "body_too_long")
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self._body_seconds)
        except TimeoutError:
            await _refuse(send, 408, f"the request did not arrive within {self._body_seconds:g} seconds", "too_slow")
            return
        if body is None:
            return  # the client is gone
        if len(body) > self._body_bytes:
            await _refuse(send, 413, too_long, "body_too_long")
            return
        await self._app(scope, _replayed(body, receive), send)

    def _knows_key(self, headers: MutableMapping[bytes, bytes]) -> bool:
        """Whether a request has the key; takes as long for any wrong one."""
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(_digest(given.strip()), self._key or b"")
        return right and kind.lower() == b"bearer"

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body, a little of a too long one, or None if the client is gone."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body", False) or len(body) > self._body_bytes:
                return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a function that gives the body first, and then what the server has to say."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return pending.pop() if pending else await receive()

    return next_message


def _host(headers: MutableMapping[bytes, bytes]) -> str:
    """Return the host name that a request addresses, without the port."""
    name = headers.get(b"host", b"").decode("latin-1").lower()
    return name[: name.index("]") + 1] if name.startswith("[") and "]" in name else name.partition(":")[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    body = json.dumps(error_body(status, message, code=code)).encode()
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def reachable_hosts(host: str) -> Collection[str] | None:
    """Return the names under which a server that listens at an address is asked; None: any."""
    return LOOPBACK if is_loopback(host) else None


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    return host in ("localhost", "127.0.0.1", "::1")
