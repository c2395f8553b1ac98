"""Saved caches: what goes on from a file goes on token for token, and no damaged file is taken for a cache."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rocketkv
from hybrids import linear
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from static import STATIC, inputs_of, own_loop
from tiny import LARGE, SMALL, TRANSFORMERS, build, greedy, hand_written, left_padded, prompt

pytestmark = pytest.mark.integration

FIRST, QUESTION = prompt(90), prompt(11, seed=7)
ROWS = [FIRST, prompt(41), prompt(15, seed=9)]
METHODS = ["rocketkv", "rocketkv+", "snapkv", "quest", "sparq", "streaming", "full"]


def settings(method: str) -> dict[str, Any]:
    split = rocketkv.RocketKVConfig(method=method, **{**SMALL, "split": None}).split_for(90, 16)
    return {**SMALL, "method": method, "split": split}


def context(padded: bool) -> dict[str, Tensor]:
    return left_padded(ROWS) if padded else {"input_ids": FIRST, "attention_mask": torch.ones_like(FIRST)}


def read(model: Any, padded: bool = False, **fields: Any) -> RocketKVCache:
    """Return a cache that has read the context."""
    inputs = context(padded)
    cache = RocketKVCache(model.config, prompt_length=90, **(fields or SMALL))
    position = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**inputs, position_ids=position, **{CACHE_ARGUMENT: cache}, use_cache=True)
    return cache


def question(model: Any, inputs: dict[str, Tensor], cache: Any, count: int = 12) -> tuple[Tensor, Tensor]:
    """Ask through `generate`, which is given the whole sequence."""
    new = QUESTION.expand(inputs["input_ids"].shape[0], -1)
    ids = torch.cat((inputs["input_ids"], new), dim=1)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(new)), dim=1)
    return greedy(model, {"input_ids": ids, "attention_mask": mask}, count, **{CACHE_ARGUMENT: cache})[:2]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss", "qwen3"])
def test_a_saved_cache_goes_on_token_for_token(family: str, padded: bool, tmp_path: Path) -> None:
    model, path, inputs = build(family), tmp_path / "context.safetensors", context(padded)
    with rocketkv.patch(model, **SMALL):
        cache = read(model, padded)
        rocketkv.save_cache(cache, path, model=model, ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        saved = rocketkv.load_inputs(path)
        assert {name: tensor.tolist() for name, tensor in saved.items()} == {
            name: tensor.tolist() for name, tensor in inputs.items()
        }
        assert rocketkv.load_cache(path, model).get_seq_length() == 90
        expected, logits = question(model, inputs, cache, 30)
        found, found_logits = question(model, saved, rocketkv.load_cache(path, model), 30)
        assert found.equal(expected)
        assert found_logits.equal(logits)
        # And in a loop of one's own, decoding at once.
        first = prompt(1, rows=len(saved["input_ids"]), seed=3)
        mask = inputs["attention_mask"] if padded else None
        mask = None if mask is None else torch.cat((mask, torch.ones_like(first)), dim=1)
        loops = [hand_written(model, first, 30, cache=each, mask=mask)
                 for each in (read(model, padded), rocketkv.load_cache(path, model))]  # fmt: skip
        assert loops[1][0].equal(loops[0][0])
        assert loops[1][1].equal(loops[0][1])


@pytest.mark.parametrize("patched", [True, False])
def test_protected_ranges_come_back(patched: bool, tmp_path: Path) -> None:
    model, path, fields = build(), tmp_path / "context.safetensors", {**SMALL, "protect": ((40, 52), (60, 63))}
    with rocketkv.patch(model, **fields):
        cache = read(model, **fields)
        rocketkv.save_cache(cache, path, model=model, ids=context(False)["input_ids"])
        expected = question(model, context(False), cache, 30)
    if not patched:
        rocketkv.load_cache(path, model)
    with rocketkv.patch(model, **fields):
        found = question(model, context(False), rocketkv.load_cache(path, model), 30)
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_any_time(method: str, tmp_path: Path) -> None:
    model, path, fields = build(), tmp_path / "cache", settings(method)
    with rocketkv.patch(model, **fields):
        for tokens in (1, 9, 70):  # in the room, and after growth or a roll
            _, _, cache = greedy(model, FIRST, tokens)
            rocketkv.save_cache(cache, path, model=model)
            loaded = rocketkv.load_cache(path, model)
            for layer, other in zip(rocketkv_layers(loaded), rocketkv_layers(cache), strict=True):
                assert layer.store.capacity == other.store.capacity
                assert layer.config == other.config
            assert loaded.stats() == cache.stats()
            found = hand_written(model, QUESTION, 20, cache=loaded)
            expected = hand_written(model, QUESTION, 20, cache=cache)
            assert found[0].equal(expected[0])
            assert found[1].equal(expected[1])


def test_a_file_holds_what_is_in_use_and_saving_changes_nothing(tmp_path: Path) -> None:
    model, path = build(), tmp_path / "cache.safetensors"
    with rocketkv.patch(model, **SMALL):
        cache = read(model)
        before = [{name: tensor.clone() for name, tensor in layer.store.tensors().items()}
                  for layer in rocketkv_layers(cache)]  # fmt: skip
        rocketkv.save_cache(cache, path, model=model, ids=FIRST)
    for layer, tensors in zip(rocketkv_layers(cache), before, strict=True):
        assert all(layer.store.tensors()[name].equal(tensor) for name, tensor in tensors.items())
    found = load_file(path)
    assert found["layers.0.keys"].shape == (1, 2, 40, 16)
    assert found["input_ids"].dtype == torch.int64
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_model_that_is_not_patched_yet_and_one_in_sixteen_bits(tmp_path: Path) -> None:
    model, path = build().to(torch.bfloat16), tmp_path / "cache"
    fields = {**SMALL, "index_dtype": "float8_e5m2"}
    with rocketkv.patch(model, **fields):
        cache = read(model, **fields)
        rocketkv.save_cache(cache, path, model=model)
        expected = hand_written(model, QUESTION, cache=cache)
    loaded = rocketkv.load_cache(path, model)
    with rocketkv.patch(model, rocketkv_layers(loaded)[0].config):
        found = hand_written(model, QUESTION, cache=loaded)
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])


@pytest.mark.filterwarnings("ignore:RocketKV runs these decode steps eagerly")
def test_a_static_cache_before_it_is_captured(tmp_path: Path) -> None:
    model, path = build(), tmp_path / "cache"
    with rocketkv.patch(model, **STATIC):
        *_, cache = own_loop(model, inputs_of("one"), model, 3)
        rocketkv.save_cache(cache, path, model=model)
        loaded = rocketkv.load_cache(path, model)
        token = prompt(1, seed=3)
        found, expected = (hand_written(model, token, 8, cache=each) for each in (loaded, cache))
        assert found[0].equal(expected[0])
        torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)
        assert all(layer.step is not None for layer in rocketkv_layers(loaded))
        rocketkv_layers(cache)[0].store.note_captured()
        with pytest.raises(ValueError, match="captured in a CUDA graph"):
            rocketkv.save_cache(cache, path, model=model)


def unfinished(model: Any) -> RocketKVCache:
    cache = RocketKVCache(model.config, **SMALL)
    with torch.no_grad():
        model(FIRST, **{CACHE_ARGUMENT: cache}, use_cache=True)
    return cache


def pending(model: Any) -> RocketKVCache:
    cache = read(model)
    layer = rocketkv_layers(cache)[1]
    layer.armed = True
    layer.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    return cache


@pytest.mark.parametrize(
    ("make", "arguments", "kind", "message"),
    [
        (unfinished, {}, ValueError, "the prompt is not finished"),
        (lambda model: RocketKVCache(model.config, **SMALL), {}, ValueError, "the prompt is not finished"),
        (pending, {}, ValueError, "layer 1 holds tokens of a forward that was interrupted"),
        (lambda model: [], {}, TypeError, "cache must be a RocketKVCache, got list"),
        (read, {"model": "llama"}, TypeError, "model must be a transformers model"),
        (read, {"ids": FIRST[:, :80]}, ValueError, r"ids must be \[B, n\] for the cache's 1 rows and at least its 90"),
        (read, {"ids": prompt(90, rows=2)}, ValueError, "for the cache's 1 rows"),
        (read, {"ids": FIRST.float()}, TypeError, "ids must be a tensor of integers, got torch.float32"),
        (read, {"attention_mask": FIRST}, ValueError, "give ids too"),
        (read, {"ids": FIRST, "attention_mask": prompt(91)}, ValueError, "must have the shape of ids"),
    ],
)
def test_what_cannot_be_saved_is_refused(
    make: Callable[[Any], Any], arguments: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    model = build()
    with rocketkv.patch(model, **SMALL):
        cache = make(model)
        with pytest.raises(kind, match=message):
            rocketkv.save_cache(cache, tmp_path / "cache", **{"model": model, **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(TRANSFORMERS < (5, 8), reason="older ones give such models a cache of their own kind")
def test_layers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    model = linear("Lfm2")
    with rocketkv.patch(model, **SMALL), pytest.raises(ValueError, match=r"layer 0 is an .*Linear.*, which cannot"):
        rocketkv.save_cache(read(model), tmp_path / "cache", model=model)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = build(), tmp_path / "cache"
    with rocketkv.patch(model, **SMALL):
        cache = read(model)
    rocketkv.save_cache(cache, path, model=model)
    before = path.read_bytes()

    def full(*args: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("rocketkv.hf.tensorfile.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        rocketkv.save_cache(cache, path, model=model)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError, match="no folder"):
        rocketkv.save_cache(cache, tmp_path / "none" / "cache", model=model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model and a file of its cache, never to be changed."""
    model, path = build("gemma3"), tmp_path_factory.mktemp("saved") / "cache.safetensors"
    with rocketkv.patch(model, **SMALL):
        rocketkv.save_cache(read(model), path, model=model, ids=FIRST)
    return model, path


def parts(path: Path) -> tuple[dict[str, Any], int]:
    """Return a file's header, and where its tensors begin."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


def with_header(path: Path, header: dict[str, Any], to: Path) -> None:
    text = json.dumps(header).encode()
    data = path.read_bytes()
    to.write_bytes(struct.pack("<Q", len(text)) + text + data[parts(path)[1] :])


def checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def refused(path: Path, model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        rocketkv.load_cache(path, model)
    assert path.name in str(error.value)


@pytest.mark.parametrize("seed", range(12))
def test_a_byte_that_was_changed(seed: int, saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    data, start, choose = bytearray(path.read_bytes()), parts(path)[1], random.Random(seed)
    place = choose.randrange(start, len(data)) if seed % 2 else choose.randrange(start)
    data[place] ^= choose.randrange(1, 256)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    if seed % 2:
        # Which tensor it is in, and nothing else, is named.
        held = [name for name, entry in parts(path)[0].items() if name != "__metadata__"
                and entry["data_offsets"][0] <= place - start < entry["data_offsets"][1]]  # fmt: skip
        refused(damaged, model, f"tensor {held[0]}.sha256 is '.*' in the file, '.*' here$")
    else:
        refused(damaged, model, "damaged|not written by")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.7, 0.999])
def test_a_file_that_was_cut_short(share: float, saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    data = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(data[: int(len(data) * share)])
    refused(cut, model, "damaged or cut short")


def edited(text: str, change: Callable[[dict[str, Any]], None]) -> str:
    document = json.loads(text)
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["settings"].update(token_budget=25),
        lambda document: document.update(version="0.0.1"),
        lambda document: document["layers"][1].update(capacity=10**6),
        lambda document: document["model"].update(weights_sha256=""),
    ],
)
def test_metadata_that_was_edited(
    change: Callable[[dict[str, Any]], None], saved: tuple[Any, Path], tmp_path: Path
) -> None:
    model, path = saved
    header = parts(path)[0]
    header["__metadata__"]["rocketkv"] = edited(header["__metadata__"]["rocketkv"], change)
    to = tmp_path / "edited.safetensors"
    with_header(path, header, to)
    refused(to, model, "metadata does not match its checksum")


def swapped(header: dict[str, Any]) -> None:
    one, other = header["layers.1.keys"], header["layers.3.keys"]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def renamed(header: dict[str, Any]) -> None:
    header["layers.9.keys"] = header.pop("layers.1.keys")


def reshaped(header: dict[str, Any]) -> None:
    header["layers.1.keys"]["shape"] = [1, 2, 16, 40]


def recast(header: dict[str, Any]) -> None:
    header["layers.1.seq_lens"]["dtype"] = "F32"


def bare(header: dict[str, Any]) -> None:
    del header["__metadata__"]


def unsigned(header: dict[str, Any]) -> None:
    del header["__metadata__"]["checksum"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, r"tensor layers.[13].keys.sha256"),
        (renamed, r"missing or were added: layers.1.keys, layers.9.keys"),
        (reshaped, r"tensor layers.1.keys.shape is \[1, 2, 40, 16\] in the file, \[1, 2, 16, 40\] here"),
        (recast, r"tensor layers.1.seq_lens.dtype is 'torch.int32' in the file, 'torch.float32' here"),
        (bare, "was not written by rocketkv.save_cache"),
        (unsigned, "metadata does not match its checksum"),
    ],
)
def test_a_header_that_was_edited(
    change: Callable[[dict[str, Any]], None], message: str, saved: tuple[Any, Path], tmp_path: Path
) -> None:
    model, path = saved
    header = parts(path)[0]
    change(header)
    to = tmp_path / "edited.safetensors"
    with_header(path, header, to)
    refused(to, model, message)


def test_other_files_are_no_caches(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, other = saved[0], tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(3)}, other)
    refused(other, model, "was not written by rocketkv.save_cache")
    other.write_text("# a text\n" * 40)
    refused(other, model, "no safetensors file")
    with pytest.raises(FileNotFoundError, match="no file"):
        rocketkv.load_cache(tmp_path / "none", model)
    with rocketkv.patch(model, **SMALL):
        rocketkv.save_cache(read(model), other, model=model)
    with pytest.raises(ValueError, match="was saved without token ids"):
        rocketkv.load_inputs(other)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: build(), "model.class is 'Gemma3ForCausalLM' in the file, 'LlamaForCausalLM' here"),
        (lambda: build("gemma3", seed=1), "model.weights_sha256"),
        (lambda: build("gemma3", rope_theta=5e5), "model.config.rope.*5.*00000"),
        (lambda: build("gemma3", sliding_window=16), "model.config.sliding_window is 24 in the file, 16 here"),
        (lambda: build("gemma3").to(torch.bfloat16), "model.dtype is 'torch.float32' in the file, 'torch.bfloat16'"),
    ],
)
def test_another_model(other: Callable[[], Any], message: str, saved: tuple[Any, Path]) -> None:
    refused(saved[1], other(), message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**SMALL, "token_budget": 25}, "settings.token_budget is 24 in the file, 25 here"),
        ({**SMALL, "method": "quest"}, "settings.method is 'rocketkv\\+' in the file, 'quest' here"),
        ({**SMALL, "index_dtype": "float8_e5m2"}, "settings.index_dtype is 'keys' in the file"),
        (LARGE, "settings.split is {.*} in the file, None here; settings.token_budget is 24 in the file, 4096"),
    ],
)
def test_other_settings(fields: dict[str, Any], message: str, saved: tuple[Any, Path]) -> None:
    model, path = saved
    with rocketkv.patch(model, **fields):
        refused(path, model, message)


def test_another_version(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = saved
    monkeypatch.setattr("rocketkv.hf.tensorfile.__version__", "9.0")
    refused(path, model, f"version is '{rocketkv._version.__version__}' in the file, '9.0' here")
    monkeypatch.setattr("rocketkv.hf.tensorfile.FORMAT", 2)
    refused(path, model, "format is 1 in the file, 2 here")


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("layers"),
        lambda document: document["layers"].pop(),
        lambda document: document["layers"][1].update(kind="DynamicLayer"),
        lambda document: document["layers"][1].update(stored=39),
        lambda document: document["layers"][1].update(seen="many"),
        lambda document: document["layers"][1].update(capacity=3),
        lambda document: document["layers"][1].pop("aligned"),
        lambda document: document["layers"][1].update(split=None),
        lambda document: document["layers"][0].update(kind="QuantizedLayer"),
        lambda document: document["settings"].update(token_budget=-1),
    ],
)
def test_a_document_under_a_true_checksum_is_still_looked_at(
    change: Callable[[dict[str, Any]], Any], saved: tuple[Any, Path], tmp_path: Path
) -> None:
    model, path = saved
    header, to = parts(path)[0], tmp_path / "made.safetensors"
    text = edited(header["__metadata__"]["rocketkv"], change)
    header["__metadata__"] = {"rocketkv": text, "checksum": checksum(text)}
    with_header(path, header, to)
    with pytest.raises(ValueError):  # noqa: PT011  # each says something else
        rocketkv.load_cache(to, model)
