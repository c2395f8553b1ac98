"""A safetensors file of tensors and one JSON document; a damaged file is refused.

The document is in the file's metadata, with a checksum. It lists the dtype, shape and SHA-256 of every tensor.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._version import __version__

FORMAT = 1
_NAMED = 4  # differences that an error message lists
_SAMPLED = 8  # numbers at both ends of each weight, which identify a model among others of the same shape

# Reads and verifies the tensors whose names a predicate accepts.
Read: TypeAlias = Callable[[Callable[[str], bool]], dict[str, Tensor]]


def write_tensors(path: Path, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """Write a file atomically; it replaces an existing one.

    Args:
        path: the file.
        tensors: tensors by name, on any device.
        document: values for JSON.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} to")
    tensors = {name: _owned(tensor) for name, tensor in tensors.items()}
    marks = {name: _mark(tensor) for name, tensor in tensors.items()}
    text = json.dumps({**document, "format": FORMAT, "version": __version__, "tensors": marks}, sort_keys=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # the mode of new files here; safetensors makes its files private
        save_file(tensors, part, {"rocketkv": text, "checksum": hashlib.sha256(text.encode()).hexdigest()})
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def open_tensors(path: Path) -> tuple[dict[str, Any], Read]:
    """Return a file's verified document, and a function that reads its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no saved cache, or of another version; the message says which.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged or cut short: {error}") from error
    text = metadata.get("rocketkv")
    if text is None:
        raise ValueError(f"{path} was not written by rocketkv.save_cache: its metadata has no entry 'rocketkv'")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("checksum") or len(metadata) != 2:
        raise ValueError(f"{path} was changed or damaged: its metadata does not match its checksum")
    document: dict[str, Any] = json.loads(text)
    for name, here in (("format", FORMAT), ("version", __version__)):
        if document.get(name) != here:
            raise ValueError(
                f"{path} was written by another version of rocketkv, make it anew: {name} is {document.get(name)!r} in "
                f"the file, {here!r} here"
            )
    marks: dict[str, Any] = document["tensors"]
    if names != set(marks):
        odd = ", ".join(sorted(names ^ set(marks))[:_NAMED])
        raise ValueError(f"{path} was changed or damaged: tensors are missing or were added: {odd}")

    def read(wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        tensors = {}
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in filter(wanted, marks):
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from error
        for name, tensor in tensors.items():
            refuse_difference(path, f"tensor {name}", marks[name], _mark(tensor))
        return tensors

    return document, read


def refuse_difference(path: Path, what: str, saved: Any, here: Any) -> None:
    """Refuse a file with a value that differs from the present one.

    Args:
        path: the file.
        what: name of the value.
        saved: the value in the file, from JSON.
        here: the present value.

    Raises:
        ValueError: they differ; the message lists the differences.
    """
    found = list(_differences(what, saved, here))
    if found:
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise ValueError(f"{path} does not fit: {'; '.join(found[:_NAMED])}{more}")


def _differences(what: str, saved: Any, here: Any) -> Iterator[str]:
    """Yield the differences of two JSON values."""
    if isinstance(saved, dict) and isinstance(here, dict):
        for name in [*saved, *(name for name in here if name not in saved)]:
            yield from _differences(f"{what}.{name}", saved.get(name), here.get(name))
    elif saved != here:
        yield f"{what} is {saved!r} in the file, {here!r} here"


def weights_digest(module: nn.Module, rounded_to: torch.dtype | None = None, *, gathered: bool = False) -> str:
    """Return a digest of every weight's name and shape, and of the first and last numbers of plain weights.

    Args:
        module: the module.
        rounded_to: a dtype that the numbers are rounded to first, so that models whose weights differ by that rounding
            alone have the same digest; None: the weights' dtypes count as well.
        gathered: whether weights that are sharded over ranks are gathered, one at a time, for the digest of the whole
            model; every rank must then call this. Otherwise only their names and shapes count.
    """
    digest = hashlib.sha256()
    samples: dict[torch.device, list[Tensor]] = {}
    for name, weight in module.named_parameters():
        digest.update(f"{name} {list(weight.shape)}{'' if rounded_to else f' {weight.dtype}'}".encode())
        gather: Any = getattr(weight, "full_tensor", None) if gathered else None
        if (gather or type(weight) is nn.Parameter) and not weight.is_meta and weight.is_floating_point():
            ends = (gather() if gather else weight).detach().reshape(-1)
            for part in (ends[:_SAMPLED], ends[-_SAMPLED:]):
                samples.setdefault(weight.device, []).append(part.to(rounded_to or part.dtype).float())
    for parts in samples.values():
        digest.update(raw_bytes(torch.cat(parts).cpu()))
    return digest.hexdigest()


def _owned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor on the CPU whose storage has no other data."""
    tensor = tensor.detach()
    own = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor.to("cpu") if own else tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _mark(tensor: Tensor) -> dict[str, Any]:
    """Return the dtype, shape and SHA-256 of a tensor."""
    digest = hashlib.sha256(raw_bytes(tensor)).hexdigest()
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": digest}
