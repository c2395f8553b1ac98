"""Decode steps that every backend is tested with, and what must hold after one.

Selections compare exactly; outputs by what plain PyTorch manages in the same precision.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from close import assert_near
from layer_case import DEVICE, HALF, Case, bias_of, expected_logits, expected_positions
from rocketkv.core.pages import FLOAT8
from rocketkv.state.store import KVStore

BF16, FP16 = torch.bfloat16, torch.float16

PAGE_CASES = [
    Case(),
    # Pages: one token, powers of two and not, the largest; the last full, or with one token, or one short.
    *(Case(page_size=p, lengths=(n,)) for p, n in product((1, 2, 3, 4, 5, 7, 8, 16), (179, 209))),
    # Head dims, values of another width, and groups: MHA, MQA, powers of two and not.
    *(Case(head_dim=d, channels=d // 3, dtype=HALF[d // 16 % 2]) for d in (80, 96, 128, 192, 256)),
    *(Case(head_dim=d, channels=d, page_size=1) for d in (16, 40, 64)),
    Case(head_dim=64, value_dim=32),
    Case(head_dim=32, value_dim=80, dtype=torch.bfloat16),
    *(Case(heads=g * h, kv_heads=h) for g, h in ((1, 4), (3, 3), (7, 2), (8, 1), (17, 1), (71, 1))),
    # Channels and tokens: few, odd, all.
    *(Case(channels=r, top_k=k, token_budget=2 * k) for r, k in ((1, 1), (1, 40), (33, 5), (64, 61), (63, 96))),
    Case(top_k=5, token_budget=150),
    # Precisions, soft-cap and learned sinks, over more than one tile of pages and more than one part.
    *(
        Case(dtype=dtype, page_size=p, softcap=cap, sinks=sinks, lengths=(411,))
        for dtype, p, (cap, sinks) in product(
            (torch.float32, *HALF), (1, 2), ((None, False), (4.0, False), (None, True), (30.0, True))
        )
    ),
    *(Case(lengths=(700,), page_size=1, programs=n, top_k=200, token_budget=400) for n in (1, 2, 3, 64)),
    # Rows of different lengths: within the budget, one token, and each with an open page of its own.
    Case(lengths=(200, 199), heads=6, kv_heads=2, steps=3),
    Case(lengths=(200, 131), heads=6, kv_heads=2, by_largest=True),
    Case(lengths=(200, 74, 73, 75, 1)),
    Case(lengths=(12, 200), page_size=1),
    Case(lengths=(130, 200, 91), dtype=torch.bfloat16, page_size=4),
    Case(lengths=(20,)),
    Case(lengths=(1,)),
    Case(lengths=(73,), steps=6),
    # Protected tokens, whole pages and parts of one, before all others.
    *(Case(protected=n, page_size=p, lengths=(200, 91), heads=6, kv_heads=2) for n, p in ((1, 3), (12, 3), (30, 1))),
    Case(protected=13, page_size=5, lengths=(411,), softcap=4.0, sinks=True, steps=2),
    # Bounds in 8 bits.
    *(
        Case(index_dtype=FLOAT8, dtype=dtype, page_size=p, lengths=(200, 131), steps=3)
        for dtype, p in product((torch.float32, *HALF), (1, 2, 3))
    ),
    *(Case(index_dtype=FLOAT8, dtype=d, lengths=(411,), heads=7, softcap=4.0, sinks=True) for d in HALF),
    # The parts that read without choosing.
    *(Case(method=m, lengths=n, dtype=d) for m in ("full", "streaming") for n in ((200,), (200, 60, 3)) for d in HALF),
    Case(method="streaming", lengths=(200,), softcap=5.0, sinks=True),
    Case(method="full", lengths=(1, 300), softcap=5.0, sinks=True, programs=64),
]


SKETCH_CASES = [
    Case(sketch_bits=2, steps=2),
    # Bits, precisions and head dims that fill their bytes or not; a tile and a token, and one less.
    Case(sketch_bits=1, dtype=FP16, head_dim=16, heads=4, kv_heads=4, lengths=(128,)),
    Case(sketch_bits=2, dtype=BF16, head_dim=80, value_dim=48, lengths=(127,)),
    Case(sketch_bits=3, head_dim=40, lengths=(129,), softcap=4.0, sinks=True),
    Case(sketch_bits=4, dtype=BF16, head_dim=72, heads=7, lengths=(140,)),
    Case(sketch_bits=1, head_dim=256, lengths=(140,), programs=2),
    # More heads of a group than are scored at a time, without the residual.
    Case(sketch_bits=2, head_dim=32, heads=40, residual=False),
    Case(sketch_bits=2, head_dim=32, heads=40, residual=False, by_largest=True),
    # More tiles than splits, and the other way round; several parts of unequal shares.
    Case(sketch_bits=2, head_dim=16, lengths=(420,), top_k=130, token_budget=200, programs=1),
    Case(sketch_bits=2, head_dim=16, lengths=(420,), top_k=130, token_budget=200, programs=64, sinks=True),
    # Rows of different lengths, some within the budget, one that passes it; protected tokens.
    Case(sketch_bits=2, head_dim=16, lengths=(150, 73, 1), steps=2, by_largest=True),
    Case(sketch_bits=2, head_dim=16, lengths=(140, 91), heads=4, kv_heads=2, dtype=FP16, protected=12, by_largest=True),
    Case(sketch_bits=2, head_dim=16, lengths=(20,)),
    # A bias of the residual: groups, rows of which some are within the budget, several parts; one head, and one part.
    Case(sketch_bits=2, head_dim=16, heads=6, kv_heads=2, lengths=(150, 73, 1), steps=2, sinks=True, biased=True),
    Case(sketch_bits=1, dtype=BF16, head_dim=72, heads=1, lengths=(140,), softcap=4.0, programs=1, biased=True),
]


def read_by(case: Case, length: int, chosen: Tensor) -> Tensor:
    """Return which slots a row of this length attends to."""
    if length <= case.token_budget or case.method == "full":
        return torch.arange(length)
    if case.method == "streaming":
        return torch.cat((torch.arange(4), torch.arange(length - case.top_k + 4, length)))
    return chosen.long().cpu()


def attention(
    case: Case, query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Attend in one precision from [G, D] over [k, D], by the definition."""
    query, keys, values = (tensor.cpu().to(dtype) for tensor in (query, keys, values))
    logits = query @ keys.T * case.head_dim**-0.5
    if case.softcap is not None:
        logits = torch.tanh(logits / case.softcap) * case.softcap
    if sinks is None:
        return logits.softmax(-1) @ values
    return torch.cat((logits, sinks.cpu().to(dtype)[:, None]), dim=-1).softmax(-1)[:, :-1] @ values


def sketched_attention(
    case: Case,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chosen: Tensor,
    logits: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attend in one precision, by the definition: to the chosen tokens [k] and to all others as one.

    Args: query [G, D], keys [N, D], values [N, DV], estimated logits [G, N], sinks [G], bias [G].
    """
    query, keys, values, logits = (tensor.cpu().to(dtype) for tensor in (query, keys, values, logits))
    others = torch.ones(len(keys), dtype=torch.bool).index_fill(0, chosen, False)
    exact = query @ keys[chosen].T * case.head_dim**-0.5
    if case.softcap is not None:
        exact = torch.tanh(exact / case.softcap) * case.softcap
    columns, own = [exact], values[chosen]
    if case.residual and bool(others.any()):
        excess = logits[:, chosen].logsumexp(-1, keepdim=True) - exact.logsumexp(-1, keepdim=True)
        rest = logits[:, others].logsumexp(-1, keepdim=True) - excess.clamp(min=0) / 2
        columns.append(rest if bias is None else rest + bias.cpu().to(dtype)[:, None])
        own = torch.cat((own, values[others].mean(0, keepdim=True)))
    if sinks is not None:
        columns.append(sinks.cpu().to(dtype)[:, None])
    weight = torch.cat(columns, -1).softmax(-1)
    rest = weight[:, len(chosen)] if len(own) > len(chosen) else torch.zeros(len(query), dtype=dtype)
    return weight[:, : len(own)] @ own, rest


def assert_paged_step(
    case: Case,
    store: KVStore,
    plain: KVStore,
    step: tuple[Tensor, Tensor, Tensor],
    sinks: Tensor | None,
    found: Tensor,
    listed: Tensor,
) -> None:
    """Check a step on pages, or without an index.

    Args:
        case: the case.
        store: its store, after the step.
        plain: the same store, to which the step's token was appended by the reference.
        step: the step's query, key and value.
        sinks: learned sinks.
        found: the step's output [B, H, Dv].
        listed: the chosen tokens, B Hkv rows.
    """
    query = step[0]
    ranked, group = case.method == "rocketkv", case.heads // case.kv_heads
    known = plain.tensors()
    assert set(known) == {"keys", "values", "positions", "seq_lens", *(["bounds"] if ranked else [])}
    for name, tensor in store.tensors().items():
        assert torch.equal(tensor.double(), known[name].double()), name
    keys, values, _, seq_lens = store.decoding.buffers[:4]
    chosen = expected_positions(case, plain, query, sinks) if ranked else None
    errors, allowed = [], []
    for b, h in product(range(len(case.lengths)), range(case.kv_heads)):
        length = int(seq_lens[b, h])
        mine = listed.view(len(case.lengths), case.kv_heads, -1)[b, h] if ranked else torch.empty(0)
        if chosen is not None and length > case.token_budget:
            assert mine[: chosen.shape[-1]].tolist() == chosen[b, h].tolist()
        at = read_by(case, length, mine[: min(case.top_k, length)]).to(DEVICE)
        heads = slice(h * group, (h + 1) * group)
        given = (query[b, heads], keys[b, h, at], values[b, h, at])
        own = None if sinks is None else sinks[heads]
        exact = attention(case, *given, own, torch.float64)
        low = attention(case, *given, own, case.dtype)
        errors.append((found[b, heads].cpu().double() - exact).abs().max())
        allowed.append((low.double() - exact).abs().max())
    # The largest of a step: a single row's may be zero by luck. Float32 rounds to 1e-7, which is noise.
    bound = 1e-6 if case.dtype == torch.float32 else 2 * max(allowed)
    assert max(errors) <= bound, (max(errors), bound)


def assert_sketched_step(
    case: Case,
    store: KVStore,
    plain: KVStore,
    step: tuple[Tensor, Tensor, Tensor],
    sinks: Tensor | None,
    found: Tensor,
    listed: Tensor,
    scores: Tensor | None = None,
) -> None:
    """Check a step on a sketch; see `assert_paged_step`.

    Args:
        case: the case.
        store: its store, after the step.
        plain: the same store, to which the step's token was appended by the reference.
        step: the step's query, key and value.
        sinks: learned sinks.
        found: the step's output [B, H, Dv].
        listed: the chosen tokens, B Hkv rows.
        scores: the step's scores, [B Hkv, G, units], or None if it keeps none: the reference's then.
    """
    query, bias = step[0], bias_of(case)
    written = store.tensors()
    kept = ("keys", "values", "positions", "seq_lens", "codes", "scales", "mean", "balance")
    for name in (*kept, *(["value_sum"] if case.residual else [])):
        assert torch.equal(written[name], plain.tensors()[name]), name
    group = case.heads // case.kv_heads
    logits, positions = expected_logits(case, plain, query), expected_positions(case, plain, query, sinks)
    errors, allowed = [], []
    for b, h in product(range(len(case.lengths)), range(case.kv_heads)):
        length, heads = int(written["seq_lens"][b, h]), slice(h * group, (h + 1) * group)
        chosen, row = torch.arange(length), b * case.kv_heads + h
        estimates = logits[b, heads, :length] if scores is None else scores[row, :, :length]
        if length > case.token_budget:
            assert_near(estimates, logits[b, heads, :length])
            assert listed[row].tolist() == positions[b, h].tolist()
            chosen = positions[b, h].long().cpu()
        stored = (written["keys"][b, h, :length], written["values"][b, h, :length])
        own = (None if sinks is None else sinks[heads], None if bias is None else bias[b, heads])
        given = (query[b, heads], *stored, chosen, estimates, *own)
        exact, rest = sketched_attention(case, *given, torch.float64)
        low, _ = sketched_attention(case, *given, case.dtype)
        errors.append((found[b, heads].cpu().double() - exact).abs().max())
        allowed.append((low.double() - exact).abs().max())
        if case.residual:
            assert_near(written["missed"][b, heads].cpu(), rest, 1e-6 if case.dtype == torch.float32 else 1e-3)
    bound = 1e-6 if case.dtype == torch.float32 else 2 * max(allowed)
    assert max(errors) <= bound, (max(errors), bound)
