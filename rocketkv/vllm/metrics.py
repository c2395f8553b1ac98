"""Metrics of the plugin in vLLM's Prometheus endpoint.

Scheduler and workers are other processes than the server: they reach its endpoint if PROMETHEUS_MULTIPROC_DIR names a
folder when the server starts. Within one process no folder is needed.
"""

import functools
from typing import NamedTuple

from prometheus_client import Counter, Gauge

# Steps of a worker between two samples of the missed mass: a sample waits for the device.
MISSED_EVERY = 64


class Metrics(NamedTuple):
    """The metrics of a process.

    Attributes:
        blocks_freed: blocks of prompts that were freed when their first token was decoded.
        sequences: requests that have a row of the slab.
        slab_bytes: bytes of the slabs of a worker.
        prompt_tokens: tokens of prompts that were compressed.
        kept_tokens: those that stage 1 kept.
        missed_mass: mean estimate of the attention weight that a decode step did not attend to, of the latest sample.
    """

    blocks_freed: Counter
    sequences: Gauge
    slab_bytes: Gauge
    prompt_tokens: Counter
    kept_tokens: Counter
    missed_mass: Gauge


@functools.cache  # prometheus_client refuses a second metric of a name
def metrics() -> Metrics:
    """Return the process's metrics."""
    return Metrics(
        Counter("rocketkv:blocks_freed", "KV cache blocks of prompts freed when their first token was decoded."),
        Gauge("rocketkv:sequences", "Requests that have a row of the slab.", multiprocess_mode="livesum"),
        Gauge("rocketkv:slab_bytes", "Bytes of compressed sequences, reserved.", multiprocess_mode="livesum"),
        Counter("rocketkv:prompt_tokens", "Tokens of compressed prompts."),
        Counter("rocketkv:kept_tokens", "Tokens of compressed prompts that stage 1 kept."),
        Gauge(
            "rocketkv:missed_mass",
            "Estimated attention weight that decode steps did not attend to: mean of the latest sample.",
            multiprocess_mode="mostrecent",
        ),
    )
