"""Whole models for `rocketkv bench model`: real shapes with random weights, filled caches, and one token at a time.

Weights do not change how long a step takes, nor do the values of keys: both are random, made on the device. Caches are
filled without a prefill; stage 1 runs over their contents.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config
from transformers.cache_utils import StaticCache

from ...config import RocketKVConfig
from ...core.params import AttentionParams
from ...hf.cache import RocketKVCache
from ...hf.layer import rocketkv_layers
from ...hf.models import CACHE_ARGUMENT
from ...hf.patch import patch, unpatch
from ...state.compress import close_prompt
from ..checks import WrongResultError, require_near_logits
from .kernel_cases import Case

DECODE_CAPACITY = 256
SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama-3.1-8b": (LlamaConfig, {"vocab_size": 128256, "intermediate_size": 14336, "num_hidden_layers": 32}),
    "qwen3-8b": (Qwen3Config, {"vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36}),
}
HEADS = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 101}
TINY |= {"intermediate_size": 96, "num_hidden_layers": 2}


def build_model(shape: str, positions: int, dtype: torch.dtype, device: torch.device, **sizes: Any) -> PreTrainedModel:
    """Return a model of a real one's shape, its weights random and made on the device; nothing is downloaded.

    Args:
        shape: one of `SHAPES`.
        positions: tokens that a sequence may have.
        dtype: of the weights.
        device: where.
        **sizes: of the configuration, in place of the shape's.
    """
    kind, own = SHAPES[shape]
    config = kind(**HEADS | own | {"max_position_embeddings": positions, "tie_word_embeddings": False} | sizes)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval()
    return model


@dataclass(eq=False)
class ModelArm:
    """A model with a filled cache, one token at a time.

    Attributes:
        model: patched or not, as the arm needs when it runs or is captured.
        config: to patch the model with, or None.
        cache: the arm's.
        token: [B, 1], the last token; replaced by each step.
        position: [B, 1], its position; raised by each step.
        logits: of the last step.
    """

    model: PreTrainedModel
    config: RocketKVConfig | None
    cache: Any
    token: Tensor
    position: Tensor
    logits: Tensor | None = None

    def ready(self) -> None:
        """Patch the model as this arm needs it, or not."""
        if self.config is None:
            unpatch(self.model)
        else:
            patch(self.model, self.config)

    def step(self) -> Tensor:
        """Run a forward of one token and choose the next, all on the device."""
        more = {}
        if "cache_position" in inspect.signature(self.model.forward).parameters:  # transformers before 5
            more["cache_position"] = self.position[0]
        out = self.model(
            self.token, position_ids=self.position, logits_to_keep=1, **{CACHE_ARGUMENT: self.cache}, **more
        )
        self.logits = out.logits[:, -1]
        self.token.copy_(self.logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        return self.logits

    def rewind(self, token: Tensor, position: int) -> None:
        """Go back to the end of the prompt."""
        self.token.copy_(token)
        self.position.fill_(position)
        for layer in rocketkv_layers(self.cache):
            layer.store.crop(position)
        for layer in self.cache.layers:
            count = getattr(layer, "cumulative_length", None)  # of a static layer, since transformers 5
            if isinstance(count, Tensor):
                count.fill_(position)


def model_arms(model: PreTrainedModel, case: Case, *, kernel: str = "auto") -> dict[str, ModelArm]:
    """Return the arms, their caches filled with the same random prompt; `static` and `full` share their buffers.

    Args:
        model: the model, not patched.
        case: batch, prompt and budget.
        kernel: see `RocketKVConfig.backend`.
    """
    config: Any = model.config
    device, dtype = model.device, model.dtype
    configs = {
        "full": RocketKVConfig(method="full", decode_capacity=DECODE_CAPACITY, backend=kernel),
        "rocketkv": RocketKVConfig(token_budget=case.token_budget, decode_capacity=DECODE_CAPACITY, backend=kernel),
    }
    caches: dict[str, Any] = {name: RocketKVCache(config, settings) for name, settings in configs.items()}
    caches["static"] = StaticCache(config=config, max_cache_len=case.context + DECODE_CAPACITY)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        sizes = (case.batch, heads, tokens, config.head_dim)
        return torch.randn(sizes, generator=generator, dtype=dtype, device=device)

    places = torch.arange(case.context, device=device)
    for number, static in enumerate(caches["static"].layers):
        key, value = (normal(config.num_key_value_heads, case.context) for _ in range(2))
        static.update(key, value, {"cache_position": places})
        for name, settings in configs.items():
            layer = caches[name].layers[number]
            split = settings.split_for(case.context, config.head_dim)
            layer.store.extend(key, value)
            window = normal(config.num_attention_heads, settings.window_size)
            layer.store.prompt.remember(window, settings.window_size)
            close_prompt(
                layer.store,
                split,
                AttentionParams(config.head_dim**-0.5),
                decode_reserve=settings.decode_reserve,
                kernel_size=settings.stage_1_kernel_size,
                decode_capacity=DECODE_CAPACITY,
            )
            layer.prompt_tokens = case.context
        # Share the buffers, which may fill half of the memory.
        static.keys, static.values = (
            caches["full"].layers[number].store.keys,
            caches["full"].layers[number].store.values,
        )
    token = torch.zeros(case.batch, 1, dtype=torch.int64, device=device)
    position = torch.full_like(token, case.context)
    return {
        name: ModelArm(model, configs.get(name), caches[name], token.clone(), position.clone())
        for name in ("static", "full", "rocketkv")
    }


def check_arms(case: Case, arms: dict[str, ModelArm]) -> dict[str, str]:
    """Run two steps of each arm and require the dense ones to agree, and all of them where the prompt is within t.

    Returns:
        Dense arms that do not fit into memory, and why.

    Raises:
        WrongResultError: they do not agree.
    """
    logits: dict[str, Tensor] = {}
    absent: dict[str, str] = {}
    for name, arm in arms.items():
        found = _unless_too_large(arm, case)
        if isinstance(found, str):
            absent[name] = found
        else:
            logits[name] = found
    if "rocketkv" in absent or "full" in absent:
        raise torch.cuda.OutOfMemoryError(next(iter(absent.values())))
    alike = [name for name in logits if name != "rocketkv" or case.context + 2 <= case.token_budget]
    for name in alike:
        require_near_logits(f"case {case}: logits of {name}", logits[name], logits["full"])
    if not bool(logits["rocketkv"].isfinite().all()):
        raise WrongResultError(f"case {case}: logits of rocketkv are not finite; nothing is timed")
    return absent


def _unless_too_large(arm: ModelArm, case: Case) -> Tensor | str:
    """Return the logits [2, B, V] of two steps, both of the same token, or why there is no memory for them."""
    start = arm.token.clone()
    try:
        arm.ready()
        first = arm.step().clone()
        arm.token.copy_(start)
        return torch.stack([first, arm.step()])
    except torch.cuda.OutOfMemoryError as error:
        return str(error).splitlines()[0]
    finally:
        arm.rewind(start, case.context)
