"""Decode divergence: KL(full || method) and perplexity of compressed decoding on the tokens of a text.

A window of a text is cut into a prompt and a continuation. The prompt is one forward, at the end of which a method
compresses; the tokens of the continuation follow one at a time (teacher forcing), so that all methods predict the same
tokens. Row i of the log-probabilities predicts token i of the continuation, after i decode steps. Row 0 comes from the
prefill, before any compression, and counts in no figure: m tokens give m - 1 steps that count.

KL is in nats a token; perplexity is the exponential of the mean negative log-likelihood.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median_low
from typing import Any, NamedTuple

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ...hf.cache import cache_stats
from ..generate import DecodeLoop
from ..methods import Full, Method
from ..prefill import Prefills, after_prompt
from ..records import SampleDict, digest, quarantine, write_atomically
from ..tasks.base import Preparation
from ..tasks.text import prose
from .memory import cache_cost

METRIC = "kl"  # in nats a token; lower is better
VERSION = 1
STEPS = 64
GENERATED = "generated"  # in place of a file name, for generated prose


class Window(NamedTuple):
    """A piece of a text.

    Attributes:
        id: unique within its text.
        ids: its tokens, prompt and continuation.
        notes: its source, of JSON's types.
    """

    id: str
    ids: list[int]
    notes: dict[str, Any]


def find_text(folder: Path | None) -> Path | None:
    """Return the file `text.txt` of a folder, or None where there is none."""
    path = None if folder is None else folder / "text.txt"
    return path if path is not None and path.exists() else None


def texts(preparation: Preparation, path: Path | None) -> list[Window]:
    """Cut windows of `preparation.length` tokens out of a text file, or out of generated prose where `path` is None.

    A file is tokenised whole; the offset of window i depends on the seed and i alone, and windows may overlap.
    Generated prose is a different text for every window. A window begins with the start token of models that have one.

    Raises:
        ValueError: no length is given, or the text is too short for it.
    """
    tokenizer, length = preparation.tokenizer, preparation.length
    if length is None or length < 2:
        raise ValueError(f"length must be at least 2 tokens, for a prompt and its continuation, got {length}")
    start = start_tokens(tokenizer)
    room = length - len(start)
    windows = []
    tokens = [] if path is None else text_tokens(tokenizer, path.read_text(encoding="utf-8"))
    if path is not None and len(tokens) < room:
        raise ValueError(
            f"the text must have at least {room} tokens, {path.name} has {len(tokens)}; give a longer one or lower the "
            "length"
        )
    for number in range(preparation.count):
        rng = random.Random(f"divergence {preparation.seed} {number}")
        notes: dict[str, Any]
        if path is None:
            notes = {"text": GENERATED, "prose_seed": rng.getrandbits(32)}
            body = _prose_tokens(tokenizer, notes["prose_seed"], room)
        else:
            offset = rng.randint(0, len(tokens) - room)
            notes = {"text": path.name, "offset": offset}
            body = tokens[offset : offset + room]
        windows.append(Window(str(number), start + body, notes))
    return windows


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # `verbose` would warn that the text is longer than the model takes; windows are cut out of it.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first = list(tokenizer("a")["input_ids"])[:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def _prose_tokens(tokenizer: PreTrainedTokenizerBase, seed: int, count: int) -> list[int]:
    """Return the first tokens of generated prose."""
    sentences = count // 5 + 1  # of at least five words; too few where tokens are longer than words
    while len(tokens := text_tokens(tokenizer, prose(seed, sentences))) < count:
        sentences *= 2
    return tokens[:count]


def decode_logprobs(
    model: PreTrainedModel, method: Method, prompt_ids: Sequence[int], continuation_ids: Sequence[int]
) -> Tensor:
    """Return the log-probabilities [m, vocabulary], float32 on the CPU, of a teacher-forced continuation.

    Row i predicts `continuation_ids[i]`, after the prompt and i decode steps over the method's cache.

    Args:
        model: a model to which no method is attached.
        method: how to compress.
        prompt_ids: n tokens, one forward.
        continuation_ids: m tokens; all but the last are read, one a step.

    Raises:
        ValueError: prompt or continuation has no token.
    """
    return teacher_forced(model, method, prompt_ids, continuation_ids)[0]


def teacher_forced(
    model: PreTrainedModel,
    method: Method,
    prompt_ids: Sequence[int],
    continuation_ids: Sequence[int],
    prefills: Prefills | None = None,
) -> tuple[Tensor, Cache]:
    """Return `decode_logprobs` and the cache; `prefills` reads the prompt once for several methods."""
    if not prompt_ids or not continuation_ids:
        raise ValueError(
            f"prompt and continuation must have tokens, got {len(prompt_ids)} and {len(continuation_ids)}; cut the "
            "text elsewhere"
        )
    with after_prompt(model, method, list(prompt_ids), prefills) as loop:
        return torch.cat(list(following(loop, continuation_ids))), loop.cache


def following(loop: DecodeLoop, continuation_ids: Sequence[int]) -> Iterator[Tensor]:
    """Yield the log-probabilities [1, vocabulary], float32 on the CPU, that predict each token of a continuation.

    Args:
        loop: of one sequence, after a prompt.
        continuation_ids: m tokens; all but the last are read, one a step.
    """
    for number, token in enumerate(continuation_ids):
        yield loop.logits.float().log_softmax(-1).cpu()
        if number + 1 < len(continuation_ids):
            loop.step([[token]])


def full_logprobs(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    continuation_ids: Sequence[int],
    *,
    model_name: str,
    folder: Path | None,
    prefills: Prefills | None = None,
) -> Tensor:
    """Return `decode_logprobs` of the stock model and its own cache, computed once and then read from a file.

    The file name is a hash of everything that the values depend on: the model, its dtype, attention and device, the
    tokens, the length of the prompt, and the versions of torch and transformers. The file is written atomically; a
    damaged one is quarantined and made again.

    Args:
        model: a model to which no method is attached.
        prompt_ids: see `decode_logprobs`.
        continuation_ids: likewise.
        model_name: identifies the model in the file's key.
        folder: of the files; None: the values are computed, and not written.
        prefills: reads the prompt once for several methods.
    """
    if folder is None:
        return teacher_forced(model, Full(), prompt_ids, continuation_ids, prefills)[0]
    key = {
        "version": VERSION,
        "model": model_name,
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "device": model.device.type,
        "text": digest([*prompt_ids, *continuation_ids]),
        "prompt_tokens": len(prompt_ids),
        "steps": len(continuation_ids),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path = folder / f"full-logprobs-{digest(key)[:16]}.safetensors"
    if path.exists():
        with contextlib.suppress(SafetensorError, KeyError):
            return safetensors.torch.load(path.read_bytes())["logprobs"]
        quarantine(path)
    logprobs, _ = teacher_forced(model, Full(), prompt_ids, continuation_ids, prefills)
    write_atomically(path, safetensors.torch.save({"logprobs": logprobs}))
    return logprobs


def divergence(reference: Tensor, other: Tensor, targets: Sequence[int]) -> dict[str, Any]:
    """Compare a method's predictions with the full cache's, row by row; row 0, from the prefill, counts apart.

    Rows are normalised again and summed in float64: equal rows give exactly 0.

    Args:
        reference: [m, vocabulary], of the full cache.
        other: [m, vocabulary], of the method.
        targets: the m tokens of the continuation, at least 2.

    Returns:
        `kl`, the mean KL(full || method) in nats a token; `perplexity`, `full_perplexity`; `nll_difference`, the
        method's mean negative log-likelihood less the full cache's; `greedy_agreement`, the share of steps with the
        same most likely token; `first_divergence`, the first step, from 1, whose most likely token differs, or None;
        `prefill_kl`, the KL of row 0: 0 unless a method changes the prefill.

    Raises:
        ValueError: shapes do not match, or a log-probability is not a number.
    """
    if reference.shape != other.shape or len(reference) != len(targets):
        raise ValueError(
            f"reference, other and targets must have a row a step, got {list(reference.shape)}, {list(other.shape)} "
            f"and {len(targets)} targets"
        )
    kl, nll, full_nll, alike = [], [], [], []
    for number, target in enumerate(targets):
        full, compressed = (rows[number].double().log_softmax(-1) for rows in (reference, other))
        share = full.exp()
        # 0 * (-inf + inf) where both have probability 0 must add nothing.
        kl.append(float(torch.where(share > 0, share * (full - compressed), 0.0).sum()))
        nll.append(-float(compressed[target]))
        full_nll.append(-float(full[target]))
        alike.append(bool(full.argmax() == compressed.argmax()))
        if not (math.isfinite(kl[-1]) and math.isfinite(nll[-1]) and math.isfinite(full_nll[-1])):
            raise ValueError(f"log-probabilities must be finite for every token that occurs; row {number} has others")
    mean, full_mean = fmean(nll[1:]), fmean(full_nll[1:])
    return {
        "kl": fmean(kl[1:]),
        "perplexity": math.exp(mean),
        "full_perplexity": math.exp(full_mean),
        "nll_difference": mean - full_mean,
        "greedy_agreement": fmean(alike[1:]),
        "first_divergence": next((step for step, same in enumerate(alike) if step and not same), None),
        "prefill_kl": kl[0],
    }


def divergence_sample(
    model: PreTrainedModel,
    method: Method,
    window: Window,
    *,
    steps: int = STEPS,
    model_name: str,
    folder: Path | None,
    prefills: Prefills | None = None,
) -> SampleDict:
    """Measure one window, whose last `steps` tokens are the continuation.

    Args:
        model: a model to which no method is attached.
        method: how to compress.
        window: see `texts`.
        steps: m, tokens of the continuation, of which all but the first count.
        model_name: see `full_logprobs`.
        folder: likewise.
        prefills: reads the prompt once for several methods; None: each reads it itself.

    Returns:
        A sample whose score is the mean KL and whose notes have the figures of `divergence`.

    Raises:
        ValueError: the window leaves no room for a prompt, or there are fewer than 2 steps.
    """
    if not 2 <= steps < len(window.ids):
        raise ValueError(
            f"steps must be from 2 to {len(window.ids) - 1}, so that a window of {len(window.ids)} tokens begins with "
            f"a prompt; got {steps}"
        )
    prompt, continuation = window.ids[:-steps], window.ids[-steps:]
    reference = full_logprobs(model, prompt, continuation, model_name=model_name, folder=folder, prefills=prefills)
    logprobs, cache = teacher_forced(model, method, prompt, continuation, prefills)
    figures = divergence(reference, logprobs, continuation)
    return {
        "id": window.id,
        "prompt_sha256": digest(window.ids),
        "score": figures["kl"],
        "turns": [],
        "cost": {"prompt_tokens": len(prompt), "new_tokens": steps, **cache_cost(cache_stats(cache))},
        "notes": {**window.notes, **figures},
    }


def divergence_values(samples: Sequence[SampleDict]) -> dict[str, float | None]:
    """Return the figures of several windows of one length together, as `values` of a record.

    Perplexity is that of all tokens; the first divergence is the lower median over windows, None where most never
    diverge.

    """

    def column(name: str) -> list[Any]:
        return [sample["notes"][name] for sample in samples]

    first = median_low([math.inf if step is None else step for step in column("first_divergence")])
    return {
        "perplexity": math.exp(fmean(map(math.log, column("perplexity")))),
        "full_perplexity": math.exp(fmean(map(math.log, column("full_perplexity")))),
        "nll_difference": fmean(column("nll_difference")),
        "greedy_agreement": fmean(column("greedy_agreement")),
        "first_divergence": None if math.isinf(first) else first,
        "prefill_kl": fmean(column("prefill_kl")),
    }
