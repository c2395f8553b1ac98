"""One prefill for many methods: each answers, and stores, exactly what it does alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, cache_utils

import tiny
from eval_case import VOCABULARY, model, sample, tokenizer
from hybrids import linear
from rocketkv import METHODS, RocketKVConfig
from rocketkv.eval.conversation import Answers, answer_sample
from rocketkv.eval.generate import DecodeLoop
from rocketkv.eval.measures.kl import Window, divergence_sample
from rocketkv.eval.methods import Compressed, Full, Method
from rocketkv.eval.prefill import Prefills, read_prompt, start
from rocketkv.hf import fork
from rocketkv.hf.layer import RocketKVLayer
from tiny import NEVER, SKETCH_SPLIT, SMALL

WORDS = tokenizer()
SETTINGS: dict[str, Any] = {"window_size": 8, "decode_reserve": 8, "kernel_size": 7}
# Of prompts this short, random attention leaves nothing to evict in some layers.
pytestmark = pytest.mark.filterwarnings("ignore:RocketKV. no budget up to:UserWarning")

# All methods of the library, and settings that change what happens at a prompt's end.
ARMS: dict[str, Method] = {
    "stock": Full(),
    **{
        name: Compressed(RocketKVConfig(method=name, token_budget=40, **SETTINGS)) for name in METHODS if name != "full"
    },
    "full": Compressed(RocketKVConfig(method="full", window_size=8)),
    "small": Compressed(RocketKVConfig(**SMALL)),
    "sketch": Compressed(RocketKVConfig(**{**SMALL, "method": "rocketkv+", "split": SKETCH_SPLIT})),
    "static": Compressed(RocketKVConfig(**SMALL, decode_capacity=48)),
    "static-mt": Compressed(RocketKVConfig(method="rocketkv-mt", token_budget=40, decode_capacity=48, **SETTINGS)),
    "mt-host": Compressed(RocketKVConfig(method="rocketkv-mt", token_budget=40, history_device="cpu", **SETTINGS)),
    "max-error": Compressed(RocketKVConfig(max_error=0.9, **SETTINGS)),
    "skips": Compressed(RocketKVConfig(**SMALL, skip_layers=(0,))),
    "by-layer": Compressed(RocketKVConfig(token_budget=40, layer_budgets=((1, 64),), **SETTINGS)),
    "wide-window": Compressed(RocketKVConfig(token_budget=600, window_size=200, decode_reserve=8)),
}


class Unending:
    """A tokenizer without an end token, so that answers have a length that a test knows."""

    eos_token_id = None

    def __call__(self, text: str, **kwargs: Any) -> Any:
        return WORDS(text, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(WORDS, name)


UNENDING: PreTrainedTokenizerBase = Unending()  # type: ignore[assignment]


@pytest.fixture(scope="module")
def made() -> PreTrainedModel:
    model_ = model()
    model_.generation_config.eos_token_id = NEVER
    return model_


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The logits of every token that is chosen."""
    found: list[Tensor] = []
    greedy = DecodeLoop.greedy

    def recorded(self: DecodeLoop, *args: Any) -> Iterator[int]:
        for token in greedy(self, *args):
            found.append(self.logits.clone())
            yield token

    monkeypatch.setattr(DecodeLoop, "greedy", recorded)
    return found  # type: ignore[return-value]


def stored(answers: Answers) -> dict[str, Any]:
    """Return what answers are and cost, without times."""
    cost = {name: value for name, value in answers.cost.items() if "seconds" not in name}
    return {"predictions": answers.predictions, "prompt": answers.prompt_sha256, **cost}


@pytest.mark.parametrize("mode", ["aware", "agnostic"])
@pytest.mark.parametrize("turns", [1, 3])
def test_every_method_answers_and_stores_what_it_does_alone(
    turns: int, mode: str, made: PreTrainedModel, rows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sample(turns=turns, length=70)
    expected = {}
    for name, method in ARMS.items():
        rows.clear()
        expected[name] = stored(answer_sample(made, UNENDING, method, one, mode=mode)), list(rows)
    reads: list[int] = []
    prefill = DecodeLoop.prefill
    monkeypatch.setattr(DecodeLoop, "prefill", lambda self, ids: (reads.append(self.seen), prefill(self, ids))[1])
    prefills = Prefills(made)
    for name, method in ARMS.items():
        rows.clear()
        found = stored(answer_sample(made, UNENDING, method, one, mode=mode, prefills=prefills))
        wanted, logits = expected[name]
        assert found == wanted, name
        assert len(rows) == len(logits) == 6 * turns
        assert all(map(torch.equal, rows, logits)), name
    assert expected["max-error"][0]["step_bytes"] < expected["full"][0]["step_bytes"]  # some layers are compressed
    assert reads.count(0) == 1  # by the arm whose window is wider than the queries that are kept
    assert len({str(wanted) for wanted, _ in expected.values()}) > len(ARMS) // 2


# Before transformers 5 recurrent layers have a cache of their own, and such models are refused.
RECURRENT = ("Qwen3Next",) if hasattr(cache_utils, "LinearAttentionLayer") else ()
FAMILIES = ("gemma2", "gemma3", "gpt-oss", *RECURRENT)


@pytest.mark.integration
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_no_method_changes_go_on_from_their_own_state(family: str, rows: list[Tensor]) -> None:
    built = linear(family) if family[0].isupper() else tiny.build(family)
    ids = tiny.prompt(90)[0].tolist()
    methods: list[Method] = [ARMS["small"], ARMS["rocketkv-mt"], Full(), ARMS["small"]]
    read = read_prompt(built, [ids])
    for method in methods:
        with method.attached(built):
            alone = DecodeLoop(model=built, cache=method.new_cache(built, len(ids)))
            alone.prefill([ids])
            tokens = list(alone.greedy(6))
            expected = list(rows)
            rows.clear()
            shared = start(built, method, read)
            assert list(shared.greedy(6)) == tokens
        assert all(map(torch.equal, rows, expected))
        rows.clear()


def test_a_method_with_a_prefill_of_its_own_reads_the_prompt_itself(made: PreTrainedModel) -> None:
    class Own(Full):
        dense_prefill = False

    prefills, one = Prefills(made), sample()
    alone = answer_sample(made, UNENDING, Own(name="own"), one, prefills=prefills)
    assert prefills._last is None
    assert answer_sample(made, UNENDING, Full(), one, prefills=prefills).predictions == alone.predictions


def test_what_was_read_stays_as_it_was(made: PreTrainedModel) -> None:
    read = read_prompt(made, [list(range(5, 105))])
    before = [{name: tensor.clone() for name, tensor in layer.store.tensors().items()} for layer in read.cache.layers]
    for method in ARMS.values():
        with method.attached(made):
            loop = start(made, method, read)
            if method.name == "rocketkv-mt":  # it keeps all tokens, so that a crop can reach into the prompt
                loop.cache.crop(60)  # type: ignore[attr-defined]  # not of every cache
                loop.seen = 60
            else:
                list(loop.greedy(12))
            loop.prefill([list(range(5, 25))])
    for layer, tensors in zip(read.cache.layers, before, strict=True):
        now = layer.store.tensors()
        assert {name: torch.equal(now[name], tensor) for name, tensor in tensors.items()} == dict.fromkeys(now, True)


@pytest.mark.parametrize(
    ("method", "attention"),
    [
        (Full(), "eager"),
        (Compressed(RocketKVConfig(**SMALL, protect=((0, 4),))), "sdpa"),
        (ARMS["wide-window"], "sdpa"),
    ],
)
def test_a_prefill_that_differs_is_done_again(
    method: Method, attention: str, made: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tiny.build(vocab_size=VOCABULARY, attn_implementation=attention)
    ids = tiny.prompt(220)[0].tolist()
    read = read_prompt(built, [ids])
    begun: list[Any] = []
    monkeypatch.setattr("rocketkv.eval.prefill.begin_after", lambda *given: begun.append(given))
    with method.attached(built):
        loop = start(built, method, read)
        alone = DecodeLoop(model=built, cache=method.new_cache(built, len(ids)))
        assert torch.equal(loop.logits, alone.prefill([ids]))
    assert not begun


def test_a_prompt_that_does_not_fit_the_device_waits_on_the_host(
    made: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(fork, "_fits", lambda device, size: sizes.append(size))
    read = read_prompt(made, [list(range(5, 105))])
    layers = [layer for layer in read.cache.layers if isinstance(layer, RocketKVLayer)]
    own = sum(layer.store.prompt.keys.nbytes + layer.store.prompt.values.nbytes for layer in layers)
    assert sizes == [own, own]  # each layer asks for all of them


def test_a_divergence_is_what_it_is_alone(made: PreTrainedModel, tmp_path: Path) -> None:
    window = Window("0", tiny.prompt(140)[0].tolist(), {})
    prefills = Prefills(made)
    for name in ("stock", "small", "rocketkv-mt"):
        alone, shared = (
            divergence_sample(made, ARMS[name], window, steps=20, model_name="m", folder=folder, prefills=given)
            for folder, given in ((tmp_path / "alone", None), (tmp_path / "shared", prefills))
        )
        assert alone == shared
