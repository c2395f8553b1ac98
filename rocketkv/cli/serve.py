"""`rocketkv serve`: an OpenAI-compatible server over one compressed model, one request at a time."""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from ..options import add_placement_options, comma_separated, loading, method_name, positive

MEBI = 2**20
# It keeps all tokens: what a document is asked later is not known when it is compressed (docs/serve.md).
SERVED_METHOD = "rocketkv-mt+"
KEY_VARIABLE = "ROCKETKV_API_KEY"
_GRACE = 5  # seconds in which an answer may end after SIGTERM
_EXTRA = "pip install 'rocketkv[serve]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--model", required=True, help="hub name, local folder, or smollm2")
    parser.add_argument("--name", help="name of the model in requests (default: the last part of --model)")
    add_placement_options(parser)
    parser.add_argument("--threads", type=positive, metavar="N", help="of PyTorch on the CPU")
    compression = parser.add_argument_group("compression")
    compression.add_argument("--config", type=Path, metavar="FILE", help="file of `rocketkv tune`, for this model")
    compression.add_argument(
        "--method", type=method_name, metavar="NAME", help=f"in place of the file's (default: {SERVED_METHOD})"
    )
    compression.add_argument(
        "--budget", type=positive, metavar="T", help="token budget of a decode step, in place of the file's max_error"
    )
    compression.add_argument(
        "--protect-system", action="store_true", help="never evict the system message (needs a chat template)"
    )
    compression.add_argument(
        "--methods", type=comma_separated(method_name), default=[], metavar="A,B", help="that a request may choose too"
    )
    compression.add_argument(
        "--most-budget", type=positive, metavar="T", help="largest budget of a request (default: the server's)"
    )
    compression.add_argument(
        "--least-max-error", type=float, metavar="E", help="least max_error of a request (default: the server's)"
    )
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--prefix-mib", type=positive, default=1024, metavar="N", help="of snapshots of prefixes (default %(default)s)"
    )
    memory.add_argument("--contexts", type=Path, metavar="FOLDER", help="of files of `rocketkv compress`")
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host", default="127.0.0.1", help=f"others than loopback need {KEY_VARIABLE} (default %(default)s)"
    )
    network.add_argument("--port", type=_port, default=8000, help="0 for any free one (default %(default)s)")
    limits = parser.add_argument_group("limits of a request")
    for name, default, text in (
        ("--most-input", None, "tokens of a prompt (default: the model's)"),
        ("--most-output", 2048, "tokens of an answer (default %(default)s)"),
        ("--most-seconds", 600, "seconds, apart from waiting (default %(default)s)"),
        ("--most-body-mib", 16, "MiB of its body (default %(default)s)"),
        ("--most-waiting", 16, "requests that wait; more are refused with 429 (default %(default)s)"),
    ):
        limits.add_argument(name, type=positive, default=default, metavar="N", help=text)


def _port(text: str) -> int:
    """Return the number of a port, for `type=` of an option."""
    if not (text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    Raises:
        ImportError: the packages of `rocketkv[serve]` are not installed.
        OSError: there is no such model, file or folder, or the port is taken.
        ValueError: a setting is impossible, the model cannot be compressed, or an address that others reach has no key.
    """
    try:
        import fastapi  # noqa: F401  # a missing package must show before the model is loaded, not after
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(f"rocketkv serve needs the packages of its extra: {_EXTRA} ({error})") from error
    import torch

    from ..hf.loading import load_model
    from ..hf.patch import patch
    from ..serve.guard import is_loopback
    from ..serve.server import ServerSettings, build

    key = os.environ.get(KEY_VARIABLE) or None
    if key is None and not is_loopback(args.host):
        raise ValueError(f"--host {args.host} lets others in: set {KEY_VARIABLE} to a key that requests must have")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, args.dtype, args.device, **loading(args))
    handle = patch(model, args.config, tokenizer=_messages(args, tokenizer), **_fields(args))
    settings = ServerSettings(
        name=args.name or Path(args.model).name,
        host=args.host,
        key=key,
        contexts=args.contexts,
        prefix_bytes=args.prefix_mib * MEBI,
        body_bytes=args.most_body_mib * MEBI,
        input_tokens=args.most_input,
        output_tokens=args.most_output,
        seconds=args.most_seconds,
        waiting=args.most_waiting,
        methods=tuple(args.methods),
        token_budget=args.most_budget,
        max_error=args.least_max_error,
    )
    app = build(model, tokenizer, handle.config, settings)
    listens: dict[str, Any] = {"host": args.host, "port": args.port, "server_header": False}
    server = uvicorn.Server(uvicorn.Config(app, **listens, timeout_graceful_shutdown=_GRACE))
    # uvicorn raises the signal once more when it has ended, which would end the process by it.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0 if server.started else 1


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the settings that options set."""
    fields: dict[str, Any] = {}
    if args.method is not None or args.config is None:
        fields["method"] = args.method or SERVED_METHOD
    if args.budget is not None:
        fields |= {"token_budget": args.budget, "max_error": None}
    if args.protect_system:
        fields["protect"] = "system"
    return fields


def _messages(args: argparse.Namespace, tokenizer: Any) -> Any:
    """Return the tokenizer if messages must be found by its chat template."""
    return tokenizer if args.protect_system else None
