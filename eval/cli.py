"""`rocketkv eval run | report | merge`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from ..hf.loading import load_model
from .sweep.plan import DTYPES, LM_EVAL, Plan, cells, plan_from, shard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands."""
    commands = parser.add_subparsers(dest="eval_command", metavar="run | report | merge", required=True)
    _add_run(commands.add_parser("run", help="run a sweep, or go on with it"))
    report = commands.add_parser("report", help="make a page, or tables, of a folder of results")
    report.add_argument("results", type=Path, help="the folder of the results")
    report.add_argument(
        "-o", "--output", type=Path, required=True, help="report.html, or a name that ends in .md or .csv"
    )
    merge = commands.add_parser("merge", help="bring the records of several folders together")
    merge.add_argument("sources", type=Path, nargs="+", help="folders of results")
    merge.add_argument("-o", "--output", type=Path, required=True, help="the folder that takes them all")


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Add what a sweep is made of; a flag that is not given leaves the field to the YAML file, and that to `Plan`."""
    parser.add_argument("--sweep", type=Path, help="a YAML file with the fields below, under the names of the flags")
    parser.add_argument("--model", help="a hub name, a local folder, or smollm2 (the default)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default float32)")
    parser.add_argument("--tasks", help="tasks or groups, by commas; kl; latency; lm-eval:NAME for a stock task")
    parser.add_argument("--methods", help="full, the library's, kvpress:PRESS, module:function; by commas")
    parser.add_argument("--budgets", help="tokens a decode step, by commas")
    parser.add_argument("--lengths", help="tokens of prompt and answer, by commas")
    parser.add_argument("--samples", type=int, help="of each task (default 50)")
    parser.add_argument("--max-new-tokens", type=int, help="for every question at most so many")
    parser.add_argument("--seed", type=int, help="of the samples (default 0)")
    parser.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: where there is one)"
    )
    parser.add_argument(
        "--agnostic", action=argparse.BooleanOptionalAction, help="compress the context before the question is seen"
    )
    parser.add_argument("--data-dir", help="a folder with the benchmarks' files, in place of the hub")
    parser.add_argument(
        "--set", action="append", metavar="FIELD=VALUE", help="a field of RocketKVConfig, as window_size=64; repeatable"
    )
    run = parser.add_argument_group("this run")
    run.add_argument("-o", "--output", type=Path, default=Path("results"), help="folder of the results (results)")
    run.add_argument("--shard", metavar="I/N", help="run the I-th of N parts of the cells")
    run.add_argument("--retry-oom", action="store_true", help="run cells again that ran out of memory")
    run.add_argument("--dry-run", action="store_true", help="print the cells and what they may take")
    run.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
    run.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    run.add_argument("--kvpress-python", help="the Python of an environment with rocketkv[eval] and kvpress")
    run.add_argument("--only-presses", action="store_true", help=argparse.SUPPRESS)  # what that Python is told


def run(args: argparse.Namespace) -> int:
    """Run a subcommand; returns the exit code."""
    if args.eval_command == "report":
        from .report.write import write_report

        write_report(args.results, args.output)
        sys.stdout.write(f"{args.output}\n")
        return 0
    if args.eval_command == "merge":
        from .sweep.run import merge

        gained = merge(args.sources, args.output)
        sys.stdout.write(f"{gained} records added to {args.output}\n")
        return 0
    return _run(args)


def given_plan(args: argparse.Namespace) -> Plan:
    """Return the plan of a command line: flags override the YAML file, which overrides the defaults.

    Raises:
        ValueError: the file is no mapping, or a field is unknown or has an impossible value.
        OSError: the file cannot be read.
    """
    found: dict[str, Any] = {}
    if args.sweep is not None:
        found = yaml.safe_load(args.sweep.read_text(encoding="utf-8")) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{args.sweep} must be a mapping of fields to values, got {type(found).__name__}")
        found = {str(name).replace("-", "_"): value for name, value in found.items()}
    for field in fields(Plan):
        value = getattr(args, field.name, None)
        if value is not None:
            found[field.name] = _listed(field.name, value)
    if args.set:
        found["settings"] = dict(found.get("settings") or {}) | _settings(args.set)
    return plan_from(found)


def _listed(name: str, value: Any) -> Any:
    """Return a flag's value; that of a flag with commas as a list."""
    if name not in ("tasks", "methods", "budgets", "lengths"):
        return value
    parts = [part for part in value.split(",") if part]
    if name in ("tasks", "methods"):
        return parts
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"--{name} must be whole numbers separated by commas, got {value!r}")
    return [int(part) for part in parts]


def _settings(given: Sequence[str]) -> dict[str, Any]:
    """Return FIELD=VALUE pairs as a dict, values parsed as YAML."""
    wrong = [pair for pair in given if "=" not in pair]
    if wrong:
        raise ValueError(f"--set must be FIELD=VALUE, got {wrong[0]!r}")
    return {name: yaml.safe_load(value) for name, value in (pair.split("=", 1) for pair in given)}


def part_of(text: str | None) -> tuple[int, int]:
    """Return the shard of this process and their number: from --shard, or the rank under torchrun.

    Raises:
        ValueError: the text is not I/N.
    """
    if text is None:
        return int(os.environ.get("RANK", "0")) + 1, int(os.environ.get("WORLD_SIZE", "1"))
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit()):
        raise ValueError(f"--shard must be I/N, such as 1/4, got {text!r}")
    return int(first), int(second)


def _device(given: str | None) -> torch.device:
    """Return the device; under torchrun each process gets a different GPU."""
    if given is not None:
        return torch.device(given)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _run(args: argparse.Namespace) -> int:
    from .methods import find_method
    from .sweep.cells import Session
    from .sweep.run import is_press, run_cells, run_presses

    plan = given_plan(args)
    if any(task.startswith(LM_EVAL) for task in plan.tasks) and importlib.util.find_spec("lm_eval") is None:
        raise ImportError("tasks of lm-eval need the package lm_eval: pip install 'rocketkv[eval]'")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = _device(args.device)
    number, count = part_of(args.shard)
    if args.dry_run:
        from .sweep.estimate import dry_run

        sys.stdout.write(dry_run(plan, args.output, device, (number, count)))
        return 0
    model, tokenizer = load_model(plan.model, getattr(torch, plan.dtype))
    model.to(device)  # type: ignore[arg-type]  # torch types `to`
    session = Session(model, tokenizer, args.output, plan.data_dir, args.retry_oom)
    wanted = shard(cells(plan, chat=tokenizer.chat_template is not None), number, count)
    presses = [cell for cell in wanted if is_press(cell)]
    apart = args.kvpress_python is not None
    if args.only_presses:
        wanted = presses
    elif apart:
        wanted = [cell for cell in wanted if not is_press(cell)]
    for cell in filter(is_press, wanted):  # a missing kvpress must show before hours of other cells, not after
        find_method(cell["method"], cell["token_budget"])
    counts = run_cells(session, wanted)
    code = 0
    if presses and apart and not args.only_presses:
        code = run_presses(args.kvpress_python, [*args.given, "--only-presses"])
    if number == 1 and not args.only_presses:
        from .report.write import load, summary

        if counts.done or counts.done_before:
            sys.stdout.write(f"{summary(load(args.output))}\n")
    sys.stderr.write(f"{counts}; records in {args.output}\n")
    return code
