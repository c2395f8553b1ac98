"""The stages of `make gpu`, in their order: commands, the tools that they need, and their time limits."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MINUTE = 60
KERNEL_TESTS = (
    *("decode", "edges", "sketch", "verify"),
    *("evict", "prompt_end", "dense", "prefill", "value_sums"),
    *("generate", "launches", "launch_counts"),
)
METHODS = ("rocketkv", "rocketkv+")


@dataclass(frozen=True)
class Stage:
    """One stage, run in a process of its own.

    Attributes:
        name: of the stage and of its files.
        what: it shows.
        command: arguments of the process.
        limit: seconds that it may take.
        needs: programs (`nvidia-smi`) and Python packages (`package:flash_attn`) without which it is left out.
        environment: variables in addition to this process's.
        result: whether the last line of its output is JSON, to be kept in its record.
        compares: optional needs: those that are missing are recorded, and the stage runs without them.
    """

    name: str
    what: str
    command: tuple[str, ...]
    limit: int
    needs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    result: bool = False
    compares: tuple[str, ...] = ()


def _program(name: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of a program of this folder."""
    return (sys.executable, str(Path(__file__).parent), name, *arguments)


def _rocketkv(*arguments: str) -> tuple[str, ...]:
    return (str(Path(sys.executable).parent / "rocketkv"), *arguments)


def _tests(*arguments: str) -> tuple[str, ...]:
    # Not `python -m pytest`: the root must stay off the path (CONTRIBUTING.md).
    return (str(Path(sys.executable).parent / "pytest"), "-q", "-n", "4", *arguments)


def plan() -> tuple[Stage, ...]:
    """Return all stages."""
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # so that a tool sees every allocation's end
    dense = ("package:flash_attn", "package:flash_attn_interface", "package:flashinfer", "ninja", "nvcc")
    clocks = ("nvidia-smi", "-q", "-d", "CLOCK,POWER,TEMPERATURE")
    stages = [
        Stage("environment", "versions and devices", _rocketkv("env", "--json"), 5 * MINUTE),
        Stage("clocks", "clocks and power", clocks, MINUTE, clocks[:1]),
    ]
    stages += [
        Stage(f"tests-{name}", "kernels against the reference", _tests(f"tests/kernels/test_{name}.py"), 15 * MINUTE)
        for name in KERNEL_TESTS
    ]
    stages.append(
        Stage("tests-bench", "the benchmarks' checks", _tests("tests/eval/test_bench_kernels.py"), 15 * MINUTE)
    )
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *_program("one-step"))
        what = "one step of each kind under compute-sanitizer"
        stages.append(Stage(tool, what, command, 20 * MINUTE, ("compute-sanitizer",), uncached))
    for method in METHODS:
        what = "100,000 replays of one captured step, bit for bit"
        stages.append(Stage(f"stress-{method}", what, _program("stress", method), 15 * MINUTE, result=True))
        if method == "rocketkv+":
            # 15,284 stored tokens, of which one program ranks 8192 at most.
            what = "the same where several programs rank the tokens of a row"
            command = _program("stress", method, "--case", "1x131072/2048")
            stages.append(Stage(f"stress-{method}-parts", what, command, 15 * MINUTE, result=True))
        what = "200 captured steps across page ends equal eager ones"
        stages.append(Stage(f"pages-{method}", what, _program("pages", method), 10 * MINUTE, result=True))
        what = "generate, compile_step and a CUDA graph of a model's step"
        stages.append(Stage(f"capture-{method}", what, _program("capture", method), 15 * MINUTE, result=True))
    for name, limit in (("kernels", 40), ("model", 60)):
        command = _rocketkv("bench", name, "--json")
        what = f"rocketkv bench {name}"
        stages.append(Stage(f"bench-{name}", what, command, limit * MINUTE, result=True, compares=dense))
    stages.append(
        Stage(
            "tune", "the table of launch configurations", _rocketkv("bench", "tune", "--json"), 40 * MINUTE, result=True
        )
    )
    return tuple(stages)
