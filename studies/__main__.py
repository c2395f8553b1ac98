"""`python -m studies STUDY -o FOLDER [options]` runs a study; `python -m studies --help` lists them.

A study is a module with `Settings`, a dataclass whose fields are the options; `study(model, tokenizer, settings,
folder)`, which returns its result as JSON has it and may keep a journal in the folder; and `markdown(result)`, its
tables. The folder gets STUDY.json and STUDY.md.
"""

import argparse
import importlib
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

STUDIES = {
    "divergence": (".divergence", "KL to the full cache by text, budget and method, after one shared prefill"),
    "error_bound": (".error_bound", "max_error: measured errors beside the bound, dense layers, bytes at equal KL"),
    "long_output": (".long_output", "re-eviction of generated tokens: KL by decode capacity, and step times"),
    "question_first": (
        ".question_first",
        "a document compressed before its questions, and with each of them",
    ),
    "questions": (".questions", "many questions on one context: rollback against new caches"),
    "recall": (".recall", "needles by budget, every method after one shared prefill"),
    "retention": (".retention", "recall of a document over the turns of a conversation"),
    "telemetry": (".telemetry", "rank correlation of a step's estimated errors with its true errors"),
}


def main(argv: list[str]) -> int:
    """Run a study; returns the exit code, 2 for input that it refuses."""
    parser = argparse.ArgumentParser(prog="python -m studies", description="Run a study.")
    commands = parser.add_subparsers(dest="study", metavar="STUDY", required=True)
    study: Any = None
    for name, (module, summary) in STUDIES.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:  # only the module that is asked for is imported
            study = importlib.import_module(module, __package__)
            add_options(command, study.Settings)
            command.add_argument("--threads", type=int, help="of PyTorch on the CPU")
            command.add_argument("-o", "--output", type=Path, required=True, help="folder of all files; also to resume")
    args = parser.parse_args(argv)
    try:
        return run(args.study, study, args)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{parser.prog} {args.study}: error: {error}\n")
        return 2


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add an option for each field of a study's settings; `studies.settings.option` describes the field."""
    for field in fields(settings):
        default: Any = field.default
        more: dict[str, Any] = {name: value for name, value in field.metadata.items() if name != "help"}
        if default is False:
            more |= {"action": "store_true"}
        else:
            several = isinstance(default, tuple)
            more = {"type": type(default[0] if several and default else default), **more}
            more |= {"nargs": "+"} if several else {}
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = field.metadata["help"] + (f" (default {shown})" if shown not in ("", None, False) else "")
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=default, help=text, **more)


def run(name: str, study: Any, args: argparse.Namespace) -> int:
    """Run a study with the options of its command line and write its files."""
    import torch
    import transformers
    from transformers.utils import logging

    from rocketkv._version import __version__
    from rocketkv.environment import machine
    from rocketkv.eval.records import write_atomically
    from rocketkv.hf.loading import load_model

    values = {field.name: getattr(args, field.name) for field in fields(study.Settings)}
    settings = study.Settings(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model, tokenizer = load_model(settings.model, settings.dtype, settings.device)
    result = {
        "settings": asdict(settings),
        "machine": {**machine(), "transformers": transformers.__version__, "rocketkv": __version__},
        **study.study(model, tokenizer, settings, args.output),
    }
    table = study.markdown(result)
    write_atomically(args.output / f"{name}.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(args.output / f"{name}.md", table)
    sys.stdout.write(table)
    return 0


if __name__ == "__main__":
    # `-m` puts the folder of the checkout on the path, where kernels/ hides a package of that name.
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    sys.exit(main(sys.argv[1:]))
