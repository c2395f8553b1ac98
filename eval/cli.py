"""`rocketkv eval run | report | merge`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import (
    AUTO,
    DTYPE_HELP,
    DTYPES,
    add_loading_options,
    comma_separated,
    device_name,
    method_name,
    positive,
)
from .optional import optional
from .recipes import RECIPES

if TYPE_CHECKING:
    import torch

    from .sweep.plan import Plan

REPORT = "report.html"  # inside the folder of the results of a recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands."""
    commands = parser.add_subparsers(dest="eval_command", metavar="run | report | merge", required=True)
    recipes = "recipes:\n" + "\n".join(f"  {recipe.name:12} {recipe.purpose}" for recipe in RECIPES.values())
    formatter = argparse.RawDescriptionHelpFormatter
    _add_run(commands.add_parser("run", help="run a sweep, or resume it", epilog=recipes, formatter_class=formatter))
    report = commands.add_parser("report", help="write a page, or tables, of a folder of results")
    report.add_argument("results", type=Path, help="folder of the results")
    report.add_argument("-o", "--output", type=Path, required=True, help="a file: .html, .md or .csv")
    merge = commands.add_parser("merge", help="merge the records of several folders into one")
    merge.add_argument("sources", type=Path, nargs="+", help="folders of results")
    merge.add_argument("-o", "--output", type=Path, required=True, help="folder of all the records")


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Add the fields of a sweep; they default to None: flags override the file, which overrides recipe and `Plan`."""
    recipe = "a sweep by name, listed below; the file and flags override it, and its report is written in the end"
    parser.add_argument("--recipe", choices=RECIPES, help=recipe)
    parser.add_argument("--sweep", type=Path, help="YAML file with the fields below, under the names of the flags")
    parser.add_argument("--model", help="hub name, local folder, or smollm2 (the default)")
    parser.add_argument("--dtype", choices=(AUTO, *DTYPES), help=f"{DTYPE_HELP} (default {AUTO})")
    add_loading_options(parser)
    ranks = "divide the model's heads among N processes, started by torchrun --nproc-per-node N (default 1)"
    parser.add_argument("--tp", type=positive, metavar="N", help=ranks)
    names, numbers = comma_separated(str), comma_separated(positive)
    tasks = "tasks or groups, comma-separated; kl; latency; lm-eval:NAME for a stock task"
    parser.add_argument("--tasks", type=names, help=tasks)
    methods = "methods of the library, kvpress:PRESS, module:function; dense, compiled:METHOD (latency alone)"
    parser.add_argument("--methods", type=comma_separated(_method), help=methods)
    parser.add_argument("--budgets", type=numbers, help="token budgets of a decode step, comma-separated")
    parser.add_argument("--lengths", type=numbers, help="tokens of prompt and answer, comma-separated")
    parser.add_argument("--samples", type=positive, metavar="N", help="of each task (default 50)")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="upper bound for every answer")
    parser.add_argument("--seed", type=int, metavar="N", help="of the samples (default 0)")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--chat", action=flag, help="use the chat template (default: if there is one)")
    variable = "a variable of the chat template, such as enable_thinking=false; repeatable"
    parser.add_argument("--chat-template-arg", action="append", type=_setting, metavar="NAME=VALUE", help=variable)
    thinking = "tokens for a model to think before each answer, in addition to it (default 0)"
    parser.add_argument("--thinking-tokens", type=positive, metavar="N", help=thinking)
    card = "greedy, or card: sample by the generation settings of the model's card (default greedy)"
    parser.add_argument("--generation", choices=("greedy", "card"), help=card)
    mean = "sampled to each question, of which the mean counts (avg@N; default 1)"
    parser.add_argument("--answers", type=positive, metavar="N", help=mean)
    sizes = "sequences at a time in latency, comma-separated; max: as many as fit into a GPU's memory (default 1)"
    parser.add_argument("--batch-sizes", type=comma_separated(_batch_size), help=sizes)
    count = "tokens that latency generates after each prompt (default 32)"
    parser.add_argument("--latency-tokens", type=positive, metavar="N", help=count)
    toy = "hide RULER's needles in generated prose instead of essays; the tasks are then named NAME_toy"
    parser.add_argument("--toy-haystack", action=flag, help=toy)
    parser.add_argument("--agnostic", action=flag, help="compress before the question is seen")
    parser.add_argument("--data-dir", metavar="FOLDER", help="folder with the benchmarks' files, instead of the hub")
    parser.add_argument("--engine", choices=("transformers", "openai"), help="what answers (default transformers)")
    parser.add_argument("--url", help="of the server of --engine openai, such as http://127.0.0.1:8000")
    setting = "a field of RocketKVConfig, such as window_size=64; repeatable"
    parser.add_argument("--set", action="append", type=_setting, metavar="FIELD=VALUE", help=setting)
    run = parser.add_argument_group("this run")
    run.add_argument(
        "-o", "--output", type=Path, default=Path("results"), help="folder of the results (default %(default)s)"
    )
    run.add_argument("--shard", type=_shard, metavar="I/N", help="run the I-th of N parts of the cells")
    run.add_argument("--retry-oom", action="store_true", help="rerun cells that ran out of memory")
    run.add_argument("--dry-run", action="store_true", help="print the cells with estimates of time and memory")
    run.add_argument("--device", type=device_name, help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    run.add_argument("--threads", type=positive, metavar="N", help="of PyTorch on the CPU")
    run.add_argument("--kvpress-python", metavar="PATH", help="Python with rocketkv[eval] and kvpress installed")
    run.add_argument("--only-presses", action="store_true", help=argparse.SUPPRESS)  # for that Python


def _method(text: str) -> str:
    """Return the name of a method; one with a colon is looked up when it runs."""
    return text if ":" in text or text == "dense" else method_name(text)


def _batch_size(text: str) -> int | str:
    """Return a number of sequences, or `max`."""
    return text if text == "max" else positive(text)


def _setting(text: str) -> tuple[str, str]:
    """Return name and value of FIELD=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be FIELD=VALUE, got {text!r}")
    return name, value


def _shard(text: str) -> tuple[int, int]:
    """Return I and N of I/N."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be I/N, such as 1/4, got {text!r}")
    return int(number), int(count)


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


def given_plans(args: argparse.Namespace) -> tuple[Plan, ...]:
    """Return the plans of a command line, several for a recipe of parts.

    Flags override the YAML file, which overrides the recipe, which overrides the defaults.

    Raises:
        ValueError: the file is no mapping, or a field is unknown or has an impossible value.
        OSError: the file cannot be read.
    """
    import yaml

    from .sweep.plan import Plan, plans_from

    found: dict[str, Any] = {}
    if args.sweep is not None:
        found = yaml.safe_load(args.sweep.read_text(encoding="utf-8")) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{args.sweep} must be a mapping of fields to values, got {type(found).__name__}")
        found = {str(name).replace("-", "_"): value for name, value in found.items()}
        if "set" in found:
            found["settings"] = found.pop("set")
    for field in fields(Plan):
        value = getattr(args, field.name, None)
        if value is not None:
            found[field.name] = value
    if args.set:
        found["settings"] = dict(found.get("settings") or {}) | {n: yaml.safe_load(value) for n, value in args.set}
    if args.chat_template_arg:
        before = found.pop("chat_template_arg", None) or found.get("chat_template_args") or {}
        found["chat_template_args"] = dict(before) | {n: yaml.safe_load(value) for n, value in args.chat_template_arg}
    return plans_from(found, RECIPES[args.recipe].parts if args.recipe else ())


def others_failed(failed: bool) -> bool:
    """Wait under torchrun until all processes have ended their work; return whether any of them has failed cells.

    torchrun would stop the others when one ends with an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or int(os.environ.get("MASTER_PORT", "0")) == 0:
        return failed
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return failed
    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    count = torch.tensor([int(failed)])
    distributed.all_reduce(count)
    distributed.destroy_process_group()
    return bool(count)


def check_tensor_parallel(plan: Plan, args: argparse.Namespace) -> None:
    """Refuse what does not run on a model whose heads are divided among processes.

    Raises:
        ValueError: a task or method of another program, or a device or a shard was asked for.
    """
    stock = [task for task in plan.tasks if task.startswith("lm-eval:")]
    presses = [method for method in plan.methods if ":" in method and not method.startswith("compiled:")]
    for names in (stock, presses):
        if names:
            raise ValueError(f"--tp runs the harness's own tasks and the library's methods; leave out {names[0]}")
    if "max" in plan.batch_sizes:
        raise ValueError("--tp measures batches of a given size; leave out max")
    if args.device is not None:
        raise ValueError("--tp gives each process a device of its own; leave --device out")
    if args.dry_run:
        raise ValueError("--dry-run times one process; leave --tp out")


def _device(given: str | None) -> torch.device:
    """Return the device to run on; under torchrun each process gets a different GPU."""
    import torch

    if given is not None:
        return torch.device(given)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _run(args: argparse.Namespace) -> int:
    import torch

    from ..hf.loading import load_model
    from ..hf.prompts import check_chat_arguments
    from .methods import find_method
    from .records import cell_key
    from .sampling import card_settings
    from .served import load_outline, served_name
    from .sweep.cells import Session
    from .sweep.plan import CARD, LARGEST, LATENCY, LM_EVAL, OPENAI, Loaded, cells, shard
    from .sweep.provenance import weights_mark
    from .sweep.ranks import Ranks
    from .sweep.run import Counts, is_press, run_cells, run_presses
    from .sweep.together import follow

    plans = given_plans(args)
    plan = plans[0]  # the model is the same in all
    if any(task.startswith(LM_EVAL) for each in plans for task in each.tasks):
        optional("lm_eval")  # a missing package must show before hours of other cells, not after
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = _device(args.device)
    if plan.tp > 1:
        for each in plans:
            check_tensor_parallel(each, args)
    number, count = args.shard or (1, 1)
    if plan.device_map is not None and args.device is not None:
        raise ValueError("--device-map stands in place of --device; leave one out")
    served = plan.engine == OPENAI
    if served != (args.url is not None):
        raise ValueError("--engine openai and --url URL go together: give both or neither")
    start = time.monotonic()
    if served:
        model, tokenizer = load_outline(plan.model, plan.revision)
    else:
        model, tokenizer = load_model(
            plan.model,
            plan.dtype,
            str(device),
            attention=plan.attn,
            device_map=plan.device_map,
            revision=plan.revision,
            tp=plan.tp,
        )
    load_seconds = time.monotonic() - start
    check_chat_arguments(tokenizer, plan.chat_template_args)
    ranks = Ranks() if plan.tp > 1 else None
    largest = any(LARGEST in each.batch_sizes and LATENCY in each.tasks for each in plans)
    if largest and model.device.type != "cuda":
        raise ValueError(f"the largest batch is found on a GPU; the model is on {model.device}: leave out {LARGEST}")
    session = Session(model, tokenizer, args.output, plan.data_dir, args.retry_oom, ranks, args.url)
    loaded = Loaded(
        chat=tokenizer.chat_template is not None,
        weights=served_name(args.url) if served else weights_mark(model),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=model.config._attn_implementation,
        sampling=card_settings(model.generation_config) if plan.generation == CARD else {},
    )
    if ranks is not None and ranks.rank:
        follow(session, ranks)
        return 0
    known = {cell_key(cell): cell for each in plans for cell in cells(each, loaded)}
    wanted = shard(list(known.values()), number, count)
    if args.dry_run:
        from .sweep.estimate import dry_run

        sys.stdout.write(dry_run(session, wanted, load_seconds))
        return 0
    presses = [cell for cell in wanted if is_press(cell)]
    apart = args.kvpress_python is not None
    if args.only_presses:
        wanted = presses
    elif apart:
        wanted = [cell for cell in wanted if not is_press(cell)]
    for cell in filter(is_press, wanted):  # a missing kvpress must show before hours of other cells, not after
        find_method(cell["method"], cell["token_budget"])
    with ranks or nullcontext():
        counts = run_cells(session, wanted)
    code = 0
    if presses and apart and not args.only_presses:
        code = run_presses(args.kvpress_python, [*args.given, "--only-presses"])
    failed = counts.failed > 0 or code != 0
    if args.only_presses:
        return int(failed)
    failed = others_failed(failed) if ranks is None else failed
    if number == 1 and int(os.environ.get("RANK", "0")) == 0:
        from .report.load import load
        from .report.write import summary, write_report

        if counts != Counts():
            sys.stdout.write(f"{summary(load(args.output).records)}\n")
            if args.recipe is not None:
                write_report(args.output, args.output / REPORT)
                sys.stderr.write(f"report: {args.output / REPORT}\n")
    sys.stderr.write(f"{counts}; records in {args.output}\n")
    return code or int(failed)
