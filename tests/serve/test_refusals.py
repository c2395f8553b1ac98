"""What a server refuses, and how it lets go: bad requests, keys, limits, clients that leave, and its own end."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rocketkv.hf.cache import RocketKVCache
from serving import NAME, TEXT, Gate, model, serving, tokenizer, until

KEY = "a key of some length"
CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"
GOOD: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "How many?"}], "max_tokens": 2}
LIMITS: dict[str, Any] = {"input_tokens": 2000, "output_tokens": 32, "body_bytes": 20_000, "waiting": 1}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[httpx.Client, Gate]]:
    made = model()
    gate = Gate(made)
    with serving(made, tokenizer(), **LIMITS) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client, gate


@pytest.fixture(scope="module")
def client(served: tuple[httpx.Client, Gate]) -> httpx.Client:
    return served[0]


def figures(client: httpx.Client) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


# Values that some field may choke on; lone surrogates are no UTF-8, and JSON's NaN is no JSON.
ODD: list[Any] = [
    *(None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x" * 3000, "\ud800", "\0", "\ue0f1\ue0f2"),
    *([], {}, [[]], [None], ["\udfff"], {"type": "text"}, [{"type": "image_url"}], {"\ud800": 1}, "../../etc/passwd"),
    *([{"role": "user"}], [{"role": "tool", "content": "x"}], [{"role": "assistant", "content": "x"}]),
    [{"role": "user", "content": [{"type": "text", "text": 5}]}],
]  # fmt: skip
FIELDS = (
    *("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream"),
    *(
        "stream_options",
        "context",
        "rocketkv",
        "return_token_ids",
        "n",
        "tools",
        "logprobs",
        "echo",
        "unknown",
        "\ud800",
    ),
    *("presence_penalty", "logit_bias", "response_format", "max_completion_tokens"),
)
BODIES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"a":' * 3000,
    b"[" * 9000,
    b'{"seed":' + b"9" * 6000 + b"}",
    b'"\\ud800"',
)


def bad_request(number: int) -> tuple[str, str, bytes]:
    """Return a random method, path and body, of which most are wrong in some way."""
    rng = random.Random(number)
    path = rng.choice([CHAT, TEXTS])
    if number % 10 == 0:
        paths = [
            "/v1/contexts/..%2f..%2fetc%2fpasswd",
            "/v1/models/%00",
            "/nothing",
            "/v1/contexts/%ff",
            "/page.js/..",
            CHAT,
        ]
        return rng.choice(["GET", "DELETE", "PUT"]), rng.choice(paths), b""
    if number % 10 == 1:
        return "POST", path, rng.choice(BODIES)
    body: dict[str, Any] = dict(GOOD)
    if path == TEXTS:
        body["prompt"] = "".join(body.pop("messages")[0]["content"])
    for name in rng.sample(FIELDS, rng.choice([1, 1, 2, 3])):
        body[name] = rng.choice(ODD)
    return "POST", path, json.dumps(body).encode()


def test_two_hundred_bad_requests_are_the_clients_fault(client: httpx.Client) -> None:
    statuses: dict[int, int] = {}
    for number in range(220):
        method, path, body = bad_request(number)
        answer = client.request(method, path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, (number, method, path, body[:200], answer.text)
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error["message"]
            assert error["type"] == "invalid_request_error"
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
    assert sum(count for status, count in statuses.items() if status >= 400) >= 200, statuses
    assert client.post(CHAT, json=GOOD).status_code == 200


@pytest.mark.parametrize(
    ("status", "change", "message"),
    [
        (404, {"model": "gpt"}, "no model 'gpt'"),
        (400, {"max_tokens": 33}, "at most 32 tokens"),
        (400, {"messages": [{"role": "user", "content": "x" * 2001}]}, "at most 2000 tokens"),
        (413, {"messages": [{"role": "user", "content": "x" * 20_000}]}, "at most 20000 bytes"),
        (400, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "last message"),
        (400, {"n": 2}, "n: "),
        (400, {"tools": [{}]}, "tools"),
        (400, {"surprise": 1}, "surprise"),
        (400, {"context": "x", "rocketkv": {}, "messages": GOOD["messages"]}, "no context 'x'"),
    ],
)  # fmt: skip
def test_a_refusal_says_why(client: httpx.Client, status: int, change: dict[str, Any], message: str) -> None:
    answer = client.post(CHAT, json={**GOOD, **change})
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (
        404 if "context" in change else status,
        True,
    ), answer.text


def test_a_browsers_page_of_another_site_gets_nothing(client: httpx.Client) -> None:
    body = json.dumps(GOOD).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        headers = {} if kind is None else {"Content-Type": kind}
        assert client.post(CHAT, content=body, headers=headers).status_code == 415
    for host in ("attacker.example", "127.0.0.1.attacker.example", ""):
        assert client.post(CHAT, json=GOOD, headers={"Host": host}).status_code in (400, 421)
    for host in ("localhost:80", "127.0.0.1", "[::1]:8000"):
        assert client.get("/health", headers={"Host": host}).status_code == 200


def test_the_key_opens_what_it_must() -> None:
    with serving(model(), tokenizer(), key=KEY) as url, httpx.Client(base_url=url, timeout=60) as client:
        right = {"Authorization": f"Bearer {KEY}"}
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json")):
                answer = client.request(method, path, json=GOOD, headers=wrong)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.post(CHAT, json=GOOD, headers=right).status_code == 200
        assert client.get("/health").json()["key_required"] is True
        assert client.get("/").status_code == 200


def sent(client: httpx.Client, request: dict[str, Any]) -> socket.socket:
    """Send a chat request over a connection of its own, and return that."""
    body = json.dumps(request).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=60)
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def test_a_full_queue_answers_429(served: tuple[httpx.Client, Gate]) -> None:
    client, gate = served
    gate.close()
    clients = []
    for number in range(2):
        clients.append(sent(client, {**GOOD, "stream": True}))
        until(lambda: gate.held if number == 0 else figures(client)["rocketkv_waiting_requests"] == 1)  # noqa: B023
    answer = client.post(CHAT, json=GOOD)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert answer.headers["Retry-After"] == "1"
    # The place of a client that leaves the queue is free at once, while the other is still answered.
    clients[1].close()
    until(lambda: figures(client)["rocketkv_waiting_requests"] == 0)
    assert gate.held
    gate.open()
    received = b""
    while b"[DONE]" not in received:
        received += clients[0].recv(4096)
    clients[0].close()


def living_caches() -> int:
    gc.collect()
    return sum(type(each) is RocketKVCache for each in gc.get_objects())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_memory(stream: bool) -> None:
    made = model()
    gate = Gate(made)
    before = living_caches()
    with serving(made, tokenizer(), prefix_bytes=0) as url, httpx.Client(base_url=url, timeout=60) as client:
        gate.close(after=12)
        request = {**GOOD, "messages": [{"role": "user", "content": TEXT}], "max_tokens": 1000, "stream": stream}
        with sent(client, request) as connection:
            until(lambda: gate.held)
            if stream:
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            assert living_caches() > before
        time.sleep(0.3)  # the server looks whether its client is there
        gate.open()
        until(lambda: figures(client).get('rocketkv_requests_total{outcome="cancelled"}') == 1)
        until(lambda: figures(client)["rocketkv_running_requests"] == 0)
        assert figures(client)["rocketkv_prefix_bytes"] == 0
        until(lambda: living_caches() == before)


def test_time_is_limited() -> None:
    made = model()
    with serving(made, tokenizer(), seconds=0) as url, httpx.Client(base_url=url, timeout=60) as client:
        answer = client.post(CHAT, json=GOOD)
        assert answer.status_code == 413
        assert "within 0 seconds" in answer.json()["error"]["message"]


def test_snapshots_stay_within_their_bytes(client: httpx.Client) -> None:
    limit = 400_000
    with serving(model(), tokenizer(), prefix_bytes=limit) as url, httpx.Client(base_url=url, timeout=60) as other:
        held = []
        for number in range(6):
            parts = [{"type": "text", "text": f"{number} {TEXT}"}, {"type": "text", "text": " How many?"}]
            for _ in range(2):
                answer = other.post(CHAT, json={**GOOD, "messages": [{"role": "user", "content": parts}]})
            assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > len(TEXT)
            held.append(figures(other)["rocketkv_prefix_bytes"])
        assert max(held) <= limit
        assert held[-1] > limit / 2
        assert figures(other)["rocketkv_prefixes"] >= 2


def test_sigterm_ends_the_command(tmp_path: Path) -> None:
    made, names = model(), tokenizer()
    made.save_pretrained(tmp_path / NAME)
    names.save_pretrained(tmp_path / NAME)
    command = [
        sys.executable,
        "-m",
        "rocketkv.cli",
        "serve",
        "--model",
        tmp_path / NAME,
        "--port",
        "0",
        "--budget",
        "256",
    ]
    command.insert(1, "-P")
    said: list[str] = []
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if "running on" in line:
                break
        url = said[-1].split("running on ")[1].split()[0]
        request = {**GOOD, "max_tokens": 400, "stream": True}
        with httpx.Client(base_url=url, timeout=60) as client, client.stream("POST", CHAT, json=request) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            said += process.stderr.readlines()
    assert process.returncode == 0, said
    assert not [line for line in said if "Traceback" in line], said


def test_an_open_address_needs_a_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rocketkv.cli.main import main

    monkeypatch.delenv("ROCKETKV_API_KEY", raising=False)
    assert main(["serve", "--model", "nowhere", "--host", "0.0.0.0"]) == 2
    assert "set ROCKETKV_API_KEY" in capsys.readouterr().err
