"""Budget split: the settings of both stages for a token budget, and the table of methods.

Uses integers and floats only: a plan needs neither torch nor a model.

Letters: S sequence length, t token budget, c compression ratio S/t, D head dim, P page size, r channels, k tokens read,
N tokens stored, W observation window, b bytes of a token's sketch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

# StreamingLLM (arXiv 2309.17453, section 3.2): four initial tokens are enough to hold the attention sink.
STREAMING_SINKS = 4

# Widest heads whose keys are sketched in 2 bits per channel; in wider heads, 1 bit has less error at equal bytes.
WIDEST_OF_TWO_BITS = 128

# Widths of stage 1's max-pooling: the paper's (section 3.3), and the best one with a sketch (docs/beyond.md).
PAPER_POOL, SKETCH_POOL = 63, 13

# Tokens by which methods with a sketch move their pools towards the beginning (docs/beyond.md): a head that has found a
# match goes on to read the tokens after it.
READ_ON = 2

# Percentages of t for the attention: with 2 bits; with 1 bit, where tokens cost less to score; and if every turn
# selects its own tokens.
ATTENDED, ATTENDED_OF_ONE_BIT, ATTENDED_OF_FILTERED = 50, 40, 65


# Fields of a split that are counts of at least 1; all but the first two may be None.
_COUNTS = ("token_budget", "page_size", "kept_tokens", "channels", "sketch_bits", "top_k", "sinks")
_SWITCHES = ("oracle", "residual", "calibrated", "by_largest", "value_aware")


@dataclass(frozen=True, kw_only=True)
class BudgetSplit:
    """The tokens that each stage stores and reads, per KV head.

    Attributes:
        token_budget: t, tokens of K and V that a decode step may read, scores included. A row that stores no more
            than this attends to all of them.
        kept_tokens: prompt tokens that stage 1 keeps, or None to evict nothing.
        page_size: P, consecutive stored tokens that share one min/max entry of the index.
        channels: r, channels of the pages' bounds that a decode step scores, or None to score no pages.
        sketch_bits: bits per channel, 1 to 4, of the sketch index, which a decode step scores instead of pages; or
            None.
        top_k: k, tokens that a decode step attends to, or None for all stored tokens.
        sinks: None to rank tokens by attention. A number ranks them by position: the first `sinks` tokens and the most
            recent ones win, in both stages.
        oracle: whether the bytes read exclude the scores, because no real method can compute these scores within a
            budget.
        protected: protected tokens of the longest row, stored before all others and attended to at every step.
        residual: whether a step adds the mean value of the tokens that it does not attend to, with their estimated
            weight.
        by_largest: whether a token ranks by its largest weight over the query heads of a group, not by their average.
        calibrated: whether the residual's weight is fitted per query head at a prompt's end, on the observation window.
        value_aware: whether stage 1 ranks a token by how much its eviction changes the output, not by attention alone.
        pool_offset: tokens by which stage 1's pools move towards the beginning, so that more tokens are kept after an
            attended token than before it; a pool ends at the token itself at the furthest.

    Raises:
        TypeError: a count is not an int, or a switch not a bool.
        ValueError: a count is not positive, or the fields do not go together.
    """

    token_budget: int
    kept_tokens: int | None = None
    page_size: int = 1
    channels: int | None = None
    sketch_bits: int | None = None
    top_k: int | None = None
    sinks: int | None = None
    oracle: bool = False
    protected: int = 0
    residual: bool = False
    calibrated: bool = False
    by_largest: bool = False
    value_aware: bool = False
    pool_offset: int = 0

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "protected", "pool_offset"):
            value = getattr(self, name)
            if value is None and name in _COUNTS[2:]:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
            if value < 1 and name in _COUNTS:
                raise ValueError(f"{name} must be at least 1 (or None where allowed), got {value}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("protected", "pool_offset"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be a number of tokens, 0 or more; got {getattr(self, name)!r}")
        if self.channels is not None and self.sketch_bits is not None:
            raise ValueError("pages are scored by channels, single tokens by sketch_bits: set one of them")
        if self.sketch_bits is not None and (self.sketch_bits > 4 or self.page_size != 1):
            raise ValueError(
                f"sketch_bits must be 1, 2, 3 or 4, of single tokens (page_size=1); got {self.sketch_bits} with "
                f"page_size={self.page_size}"
            )
        if self.scored and (self.top_k is None or self.sinks is not None):
            raise ValueError(
                "channels or sketch_bits are scored to choose top_k tokens by attention: set top_k and leave sinks None"
            )
        if self.top_k is not None and not self.scored and self.sinks is None:
            raise ValueError("top_k needs a ranking: set channels or sketch_bits (by attention) or sinks (by position)")
        if self.residual and not self.scored:
            raise ValueError("residual needs the scores of all tokens: set channels or sketch_bits")
        if self.calibrated and not (self.residual and self.sketch_bits is not None):
            raise ValueError("calibrated is of a residual by sketched keys: set sketch_bits and residual")
        if self.by_largest and not self.scored:
            raise ValueError("by_largest is of a ranking by scores: set channels or sketch_bits")
        for name in ("value_aware", "pool_offset"):
            if getattr(self, name) and (self.kept_tokens is None or self.sinks is not None):
                raise ValueError(
                    f"{name} is of stage 1, where it ranks by attention: set kept_tokens and leave sinks None"
                )
        if self.top_k is not None and self.top_k > self.token_budget:
            raise ValueError(
                f"top_k must be at most token_budget={self.token_budget}, the tokens a step reads; got {self.top_k}. "
                f"Lower it or raise token_budget."
            )

    @property
    def scored(self) -> bool:
        """Whether a decode step scores the stored tokens, for which it needs an index."""
        return self.channels is not None or self.sketch_bits is not None

    @property
    def ranked(self) -> bool:
        """Whether stage 1 or stage 2 ranks tokens by attention."""
        return self.scored or (self.kept_tokens is not None and self.sinks is None)

    def ranks(self, prompt_tokens: int) -> bool:
        """Whether the end of a prompt, whose longest row has `prompt_tokens` tokens, needs the observation window."""
        evicts = self.kept_tokens is not None and self.sinks is None and prompt_tokens > self.kept_tokens
        return evicts or (self.calibrated and prompt_tokens > self.token_budget)

    @property
    def rolling(self) -> bool:
        """Whether each generated token evicts the oldest stored token that is no sink token."""
        return self.sinks is not None


def compression_ratio(sequence_length: int, token_budget: int) -> float:
    """Return c = max(1, S/t)."""
    return max(1.0, sequence_length / token_budget)


def rocketkv_split(prompt_length: int, token_budget: int, head_dim: int, decode_reserve: int) -> BudgetSplit:
    """Split a budget over both stages (paper, arXiv 2502.14051, section 3.6, "Adaptive Compression Decomposition").

    Stage 1 compresses by c^alpha with the split factor alpha = min(0.2 + 0.06 log2(c), 0.8), the paper's r. Stage 2
    compresses by the rest, c2, divided between P = ceil(sqrt(c2)) tokens per page and the channels. Half of t is for
    the scores, half for the attention.

    Args:
        prompt_length: tokens of the longest row's prompt.
        token_budget: t.
        head_dim: D.
        decode_reserve: generated tokens that the sequence length includes.

    Returns:
        The split; `kept_tokens` is at least `min(decode_reserve, prompt_length)`.
    """
    sequence_length = prompt_length + decode_reserve
    ratio = compression_ratio(sequence_length, token_budget)
    alpha = min(0.2 + 0.06 * math.log2(ratio), 0.8)
    capacity = max(math.floor(sequence_length / ratio**alpha), min(2 * decode_reserve, sequence_length))
    remaining_ratio = max(1.0, capacity / token_budget)
    page_size = math.ceil(math.sqrt(remaining_ratio))
    if page_size > remaining_ratio:
        page_size = 1
    return BudgetSplit(
        token_budget=token_budget,
        kept_tokens=max(1, capacity - decode_reserve),
        page_size=page_size,
        channels=max(1, math.floor(head_dim * page_size / remaining_ratio)),
        top_k=max(1, token_budget // 2),
    )


def sketch_bytes(head_dim: int, bits: int) -> int:
    """Return b, the bytes of a token's sketch: packed codes of D channels (3 bits as 2 and 1), and a 16-bit scale."""
    return sum(-(-head_dim * width // 8) for width in ((2, 1) if bits == 3 else (bits,))) + 2


def rocketkv_plus_split(
    prompt_length: int,
    token_budget: int,
    head_dim: int,
    decode_reserve: int,
    *,
    most_stored: int | None = None,
    attended: int | None = None,
) -> BudgetSplit:
    """Split a budget over stage 1, the sketch of the kept tokens, and the attention (beyond the paper).

    Attending to a token reads 4D bytes, its key and value in 16 bits; scoring it reads b. The sketch's mean key and
    the residual's mean value count as one more token, and the sketch's balance as half a token. So a step reads the
    bytes of t tokens if

        N b + 2D + 4D (k + 1) = 4D t.

    The attention gets a share of t: half at 2 bits (up to 128 channels), 0.4 at 1 bit (above). The sketch gets the
    rest, N = ((1 - share) 4D t - 2D) / b. N is at most the sequence, and at least twice the reserve, as in
    `rocketkv_split`; k uses the remaining bytes.

    Args:
        prompt_length: tokens of the longest row's prompt.
        token_budget: t.
        head_dim: D, at least 8 for a split within the budget.
        decode_reserve: generated tokens that the sequence length and N include.
        most_stored: largest N allowed, or None for no limit.
        attended: percentage of t that the attention gets, or None for the method's.
    """
    bits = 2 if head_dim <= WIDEST_OF_TWO_BITS else 1
    token, sketched = 4 * head_dim, sketch_bytes(head_dim, bits)
    sequence_length = prompt_length + decode_reserve
    if attended is None:
        attended = ATTENDED if bits == 2 else ATTENDED_OF_ONE_BIT
    stored = ((token_budget - token_budget * attended // 100) * token - 2 * head_dim) // sketched
    stored = min(stored if most_stored is None else min(stored, most_stored), sequence_length)
    stored = max(stored, min(2 * decode_reserve, sequence_length))
    left = token_budget - -(-(stored * sketched + 2 * head_dim) // token) - 1
    return BudgetSplit(
        token_budget=token_budget,
        kept_tokens=max(1, stored - decode_reserve),
        sketch_bits=bits,
        top_k=max(1, left),
        residual=True,
        calibrated=True,
        by_largest=True,
        value_aware=True,
        pool_offset=READ_ON,
    )


def rocketkv_mt_plus_split(prompt_length: int, token_budget: int, head_dim: int, decode_reserve: int) -> BudgetSplit:
    """Split a budget as `rocketkv_plus_split`, with 0.65 t for the attention.

    Stage 1 selects again in the next turn, so tokens that it leaves out now are not lost (docs/conversations.md).
    """
    return rocketkv_plus_split(prompt_length, token_budget, head_dim, decode_reserve, attended=ATTENDED_OF_FILTERED)


def with_protected(split: BudgetSplit, count: int) -> BudgetSplit:
    """Return a split that stores and reads `count` protected tokens in addition to all others.

    Protection costs the other tokens nothing: a token that is kept without it is kept with it.
    """
    if count == 0:
        return split
    read = math.ceil(count / split.page_size) * split.page_size  # whole pages, since pages are ranked
    return replace(
        split,
        token_budget=split.token_budget + read,
        kept_tokens=None if split.kept_tokens is None else split.kept_tokens + count,
        top_k=None if split.top_k is None else split.top_k + read,
        protected=count,
    )


def full_split(prompt_length: int, token_budget: int, head_dim: int, decode_reserve: int) -> BudgetSplit:
    """Store and read all tokens: the full-cache baseline on the same code path."""
    return BudgetSplit(token_budget=token_budget)


def snapkv_split(prompt_length: int, token_budget: int, head_dim: int, decode_reserve: int) -> BudgetSplit:
    """Evict to t tokens and read all stored tokens (after SnapKV, arXiv 2404.14469)."""
    return BudgetSplit(token_budget=token_budget, kept_tokens=token_budget)


def quest_split(prompt_length: int, token_budget: int, head_dim: int, decode_reserve: int) -> BudgetSplit:
    """Store all tokens, score pages of ceil(c) tokens on all channels (Quest, arXiv 2406.10774; paper, A.3)."""
    ratio = compression_ratio(prompt_length + decode_reserve, token_budget)
    return BudgetSplit(
        token_budget=token_budget, page_size=math.ceil(ratio), channels=head_dim, top_k=max(1, token_budget // 2)
    )


def sparq_split(prompt_length: int, token_budget: int, head_dim: int, decode_reserve: int) -> BudgetSplit:
    """Store all tokens, score each on floor(D/c) channels (SparQ, arXiv 2312.04985; paper, A.3)."""
    ratio = compression_ratio(prompt_length + decode_reserve, token_budget)
    return BudgetSplit(
        token_budget=token_budget, channels=max(1, math.floor(head_dim / ratio)), top_k=max(1, token_budget // 2)
    )


def streaming_split(prompt_length: int, token_budget: int, head_dim: int, decode_reserve: int) -> BudgetSplit:
    """Keep four sink tokens and the most recent t - 4 tokens, rolling (after StreamingLLM, arXiv 2309.17453)."""
    return BudgetSplit(
        token_budget=token_budget,
        kept_tokens=token_budget,
        top_k=token_budget,
        sinks=min(STREAMING_SINKS, token_budget),
    )


def exact_topk_split(prompt_length: int, token_budget: int, head_dim: int, decode_reserve: int) -> BudgetSplit:
    """Store all tokens, read the t of largest attention weight: an oracle without cost (Exact-TopK; paper, A.3)."""
    return BudgetSplit(token_budget=token_budget, channels=head_dim, top_k=token_budget, oracle=True)


def stored_topk_split(prompt_length: int, token_budget: int, head_dim: int, decode_reserve: int) -> BudgetSplit:
    """Evict as `rocketkv`, then read the k stored tokens of largest attention weight: an oracle of stage 2."""
    evicted = rocketkv_split(prompt_length, token_budget, head_dim, decode_reserve)
    return replace(evicted, page_size=1, channels=head_dim, oracle=True)


def _least_of_stage_1(window_size: int, decode_reserve: int) -> int:
    # Stage 1 keeps at least max(t, 2 * reserve) - reserve tokens; the observation window must be smaller.
    return window_size + decode_reserve + 1 if decode_reserve <= window_size else 2


def _least_of_sketch(window_size: int, decode_reserve: int, attended: int = ATTENDED) -> int:
    # At D = 8, the least, a sketch has an eighth of a token's bytes: this budget holds 2 * reserve tokens and k = 1.
    least = max(4, -(-(decode_reserve + 2) // 4) + 2)
    if decode_reserve > window_size:
        return least
    # The sketch's share of t must cover more tokens than the observation window and the reserve.
    sketched = -(-(window_size + decode_reserve + 5) // 8)
    return max(least, 100 * (sketched - 1) // (100 - attended) + 1)


SplitFunction = Callable[[int, int, int, int], BudgetSplit]


@dataclass(frozen=True)
class Method:
    """A compression method: how it splits a budget, and its settings outside of the split.

    Attributes:
        name: its name in `RocketKVConfig(method=...)` and on the command line.
        split: function of (prompt_length, token_budget, head_dim, decode_reserve), all integers, that returns the
            `BudgetSplit` of a prompt.
        least_budget: function of (window_size, decode_reserve) that returns the smallest token budget with which stage
            1 keeps more than the observation window and a step attends to at least one token; a method like RocketKV
            takes `METHODS["rocketkv"].least_budget`.
        kernel_size: odd width, in tokens, of stage 1's max-pooling, unless the config gives another.
        multi_turn: whether the cache keeps every token, and each prompt selects the tokens that its turn decodes from
            (paper, section 3.5, RocketKV-MT).

    Raises:
        ValueError: `kernel_size` is not a positive odd number.
    """

    name: str
    split: SplitFunction
    least_budget: Callable[[int, int], int] = field(default=lambda window_size, decode_reserve: 2, kw_only=True)
    kernel_size: int = field(default=PAPER_POOL, kw_only=True)
    multi_turn: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {self.kernel_size} in method {self.name!r}")


_TABLE = (
    Method("full", full_split, least_budget=lambda window, reserve: 1),
    Method("rocketkv", rocketkv_split, least_budget=_least_of_stage_1),
    Method("rocketkv+", rocketkv_plus_split, least_budget=_least_of_sketch, kernel_size=SKETCH_POOL),
    Method("rocketkv-mt", rocketkv_split, least_budget=_least_of_stage_1, multi_turn=True),
    Method(
        "rocketkv-mt+",
        rocketkv_mt_plus_split,
        least_budget=partial(_least_of_sketch, attended=ATTENDED_OF_FILTERED),
        kernel_size=SKETCH_POOL,
        multi_turn=True,
    ),
    Method("snapkv", snapkv_split, least_budget=lambda window, reserve: window + 1),
    Method("quest", quest_split),
    Method("sparq", sparq_split),
    Method("streaming", streaming_split, least_budget=lambda window, reserve: STREAMING_SINKS + 1),
    Method("exact-topk", exact_topk_split, least_budget=lambda window, reserve: 1),
    Method("stored-topk", stored_topk_split, least_budget=_least_of_stage_1),
)
_METHODS = {method.name: method for method in _TABLE}

METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
"""Every method by name, read-only; `register_method` adds to it."""

DEFAULT_METHOD = "rocketkv+"
"""The method of `RocketKVConfig()`, and of every command but `serve`."""


def register_method(method: Method) -> None:
    """Add a method; `patch`, caches, plans and evaluations then accept its name.

    Raises:
        TypeError: `method` is not a `Method`.
        ValueError: there is a method of that name.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method, got {type(method).__name__}")
    if method.name in _METHODS:
        raise ValueError(f"there is a method {method.name!r} already: choose another name")
    _METHODS[method.name] = method
