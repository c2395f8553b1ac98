"""Capture a model's decode steps for real: by `generate`, by `compile_step`, and in a CUDA graph."""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import rocketkv
from rocketkv.eval.bench.model_arms import TINY, build_model
from rocketkv.eval.checks import WrongResultError, require_near_logits
from rocketkv.hf.models import CACHE_ARGUMENT

from .replay import captured, warmed

ROOM = 64
LAYERS = {"num_hidden_layers": 2, "vocab_size": 4096}
EAGERLY = "RocketKV runs these decode steps eagerly"


def capture(method: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> dict[str, Any]:
    """Compare captured steps of a model of two layers with eager ones.

    Args:
        method: one of `METHODS`.
        device: where.
        dtype: of the weights.
        tiny: whether to take tiny shapes.

    Raises:
        WrongResultError: a way of running them gives other logits or tokens, or ran eagerly.
    """
    context, token_budget, count = (200, 64, 6) if tiny else (4096, 512, 32)
    model = build_model("llama-3.1-8b", context + ROOM, dtype, device, **(TINY if tiny else LAYERS))
    settings: Any = model.config
    generator = torch.Generator(device).manual_seed(0)
    prompt = torch.randint(settings.vocab_size, (2, context), generator=generator, device=device)
    options: dict[str, Any] = {} if device.type == "cuda" else {"backend": "eager"}
    config = rocketkv.RocketKVConfig(
        method=method,
        token_budget=token_budget,
        decode_capacity=ROOM,
        backend="triton" if device.type == "cuda" else "auto",
    )
    with rocketkv.patch(model, config) as handle:
        expected, tokens = _loop(model, model, config, prompt, count)
        found, _ = _loop(model, handle.compile_step(**options), config, prompt, count, tokens)
        require_near_logits(f"{method}: logits of compile_step", found, expected)
        replayed = _graph(model, config, prompt, tokens)
        require_near_logits(f"{method}: logits of a CUDA graph", replayed, expected)
        plain: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        generate: Any = model.generate  # typed as a Tensor of the module
        generated = generate(prompt, attention_mask=torch.ones_like(prompt), **plain)
        agreed = int((generated[:, context:] == tokens).all(0).long().cumprod(0).sum())
    # Steps in another order of operations may choose another token of nearly equal logits: from then on all differ.
    if agreed < 1:
        raise WrongResultError(f"{method}: generate begins with another token than the loop")
    return {"method": method, "steps": count - 1, "tokens_of_generate_that_agree": agreed}


def _cache(model: PreTrainedModel, config: rocketkv.RocketKVConfig, prompt: Tensor) -> tuple[Any, Tensor]:
    """Return a cache with the prompt, and the logits [B, V] after it."""
    cache = rocketkv.RocketKVCache(model.config, config, prompt_length=prompt.shape[1])
    logits: Tensor = model(prompt, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits[:, -1]
    return cache, logits


def _loop(
    model: PreTrainedModel,
    step: Any,
    config: rocketkv.RocketKVConfig,
    prompt: Tensor,
    count: int,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode so many tokens greedily, or those given [B, n]; return the logits [n, B, V] and the tokens.

    Raises:
        WrongResultError: a compiled step says that it runs eagerly.
    """
    cache, logits = _cache(model, config, prompt)
    every, chosen = [logits], [logits.argmax(-1) if tokens is None else tokens[:, 0]]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=EAGERLY)
        for number in range(1, count):
            try:
                logits = step(chosen[-1][:, None], logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits[:, -1].clone()
            except UserWarning as error:
                raise WrongResultError(str(error)) from error
            every.append(logits)
            chosen.append(logits.argmax(-1) if tokens is None else tokens[:, number])
    return torch.stack(every), torch.stack(chosen, 1)


def _graph(model: PreTrainedModel, config: rocketkv.RocketKVConfig, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Return the logits [n, B, V] of the tokens [B, n], by replays of one captured step."""
    cache, first = _cache(model, config, prompt)
    token = tokens[:, :1].clone()
    position = torch.full_like(token, prompt.shape[1])
    out = torch.empty_like(first)

    def step() -> None:
        logits = model(token, position_ids=position, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits[:, -1]
        out.copy_(logits)

    warmed(step, prompt.device)
    cache.crop(prompt.shape[1])
    replay = captured(step, prompt.device)
    cache.crop(prompt.shape[1])
    every = [first]
    for number in range(tokens.shape[1] - 1):
        token.copy_(tokens[:, number : number + 1])
        position.fill_(prompt.shape[1] + number)
        replay()
        every.append(out.clone())
    return torch.stack(every)
