"""Figures for Prometheus, in a registry of their own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .jobs import Usage

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("rocketkv_requests", "Requests that ended", ["outcome"], registry=registry)
        self.waiting = Gauge("rocketkv_waiting_requests", "Requests that wait", registry=registry)
        self.running = Gauge("rocketkv_running_requests", "Requests that are answered", registry=registry)
        self.prefixes = Gauge("rocketkv_prefixes", "Snapshots in memory", registry=registry)
        self.prefix_bytes = Gauge("rocketkv_prefix_bytes", "Bytes of the snapshots", registry=registry)
        self.contexts = Counter("rocketkv_context_loads", "Context files read", registry=registry)
        self._lookups = Counter(
            "rocketkv_prefix_lookups", "Requests that began after a snapshot, or not", ["result"], registry=registry
        )
        self._tokens = Counter(
            "rocketkv_tokens", "Prompt tokens read and reused, tokens generated", ["kind"], registry=registry
        )
        self._cache_bytes = Gauge("rocketkv_cache_bytes", "Bytes of the last answer's cache", registry=registry)
        self._full_bytes = Gauge("rocketkv_full_cache_bytes", "Bytes of a full cache there", registry=registry)
        self._missed = Histogram(
            "rocketkv_missed_mass", "Mean missed mass of an answer", buckets=_SHARES, registry=registry
        )
        self._seconds = Histogram(
            "rocketkv_seconds", "Times of a request", ["part"], buckets=_SECONDS, registry=registry
        )

    def answered(self, usage: Usage) -> None:
        """Count a finished answer."""
        self.requests.labels("answered").inc()
        self._lookups.labels("hit" if usage.prefix_tokens else "miss").inc()
        self._tokens.labels("reused").inc(usage.prefix_tokens)
        self._tokens.labels("read").inc(usage.prompt_tokens - usage.prefix_tokens)
        self._tokens.labels("generated").inc(usage.completion_tokens)
        self._cache_bytes.set(usage.cache_bytes)
        self._full_bytes.set(usage.full_bytes)
        if usage.missed_mass is not None:
            self._missed.observe(usage.missed_mass)
        self._seconds.labels("waiting").observe(usage.waiting_seconds)
        self._seconds.labels("first_token").observe(usage.first_token_seconds or usage.seconds)
        self._seconds.labels("whole").observe(usage.seconds)

    def text(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self._registry)
