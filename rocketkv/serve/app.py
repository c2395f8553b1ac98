"""The application: OpenAI's routes, health, metrics and the page, behind the guard."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from .._version import __version__
from .api import Api, routes
from .errors import RequestError, error_body
from .guard import Guard, reachable_hosts

PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SHOWN_ERRORS = 3


def create_app(api: Api, *, host: str, key: str | None, body_bytes: int, body_seconds: float = 60.0) -> ASGIApp:
    """Return the application of a server; its engine runs while the application does.

    Args:
        api: what the routes use.
        host: the address at which the server listens.
        key: the API key, or None.
        body_bytes: most bytes of a request's body.
        body_seconds: longest time in which a body must arrive.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        api.engine.start()
        yield
        api.engine.close()

    app = FastAPI(title="rocketkv serve", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.include_router(routes(api))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": api.name, "version": __version__, "key_required": key is not None}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(api.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    for path, (name, kind) in _FILES.items():
        app.add_api_route(path, _file(name, kind), include_in_schema=False)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    return Guard(
        app,
        key=key,
        hosts=reachable_hosts(host),
        public=("/health", *_FILES),
        body_bytes=body_bytes,
        body_seconds=body_seconds,
    )


def _file(name: str, kind: str) -> Callable[[], Any]:
    """Return a route of one of the page's files."""
    content = (PAGE / name).read_bytes()
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    async def answer() -> Response:
        return Response(content, media_type=kind, headers=headers)

    return answer


async def _refused(_: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _invalid(_: Request, error: Any) -> Response:
    found = error.errors()
    shown = "; ".join(f"{_place(each['loc'])}: {each['msg']}" for each in found[:_SHOWN_ERRORS])
    more = f"; and {len(found) - _SHOWN_ERRORS} more" if len(found) > _SHOWN_ERRORS else ""
    return JSONResponse(error_body(400, shown + more, _place(found[0]["loc"]) if found else None), 400)


def _place(location: Sequence[Any]) -> str:
    return ".".join(map(str, location[1:] if location[:1] == ("body",) else location)) or "body"


async def _http_error(_: Request, error: Any) -> Response:
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, headers=error.headers)
