"""Files of `rocketkv tune`: read by `patch` for the model that they were made for, refused by name for any other."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import rocketkv
from rocketkv import RocketKVConfig
from rocketkv.hf.tuned import fingerprint, read_settings, sealed
from tiny import build, greedy, prompt

pytestmark = pytest.mark.integration

SETTINGS = RocketKVConfig(method="rocketkv+", max_error=0.5, window_size=16, skip_layers=(0,))


def document(**changes: Any) -> dict[str, Any]:
    settings = asdict(SETTINGS) | changes.pop("settings", {})
    return {"rocketkv": "9.9", "model": fingerprint(build()), "settings": settings, "target_kl": 0.02, **changes}


def write(folder: Path, made: Any) -> Path:
    path = folder / "rocketkv.json"
    path.write_text(made if isinstance(made, str) else json.dumps(made), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path, sealed(document()))


@pytest.mark.parametrize("kind", [str, Path])
def test_patch_takes_a_file(kind: Any, file: Path) -> None:
    model = build()
    with rocketkv.patch(model, kind(file)) as handle:
        assert handle.config == SETTINGS
        of_file = greedy(model, prompt(300))[0]
    with rocketkv.patch(model, SETTINGS):
        assert torch.equal(of_file, greedy(model, prompt(300))[0])


def test_fields_replace_those_of_the_file(file: Path) -> None:
    with rocketkv.patch(build(), file, max_error=0.3, backend="torch") as handle:
        assert handle.config == RocketKVConfig(**asdict(SETTINGS) | {"max_error": 0.3, "backend": "torch"})


def test_a_patched_model_takes_a_file_too(file: Path) -> None:
    model = build()
    with rocketkv.patch(model, token_budget=64), rocketkv.patch(model, file) as handle:
        assert handle.config == SETTINGS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_does_not_matter(dtype: torch.dtype, file: Path) -> None:
    assert read_settings(file, build().to(dtype)) == SETTINGS  # type: ignore[arg-type]  # torch types `to`


def other_weight() -> Any:
    model = build()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[-1, -1] += 0.5
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("qwen3"), "model.architecture is 'LlamaModel' in the file, 'Qwen3Model' here"),
        (lambda: build(num_hidden_layers=3), "model.sizes.num_hidden_layers is 2 in the file, 3 here"),
        (lambda: build(num_key_value_heads=4), "model.sizes.num_key_value_heads is 2 in the file, 4 here"),
        (lambda: build(vocab_size=128), "model.vocabulary is 96 in the file, 128 here"),
        (lambda: build(seed=1), "does not fit: model.weights_sha256 is"),
        (other_weight, "does not fit: model.weights_sha256 is"),
    ],
    ids=["architecture", "layers", "heads", "vocabulary", "weights", "one-weight"],
)
def test_another_model_is_refused_by_name(make: Any, message: str, file: Path) -> None:
    model = make()
    with pytest.raises(ValueError, match=message) as refused:
        rocketkv.patch(model, file)
    assert "run `rocketkv tune` on this one" in str(refused.value)
    assert "generate" not in model.__dict__  # nothing is patched


def edited(**changes: Any) -> dict[str, Any]:
    return sealed(document()) | changes


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("{", "is damaged, or no file of `rocketkv tune`"),
        ("[]", "is no file of `rocketkv tune`"),
        ('{"model_type": "llama"}', "is no file of `rocketkv tune`"),
        (lambda: edited(format=2), "has format 2; this version reads format 1"),
        (lambda: edited(target_kl=0.5), "does not match its checksum"),
        (lambda: json.dumps(edited())[:-40], "is damaged"),
        (lambda: sealed(document(settings={"colour": 1})), "made by rocketkv 9.9 and has settings that this version"),
        (lambda: sealed(document(settings={"method": "mine"})), "method must be one of"),
    ],
    ids=["no-json", "a-list", "another-file", "format", "edited", "cut", "field", "method"],
)
def test_a_file_that_cannot_be_used_is_refused(made: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, made() if callable(made) else made)
    with pytest.raises(ValueError, match=message) as refused:
        rocketkv.patch(build(), path)
    assert str(refused.value).startswith(str(path))


def test_a_file_that_is_missing_or_binary(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        rocketkv.patch(build(), tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is damaged, or no file of `rocketkv tune`"):
        rocketkv.patch(build(), tmp_path / "binary")


def test_weights_that_are_not_at_hand_are_refused() -> None:
    with torch.device("meta"):
        model = type(build())(build().config)
    with pytest.raises(ValueError, match=r"cannot be identified: its weight .* on meta"):
        fingerprint(model)
