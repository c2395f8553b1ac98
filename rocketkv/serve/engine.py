"""One worker thread that answers requests one after the other, over one patched model.

The worker alone uses the model, the caches and the prefixes. After each request, answered or not, its cache returns to
its state at rest, so that only prefixes stay in memory.
"""

import logging
import threading
import time
from collections import deque
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import RocketKVConfig
from ..hf.cache import RocketKVCache
from ..hf.models import CACHE_ARGUMENT, find_decoder
from .answer import AfterPrompt, Writer, interrupted
from .contexts import load_context
from .errors import RequestError
from .jobs import CancelledError, Done, Failed, Job, Limits
from .metrics import Metrics
from .prefixes import Prefix, Prefixes, Tree, keys_after, start_key

_LOG = logging.getLogger("rocketkv.serve")


class Engine:
    """Answers jobs in the order in which they came.

    Args:
        model: a patched model.
        tokenizer: its tokenizer.
        config: the settings of the patch.
        limits: limits on requests.
        prefix_bytes: most bytes of prefixes between requests.
        metrics: counts what is done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: RocketKVConfig,
        *,
        limits: Limits,
        prefix_bytes: int,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self.limits = limits
        self.metrics = metrics
        self._model: Any = model
        self._tokenizer = tokenizer
        self._decoder, self._attentions = find_decoder(model)
        self._prefixes = Prefixes(prefix_bytes)
        self._ends = _end_tokens(model, tokenizer)
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._stops = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="rocketkv serve", daemon=True)

    def start(self) -> None:
        """Start the worker."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for the worker.

        Raises:
            RequestError: too many wait already, or the server stops.
        """
        with self._changed:
            if self._stops:
                raise RequestError(503, "the server stops")
            if len(self._waiting) >= self.limits.waiting and (self._running is not None or self._waiting):
                self.metrics.requests.labels("refused").inc()
                raise RequestError(
                    429,
                    f"{len(self._waiting)} requests wait already, and this server answers one at a time",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            self._waiting.append(job)
            self._counted()
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Stop a job that nobody waits for: at once if it waits, else within a layer of a prefill or a decode step."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._counted()
                self.metrics.requests.labels("cancelled").inc()

    def close(self) -> None:
        """Cancel all jobs, end the worker and free the prefixes."""
        with self._changed:
            self._stops = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.cancelled.set()
            self._changed.notify_all()
        self._thread.join()

    def _counted(self) -> None:
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.running.set(0 if self._running is None else 1)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._counted()
                while not self._waiting and not self._stops:
                    self._changed.wait()
                if self._stops:
                    break
                job = self._running = self._waiting.popleft()
                self._counted()
            self._run(job)
            del job
        self._prefixes.clear()
        for job in self._waiting:
            job.deliver(Failed(RequestError(503, "the server stops")))
        self._waiting.clear()
        self._counted()

    def _run(self, job: Job) -> None:
        """Answer a job, whatever happens."""
        outcome, failed = "answered", None
        try:
            done = self._answer(job)
            self.metrics.answered(job.usage)
            job.deliver(done)
            return
        except CancelledError:
            outcome, failed = "cancelled", RequestError(503, "the request was cancelled: the server stops")
        except RequestError as error:
            outcome, failed = "refused", error.with_traceback(None)  # which refers to tensors
        except torch.OutOfMemoryError:
            _LOG.warning("out of memory: all prefixes are dropped")
            self._prefixes.clear()
            outcome, failed = "failed", RequestError(503, "the device is out of memory; its prefixes were dropped")
        except ValueError as error:
            _LOG.warning("a request was refused: %s", error)
            outcome, failed = "refused", RequestError(400, str(error))
        except Exception:  # noqa: BLE001  # the worker must outlive any request
            _LOG.exception("a request failed")
            outcome, failed = "failed", RequestError(500, "the request failed; the server's log says why")
        self.metrics.requests.labels(outcome).inc()
        job.deliver(Failed(failed))

    @torch.inference_mode()
    def _answer(self, job: Job) -> Done:
        """Read what is new of a job's prompt, and answer it."""
        began = time.monotonic()
        job.usage.waiting_seconds = began - job.created
        job.deadline = began + self.limits.seconds
        job.check()
        # The last turn is read by `generate`, which needs tokens to begin with.
        version = () if job.context is None else (job.context.id, job.context.version)
        start = start_key(job.config, version)
        keys = [start, *keys_after(start, job.turns)]
        place, prefix = self._prefixes.find(keys[:-1])
        if prefix is None:
            place, prefix = 0, self._new(job, start)
        tree, tokens = prefix.tree, prefix.tokens
        if tree.key is not None:
            job.config = tree.cache.config
        ids = (*tree.ids, *chain.from_iterable(job.turns))
        job.usage.prompt_tokens, job.usage.prefix_tokens = len(ids), tokens
        new_tokens = self.limits.new_tokens(job.new_tokens, len(ids))
        cache = tree.cache
        try:
            cache.rollback(prefix.snapshot)
            with interrupted(self._attentions, lambda: self._check_prefill(job)) as release:
                for number in range(place, len(job.turns) - 1):
                    turn = job.turns[number]
                    self._read(cache, turn)
                    tokens += len(turn)
                    self._prefixes.put(keys[number + 1], Prefix(tree, cache.snapshot(), tokens))

                def keep() -> None:
                    release()
                    self._prefixes.put(keys[-1], Prefix(tree, cache.snapshot(), len(ids)))

                writer = Writer(job, cache, self._tokenizer, self._ends, began)
                self._generate(job, cache, ids, new_tokens, writer, AfterPrompt(keep))
            writer.finish()
        finally:
            cache.rollback(tree.root)
            self.metrics.prefix_bytes.set(self._prefixes.trim())
            self.metrics.prefixes.set(len(self._prefixes))
        return Done(
            reason=writer.reason or "length",
            usage=job.usage.document(job.config),
            prompt_ids=ids,
            token_ids=tuple(writer.tokens),
        )

    def _new(self, job: Job, start: bytes) -> Prefix:
        """Return the beginning of a new tree: an empty cache, or a context file's, which is a prefix by itself."""
        if job.context is None:
            cache = RocketKVCache(self._decoder.config, job.config)
            root = cache.snapshot()
            return Prefix(Tree(cache, root), root, 0)
        context = load_context(job.context, self._model, self._tokenizer)
        self.metrics.contexts.inc()
        root = context.cache.snapshot()
        prefix = Prefix(Tree(context.cache, root, context.ids, start), root, len(context.ids))
        self._prefixes.put(start, prefix)
        return prefix

    def _check_prefill(self, job: Job) -> None:
        job.check()
        if job.overdue:
            raise RequestError(
                413,
                f"the prompt could not be read within {self.limits.seconds:g} seconds, the limit of this server; send "
                "a shorter one, or make a context file of it",
            )

    def _read(self, cache: RocketKVCache, turn: tuple[int, ...]) -> None:
        """Read a turn's prompt; only the decoder runs, as its logits are not needed."""
        cache.begin_turn(len(turn))
        ids = torch.tensor([turn], device=self._model.device)
        self._decoder(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache})

    def _generate(
        self, job: Job, cache: RocketKVCache, ids: tuple[int, ...], new_tokens: int, writer: Writer, after: AfterPrompt
    ) -> None:
        """Read the last turn and generate; the writer has the tokens."""
        tensor = torch.tensor([ids], device=self._model.device)
        settings: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "num_beams": 1,
            "num_return_sequences": 1,
            "use_cache": True,
            CACHE_ARGUMENT: cache,
            **job.sampling,
        }
        if self._model.generation_config.pad_token_id is None:
            settings["pad_token_id"] = min(self._ends, default=0)
        with torch.random.fork_rng(devices=_cuda(self._model.device)):
            torch.manual_seed(job.seed)
            self._model.generate(
                input_ids=tensor,
                attention_mask=torch.ones_like(tensor),
                logits_processor=[after],
                stopping_criteria=[writer],
                **settings,
            )


def _cuda(device: torch.device) -> list[torch.device]:
    """Return the device in a list if it has a random generator that `fork_rng` knows."""
    return [device] if device.type == "cuda" else []


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer: those of the model's generation config, as in `generate`."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    return {token for token in listed if token is not None}
