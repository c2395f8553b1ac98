"""The plugin's settings, and what it refuses; without vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rocketkv.vllm.markers import FIRST_MARKER, LAST_MARKER, marker, most_rows, read_marker
from rocketkv.vllm.refusals import by_layer, refuse
from rocketkv.vllm.settings import DECODE_CAPACITY, VARIABLE, parse, settings_of
from rocketkv.vllm.versions import SUPPORTED


def engine(**changed: Any) -> SimpleNamespace:
    """Return the part of a `VllmConfig` that is looked at; names with a dot change one of its parts."""
    model = SimpleNamespace(
        use_mla=False, is_encoder_decoder=False, max_model_len=4096, get_total_num_hidden_layers=lambda: 4
    )
    made = SimpleNamespace(
        additional_config={},
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=8, scheduler_reserve_full_isl=True),
        speculative_config=None,
        kv_transfer_config=None,
        use_v2_model_runner=False,
    )
    for path, value in changed.items():
        *parts, name = path.split("__")
        place = made
        for part in parts:
            place = getattr(place, part)
        setattr(place, name, value)
    return made


def test_without_settings_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert settings_of(engine()) is None
    assert settings_of(engine(additional_config={"another plugin": 1})) is None


def test_settings_come_from_the_config_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = engine(additional_config={"rocketkv": {"token_budget": 300, "max_sequences": 4}})
    found = settings_of(given)
    assert found is not None
    assert (found.config.method, found.config.token_budget, found.config.decode_capacity) == (
        "rocketkv+",
        300,
        DECODE_CAPACITY,
    )
    assert (found.rows(8), found.rows(2)) == (4, 2)
    monkeypatch.setenv(VARIABLE, '{"token_budget": 700, "layer_budgets": {"1": 900}}')
    assert settings_of(given) == found
    other = settings_of(engine())
    assert other is not None
    assert [config.token_budget for config in by_layer(engine(), other)] == [700, 900, 700, 700]
    monkeypatch.setenv(VARIABLE, "512")
    with pytest.raises(TypeError, match="JSON object"):
        settings_of(engine())
    monkeypatch.setenv(VARIABLE, "{")
    with pytest.raises(ValueError, match=VARIABLE):
        settings_of(engine())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"token_budgets": 1}, "Did you mean 'token_budget'"),
        ({"max_error": 0.1}, "max_error does not work in vLLM"),
        ({"skip_layers": [0]}, "skip_layers does not work in vLLM"),
        ({"method": "rocketkv-mt"}, "evicts by attention: rocketkv, rocketkv\\+"),
        ({"method": "quest"}, "evicts by attention"),
        ({"method": "streaming"}, "evicts by attention"),
        ({"decode_capacity": 32}, "2 \\* window_size = 64"),
        ({"decode_capacity": None}, "must be an int in vLLM"),
        ({"max_sequences": 0}, "max_sequences must be"),
    ],
)
def test_settings_that_do_not_work_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(given)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_config__use_mla": True}, "MLA"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
        ({"speculative_config": object()}, "speculative decoding: leave out --speculative-config"),
        ({"kv_transfer_config": SimpleNamespace(is_kv_transfer_instance=True)}, "KV connectors"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallel"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context parallel"),
        ({"parallel_config__enable_dbo": True}, "dual batch overlap"),
        ({"cache_config__cache_dtype": "fp8"}, "quantised KV caches: leave out --kv-cache-dtype fp8"),
        ({"scheduler_config__scheduler_reserve_full_isl": False}, "admission by the first chunk"),
        ({"scheduler_config__max_num_seqs": 10**7}, "set max_sequences=262080"),
    ],
)
def test_engines_that_cannot_be_served_are_refused(changed: dict[str, Any], words: str) -> None:
    refuse(engine(), parse({}))
    with pytest.raises(ValueError, match=words):
        refuse(engine(**changed), parse({}))


def test_model_runner_v2_has_a_row_for_each_request() -> None:
    refuse(engine(use_v2_model_runner=True), parse({}))
    refuse(engine(), parse({"max_sequences": 4}))
    with pytest.raises(ValueError, match="set --max-num-seqs 4 instead"):
        refuse(engine(use_v2_model_runner=True), parse({"max_sequences": 4}))
    unknown = engine()
    del unknown.use_v2_model_runner
    with pytest.raises(AttributeError):
        refuse(unknown, parse({"max_sequences": 4}))


def test_the_extra_and_the_docs_name_the_supported_versions() -> None:
    root = Path(__file__).parents[2]
    major, minor = SUPPORTED[-1].split(".")
    assert f'"vllm>={SUPPORTED[0]},<{major}.{int(minor) + 1}"' in (root / "pyproject.toml").read_text(encoding="utf-8")
    assert f"({' and '.join(SUPPORTED)})" in (root / "docs" / "vllm.md").read_text(encoding="utf-8")


def test_rooms_that_cannot_be_full() -> None:
    with pytest.raises(ValueError, match="when_full='raise' needs a decode_capacity of max_model_len=4096"):
        refuse(engine(), parse({"when_full": "raise"}))
    refuse(engine(), parse({"when_full": "raise", "decode_capacity": 4096}))


def test_markers_tell_rows_and_prompts_apart_from_blocks() -> None:
    for length in (1, 131072):
        rows = most_rows(length)
        for row, tokens in ((0, 1), (rows - 1, length)):
            number = marker(row, tokens, length)
            assert FIRST_MARKER <= number <= LAST_MARKER
            assert read_marker(number, length) == (row, tokens)
    assert read_marker(FIRST_MARKER - 1, 100) is None
