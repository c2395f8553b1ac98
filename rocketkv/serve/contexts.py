"""Context files of `rocketkv compress` in one folder, by id: the file's name without its suffix."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..budget import BudgetSplit
from ..config import RocketKVConfig
from ..hf.cache import RocketKVCache
from ..hf.files import load_cache, load_inputs
from ..hf.layer import rocketkv_layers
from ..hf.patch import patch
from ..hf.tensorfile import open_tensors
from .errors import RequestError

SUFFIX = ".safetensors"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class ContextFile:
    """A context file as it was when a request named it.

    Attributes:
        id: its id.
        path: its path, without links.
        version: changes when the file is replaced or written.
    """

    id: str
    path: Path
    version: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.version[2]


@dataclass(frozen=True)
class Context:
    """A context that was read from its file."""

    cache: RocketKVCache
    ids: tuple[int, ...]


class Contexts:
    """The context files of a folder.

    Args:
        folder: the folder; None: there are none.

    Raises:
        NotADirectoryError: it is no folder.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and not folder.is_dir():
            raise NotADirectoryError(f"--contexts must be a folder of context files, got {folder}")
        self._folder = None if folder is None else folder.resolve()

    def find(self, name: str) -> ContextFile:
        """Return the file of an id.

        Raises:
            RequestError: the id is not one, or there is no such file in the folder.
        """
        if not _ID.fullmatch(name):
            raise RequestError(400, "a context's id has letters, digits, '.', '_' and '-'", param="context")
        unknown = RequestError(404, f"there is no context {name!r}", param="context", code="context_not_found")
        if self._folder is None:
            raise unknown
        path = self._folder / f"{name}{SUFFIX}"
        try:
            # A link may lead anywhere: only files of the folder itself are read.
            if path.is_symlink() or path.resolve(strict=True).parent != self._folder or not path.is_file():
                raise unknown
            stat = path.stat()
        except OSError:
            raise unknown from None
        return ContextFile(name, path, (stat.st_ino, stat.st_mtime_ns, stat.st_size))

    def listed(self) -> list[ContextFile]:
        """Return the files of the folder, by id."""
        names = [] if self._folder is None else sorted(path.stem for path in self._folder.glob(f"*{SUFFIX}"))
        return [file for file in map(self._found, names) if file is not None]

    def _found(self, name: str) -> ContextFile | None:
        try:
            return self.find(name)
        except RequestError:  # no id, a link, or gone
            return None


def load_context(file: ContextFile, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Context:
    """Read a context file, which has settings of its own; nothing in a file is executed.

    Args:
        file: the file.
        model: the patched model.
        tokenizer: its tokenizer.

    Raises:
        RequestError: the file is damaged, or is not of this model and this version of the library.
    """
    settings = _checked(file, lambda: _settings(file.path))
    with patch(model, settings, tokenizer=tokenizer if settings.protect == "system" or settings.fair_shares else None):
        cache: RocketKVCache = _checked(file, lambda: load_cache(file.path, model))
    ids = _checked(file, lambda: load_inputs(file.path))["input_ids"]
    seen = rocketkv_layers(cache)[0].tokens_seen
    if ids.shape[0] != 1 or ids.shape[1] < seen:
        raise _unfit(file, f"it must have one row and the token ids of all {seen} tokens")
    return Context(cache, tuple(ids[0, :seen].tolist()))


def _settings(path: Path) -> RocketKVConfig:
    fields: dict[str, Any] = open_tensors(path)[0]["settings"]
    split = None if fields["split"] is None else BudgetSplit(**fields["split"])
    return RocketKVConfig(**{**fields, "split": split})


def _checked(file: ContextFile, read: Callable[[], Any]) -> Any:
    """Return what a function reads from a file; its errors name the id, and not the path."""
    try:
        return read()
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _unfit(file, str(error).replace(str(file.path), file.path.name)) from error


def _unfit(file: ContextFile, reason: str) -> RequestError:
    return RequestError(422, f"context {file.id!r} cannot be used: {reason}", param="context", code="context_unfit")
