"""Answers that a server gives are scored as those of the model itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from eval_case import know_tasks, made_task, make_session, model, save
from rocketkv.eval.records import records
from rocketkv.eval.served import load_outline, served_name
from rocketkv.eval.sweep.cells import Session
from rocketkv.eval.sweep.plan import Loaded, Plan, cells
from rocketkv.eval.sweep.run import run_cells


class Handler(BaseHTTPRequestHandler):
    """vLLM's interface, as far as it is used."""

    tokens = True

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "tested"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "tested"
        written = greedy(asked["prompt"], asked["max_tokens"], asked["stop_token_ids"])
        self.reply({"choices": [{"text": "", **({"token_ids": written} if self.tokens else {})}]})

    def reply(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


MODEL = model()


@torch.no_grad()
def greedy(prompt: list[int], count: int, ends: list[int]) -> list[int]:
    """Return greedy tokens, an end token included, as vLLM does."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(MODEL(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def predictions(session: Session, plan: Plan) -> list[list[str]]:
    counts = run_cells(session, cells(plan, Loaded(chat=True)))
    assert (counts.done, counts.failed) == (1, 0)
    (record,) = records(session.results)
    return [[turn["prediction"] for turn in sample["turns"]] for sample in record["samples"]]


def test_a_server_answers_as_its_model(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    know_tasks(monkeypatch, made_task(turns=3))
    folder = save(tmp_path / "model")
    plan: dict[str, Any] = {
        "model": str(folder),
        "tasks": ("made",),
        "methods": ("full",),
        "budgets": (),
        "lengths": (60,),
        "samples": 2,
    }
    expected = predictions(make_session(folder, tmp_path / "own"), Plan(**plan))
    outline = load_outline(str(folder), None)
    assert outline[0].device.type == "meta"
    assert served_name(url) == "tested"
    session = Session(*outline, tmp_path / "served", None, url=url)
    assert predictions(session, Plan(**plan, engine="openai")) == expected
    assert len({answer for sample in expected for answer in sample}) > 2


def test_a_server_without_token_ids_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    know_tasks(monkeypatch, made_task())
    monkeypatch.setattr(Handler, "tokens", False)
    folder = save(tmp_path / "model")
    session = Session(*load_outline(str(folder), None), tmp_path / "served", None, url=url)
    plan = Plan(model=str(folder), tasks=("made",), methods=("rocketkv+",), lengths=(60,), samples=1, engine="openai")
    assert run_cells(session, cells(plan, Loaded(chat=True))).failed == 1
    (record,) = records(session.results)
    assert "returns no token_ids" in record["message"]
    assert (record["cell"]["method"], record["cell"]["token_budget"]) == ("rocketkv+", 512)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tasks": ("kl",)}, "leave out kl"),
        ({"tasks": ("niah_single_1",), "agnostic": True}, "leave out --agnostic"),
        ({"methods": ("full", "rocketkv")}, "the one method and budget"),
        ({"methods": ("rocketkv",), "budgets": (256, 512)}, "the one method and budget"),
    ],
)
def test_what_a_server_cannot_do(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Plan(**{"methods": ("rocketkv",), **fields}, engine="openai")
