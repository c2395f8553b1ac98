"""Mixed load on `rocketkv serve`, and its resident memory: `python tools/serve_load.py --model NAME --minutes 30`.

Questions on old and new documents, conversations, streams that are cut off, samples, and bad requests, from several
threads. After a warm-up (a fifth of the time, at least until the prefixes have used their memory), the median of the
last quarter must be within 5 % of that of the first. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from rocketkv.eval.tasks.text import prose

SECONDS = 2.0  # between two samples of the memory
TOLERATED = 0.05


def resident(pid: int) -> int:
    """Return the resident bytes of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"process {pid} has ended")
    return 1024 * int(found[1])


@contextlib.contextmanager
def command(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Run `rocketkv serve`; yield its address and its process id."""
    serve = ["--model", args.model, "--port", "0", "--prefix-mib", str(args.prefix_mib), "--budget", str(args.budget)]
    started = [sys.executable, "-P", "-m", "rocketkv.cli", "serve", *serve, "--threads", "1", "--name", "model"]
    with subprocess.Popen(started, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        if process.stderr is None:
            raise ValueError("the server has no output")
        line = next((line for line in process.stderr if "running on" in line), None)
        if line is None:
            raise ValueError("the server has not started")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield line.split("running on ")[1].split()[0], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def request(rng: random.Random, tokens: int) -> dict[str, Any]:
    """Return a random request."""
    seed = rng.choice([1, 2, 3, rng.getrandbits(30)])  # three documents come again and again
    text = prose(seed, max(1, rng.choice([tokens, tokens // 3]) // 12))
    parts = [{"type": "text", "text": text}, {"type": "text", "text": f"\n\nWhat is said of {rng.getrandbits(8)}?"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    for _ in range(rng.choice([0, 0, 1, 3])):
        messages += [{"role": "assistant", "content": "Nothing."}, {"role": "user", "content": "Are you sure?"}]
    body: dict[str, Any] = {"model": "model", "messages": messages, "max_tokens": rng.choice([4, 16, 48])}
    if rng.random() < 0.3:
        body |= {"temperature": 1, "seed": rng.getrandbits(30)}
    if rng.random() < 0.1:
        body["surprise"] = 1
    return body


def client(url: str, seed: int, args: argparse.Namespace, end: float, counts: collections.Counter[str]) -> None:
    """Send requests until the end."""
    rng = random.Random(seed)
    with httpx.Client(base_url=url, timeout=600) as http:
        while time.monotonic() < end:
            body = request(rng, args.tokens)
            if rng.random() < 0.5:
                counts[str(http.post("/v1/chat/completions", json=body).status_code)] += 1
                continue
            with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
                cut = rng.choice([1, 3, 10_000])
                for number, _ in enumerate(answer.iter_lines()):
                    if number >= cut:
                        counts["cut off"] += 1
                        break
                else:
                    counts[f"{answer.status_code} streamed"] += 1


def main() -> int:
    """Run the load; returns 1 if the memory has grown or the server has failed."""
    parser = argparse.ArgumentParser(description="Mixed load on rocketkv serve.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1200, help="of a long document, about")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--prefix-mib", type=int, default=64)
    args = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    samples = []
    with command(args) as (url, pid):
        begun = time.monotonic()
        end = begun + 60 * args.minutes
        threads = [threading.Thread(target=client, args=(url, seed, args, end, counts)) for seed in range(args.clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(SECONDS)
            samples.append((time.monotonic() - begun, resident(pid)))
        figures = httpx.get(f"{url}/metrics", timeout=60).text
    warm = [size for at, size in samples if at > 60 * args.minutes / 5]
    quarter = max(1, len(warm) // 4)
    first, last = median(warm[:quarter]), median(warm[-quarter:])
    result = {
        "minutes": args.minutes,
        "load": os.getloadavg()[0],
        "requests": dict(counts),
        "mib": {"first quarter": first / 2**20, "last quarter": last / 2**20, "max": max(warm) / 2**20},
        "growth": last / first - 1,
        "prefixes": re.findall(r"^(rocketkv_prefix\w* .*)$", figures, re.MULTILINE),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0 if result["growth"] <= TOLERATED and not any(name.startswith("5") for name in counts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
