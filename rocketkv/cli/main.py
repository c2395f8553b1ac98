"""The command line of `rocketkv`: the commands of `COMMANDS`, the harness's among them.

A command is a module with `add_arguments(parser)` and `run(args)`, which returns the exit code. Only the module of the
given command is imported, and it imports torch in `run`, so that help and argument errors take no time.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .._version import __version__
from ..options import did_you_mean

# Name: module, one line of help.
COMMANDS = {
    "demo": (".demo", "find a number in a long text with a real model, with and without compression"),
    "compress": (".compress", "read a long text once and save its compressed cache in a file"),
    "ask": (".ask", "answer a question about a text that `compress` has read"),
    "show": (".show", "write a page of the tokens that `compress` kept, and of those that an answer's steps read"),
    "serve": (".serve", "answer requests of OpenAI's API; a long text is read once and asked many times"),
    "tune": (".tune", "find the settings that keep a model's decode divergence within a target on your texts"),
    "plan": (".plan", "memory, bytes read per step and ceilings on speed of a model at a token budget"),
    "env": (".env", "versions, devices and backends, for bug reports"),
    "bench": ("..eval.bench.cli", "decode speed against dense attention"),
    "eval": ("..eval.cli", "accuracy against memory and latency, over methods, budgets, tasks and lengths"),
    "oracle": ("..eval.oracle.command", "the fewest tokens that attention needs, and the parts of a method's error"),
    "lm-eval": ("..eval.lm_eval_cli", "the command line of lm-eval with the model rocketkv"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; None for the arguments of the process.

    Returns:
        The exit code: the command's, 2 for invalid input, 130 after an interrupt.

    Raises:
        SystemExit: argparse refuses the arguments (2), or has printed help or the version (0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="rocketkv", description="KV-cache compression for Hugging Face models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    run = None
    try:
        for name, (module_name, summary) in COMMANDS.items():
            command = commands.add_parser(name, help=summary, description=summary)
            if name == asked:
                module = importlib.import_module(module_name, __package__)
                module.add_arguments(command)
                run = module.run
        if asked is not None and run is None:
            parser.error(f"no command {asked!r}.{did_you_mean(asked, COMMANDS)} Commands: {', '.join(COMMANDS)}")
        parsed = parser.parse_args(arguments, argparse.Namespace(given=arguments))
        return int(run(parsed)) if run is not None else 2
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if sys.flags.dev_mode:  # python -X dev: show the traceback
            raise
        sys.stderr.write(f"rocketkv {asked}: error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
