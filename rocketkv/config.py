"""Settings of one patched model or one cache."""

import difflib
from dataclasses import dataclass

import torch

from .budget import METHODS, MULTI_TURN, SKETCHED, UNRANKED, BudgetSplit, least_token_budget

BACKENDS = ("auto", "torch", "triton")
WHEN_FULL = ("evict", "raise")
ON_LOSS = ("warn", "widen", "dense")
LOSS_BOUND = 0.5  # where none is given
PAPERS_POOL, SKETCHED_POOL = 63, 13  # widths of stage 1's max-pooling where none is given
INDEX_DTYPES = ("keys", "float8_e5m2", "float8_e4m3fn")


@dataclass(frozen=True, kw_only=True)
class RocketKVConfig:
    """What to compress with, and how far.

    Attributes:
        method: name of the method; `rocketkv.METHODS` lists them.
        token_budget: t, in tokens per KV head and decode step: how much K and V, in 16 bits, one step may read, scores
            included (paper, "token budget").
        decode_reserve: generated tokens that the budget split counts into the sequence length. Never taken from
            `max_new_tokens`: the first token must not depend on how many may follow. To reproduce the paper, set it to
            the number of tokens that will be generated.
        window_size: W, queries at the end of the prompt whose attention ranks the prompt's tokens; their own tokens are
            always kept (paper and SnapKV section 3: 32).
        kernel_size: odd width, in tokens, of the max-pooling of those ranks; None for the method's own: 63 as in the
            paper, and 13 for methods with a sketch, which were measured to lose less with it (docs/beyond.md). Those
            move their pools back by two tokens of whatever width (`BudgetSplit.pool_offset`). Where generated tokens
            are ranked, at most 5, around each.
        split: a budget split of your own, used for every prompt length; None derives one from the prompt.
        backend: `torch`, the reference; `triton`, the kernels; or `auto`, the kernels where there is a GPU that runs
            them. The environment variable ROCKETKV_BACKEND decides where this is `auto`.
        decode_capacity: generated tokens that the cache has room for after each prompt, in buffers that never move, so
            that decode steps can be compiled and captured in CUDA graphs; None: a cache that grows.
        when_full: what happens at the end of that room. `evict`: stage 1 runs again, over the generated tokens and with
            the queries of their last W; half of them stay, and so does what the prompt kept, so that memory and steps
            stay the same for any length. `raise`: an error, as with methods without a stage 1, and where there is room
            for fewer than 2W.
        index_dtype: of the bounds of pages, for methods that score those: `keys`, the keys' own; or 8 bits, a quarter
            to a half of its bytes: `float8_e5m2`, of a wide range, or `float8_e4m3fn`, which is finer and ends at 448.
            Budgets are counted for 16 bits all the same.
        protect: tokens that stage 1 never evicts and every step attends to, beside the budget: `system`, the
            conversation's system message, found by the chat template of the tokenizer that `patch` is given; or ranges
            (start, stop), counted from each row's first token; None for none.
        fair_shares: whether each message of a conversation, found by the chat template, has its share of what stage 1
            keeps beside tokens that must stay: as large a part as of the prompt's other tokens.
        history_device: where `rocketkv-mt` and `rocketkv-mt+` keep the history between prompts, for instance `cpu` (in
            pinned memory beside a GPU); None: where the model's layers are.
        audit_every: compare one head with exact attention after every so many tokens of the sequence while it decodes,
            another layer and head each time: see `CacheStats.audits`. None for never. Costs a look at one head's keys
            and values, and makes the host wait for the device.
        on_loss: what happens where a step says itself that it misses more than `loss_bound`, in that step, for those
            rows and KV heads alone. `warn`: a warning, once a generation, that names the layer and the value. `widen`:
            k is doubled until no more than that is missed, or all that is stored is attended to. `dense`: all that is
            stored is attended to. For methods that estimate it, `rocketkv+` and `rocketkv-mt+`; the host waits for the
            device in every layer and step. None for nothing.
        loss_bound: from 0 to less than 1, the missed mass that is tolerated: the share of one query head's attention
            weight that lies on stored tokens to which the step does not attend, as the step estimates it. What stage 1
            has evicted is not in it. None for 0.5.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value, or the budget is below the least that works.
    """

    method: str = "rocketkv"
    token_budget: int = 512
    decode_reserve: int = 128
    window_size: int = 32
    kernel_size: int | None = None
    split: BudgetSplit | None = None
    backend: str = "auto"
    decode_capacity: int | None = None
    when_full: str = "evict"
    index_dtype: str = "keys"
    protect: str | tuple[tuple[int, int], ...] | None = None
    fair_shares: bool = False
    history_device: str | None = None
    audit_every: int | None = None
    on_loss: str | None = None
    loss_bound: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            near = difflib.get_close_matches(str(self.method), METHODS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}.{hint}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {self.backend!r}")
        for name, known in (("index_dtype", INDEX_DTYPES), ("when_full", WHEN_FULL)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name in ("token_budget", "decode_reserve", "window_size", "kernel_size", "decode_capacity"):
            value = getattr(self, name)
            if value is None and name in ("kernel_size", "decode_capacity"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int (tokens), got {value!r} of type {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._check_history_device(self.history_device)
        self._check_protect(self.protect)
        if self.kernel_size is not None and self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd, a token and as many before as behind it; got {self.kernel_size}. "
                f"Use {self.kernel_size - 1} or {self.kernel_size + 1}."
            )
        if self.split is not None:
            if not isinstance(self.split, BudgetSplit):
                raise TypeError(f"split must be a BudgetSplit or None, got {type(self.split).__name__}")
            kept, by_attention = self.split.kept_tokens, self.split.sinks is None
            if kept is not None and by_attention and kept < self.window_size:
                raise ValueError(
                    f"split.kept_tokens must be at least window_size={self.window_size}, the tokens that are always "
                    f"kept; got {kept}. Raise it or lower window_size."
                )
        self._check_index_dtype()
        self._check_watching()
        if self.split is not None:
            return
        least = least_token_budget(self.method, self.window_size, self.decode_reserve)
        if self.token_budget < least:
            raise ValueError(
                f"token_budget must be at least {least} for method {self.method!r} with window_size={self.window_size} "
                f"and decode_reserve={self.decode_reserve}; got {self.token_budget}. Use {least} or more."
            )

    def _check_index_dtype(self) -> None:
        sketched = self.method in SKETCHED if self.split is None else self.split.sketch_bits is not None
        if self.index_dtype != "keys" and sketched:
            raise ValueError(
                f"index_dtype={self.index_dtype!r} is for the bounds of pages, and this method scores a sketch of "
                "every key, which has bits of its own. Leave it 'keys'."
            )

    def _check_watching(self) -> None:
        every, bound = (getattr(self, name) for name in ("audit_every", "loss_bound"))
        if every is not None and (not isinstance(every, int) or isinstance(every, bool)):
            raise TypeError(
                f"audit_every must be an int (tokens) or None, got {every!r} of type {type(every).__name__}"
            )
        if every is not None and every < 1:
            raise ValueError(f"audit_every must be at least 1, got {every}; None for never")
        if self.on_loss not in (None, *ON_LOSS):
            raise ValueError(f"on_loss must be one of {', '.join(ON_LOSS)} or None; got {self.on_loss!r}")
        if bound is not None:
            if not isinstance(bound, (int, float)) or isinstance(bound, bool):
                raise TypeError(f"loss_bound must be a float or None, got {bound!r} of type {type(bound).__name__}")
            if not 0 <= bound < 1:
                raise ValueError(f"loss_bound must be from 0 to less than 1, a share of the weight; got {bound}")
            if self.on_loss is None:
                raise ValueError(f"loss_bound={bound} is where on_loss acts, which is None: set it, or leave both out")
        estimates = self.method in SKETCHED if self.split is None else self.split.residual
        if self.on_loss is not None and not estimates:
            raise ValueError(
                f"on_loss={self.on_loss!r} needs an estimate of what a step misses, which only "
                f"{', '.join(sorted(SKETCHED))} make (or a split with residual=True), not {self.method!r}. Use one of "
                "those, or audit_every, which any method takes"
            )
        if self.watched and self.decode_capacity is not None:
            name = "audit_every" if self.on_loss is None else "on_loss"
            raise ValueError(
                f"{name}={getattr(self, name)!r} is for caches that grow: the steps of a static cache (decode_capacity="
                f"{self.decode_capacity}) are compiled and captured, and ask nobody. Leave one of the two out"
            )

    def _check_history_device(self, device: object) -> None:
        if device is None:
            return
        if not isinstance(device, str):
            raise TypeError(
                f"history_device must be the name of a device, such as 'cpu', or None; got {type(device).__name__}"
            )
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"history_device must be the name of a device, such as 'cpu'; got {device!r}") from error
        if not self.keeps_history:
            raise ValueError(
                f"history_device={device!r} is for methods that keep a history, {', '.join(sorted(MULTI_TURN))}; "
                f"{self.method!r} keeps none. Leave it None."
            )

    def _check_protect(self, protect: object) -> None:
        if not isinstance(self.fair_shares, bool):
            raise TypeError(f"fair_shares must be True or False, got {self.fair_shares!r}")
        if protect is None and not self.fair_shares:
            return
        if self.method in UNRANKED:
            raise ValueError(
                f"protect and fair_shares are for methods that rank tokens by attention; {self.method!r} does not"
            )
        if protect is None or protect == "system":
            return
        if isinstance(protect, str):
            raise ValueError(f"protect must be 'system', ranges (start, stop) or None; got {protect!r}")
        if not isinstance(protect, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in protect):
            raise TypeError(f"protect must be 'system' or a tuple of ranges (start, stop), got {protect!r}")
        for start, stop in protect:
            whole = all(isinstance(end, int) and not isinstance(end, bool) for end in (start, stop))
            if not (whole and 0 <= start < stop):
                raise ValueError(
                    f"a range to protect must be (start, stop) with 0 <= start < stop; got {(start, stop)}"
                )

    @property
    def pool_size(self) -> int:
        """Odd width of stage 1's max-pooling: `kernel_size`, or the method's own."""
        if self.kernel_size is not None:
            return self.kernel_size
        return SKETCHED_POOL if self.method in SKETCHED else PAPERS_POOL

    @property
    def watched(self) -> bool:
        """Whether decode steps are audited, or looked at for what they miss."""
        return self.audit_every is not None or self.on_loss is not None

    @property
    def marks_prompts(self) -> bool:
        """Whether tokens of prompts are marked, to be protected or to have fair shares."""
        return self.protect is not None or self.fair_shares

    @property
    def keeps_history(self) -> bool:
        """Whether stage 1 only filters: all tokens stay, and every prompt selects from them anew (RocketKV-MT)."""
        return self.method in MULTI_TURN

    def split_for(self, prompt_length: int, head_dim: int) -> BudgetSplit:
        """Return the split for a prompt whose longest row has `prompt_length` tokens (an integer, in tokens).

        Raises:
            ValueError: `split` asks for more channels than `head_dim` has.
        """
        if self.split is None:
            return METHODS[self.method](prompt_length, self.token_budget, head_dim, self.decode_reserve)
        if self.split.channels is not None and self.split.channels > head_dim:
            raise ValueError(
                f"split.channels must be at most head_dim={head_dim}, got {self.split.channels}. Lower it."
            )
        return self.split
