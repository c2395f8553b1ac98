"""`rocketkv lm-eval`: lm-eval's own command line, with the model `rocketkv` in it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from .records import digest

_CACHE, _SHORT_CACHE = "--use_cache", "-c"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pass all arguments on: the options are lm-eval's."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="lm-eval's arguments; the model is rocketkv")
    parser.prefix_chars = "\0"  # no argument is an option of this parser


def run(args: argparse.Namespace) -> int:
    """Run lm-eval; returns the exit code.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: several methods would share a cache of answers.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("rocketkv lm-eval needs lm-eval: pip install 'rocketkv[eval]'")
    importlib.import_module(".lm", __package__)  # which registers the model
    command = importlib.import_module("lm_eval.__main__")
    before, sys.argv = sys.argv, ["lm_eval", *with_model(args.arguments)]
    try:
        command.cli_evaluate()
    finally:
        sys.argv = before
    return 0


def with_model(arguments: Sequence[str]) -> list[str]:
    """Return lm-eval's arguments with the model `rocketkv`, and with a separate cache of answers for its settings.

    lm-eval's cache has answers by prompt: two methods would share it.

    Raises:
        ValueError: the arguments name another model, or a file names the cache.
        OSError: the file cannot be read.
    """
    found = list(arguments)
    if found[:1] in (["ls"], ["validate"]):
        return found  # these run no model
    models = _values(found, "--model", "-M")
    if any(model != "rocketkv" for model in models):
        raise ValueError(f"rocketkv lm-eval runs the model 'rocketkv', got --model {models[0]}; use lm_eval for others")
    own = _own(_values(found, "--model_args", "-a"), _values(found, "--config", "-C"))
    for i, argument in enumerate(found):
        if argument.startswith((f"{_CACHE}=", f"{_SHORT_CACHE}=")):
            found[i] = f"{argument}-{own}"
        elif argument in (_CACHE, _SHORT_CACHE) and i + 1 < len(found):
            found[i + 1] = f"{found[i + 1]}-{own}"
    if models:
        return found
    run_first = found[:1] == ["run"]
    return [*(["run"] if run_first else []), "--model", "rocketkv", *found[run_first:]]


def _own(model_args: Sequence[str], files: Sequence[str]) -> str:
    """Return the suffix of a cache's name: method and budget where they are set, and a hash of all settings."""
    texts = [Path(file).read_text(encoding="utf-8") for file in files]
    for file, text in zip(files, texts, strict=True):
        if (yaml.safe_load(text) or {}).get("use_cache"):
            raise ValueError(f"{file} must not set use_cache, which methods would share; give {_CACHE} instead")
    pairs = dict(pair.split("=", 1) for value in model_args for pair in value.split(",") if "=" in pair)
    names = [pairs[name].replace("/", "_") for name in ("method", "token_budget") if name in pairs]
    return "-".join([*names, digest([list(model_args), texts])[:12]])


def _values(arguments: Sequence[str], *flags: str) -> list[str]:
    """Return the values of a flag under any of its names: `--flag=value`, or all up to the next flag."""
    found, taken = [], False
    for argument in arguments:
        flag, separator, value = argument.partition("=")
        if argument.startswith("-"):
            taken = flag in flags
            if taken and separator:
                found.append(value)
        elif taken:
            found.append(argument)
    return found
