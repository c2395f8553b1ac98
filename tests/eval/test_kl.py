"""Decode divergence: figures by independent sums, teacher forcing against one forward, windows, and the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rocketkv import METHODS, RocketKVConfig
from rocketkv.eval.measures.kl import (
    Window,
    decode_logprobs,
    divergence,
    divergence_sample,
    divergence_values,
    find_text,
    full_logprobs,
    texts,
)
from rocketkv.eval.methods import Compressed, Full
from rocketkv.eval.tasks.base import Preparation
from rocketkv.eval.tasks.text import prose
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import LARGE, SETTINGS, SMALL, VOCABULARY, build, prompt

pytestmark = pytest.mark.integration

TEXT = prompt(120)[0].tolist()
PROMPT, CONTINUATION = TEXT[:100], TEXT[100:]


def ours(**fields: Any) -> Compressed:
    return Compressed(RocketKVConfig(**fields))


class Shortened(Full):
    """Drops the first half of the prompt from a stock cache, as a press would: the cache no longer knows its length."""

    def attached(self, model: Any) -> Any:
        @contextmanager
        def halved() -> Iterator[None]:
            def halve(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                for layer in kwargs[CACHE_ARGUMENT].layers if args[0].shape[1] > 1 else ():
                    layer.keys, layer.values = (x[:, :, x.shape[2] // 2 :] for x in (layer.keys, layer.values))

            hook = model.register_forward_hook(halve, with_kwargs=True)
            yield
            hook.remove()

        return halved()


class Words:
    """A tokenizer of whitespace words, with a start token where told."""

    def __init__(self, bos_token_id: int | None = None) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> Mapping[str, list[int]]:
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": start + [100 + int.from_bytes(word.encode(), "big") % 9973 for word in text.split()]}


def prepared(tokenizer: Any = None, **fields: Any) -> Preparation:
    return Preparation(tokenizer=tokenizer or Words(), **{"length": 50, "count": 3, **fields})


def one_forward(model: Any, ids: list[int]) -> Tensor:
    """The log-probabilities [n, V] after each token, of a forward without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def test_teacher_forcing_is_one_forward_over_the_text() -> None:
    model = build()
    found = decode_logprobs(model, Full(), PROMPT, CONTINUATION)
    assert found.dtype is torch.float32
    assert found.shape == (len(CONTINUATION), VOCABULARY)
    # Row i follows token n - 1 + i: the last token of the text is predicted, and never read.
    torch.testing.assert_close(found, one_forward(model, TEXT)[99:119], atol=1e-4, rtol=0)


def test_positions_are_the_texts_own_where_a_cache_is_shortened() -> None:
    model = build()
    found = decode_logprobs(model, Shortened(), PROMPT, CONTINUATION)
    # The first step by itself: its token stands at position 100, whatever is left in the cache.
    mask = torch.ones(101, 101, dtype=torch.bool).tril()
    mask[100, :50] = False
    with torch.no_grad():
        logits = model(torch.tensor([TEXT[:101]]), attention_mask=mask[None, None], use_cache=False).logits[0, -1]
    torch.testing.assert_close(found[1], logits.log_softmax(-1), atol=1e-4, rtol=0)


def test_full_against_full_differs_by_nothing() -> None:
    model = build()
    first, second = (decode_logprobs(model, Full(), PROMPT, CONTINUATION) for _ in range(2))
    figures = divergence(first, second, CONTINUATION)
    assert figures["kl"] == figures["prefill_kl"] == figures["nll_difference"] == 0
    assert figures["greedy_agreement"] == 1
    assert figures["first_divergence"] is None
    assert figures["perplexity"] == figures["full_perplexity"]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_within_the_budget_every_method_predicts_what_the_full_cache_does(method: str) -> None:
    model = build()
    found = decode_logprobs(model, ours(method=method, **LARGE), PROMPT, CONTINUATION)
    figures = divergence(decode_logprobs(model, Full(), PROMPT, CONTINUATION), found, CONTINUATION)
    assert 0 <= figures["kl"] < 1e-8
    assert abs(figures["nll_difference"]) < 1e-4
    assert figures["first_divergence"] is None


def test_the_first_row_is_not_compressed_and_the_next_is() -> None:
    model = build()
    reference = decode_logprobs(model, Full(), PROMPT, CONTINUATION)
    found = decode_logprobs(model, ours(**SMALL), PROMPT, CONTINUATION)
    torch.testing.assert_close(found[0], reference[0], atol=1e-4, rtol=0)
    assert (found[1] - reference[1]).abs().max() > 0.1


def test_a_smaller_budget_diverges_more() -> None:
    model = build()
    # Tokens of a first part return in the continuation: a method that has forgotten that part predicts otherwise.
    mean = {}
    for budget in (12, 48, 96):
        method = ours(method="streaming", token_budget=budget, **SETTINGS)
        kl = []
        for seed in range(4):
            first = prompt(20, seed=seed)[0].tolist()
            given = [*first, *prompt(80, seed=50 + seed)[0].tolist()]
            reference = decode_logprobs(model, Full(), given, first)
            kl.append(divergence(reference, decode_logprobs(model, method, given, first), first)["kl"])
        mean[budget] = sum(kl) / len(kl)
    assert mean[12] > mean[48] > mean[96] > 0.01


def test_figures_are_those_of_plain_sums() -> None:
    generator = torch.Generator().manual_seed(3)
    reference, other = (torch.randn(7, 11, generator=generator).log_softmax(-1) for _ in range(2))
    targets = [3, 0, 10, 5, 5, 1, 7]
    full, found = reference.double().tolist(), other.double().tolist()
    steps = range(1, 7)  # the prefill's row is none of them

    def kl(row: int) -> float:
        return sum(math.exp(p) * (p - q) for p, q in zip(full[row], found[row], strict=True))

    def best(row: list[float]) -> int:
        return max(range(11), key=row.__getitem__)

    nll = -sum(found[i][targets[i]] for i in steps) / 6
    full_nll = -sum(full[i][targets[i]] for i in steps) / 6
    agree = [best(full[i]) == best(found[i]) for i in steps]
    figures = divergence(reference, other, targets)
    assert figures["kl"] == pytest.approx(sum(map(kl, steps)) / 6, abs=1e-6)
    assert figures["prefill_kl"] == pytest.approx(kl(0), abs=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert figures["full_perplexity"] == pytest.approx(math.exp(full_nll), rel=1e-6)
    assert figures["nll_difference"] == pytest.approx(nll - full_nll, abs=1e-6)
    assert figures["greedy_agreement"] == pytest.approx(sum(agree) / 6)
    assert figures["first_divergence"] == 1 + agree.index(False)


def test_kl_of_a_case_done_by_hand() -> None:
    reference = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.75, 0.25]]).log()
    other = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.25, 0.75]]).log()
    figures = divergence(reference, other, [0, 0, 0])
    # 1/2 ln 2 + 1/2 ln 2/3, and 3/4 ln 3 + 1/4 ln 1/3, the reference's shares being the weights
    assert figures["kl"] == pytest.approx((0.5 * math.log(4 / 3) + 0.5 * math.log(3)) / 2, abs=1e-7)
    assert figures["perplexity"] == pytest.approx(4)
    assert figures["full_perplexity"] == pytest.approx(math.sqrt(2 * 4 / 3))


@pytest.mark.parametrize(
    ("choices", "first", "agreement"),
    [
        ([0, 1, 2, 0], None, 1.0),
        ([1, 1, 2, 0], None, 1.0),  # the prefill's row does not count
        ([0, 2, 2, 0], 1, 2 / 3),
        ([0, 1, 2, 1], 3, 2 / 3),
        ([0, 0, 0, 1], 1, 0.0),
    ],
)
def test_first_divergence(choices: list[int], first: int | None, agreement: float) -> None:
    def rows(best: list[int]) -> Tensor:
        return (4 * torch.nn.functional.one_hot(torch.tensor(best), 3)).float().log_softmax(-1)

    figures = divergence(rows([0, 1, 2, 0]), rows(choices), [0, 0, 0, 0])
    assert figures["first_divergence"] == first
    assert figures["greedy_agreement"] == pytest.approx(agreement)


def test_tokens_that_neither_can_say_add_nothing() -> None:
    never = torch.tensor([[0.5, 0.5, 0.0]] * 2).log()
    assert divergence(never, never, [0, 1])["kl"] == 0


@pytest.mark.parametrize(
    ("other", "targets", "message"),
    [
        ([[0.5, 0.5], [1.0, 0.0]], [0, 0], "must be finite .* row 1"),  # the full cache says it can come
        ([[0.5, 0.5], [math.nan, 0.5]], [0, 0], "must be finite .* row 1"),
        ([[0.5, 0.5]], [0, 0], r"a row a step, got \[2, 2\], \[1, 2\] and 2 targets"),
        ([[0.5, 0.5], [0.5, 0.5]], [0], r"a row a step, got \[2, 2\], \[2, 2\] and 1 targets"),
    ],
)
def test_divergence_refuses(other: list[list[float]], targets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divergence(torch.full((2, 2), 0.5).log(), torch.tensor(other).log(), targets)


def test_divergence_refuses_the_prefill_alone() -> None:
    with pytest.raises(ValueError, match="at least one data point"):
        divergence(torch.zeros(1, 2), torch.zeros(1, 2), [0])


@pytest.fixture
def forwards() -> tuple[Any, list[int]]:
    """A model, and the number of tokens of each of its forwards."""
    model = build()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return model, seen


def test_the_reference_is_computed_once(forwards: tuple[Any, list[int]], tmp_path: Path) -> None:
    model, seen = forwards
    folder = tmp_path / "data"

    def reference(continuation: list[int] = CONTINUATION, name: str = "tiny") -> Tensor:
        return full_logprobs(model, PROMPT, continuation, model_name=name, folder=folder)

    first = reference()
    assert seen == [100] + [1] * 19
    assert first.equal(decode_logprobs(model, Full(), PROMPT, CONTINUATION))
    seen.clear()
    again = reference()
    assert seen == []
    assert again.equal(first)
    assert again.dtype is torch.float32
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]
    for other in ({"name": "another"}, {"continuation": CONTINUATION[:-1]}, {"continuation": CONTINUATION[::-1]}):
        seen.clear()
        reference(**other)
        assert seen, other
    assert len(list(folder.iterdir())) == 4


def test_the_cut_between_prompt_and_continuation_is_part_of_the_key(
    forwards: tuple[Any, list[int]], tmp_path: Path
) -> None:
    model, _ = forwards
    one = full_logprobs(model, TEXT[:100], TEXT[100:], model_name="tiny", folder=tmp_path)
    two = full_logprobs(model, TEXT[:101], TEXT[101:], model_name="tiny", folder=tmp_path)
    assert (len(one), len(two)) == (20, 19)


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: b"", lambda content: b"x" * 40])
def test_a_damaged_reference_is_quarantined(forwards: tuple[Any, list[int]], tmp_path: Path, damage: Any) -> None:
    model, seen = forwards
    first = full_logprobs(model, PROMPT, CONTINUATION, model_name="tiny", folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    seen.clear()
    assert full_logprobs(model, PROMPT, CONTINUATION, model_name="tiny", folder=tmp_path).equal(first)
    assert seen
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.damaged-1"]


def test_a_sample_has_the_figures_and_the_cost(tmp_path: Path) -> None:
    model, method = build(), ours(**SMALL)
    window = Window("7", TEXT, {"text": "a.txt", "offset": 3})
    sample = divergence_sample(model, method, window, steps=20, model_name="tiny", folder=tmp_path)
    reference = decode_logprobs(model, Full(), PROMPT, CONTINUATION)
    figures = divergence(reference, decode_logprobs(model, method, PROMPT, CONTINUATION), CONTINUATION)
    assert sample["id"] == "7"
    assert sample["score"] == figures["kl"] > 0.01
    assert sample["notes"] == {"text": "a.txt", "offset": 3, **figures}
    assert (sample["cost"]["prompt_tokens"], sample["cost"]["new_tokens"]) == (100, 20)
    assert 0 < sample["cost"]["step_bytes"] < sample["cost"]["dense_step_bytes"]
    assert sample["cost"]["full_kv_bytes"] == 2 * 2 * 2 * 16 * 4 * 119  # layers, K and V, heads, width, float32, tokens


@pytest.mark.parametrize("steps", [1, 120, 400])
def test_a_sample_needs_a_prompt_and_a_step(steps: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"steps must be from 2 to 119, .* got {steps}"):
        divergence_sample(build(), Full(), Window("0", TEXT, {}), steps=steps, model_name="tiny", folder=tmp_path)


def test_nothing_to_read_or_predict_is_refused() -> None:
    for given, predicted in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="prompt and continuation must have tokens"):
            decode_logprobs(build(), Full(), given, predicted)


def sample(**notes: Any) -> Any:
    figures = {"perplexity": 4.0, "full_perplexity": 2.0, "nll_difference": 0.5, "greedy_agreement": 0.5}
    return {"notes": {**figures, "first_divergence": 3, "prefill_kl": 0.0, **notes}}


def test_values_of_several_samples() -> None:
    values = divergence_values([sample(), sample(perplexity=16.0, nll_difference=0.1, first_divergence=9)])
    assert values["perplexity"] == pytest.approx(8)  # of the mean negative log-likelihood
    assert values["full_perplexity"] == pytest.approx(2)
    assert values["nll_difference"] == pytest.approx(0.3)
    assert values["greedy_agreement"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("firsts", "median"), [([None], None), ([2], 2), ([None, 4], 4), ([None, None, 4], None), ([9, None, 4], 9)]
)
def test_median_first_divergence(firsts: list[int | None], median: int | None) -> None:
    values = divergence_values([sample(first_divergence=first) for first in firsts])
    assert values["first_divergence"] == median


def test_windows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{number}" for number in range(400)), encoding="utf-8")
    ids = Words()(path.read_text(encoding="utf-8"))["input_ids"]
    windows = texts(prepared(count=8), path)
    for window in windows:
        offset = window.notes["offset"]
        assert window.ids == ids[offset : offset + 50]
        assert len(window.ids) == 50
        assert window.notes["text"] == "text.txt"
    assert len({window.id for window in windows}) == 8
    assert len({window.notes["offset"] for window in windows}) > 6
    assert texts(prepared(count=8), path) == windows
    assert texts(prepared(count=3), path) == windows[:3]
    assert texts(prepared(count=8, seed=1), path) != windows


def test_a_window_may_be_the_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("word " * 50, encoding="utf-8")
    assert texts(prepared(), path)[0].notes["offset"] == 0
    with pytest.raises(ValueError, match=r"at least 51 tokens, text\.txt has 50"):
        texts(prepared(length=51), path)


def test_windows_of_generated_prose_say_so() -> None:
    windows = texts(prepared(), None)
    for window in windows:
        assert window.notes["text"] == "generated"
        assert window.ids == Words()(prose(window.notes["prose_seed"], 20))["input_ids"][:50]
    assert len({tuple(window.ids) for window in windows}) == 3
    assert texts(prepared(count=2), None) == windows[:2]


@pytest.mark.parametrize("named", [True, False], ids=["file", "prose"])
def test_windows_begin_with_the_start_token(tmp_path: Path, named: bool) -> None:
    (tmp_path / "text.txt").write_text("word " * 90, encoding="utf-8")
    for window in texts(prepared(Words(bos_token_id=1)), tmp_path / "text.txt" if named else None):
        assert window.ids[0] == 1
        assert window.ids.count(1) == 1
        assert len(window.ids) == 50


@pytest.mark.parametrize("length", [None, 0, 1])
def test_windows_need_a_length(length: int | None) -> None:
    with pytest.raises(ValueError, match="length must be at least 2 tokens"):
        texts(prepared(length=length), None)


def test_the_text_of_a_folder(tmp_path: Path) -> None:
    assert find_text(None) is None
    assert find_text(tmp_path) is None
    (tmp_path / "0shot.txt").touch()  # another benchmark's
    assert find_text(tmp_path) is None
    (tmp_path / "text.txt").touch()
    assert find_text(tmp_path) == tmp_path / "text.txt"
