"""The OpenAI server on loopback: its tokens, data and tensor parallel, clients that leave, workers that die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers

import tiny
import vllm_case
import vllm_server
from rocketkv.hf.loading import load_smollm2

METHOD = {**vllm_case.SETTINGS, "method": "rocketkv+"}
# The tests' own process stays without Numba; see test_engine.py.
SERVED = {**METHOD, "backend": "cpu"}


def prompt(length: int) -> list[int]:
    return tiny.prompt(length, seed=length)[0].tolist()


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    """Return a tiny model with SmolLM2's tokenizer: the server wants one."""
    place = models / "served"
    vllm_case.build("llama", vocab_size=49152).save_pretrained(place)
    load_smollm2()[1].save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[vllm_server.Server]:
    """Return a server of two engines, each with blocks and rows of its own."""
    arguments = "--max-num-batched-tokens", "128", "--data-parallel-size", "2"
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server.serve(folder, SERVED, *arguments, log=log) as server:
        yield server


def idle(server: vllm_server.Server) -> bool:
    """Wait until no request runs or waits, and no block or row of the slab is in use."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "rocketkv:sequences")
    for _ in range(100):
        if not any(map(server.metric, names)):
            return True
        time.sleep(0.2)
    return False


def test_streams_the_tokens_of_transformers(server: vllm_server.Server, model: Any) -> None:
    for length in (37, 700):
        expected = vllm_case.reference(model, prompt(length), 40, METHOD)
        assert server.complete(prompt(length), 40) == expected
        events = server.stream(prompt(length), 40)
        assert [token for event in events for token in event] == expected
        assert len(events) > 20


def test_metrics(server: vllm_server.Server) -> None:
    names = [f"rocketkv:{name}_total" for name in ("blocks_freed", "prompt_tokens", "kept_tokens")]
    freed, read, kept = map(server.metric, names)
    server.complete(prompt(640), 130)
    assert server.metric(names[0]) - freed == 640 // vllm_case.BLOCK
    assert server.metric(names[1]) - read == 640
    assert 0 < server.metric(names[2]) - kept < 640
    assert server.metric("rocketkv:slab_bytes") > 0
    assert 0 < server.metric("rocketkv:missed_mass") < 1
    assert server.metric("rocketkv:sequences") == 0


def test_a_client_that_leaves_frees_its_request(server: vllm_server.Server, model: Any) -> None:
    assert idle(server)
    for length in (100, 700, 1500):
        assert len(server.stream(prompt(length), 1000, leave_after=3)) == 3
    assert idle(server)
    assert server.complete(prompt(300), 30) == vllm_case.reference(model, prompt(300), 30, METHOD)


def test_a_thousand_short_requests_leak_nothing(server: vllm_server.Server, model: Any) -> None:
    assert idle(server)
    kinds = [(20, 3), (70, 1), (90, 4), (130, 2)]
    expected = [vllm_case.reference(model, prompt(length), count, METHOD) for length, count in kinds]
    with ThreadPoolExecutor(24) as clients:  # more than there are rows
        found = list(clients.map(lambda i: server.complete(prompt(kinds[i % 4][0]), kinds[i % 4][1]), range(1000)))
    assert all(tokens == expected[i % 4] for i, tokens in enumerate(found))
    assert idle(server)
    assert all(server.metric("vllm:request_success_total", f'engine="{i}"') > 100 for i in range(2))


def test_tensor_parallel_and_a_worker_that_is_killed(folder: Path, model: Any, tmp_path: Path) -> None:
    with vllm_server.serve(folder, METHOD, "--tensor-parallel-size", "2", log=tmp_path / "log") as server:
        for length in (37, 300, 1500):
            expected = vllm_case.reference(model, prompt(length), 40, METHOD)
            assert server.complete(prompt(length), 40) == expected
        workers = [
            pid for pid in server.children() if "Worker" in Path(f"/proc/{pid}/status").read_text().split("\n")[0]
        ]
        family = server.children()
        os.kill((workers or sorted(family))[-1], signal.SIGKILL)
        server.process.wait(120)  # vLLM ends the server, so that a supervisor starts it again
        time.sleep(2)
        assert not [pid for pid in family if Path(f"/proc/{pid}").exists() and _alive(pid)]


def _alive(pid: int) -> bool:
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
