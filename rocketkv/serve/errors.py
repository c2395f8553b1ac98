"""Errors that a client gets: a status code, and a body as OpenAI's clients read it."""

from typing import Any

INVALID = "invalid_request_error"


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: status code of HTTP, 4xx for what the client can change.
        message: for the reader, in one sentence or two.
        param: name of the field that is wrong, or None.
        code: a word for programs, or None.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """Return the response's body."""
        return error_body(self.status, str(self), self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error as OpenAI's clients read it; characters that UTF-8 has no bytes for are escaped."""
    kind = INVALID if status < 500 else "server_error"
    texts = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": {name: None if text is None else _encodable(text) for name, text in texts.items()}}


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
