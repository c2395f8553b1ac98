"""The command line: `rocketkv demo | compress | ask | plan | env | bench | eval | oracle | lm-eval`.

A command is a module with `add_arguments(parser)` and `run(args)`, which returns the exit code. Only the module that is
asked for is imported.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .._version import __version__

# Name: module, one line of help.
COMMANDS = {
    "demo": (".demo", "a real model finds a number in a long text, with and without compression"),
    "compress": (".compress", "read a long text once, and keep its compressed cache in a file"),
    "ask": (".ask", "a question about a text that `compress` has read"),
    "plan": (".plan", "what a budget means for a model: split, memory, ceilings on speed"),
    "env": (".env", "versions, devices and backends, for bug reports"),
    "bench": ("..eval.bench.command", "decode speed against dense attention"),
    "eval": ("..eval.cli", "accuracy against memory and latency, over methods, budgets, tasks and lengths"),
    "oracle": ("..eval.oracle.command", "how few tokens attention needs, and where a method's error comes from"),
    "lm-eval": ("..eval.lm_eval_cli", "lm-eval's command line with the model rocketkv in it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, without the program's name; None takes them from the process.

    Returns:
        The exit code: the command's own, 2 for input that it refuses, 130 where it was interrupted.

    Raises:
        SystemExit: argparse refuses the arguments (2), or has shown help or the version (0).
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
        parsed = parser.parse_args(arguments, argparse.Namespace(given=arguments))
        return int(run(parsed)) if run is not None else 2
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if sys.flags.dev_mode:  # python -X dev: show where
            raise
        sys.stderr.write(f"rocketkv {asked}: error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
