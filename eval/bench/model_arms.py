"""Whole models for `rocketkv bench model`: real shapes with random weights, filled caches, and one token at a time.

Weights do not change how long a step takes, nor do the values of keys: both are random, made on the device. Caches are
filled without a prefill; stage 1 runs over their contents, on the kernels where there is a GPU.
"""

import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.cache_utils import StaticCache

from ...config import RocketKVConfig
from ...core.params import AttentionParams
from ...dispatch import eviction_ops
from ...hf.cache import RocketKVCache
from ...hf.layer import rocketkv_layers
from ...hf.models import CACHE_ARGUMENT
from ...hf.patch import patch, unpatch
from ...state.compress import close_prompt
from ..checks import WrongResultError, require_near_logits
from .kernel_cases import METHODS, Case

DECODE_CAPACITY = 256
USUAL_ATTENTION = "sdpa"
FLASH_NAME = "rocketkv_bench_static"  # a name with "flash" in it would make transformers look for a package
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
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=USUAL_ATTENTION
        )
    model.eval()
    return model


def flash_attention(
    position: Tensor,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by flash-attn from one query a row to the tokens of a static cache, up to the query's own.

    Args:
        position: [B, 1], the query's position.
        module: the model's attention module.
        query: [B, H, 1, D].
        key: [B, Hkv, capacity, D].
        value: [B, Hkv, capacity, Dv].
        attention_mask: ignored: tokens behind the position are those that are not there.
        scaling: factor of the logits.
        **kwargs: of other attention functions.
    """
    attend = importlib.import_module("flash_attn").flash_attn_with_kvcache
    lengths = (position[:, 0] + 1).to(torch.int32)
    cached = (key.transpose(1, 2), value.transpose(1, 2))
    out: Tensor = attend(query.transpose(1, 2), *cached, cache_seqlens=lengths, softmax_scale=scaling)
    return out, None


def restore(model: PreTrainedModel) -> None:
    """Leave a model of `build_model` unpatched, with PyTorch's attention."""
    unpatch(model)
    model.set_attn_implementation(USUAL_ATTENTION)


@dataclass(eq=False)
class ModelArm:
    """A model with a filled cache, one token at a time.

    Attributes:
        model: patched or not, as the arm needs when it runs or is captured.
        config: to patch the model with, or None.
        cache: the arm's.
        attention: name of the attention that the unpatched model runs.
        token: [B, 1], the last token; replaced by each step.
        position: [B, 1], its position; raised by each step.
        logits: of the last step.
    """

    model: PreTrainedModel
    config: RocketKVConfig | None
    cache: Any
    attention: str
    token: Tensor
    position: Tensor
    logits: Tensor | None = None

    def ready(self) -> None:
        """Patch the model as this arm needs it, or not."""
        restore(self.model)
        if self.attention == FLASH_NAME:
            AttentionInterface.register(FLASH_NAME, partial(flash_attention, self.position))
            self.model.set_attn_implementation(FLASH_NAME)
        if self.config is not None:
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


def configs_of(case: Case, *, kernel: str = "auto") -> tuple[dict[str, RocketKVConfig], dict[str, str]]:
    """Return the settings of the patched arms, and the methods that cannot have the case's budget, with the reasons.

    Args:
        case: batch, prompt and budget.
        kernel: see `RocketKVConfig.backend`.
    """
    configs: dict[str, RocketKVConfig] = {}
    absent: dict[str, str] = {}
    for method in ("full", *METHODS):
        budget: dict[str, Any] = {} if method == "full" else {"token_budget": case.token_budget}
        try:
            configs[method] = RocketKVConfig(method=method, decode_capacity=DECODE_CAPACITY, backend=kernel, **budget)
        except ValueError as error:  # a budget that is too small for the method
            absent[method] = str(error)
    return configs, absent


def model_arms(
    model: PreTrainedModel, case: Case, *, kernel: str = "auto"
) -> tuple[dict[str, ModelArm], dict[str, str]]:
    """Return the arms, and the reasons why others are absent; the dense arms share their buffers.

    All caches are filled with the same random prompt.

    Args:
        model: the model, not patched.
        case: batch, prompt and budget.
        kernel: see `RocketKVConfig.backend`.
    """
    config: Any = model.config
    device, dtype = model.device, model.dtype
    configs, absent = configs_of(case, kernel=kernel)
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
                ops=eviction_ops(key, backend=kernel, workspaces=layer.workspaces),
            )
            layer.prompt_tokens = case.context
        # Share the buffers, which may fill half of the memory.
        static.keys, static.values = (
            caches["full"].layers[number].store.keys,
            caches["full"].layers[number].store.values,
        )
    attentions = dict.fromkeys(("static", *configs), USUAL_ATTENTION)
    if importlib.util.find_spec("flash_attn") is None:
        absent["flash-attn"] = "flash-attn is not installed"
    else:
        attentions["flash-attn"], caches["flash-attn"] = FLASH_NAME, caches["static"]
    token = torch.zeros(case.batch, 1, dtype=torch.int64, device=device)
    position = torch.full_like(token, case.context)
    arms = {
        name: ModelArm(model, configs.get(name), caches[name], attention, token.clone(), position.clone())
        for name, attention in attentions.items()
    }
    return arms, absent


def check_arms(case: Case, arms: dict[str, ModelArm]) -> dict[str, str]:
    """Run two steps of each arm and require the dense ones to agree, and all of them where the prompt is within t.

    Returns:
        Arms that do not fit into memory or cannot run, and why.

    Raises:
        WrongResultError: they do not agree.
    """
    logits: dict[str, Tensor] = {}
    absent: dict[str, str] = {}
    for name, arm in arms.items():
        found = _unless_absent(arm, case)
        if isinstance(found, str):
            absent[name] = found
        else:
            logits[name] = found
    if "rocketkv" in absent or "full" in absent:
        raise torch.cuda.OutOfMemoryError(next(iter(absent.values())))
    alike = [name for name in logits if name not in METHODS or case.context + 2 <= case.token_budget]
    for name in alike:
        require_near_logits(f"case {case}: logits of {name}", logits[name], logits["full"])
    for name, found in logits.items():
        if not bool(found.isfinite().all()):
            raise WrongResultError(f"case {case}: logits of {name} are not finite; nothing is timed")
    return absent


def _unless_absent(arm: ModelArm, case: Case) -> Tensor | str:
    """Return the logits [2, B, V] of two steps, both of the same token, or why it cannot take them."""
    start = arm.token.clone()
    try:
        arm.ready()
        first = arm.step().clone()
        arm.token.copy_(start)
        return torch.stack([first, arm.step()])
    except torch.cuda.OutOfMemoryError as error:
        return str(error).splitlines()[0]
    except (ImportError, RuntimeError) as error:
        if arm.attention != FLASH_NAME:
            raise
        return (str(error).splitlines() or [type(error).__name__])[0]  # an installation for another GPU or PyTorch
    finally:
        arm.rewind(start, case.context)
