"""Settings of a patched model or of one cache."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

from .budget import DEFAULT_METHOD, METHODS, BudgetSplit

LOSS_BOUND = 0.5  # by default
INDEX_DTYPES = ("keys", "float8_e5m2")
BACKENDS = ("auto", "torch", "triton", "cpu")
_CHOICES: dict[str, tuple[str, ...]] = {
    "backend": BACKENDS,
    "when_full": ("evict", "raise"),
    "index_dtype": INDEX_DTYPES,
}
_ON_LOSS = ("warn", "widen", "dense")
_COUNTS = ("token_budget", "decode_reserve", "window_size", "kernel_size", "decode_capacity", "audit_every")
_MAY_BE_NONE = ("kernel_size", "decode_capacity", "audit_every")
# The split of a long prompt shows which features a method uses: its tokens, and D.
_LONG_PROMPT, _HEAD_DIM = 1 << 20, 128


@dataclass(frozen=True, kw_only=True)
class RocketKVConfig:
    """Settings of the compression. The first six matter most; the defaults of the others suit most uses.

    Integers of numpy and lists in place of tuples are accepted, and stored as Python's integers and tuples.

    Attributes:
        method: name of the method; `rocketkv.METHODS` lists them.
        token_budget: t, in tokens per KV head and decode step: the keys and values, in 16 bits, that one step may read,
            scores included (paper, arXiv 2502.14051, section 3.6).
        decode_capacity: generated tokens that fit after each prompt, in static buffers, so that decode steps can be
            compiled and captured in CUDA graphs. None: the cache grows.
        max_error: lets every layer set its own budget at the end of each prompt, in place of `token_budget`: the least
            whose attention outputs are expected to have at most this mean relative error, estimated with 95 %
            confidence on the observation window. A layer keeps all tokens, with a warning, if no budget up to half of
            the prompt is within it; also, without one, after prompts under 128 tokens and turns under 4 tokens. Tokens
            that earlier turns evicted are in no estimate. `CacheStats` has the budgets and the expected errors. None:
            `token_budget`.
        protect: tokens that stage 1 never evicts and every step attends to, in addition to the budget. `system`: the
            conversation's system message, found by the chat template of the tokenizer given to `patch`. Or ranges
            (start, stop), counted from each row's first token. None: none.
        backend: `torch`, the reference; `triton`, the kernels; `cpu`, the compiled CPU step (the extra `[cpu]`); or
            `auto`, the kernels on a GPU that runs them and the compiled step on a CPU where it is installed. The
            environment variable ROCKETKV_BACKEND replaces `auto`.

    Budget split and ranking:
        decode_reserve: generated tokens that the sequence length of the split includes. It never depends on
            `max_new_tokens`: the first token must not depend on how many may follow. Set it to the number of generated
            tokens to reproduce the paper.
        window_size: W, the observation window: the last W queries of a prompt rank its tokens, and their own tokens are
            always kept (paper, appendix A.3: 32 for single-turn tasks).
        kernel_size: odd width, in tokens, of the max-pooling of those ranks. None: the method's own, 63 as in the paper
            (section 3.3), or 13 for methods with a sketch (docs/beyond.md). Generated tokens are ranked with a width of
            at most 5.
        split: a custom budget split for every prompt length. None: derived from the prompt's length by the method.
        fair_shares: whether every message of a conversation, found by the chat template, keeps the same share of its
            tokens in stage 1.

    Exceptions by layer (negative numbers count from the end):
        skip_layers: layers that keep a full, stock cache; not with `decode_capacity`.
        layer_budgets: token budgets that replace `token_budget`, as a mapping {layer: budget}; stored as a tuple of
            pairs.

    Memory:
        when_full: `evict`: when the static buffer is full, stage 1 re-evicts generated tokens, ranked by their last W
            queries. Half of them stay, and so do the kept prompt tokens, so memory and time per step stay the same for
            any length. `raise`: an error, as for methods without a stage 1 and for a decode_capacity under 2W.
        index_dtype: dtype of the page bounds, of methods with pages, such as `rocketkv`: `keys`, the keys' own, or
            `float8_e5m2`, a half to a quarter of the bytes. Budgets are counted for 16 bits in both.
        history_device: device that holds the history of `rocketkv-mt` and `rocketkv-mt+` between prompts, for instance
            `cpu` (pinned if there is a GPU). None: the device of each layer.

    Diagnostics (for caches that grow):
        audit_every: compare one head with exact attention every `audit_every` tokens, another layer and head each time
            (`CacheStats.audits`). It reads one head's keys and values and waits for the device. None: never.
        on_loss: reaction of a step to a missed mass above `loss_bound`, in each row and KV head.
            `warn`: one warning per generation, with layer and value. `widen`: double k until the missed mass is within
            the bound. `dense`: attend to all stored tokens. It needs a method with a residual, such as `rocketkv+`, and
            waits for the device in every layer and step. None: nothing.
        loss_bound: tolerated missed mass, at least 0 and less than 1: the share of a query head's attention weight on
            stored tokens that the step does not attend to. Evicted tokens do not count. None: 0.5.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value, fields contradict each other, or the budget is too small.
    """

    method: str = DEFAULT_METHOD
    token_budget: int = 512
    decode_capacity: int | None = None
    max_error: float | None = None
    protect: str | Sequence[tuple[int, int]] | None = None
    backend: str = "auto"

    decode_reserve: int = 128
    window_size: int = 32
    kernel_size: int | None = None
    split: BudgetSplit | None = None
    fair_shares: bool = False

    skip_layers: Sequence[int] = ()
    layer_budgets: Mapping[int, int] | Sequence[tuple[int, int]] = ()

    when_full: str = "evict"
    index_dtype: str = "keys"
    history_device: str | None = None

    audit_every: int | None = None
    on_loss: str | None = None
    loss_bound: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"method must be one of {', '.join(METHODS)}; got {self.method!r}.{did_you_mean(self.method, METHODS)}"
            )
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name in _COUNTS:
            if getattr(self, name) is not None or name not in _MAY_BE_NONE:
                self._set(name, _count(name, getattr(self, name)))
        if not isinstance(self.fair_shares, bool):
            raise TypeError(f"fair_shares must be True or False, got {self.fair_shares!r}")
        if self.kernel_size is not None and self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd, to be centred on a token; got {self.kernel_size}. "
                f"Use {self.kernel_size - 1} or {self.kernel_size + 1}."
            )
        if self.protect is not None and not isinstance(self.protect, str):
            self._set("protect", _ranges(self.protect))
        elif self.protect not in (None, "system"):
            raise ValueError(f"protect must be 'system', ranges (start, stop) or None; got {self.protect!r}")
        self._set(
            "skip_layers", tuple(_whole("skip_layers", layer) for layer in _listed("skip_layers", self.skip_layers))
        )
        self._check_budgets()
        self._check_split(self.split or self._split(_LONG_PROMPT, _HEAD_DIM))
        self._check_max_error(self._split(_LONG_PROMPT, _HEAD_DIM))
        self._check_diagnostics()
        if self.history_device is not None:
            self._check_history_device(self.history_device)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen after __post_init__

    def _check_budgets(self) -> None:
        given = self.layer_budgets
        pairs = _pairs("layer_budgets", list(given.items()) if isinstance(given, Mapping) else given)
        self._set("layer_budgets", tuple(sorted(pairs)))
        if self.split is not None:
            if not isinstance(self.split, BudgetSplit):
                raise TypeError(f"split must be a BudgetSplit or None, got {type(self.split).__name__}")
            if pairs:
                raise ValueError("layer_budgets has no effect with a custom split: leave one of the two out")
            return
        least = METHODS[self.method].least_budget(self.window_size, self.decode_reserve)
        for name, budget in (("token_budget", self.token_budget), *((f"layer_budgets[{i}]", t) for i, t in pairs)):
            if budget < least:
                raise ValueError(
                    f"{name} must be at least {least} for method {self.method!r} with window_size={self.window_size} "
                    f"and decode_reserve={self.decode_reserve}; got {budget}. Use {least} or more."
                )

    def _check_split(self, split: BudgetSplit) -> None:
        """Check the settings that depend on the method's split, or on the custom one."""
        kept = split.kept_tokens
        if self.split is not None and kept is not None and split.sinks is None and kept < self.window_size:
            raise ValueError(
                f"split.kept_tokens must be at least window_size={self.window_size}, the tokens that are always "
                f"kept; got {kept}. Raise it or lower window_size."
            )
        if self.index_dtype != "keys" and split.sketch_bits is not None:
            raise ValueError(
                f"index_dtype={self.index_dtype!r} is for the bounds of pages, but method {self.method!r} scores a "
                "sketch of every key. Leave it 'keys', or choose a method with pages, such as 'rocketkv'."
            )
        if self.marks_prompts and not split.ranked:
            raise ValueError(
                f"protect and fair_shares are for methods that rank tokens by attention; {self.method!r} does not"
            )
        if self.on_loss is not None and not split.residual:
            raise ValueError(
                f"on_loss={self.on_loss!r} needs an estimate of the missed mass, which methods with a residual make, "
                f"such as 'rocketkv+', not {self.method!r}. Use one of those, or audit_every, which works with any"
            )

    def _check_max_error(self, split: BudgetSplit) -> None:
        bound: Any = self.max_error
        if bound is None:
            return
        if isinstance(bound, bool) or not isinstance(bound, (int, float)):
            raise TypeError(f"max_error must be a float or None, got {bound!r} of type {type(bound).__name__}")
        if not 0 < bound < 1:
            raise ValueError(f"max_error must be above 0 and below 1, a share of the outputs' length; got {bound}")
        self._set("max_error", float(bound))
        if not split.ranked:
            raise ValueError(
                f"max_error={bound} is for methods that rank tokens by attention; {self.method!r} does not"
            )
        if split.kept_tokens is None:
            raise ValueError(
                f"max_error={bound} is for methods that evict tokens; {self.method!r} keeps them all. Use one that "
                "evicts, such as 'rocketkv+', or token_budget"
            )
        for name, value in (("split", self.split), ("layer_budgets", self.layer_budgets)):
            if value:
                raise ValueError(f"max_error={bound} sets the budget of every layer: leave out {name}")
        if self.decode_capacity is not None:
            raise ValueError(
                f"max_error={bound} is for caches that grow: the buffers of a static cache (decode_capacity="
                f"{self.decode_capacity}) have a size that is known before the prompt. Leave one of the two out"
            )

    def _check_diagnostics(self) -> None:
        bound: Any = self.loss_bound
        if self.on_loss not in (None, *_ON_LOSS):
            raise ValueError(f"on_loss must be one of {', '.join(_ON_LOSS)} or None; got {self.on_loss!r}")
        if bound is not None:
            if isinstance(bound, bool) or not isinstance(bound, (int, float)):
                raise TypeError(f"loss_bound must be a float or None, got {bound!r} of type {type(bound).__name__}")
            if not 0 <= bound < 1:
                raise ValueError(f"loss_bound must be from 0 to less than 1, a share of the weight; got {bound}")
            if self.on_loss is None:
                raise ValueError(f"loss_bound={bound} has no effect without on_loss: set both or neither")
            self._set("loss_bound", float(bound))
        if self.skip_layers and self.decode_capacity is not None:
            raise ValueError(
                f"skip_layers is for caches that grow: a full cache next to a static one (decode_capacity="
                f"{self.decode_capacity}) changes its shape with every step. Leave one of the two out"
            )
        if self.watched and self.decode_capacity is not None:
            name = "audit_every" if self.on_loss is None else "on_loss"
            raise ValueError(
                f"{name}={getattr(self, name)!r} is for caches that grow: the steps of a static cache (decode_capacity="
                f"{self.decode_capacity}) are compiled and captured. Leave one of the two out"
            )

    def _check_history_device(self, device: object) -> None:
        if not isinstance(device, str):
            raise TypeError(
                f"history_device must be the name of a device, such as 'cpu', or None; got {type(device).__name__}"
            )
        import torch  # imported here: other settings need no torch

        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"history_device must be the name of a device, such as 'cpu'; got {device!r}") from error
        if not self.keeps_history:
            names = ", ".join(name for name, method in METHODS.items() if method.multi_turn)
            raise ValueError(
                f"history_device={device!r} is for methods that keep a history, {names}; {self.method!r} keeps none. "
                "Leave it None."
            )

    @property
    def stage_1_kernel_size(self) -> int:
        """Odd width of stage 1's max-pooling: `kernel_size`, or the method's own."""
        return METHODS[self.method].kernel_size if self.kernel_size is None else self.kernel_size

    @property
    def watched(self) -> bool:
        """Whether decode steps are audited, or react to their estimated missed mass."""
        return self.audit_every is not None or self.on_loss is not None

    @property
    def marks_prompts(self) -> bool:
        """Whether prompt tokens are marked, to be protected or to get fair shares."""
        return self.protect is not None or self.fair_shares

    @property
    def keeps_history(self) -> bool:
        """Whether all tokens stay, and every prompt selects from all of them (RocketKV-MT)."""
        return METHODS[self.method].multi_turn

    def split_for(self, prompt_length: int, head_dim: int) -> BudgetSplit:
        """Return the split for a prompt whose longest row has `prompt_length` tokens, with heads of `head_dim` = D.

        Raises:
            ValueError: `split` asks for more channels than `head_dim` has, or `max_error` sets the budget, which is
                known only when the prompt has been read.
        """
        if self.max_error is not None:
            raise ValueError(
                f"max_error={self.max_error} sets the budget of each layer when the prompt has been read: give a "
                "token_budget instead to know the split before"
            )
        if self.split is None:
            return self._split(prompt_length, head_dim)
        if self.split.channels is not None and self.split.channels > head_dim:
            raise ValueError(
                f"split.channels must be at most head_dim={head_dim}, got {self.split.channels}. Lower it."
            )
        return self.split

    def split_of(self, token_budget: int, prompt_length: int, head_dim: int) -> BudgetSplit:
        """Return the method's split of another budget."""
        return METHODS[self.method].split(prompt_length, token_budget, head_dim, self.decode_reserve)

    def _split(self, prompt_length: int, head_dim: int) -> BudgetSplit:
        return self.split_of(self.token_budget, prompt_length, head_dim)

    def by_layer(self, layers: int) -> "list[RocketKVConfig | None]":
        """Return the settings of each layer of a model with `layers` layers, None for layers that keep a full cache.

        Raises:
            ValueError: `skip_layers` or `layer_budgets` names a layer that the model does not have, or a layer twice.
        """
        common = replace(self, skip_layers=(), layer_budgets=())
        found: list[RocketKVConfig | None] = [common] * layers
        exceptions: list[tuple[str, int, int | None]] = [("skip_layers", layer, None) for layer in self.skip_layers]
        budgets: Any = self.layer_budgets  # pairs, since they are stored
        exceptions += [("layer_budgets", layer, budget) for layer, budget in budgets]
        named = set()
        for name, layer, budget in exceptions:
            if not -layers <= layer < layers:
                raise ValueError(f"{name} names layer {layer}, but the model has layers 0 to {layers - 1}")
            if layer % layers in named:
                raise ValueError(f"skip_layers and layer_budgets name layer {layer % layers} twice: name it once")
            named.add(layer % layers)
            found[layer % layers] = None if budget is None else replace(common, token_budget=budget)
        return found


def make_config(config: RocketKVConfig | None, given: Mapping[str, Any]) -> RocketKVConfig:
    """Return `config`, or the defaults for None, with some fields replaced.

    Raises:
        TypeError: `config` is not a RocketKVConfig, or there is no such field.
        ValueError: a field has an impossible value.
    """
    if not isinstance(config, (RocketKVConfig, type(None))):
        raise TypeError(f"config must be a RocketKVConfig or None, got {type(config).__name__}; fields go by name")
    known = [field.name for field in fields(RocketKVConfig)]
    for name in given:
        if name not in known:
            raise TypeError(f"there is no setting {name!r}.{did_you_mean(name, known)} RocketKVConfig lists them")
    return replace(config or RocketKVConfig(), **given)


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the name closest to `given`, or nothing if none is close."""
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _whole(name: str, value: object) -> int:
    """Return an integer of any kind as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    return int(value)


def _count(name: str, value: object) -> int:
    """Return a positive integer as an int."""
    count = _whole(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def _listed(name: str, value: object) -> list[Any]:
    """Return the entries of a list or tuple."""
    if not isinstance(value, (list, tuple, range)):
        raise TypeError(f"{name} must be a list or tuple, got {value!r} of type {type(value).__name__}")
    return list(value)


def _pairs(name: str, value: object) -> list[tuple[int, int]]:
    """Return pairs of integers as tuples of ints."""
    pairs = [_listed(name, pair) for pair in _listed(name, value)]
    if not all(len(pair) == 2 for pair in pairs):
        raise TypeError(f"{name} must hold pairs of integers, got {value!r}")
    return [(_whole(name, first), _whole(name, second)) for first, second in pairs]


def _ranges(value: object) -> tuple[tuple[int, int], ...]:
    """Return the ranges of `protect`, checked."""
    ranges = tuple(_pairs("protect", value))
    for start, stop in ranges:
        if not 0 <= start < stop:
            raise ValueError(f"a range to protect must be (start, stop) with 0 <= start < stop; got {(start, stop)}")
    return ranges
