"""Small random models of many architectures, sharp enough that what a token attends to decides what comes next."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rocketkv import BudgetSplit
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VOCABULARY = 96
PAD = 0
NEVER = 10_000  # an end token that no vocabulary has
WINDOW = 24  # of the sliding layers

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
HYBRID = {
    "num_hidden_layers": 4,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": []}

# Name to the stem of its classes, and the fields in which it differs from COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
    # Eager is what Gemma 2 was trained with: SDPA of transformers before 5 leaves its soft-cap out.
    "gemma2": (
        "Gemma2",
        {**HYBRID, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0, "attn_implementation": "eager"},
    ),
    "gemma3": ("Gemma3", {**HYBRID, "query_pre_attn_scalar": 16}),
    "gpt-oss": ("GptOss", {**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2", {}),
    "glm4": ("Glm4", {"partial_rotary_factor": 0.5}),
    "cohere2": ("Cohere2", HYBRID),
}

# Real eviction and real selection for prompts of some 50 to 150 tokens.
SPLIT = BudgetSplit(token_budget=24, kept_tokens=40, page_size=2, channels=8, top_k=12)
SKETCH_SPLIT = BudgetSplit(
    token_budget=24, kept_tokens=40, sketch_bits=2, top_k=11, residual=True, calibrated=True, by_largest=True,
    value_aware=True, pool_offset=2,
)  # fmt: skip
SETTINGS: dict[str, Any] = {"decode_reserve": 8, "window_size": 8, "kernel_size": 7}
SMALL: dict[str, Any] = {**SETTINGS, "token_budget": 24, "split": SPLIT}
LARGE: dict[str, Any] = {**SETTINGS, "token_budget": 4096}


def config(name: str, **fields: Any) -> PretrainedConfig:
    """Return the configuration of a family's tiny model, with some fields of one's own."""
    stem, own = FAMILIES[name]
    kind = getattr(transformers, f"{stem}TextConfig" if stem == "Gemma3" else f"{stem}Config")
    made: PretrainedConfig = kind(**{**COMMON, **own, **fields})
    return made


def build(name: str = "llama", *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Build a family's tiny model; the global random state stays as it is."""
    made = config(name, **fields)
    return sharpened(getattr(transformers, f"{FAMILIES[name][0]}ForCausalLM"), made, seed)


def sharpened(kind: Any, made: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Build a model whose weights keep activations at about 1: at the usual 0.02 attention would decide nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(made).eval()
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 1.0 if id(parameter) in embeddings else 1.4 * parameter.shape[-1] ** -0.5)
                elif name.endswith("sinks"):
                    parameter.normal_(1, 1)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = NEVER
    return model


def prompt(length: int, *, rows: int = 1, seed: int = 1) -> Tensor:
    """Return random token ids [rows, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` of rows [1, length] of different lengths."""
    longest = max(row.shape[1] for row in rows)
    padded = [nn.functional.pad(row, (longest - row.shape[1], 0), value=PAD) for row in rows]
    mask = [nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows]
    return {"input_ids": torch.cat(padded), "attention_mask": torch.cat(mask)}


def greedy(model: Any, inputs: Any, new_tokens: int = 12, **kwargs: Any) -> tuple[Tensor, Tensor, Any]:
    """Generate greedily; return the new tokens [B, n], their logits [B, n, V] and the cache."""
    # A mask, lest a generated PAD be taken for padding in a second turn.
    given = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)} if isinstance(inputs, Tensor) else inputs
    out = model.generate(
        **given,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    # Prompt lookup of transformers 4 may write more than it was asked for.
    tokens, logits = out.sequences[:, -len(out.logits) :], torch.stack(out.logits, dim=1)
    return tokens[:, :new_tokens], logits[:, :new_tokens], out.get(CACHE_ARGUMENT)


def begin_turn(cache: Any, ids: Tensor) -> None:
    """Begin a turn on a cache whose prompt has ended, if the next ids [B, n] are more than one decoded token."""
    for layer in rocketkv_layers(cache):
        if ids.shape[1] > 1 and layer.store.closed and not layer.turn_begins and not layer.speculative:
            layer.begin_turn()


def hand_written(
    model: Any, ids: Tensor, new_tokens: int = 12, *, cache: Any = None, mask: Tensor | None = None, chunk: int = 0
) -> tuple[Tensor, Tensor, Any]:
    """Generate greedily in a loop of one's own, the prompt in chunks where told; return what `greedy` does."""
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    steps = list(torch.split(ids, chunk, dim=1)) if chunk else [ids]
    seen = 0 if cache is None else cache.get_seq_length()
    begin_turn(cache, ids)
    with torch.no_grad():
        while len(tokens) < new_tokens:
            step = steps.pop(0)
            seen += step.shape[1]
            given: dict[str, Tensor] = {}
            if mask is not None:
                if mask.shape[1] < seen:
                    mask = nn.functional.pad(mask, (0, 1), value=1)
                position = (mask.cumsum(-1) - 1).clamp(min=0)
                given = {"attention_mask": mask[:, :seen], "position_ids": position[:, seen - step.shape[1] : seen]}
            out = model(step, **{CACHE_ARGUMENT: cache}, use_cache=True, **given)
            cache = out.get(CACHE_ARGUMENT)
            if not steps:
                logits.append(out.logits[:, -1])
                tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
                steps.append(tokens[-1])
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1), cache
