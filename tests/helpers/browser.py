"""A page open in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Visit:
    """A page open in a browser, and all that it said and asked for."""

    def __init__(self, browser: Any, path: Path, width: int) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.until("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.points'))")

    def until(self, expression: str) -> None:
        """Wait for what an expression says; the page's own policy lets no expression run inside of it."""
        for _ in range(200):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(50)
        raise TimeoutError(expression)

    def near(self) -> list[str]:
        """Return what it asked of anyone but itself."""
        return [url for url in self.asked if not url.startswith(("file:", "data:", "blob:"))]
