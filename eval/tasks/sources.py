"""Where benchmarks' data and templates come from: the lm-eval package, the user's folder, or the Hugging Face hub."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

INSTALL = "pip install 'rocketkv[eval]'"


def lm_eval_file(relative: str) -> Path:
    """Return a file of the installed lm-eval package, which is found and not imported.

    Args:
        relative: path inside the package, such as `tasks/longbench/trec.yaml`.

    Raises:
        ImportError: lm-eval is not installed.
        FileNotFoundError: it has no such file.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the templates are read from the lm-eval package, which is not installed; run: {INSTALL}")
    path = Path(spec.submodule_search_locations[0], relative)
    if not path.is_file():
        raise FileNotFoundError(f"the installed lm-eval package has no {relative}; install lm-eval 0.4.13 or newer")
    return path


def data_file(data_dir: Path, *candidates: str) -> Path:
    """Return the first of several files that the user's folder holds.

    Args:
        data_dir: the folder.
        candidates: paths inside it, the preferred first.

    Raises:
        FileNotFoundError: the folder does not exist, or holds none of them.
    """
    if not data_dir.is_dir():
        raise FileNotFoundError(f"--data-dir must name a folder that exists, got {data_dir}")
    for candidate in candidates:
        if (data_dir / candidate).is_file():
            return data_dir / candidate
    raise FileNotFoundError(f"--data-dir {data_dir} must hold {' or '.join(candidates)}; put the file there")


def hub_file(repo_id: str, filename: str) -> Path:
    """Return a file of a data set on the Hugging Face hub, downloaded once and then read from the hub's cache.

    Args:
        repo_id: the data set, such as `zai-org/LongBench`.
        filename: path inside it.

    Raises:
        OSError: it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, filename, repo_type="dataset"))
    except OSError as error:  # every error of the hub's is one, those for want of a network too
        raise OSError(
            f"{filename} of the data set {repo_id} could not be downloaded ({type(error).__name__}). Without a network,"
            f" download https://huggingface.co/datasets/{repo_id}/resolve/main/{filename} elsewhere, put it into a"
            " folder and name that with --data-dir"
        ) from error


def read_jsonl(path: Path, member: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one JSON object a line; blank lines are passed over.

    Args:
        path: the file, or a zip archive that holds it.
        member: its name inside the archive; None where `path` is the file itself.

    Raises:
        ValueError: a line holds no JSON object, or the archive cannot be read or has no such member.
    """
    with _opened(path, member) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {member or path.name}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} must be a JSON object, got {type(row).__name__}")
            yield row


def read_json(path: Path, member: str | None = None) -> Any:
    """Return what a JSON file holds.

    Args:
        path: the file, or a zip archive that holds it.
        member: its name inside the archive; None where `path` is the file itself.

    Raises:
        ValueError: it is not JSON, or the archive cannot be read or has no such member.
    """
    with _opened(path, member) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{member or path.name} is not JSON: {error}") from error


def check_fields(row: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    """Check that a row of data has the fields that are needed.

    Raises:
        ValueError: some are missing.
    """
    missing = [field for field in fields if field not in row]
    if missing:
        raise ValueError(
            f"{where} must have the fields {', '.join(fields)}; {', '.join(missing)} missing: take the official file"
        )


def _opened(path: Path, member: str | None) -> TextIO:
    """Open a text file, or one inside a zip archive; the caller closes it."""
    if member is None:
        return path.open(encoding="utf-8")
    try:
        with zipfile.ZipFile(path) as archive:
            # A member outlives its archive: zipfile keeps the file open until the last of them is closed.
            return io.TextIOWrapper(archive.open(member), encoding="utf-8")
    except KeyError:
        raise ValueError(f"{path} must hold {member}, and does not; download the archive again") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a whole zip archive ({error}); download it again") from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML ships no types
    """Reads tags it does not know, such as `!function`, as the text behind them."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: loader.construct_scalar(node))


def yaml_field(path: Path, name: str) -> Any:
    """Return one field of a YAML file of lm-eval's; `!function` and other tags are left as the text behind them.

    Raises:
        ValueError: the file is not YAML, or has no such field.
    """
    try:
        # The loader is SafeLoader's: it makes plain values only.
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML that can be read: {error}") from error
    if not isinstance(found, dict) or name not in found:
        raise ValueError(f"{path} has no field {name!r}; install another release of lm-eval (0.4.13 has it)")
    return found[name]


def python_constant(path: Path, name: str) -> Any:
    """Return a literal that a Python file assigns to a name at its top level, without running the file.

    Raises:
        ValueError: nothing is assigned to the name, or no literal is.
    """
    value: ast.expr | None = None
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = node.value
    if value is None:
        raise ValueError(f"{path} assigns nothing to {name!r}; install another release of lm-eval (0.4.13 does)")
    try:
        return ast.literal_eval(value)
    except ValueError as error:
        raise ValueError(f"{name!r} in {path} must be a literal: {error}") from error
