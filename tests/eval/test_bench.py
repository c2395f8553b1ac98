"""The benchmarks check before they time, and report what they timed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import eval_case
from rocketkv.cli.main import main
from rocketkv.config import RocketKVConfig
from rocketkv.eval.bench import cpu as bench
from rocketkv.eval.bench import decode
from rocketkv.eval.tasks.needle import needle_grid
from rocketkv.hf.loading import load_model
from rocketkv.hf.patch import patch


def test_attention_reports_every_arm() -> None:
    result = bench.bench_attention(context=600, token_budget=96, rounds=2, steps=1, heads=4, kv_heads=2, head_dim=16)
    dense = {"SDPA enable_gqa", "SDPA group as rows"}
    assert set(result["milliseconds"]) == {"rocketkv", "rocketkv+", "copy of its bytes", *dense}
    for name, ratio in result["speedup_over"].items():
        assert ratio["min"] <= ratio["median"] <= ratio["max"], name


@pytest.mark.parametrize(
    ("index", "what"),
    [("bounds", "a sparse step"), ("codes", r"a step of rocketkv\+"), (None, "a step over all tokens")],
)
def test_nothing_is_timed_when_a_step_is_wrong(index: str | None, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.decode_step

    def wrong(query: Tensor, key: Tensor, value: Tensor, store: bench.KVStore, params: bench.AttentionParams) -> Tensor:
        spoilt = index is None or index in store.tensors()
        return real(query, key, value, store, params) + 1e-2 * spoilt

    monkeypatch.setattr(bench, "decode_step", wrong)
    monkeypatch.setattr(bench, "alternate", lambda *args: pytest.fail("timed a wrong result"))
    with pytest.raises(RuntimeError, match=f"{what} is wrong.*nothing is timed"):
        bench.bench_attention(context=600, token_budget=96, rounds=1, steps=1, heads=4, kv_heads=2, head_dim=16)


def test_nothing_is_timed_when_a_sketch_is_not_of_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.decode

    def other(sketch: bench.Sketch, *rest: int) -> Tensor:
        return real(bench.Sketch(torch.randint_like(sketch.codes, 256), *sketch[1:]), *rest)

    monkeypatch.setattr(bench, "decode", other)
    with pytest.raises(RuntimeError, match="the sketch is not one of the stored keys"):
        bench.bench_attention(context=600, token_budget=96, rounds=1, steps=1, heads=4, kv_heads=2, head_dim=16)


def test_a_budget_that_selects_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="selects nothing"):
        bench.bench_attention(context=64, token_budget=512, rounds=1, steps=1, heads=2, kv_heads=2, head_dim=16)


def test_a_close_result_passes_and_a_nan_does_not() -> None:
    bench._require_close("this", torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match="this is wrong"):
        bench._require_close("this", torch.full((3,), torch.nan), torch.ones(3))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("attention --cases 1x8192/512 --quick", "unrecognized arguments: --cases 1x8192/512 --quick"),
        ("attention --model smollm2", "unrecognized arguments: --model smollm2"),
        ("decode --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("kernels --check --context 512", "unrecognized arguments: --context 512"),
        ("model --check --dtype float32", "unrecognized arguments: --dtype float32"),
        ("model --shape small", "invalid choice: 'small'"),
        ("attention --budget 0", "--budget: must be an integer of at least 1, got '0'"),
        ("decode --rounds 0", "--rounds: must be an integer of at least 1, got '0'"),
    ],
)
def test_options_that_would_be_ignored_are_refused(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *given.split()])
    assert said in capsys.readouterr().err


def test_decode_counts_the_needles_of_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(eval_case.save(tmp_path))
    completions: dict[str, list[str]] = {}

    def is_second(answer: str, completion: str) -> bool:
        """Whether it is the second needle, asked of the first arm."""
        completions.setdefault(answer, []).append(completion)
        return len(completions) == 2

    def eager(model: PreTrainedModel, config: RocketKVConfig) -> Any:
        return decode._Compiled(config, patch(model, config).compile_step(backend="eager"))

    monkeypatch.setattr(decode, "found", is_second)
    monkeypatch.setattr(decode, "_int8_model", lambda name, dtype: load_model(name, dtype)[0])
    monkeypatch.setattr(decode, "_compiled", eager)
    result = decode.bench_decode(folder, context=400, token_budget=128, rounds=1, steps=2, prompts=3, int8=True)
    arms = ["rocketkv", "rocketkv+", "stock", "dense preallocated", decode.INT8]
    assert result["needles"] == len(completions) == 3
    assert result["needles_found"] == dict.fromkeys(arms, 0) | {"rocketkv": 1}
    assert set(result["milliseconds"]) == {*arms, "stock, 16 tokens"} == set(result["first_token_seconds"])
    # Every prompt's needle was looked for in the stock model's own answer to it, also in a preallocated cache, and the
    # compiled step gives the answers of the eager one.
    model, tokenizer = load_model(folder, "float32")
    for needle in needle_grid(tokenizer, tokens=400, count=3, seed=decode.SEED):
        ids = tokenizer(needle.text, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, max_new_tokens=decode.ANSWER_TOKENS, do_sample=False, eos_token_id=None)
        answer = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        ours, _, stock, preallocated, compiled = completions[needle.answer]
        assert stock == preallocated == answer
        assert compiled == ours


def test_weights_of_8_bits_need_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="pip install torchao"):
        decode.bench_decode(str(eval_case.save(tmp_path)), context=400, token_budget=64, int8=True)
