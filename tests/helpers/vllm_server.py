"""vLLM's OpenAI server as a child process, and a client of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import vllm_case

START = 900  # seconds that a server may take to start, on a busy machine
ANSWER = 300


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER)

    def get(self, path: str) -> str:
        connection = self.connection()
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def post(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = self.connection()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def body(self, prompt: Sequence[int], new_tokens: int, **fields: Any) -> dict[str, Any]:
        greedy = {"temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "return_token_ids": True}
        return {"model": "tested", "prompt": list(prompt), **greedy, **fields}

    def complete(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """Return the generated tokens."""
        answer = json.loads(self.post(self.body(prompt, new_tokens)).read())
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens

    def stream(self, prompt: Sequence[int], new_tokens: int, *, leave_after: int | None = None) -> list[list[int]]:
        """Return the generated tokens event by event; leave after some events, as a client that is gone."""
        events: list[list[int]] = []
        answer = self.post(self.body(prompt, new_tokens, stream=True))
        for line in answer:
            text = line.decode().strip()
            if not text.startswith("data: {"):
                continue
            events += [choice["token_ids"] for choice in json.loads(text[6:])["choices"] if choice.get("token_ids")]
            if leave_after is not None and len(events) >= leave_after:
                answer.close()
                break
        return events

    def metric(self, name: str, label: str = "") -> float:
        """Return the sum of a metric over its labels, or over those with this one."""
        found = [line for line in self.get("/metrics").splitlines() if line.split("{")[0].split(" ")[0] == name]
        lines = [line for line in found if label in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def children(self) -> dict[int, str]:
        """Return the names of all processes below the server by id."""
        found: dict[int, str] = {}
        parents = [self.process.pid]
        while parents:
            pid = parents.pop()
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                parents.append(int(child))
        return found


@contextlib.contextmanager
def serve(folder: Path, settings: dict[str, Any] | None, *arguments: str, log: Path) -> Iterator[Server]:
    """Run a server with the plugin's settings, and end it with all of its processes."""
    port = free_port()
    additional = [] if settings is None else ["--additional-config", json.dumps({"rocketkv": settings})]
    command = [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "tested", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--block-size", str(vllm_case.BLOCK), "--enforce-eager", "--max-num-seqs", "8", "--max-model-len", "3200"),
        *("--num-gpu-blocks-override", "400", *additional, *arguments),
    ]
    environment = {**os.environ, **vllm_case.environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with tempfile.TemporaryDirectory() as metrics:
        environment["PROMETHEUS_MULTIPROC_DIR"] = metrics  # those of the engine's processes reach the server by files
        yield from _running(command, environment, port, log)


def _running(command: list[str], environment: dict[str, str], port: int, log: Path) -> Iterator[Server]:
    """Start a server and end it."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    server = Server(process, port, log)
    try:
        _wait(server)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _wait(server: Server) -> None:
    """Wait until the server answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of its log.
    """
    limit = time.monotonic() + START
    while time.monotonic() < limit and server.process.poll() is None:
        with contextlib.suppress(OSError):
            connection = server.connection()
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{server.log.read_text()[-4000:]}")
