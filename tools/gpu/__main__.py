"""`python tools/gpu` (`make gpu`): the first hour on a GPU, in one command that stops at nothing.

It runs the kernels' tests natively, sanitizers, stress runs, captures, benchmarks and the tuner, each in a process of
its own with a time limit, and then fills the table of docs/kernels.md and docs/gpu.json. Records and logs lie in .gpu/:
what has passed with the same code does not run again. `--dry-run` prints the plan; `python tools/gpu PROGRAM` runs one
of the programs that the stages run.
"""

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

# Python puts the program's folder first on the path: its package and what the tests share take the place.
_ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(_ROOT / "tools"), str(_ROOT / "tests" / "helpers")]

from gpu.device import Machine  # noqa: E402
from gpu.plan import plan  # noqa: E402

PROGRAMS = ("one-step", "stress", "pages", "capture")
NO_GPU = "make gpu runs the kernels on a GPU, and this machine has none that torch can use; --dry-run prints the plan\n"


def main(argv: Sequence[str], machine: Machine | None = None) -> int:
    """Run the plan or one program; returns the exit code, 1 where a stage failed or timed out."""
    if argv and argv[0] in PROGRAMS:
        from gpu import programs

        return programs.run(argv[0], argv[1:])
    parser = argparse.ArgumentParser(prog="python tools/gpu", description="The first hour on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="print the stages, and run none")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages alone")
    parser.add_argument("--fresh", action="store_true", help="run again what has passed")
    parser.add_argument("-o", "--output", type=Path, default=_ROOT / ".gpu", help="folder of records and logs (.gpu)")
    args = parser.parse_args(argv)
    stages = [stage for stage in plan() if args.only is None or stage.name in args.only]
    unknown = set(args.only or ()) - {stage.name for stage in stages}
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; --dry-run lists them")
    machine = machine or Machine()
    if args.dry_run:
        for stage in stages:
            absent = [need for need in (*stage.needs, *stage.compares) if machine.missing(need)]
            sys.stdout.write(f"{stage.name}: {stage.what}; at most {stage.limit // 60} minutes\n")
            sys.stdout.write(f"    {shlex.join(stage.command)}\n")
            if absent:
                left_out = "left out" if set(absent) & set(stage.needs) else "runs without them"
                sys.stdout.write(f"    not installed here: {', '.join(absent)} ({left_out})\n")
        sys.stdout.write(f"{len(stages)} stages, at most {sum(stage.limit for stage in stages) / 3600:.1f} hours\n")
        return 0
    if not machine.has_gpu():
        sys.stderr.write(NO_GPU)
        return 2
    from gpu.stages import FAILED, TIMED_OUT, revision, run_stages
    from gpu.summary import write_documents

    if args.fresh:
        shutil.rmtree(args.output, ignore_errors=True)
    records = run_stages(stages, machine, args.output, revision())
    if args.only is None:
        write_documents(records)
    return int(any(record["status"] in (FAILED, TIMED_OUT) for record in records.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
