"""Options that several commands share, and the types of their values; imports neither torch nor transformers."""

import argparse
import difflib
import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .budget import DEFAULT_METHOD, METHODS

T = TypeVar("T")

DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"
DTYPE_HELP = "of the weights; auto: float32 on a CPU, bfloat16 elsewhere"


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


def device_map(text: str) -> str | dict[str, Any]:
    """Return a device map: a name such as `auto`, or a JSON object of modules and devices; for `type=` of an option.

    Raises:
        argparse.ArgumentTypeError: the text begins as an object and is none.
    """
    if not text.startswith("{"):
        return text
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a name such as auto, or a JSON object; got {text!r}") from error
    return found


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, and the options of `add_placement_options`."""
    parser.add_argument("--model", help="hub name or local folder (default: SmolLM2-135M-Instruct from PyPI)")
    add_placement_options(parser)


def add_placement_options(parser: argparse.ArgumentParser) -> None:
    """Add --dtype, --device and the options of `add_loading_options`."""
    parser.add_argument("--dtype", choices=(AUTO, *DTYPES), default=AUTO, help=f"{DTYPE_HELP} (default %(default)s)")
    parser.add_argument(
        "--device", type=device_name, default="cpu", help="cpu, cuda, cuda:1, mps or xpu (default %(default)s)"
    )
    add_loading_options(parser)


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add --attn, --device-map and --revision, which default to None."""
    attention = "attention of transformers, such as sdpa, eager or flash_attention_2 (default: its choice)"
    parser.add_argument("--attn", metavar="NAME", help=attention)
    placement = "auto, balanced, ... or a JSON object, in place of --device; needs accelerate"
    parser.add_argument("--device-map", type=device_map, metavar="MAP", help=placement)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the model on the hub")


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of `hf.loading.load_model` from the options of `add_loading_options`."""
    return {"attention": args.attn, "device_map": args.device_map, "revision": args.revision}


def add_method_options(parser: argparse.ArgumentParser, *, budget: int) -> None:
    """Add --method and --budget, with `budget` tokens as its default."""
    names = f"{', '.join(METHODS)} (default %(default)s)"
    parser.add_argument("--method", type=method_name, default=DEFAULT_METHOD, metavar="NAME", help=names)
    tokens = "token budget of a decode step (default %(default)s)"
    parser.add_argument("--budget", type=positive, default=budget, metavar="T", help=tokens)
