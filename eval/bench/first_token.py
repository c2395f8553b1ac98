"""Time to the first token of a prompt: the stock model, and each method with its stage 1.

Letters: B batch, S tokens of the prompt.
"""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ...config import RocketKVConfig
from ...hf.cache import RocketKVCache
from ...hf.models import CACHE_ARGUMENT
from ...hf.patch import patch
from ..checks import require_near_logits
from .gpu_timing import spread
from .kernel_cases import METHODS, Case
from .model_arms import configs_of, restore

STOCK = "stock"


def first_logits(model: PreTrainedModel, prompt: Tensor, config: RocketKVConfig | None) -> tuple[Tensor, float]:
    """Return the logits [B, V] after a prompt [B, S], and the seconds until the first token is known to the host.

    Args:
        model: the model; patched or not, whatever it was before.
        prompt: token ids.
        config: settings to patch it with, or None for the stock model and its growing cache.
    """
    cache: Any
    if config is None:
        restore(model)
        cache = DynamicCache(config=model.config)
    else:
        patch(model, config)
        cache = RocketKVCache(model.config, config, prompt_length=prompt.shape[1])
    _synchronize(prompt.device)
    began = time.perf_counter()
    logits: Tensor = model(prompt, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits[:, -1]
    logits.argmax(-1).tolist()
    _synchronize(prompt.device)  # stage 1 and the index of the last layer too
    return logits, time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_token(
    model: PreTrainedModel, case: Case, rounds: int, *, kernel: str = "auto"
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Time the first token of each arm in alternating rounds, the first of which does not count.

    Every method attends to the whole prompt exactly, so all arms must agree in their logits.

    Args:
        model: the model.
        case: batch, prompt and budget.
        rounds: that count.
        kernel: see `RocketKVConfig.backend`.

    Returns:
        Milliseconds by arm: median, min and max; and the arms that do not fit or cannot have the budget, with reasons.

    Raises:
        WrongResultError: the arms do not agree.
    """
    configs, absent = configs_of(case, kernel=kernel)
    arms: dict[str, RocketKVConfig | None] = {STOCK: None}
    arms |= {method: configs[method] for method in METHODS if method in configs}
    settings: Any = model.config
    generator = torch.Generator(model.device).manual_seed(0)
    prompt = torch.randint(settings.vocab_size, (case.batch, case.context), generator=generator, device=model.device)
    seconds: dict[str, list[float]] = {}
    expected: Tensor | None = None
    try:
        for number in range(rounds + 1):
            for name in [name for name in arms if name not in absent]:
                found = _unless_too_large(model, prompt, arms[name])
                if isinstance(found, str):
                    absent[name] = found
                    continue
                logits, once = found
                expected = logits if expected is None else expected
                require_near_logits(f"case {case}: logits of {name} after the prompt", logits, expected)
                if number:
                    seconds.setdefault(name, []).append(once)
    finally:
        restore(model)
    return {name: spread(times, 1e3) for name, times in seconds.items()}, absent


def _unless_too_large(
    model: PreTrainedModel, prompt: Tensor, config: RocketKVConfig | None
) -> tuple[Tensor, float] | str:
    try:
        return first_logits(model, prompt, config)
    except torch.cuda.OutOfMemoryError as error:
        return str(error).splitlines()[0]
