"""The command line: its output, its errors, and that help and errors need no torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import rocketkv
from rocketkv.cli.main import COMMANDS, main
from rocketkv.dispatch import backend_name
from rocketkv.eval.bench.cli import BENCHMARKS
from rocketkv.hf.plan import plan
from tiny import config

pytestmark = pytest.mark.integration

PARSERS = (
    *("demo", "compress", "ask", "show", "serve", "tune", "plan", "env", "oracle", "lm-eval"),
    *("eval", "eval run", "eval report", "eval merge"),
    *("bench", "bench attention", "bench decode", "bench kernels", "bench model", "bench tune"),
)
# Exits with the code of argparse, or prints the slow packages that it imported and exits with 1.
AT_ONCE = """
import sys
from rocketkv.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
slow = {"torch", "transformers", "lm_eval", "numpy", "yaml", "tqdm", "plotly"} & set(sys.modules)
sys.exit(f"imported {slow}" if slow else code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds a config.json and nothing else."""
    config("llama", architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path


def add_command(name: str, source: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contribute a command as a module of its own does."""
    module = f"rocketkv_test_{name}"
    (path / f"{module}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(path)
    monkeypatch.setitem(COMMANDS, name, (module, f"the test's {name}"))
    monkeypatch.delitem(sys.modules, module, raising=False)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert name in out
        assert summary.split(maxsplit=1)[0] in out


@pytest.mark.parametrize(
    "arguments",
    [
        *([*command, "--help"] for command in ([], *map(str.split, PARSERS))),
        *(["plam"], ["plan"], ["plan", "--context", "many"], ["demo", "--budgets", "many"], ["ask", "file"]),
        *(["compress", "text", "--method", "rocketvk"], ["compress", "text", "--device", "gpu"]),
        *(["eval", "run", "--methods", "rocketvk"], ["eval", "run", "--samples", "0"], ["eval", "merge"]),
        *(["bench", "decode", "--cases", "1x8/8"], ["oracle", "--samples", "0"], ["env", "--verbose"]),
        *(["tune", "smollm2", "text"], ["tune", "smollm2", "text", "--target-kl", "-1"]),
    ],
    ids=" ".join,
)
def test_help_and_wrong_arguments_are_answered_without_torch(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", AT_ONCE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    text = done.stdout if "--help" in arguments else done.stderr
    assert "usage: rocketkv" in text


def test_every_parser_is_known() -> None:
    for name in COMMANDS:
        assert any(parser.split()[0] == name for parser in PARSERS), name
    assert set(BENCHMARKS) == {parser.split()[1] for parser in PARSERS if parser.startswith("bench ")}


def test_every_command_has_a_module() -> None:
    names = {"demo", "compress", "ask", "show", "serve", "tune", "plan", "env", "bench", "eval", "oracle", "lm-eval"}
    assert set(COMMANDS) == names
    for module, _ in COMMANDS.values():
        assert importlib.util.find_spec(module, "rocketkv.cli") is not None


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"rocketkv {rocketkv._version.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["plam"], ["--verbose"], ["plan"], ["plan", "--context", "many"]])
def test_wrong_arguments_end_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert "usage: rocketkv" in error
    if arguments == ["plam"]:
        assert "no command 'plam'. Did you mean 'plan'?" in error
        assert all(name in error for name in COMMANDS)


def test_a_module_contributes_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "def add_arguments(parser):\n    parser.add_argument('code', type=int)\n\n\n"
        "def run(args):\n    return args.code\n"
    )
    add_command("probe", source, tmp_path, monkeypatch)
    add_command("broken", "raise RuntimeError('imported without being asked for')\n", tmp_path, monkeypatch)
    assert main(["probe", "7"]) == 7


def test_an_interrupt_ends_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        "import signal\n\n\ndef add_arguments(parser):\n    pass\n\n\n"
        "def run(args):\n    signal.raise_signal(signal.SIGINT)\n    return 0\n"
    )
    add_command("interrupted", source, tmp_path, monkeypatch)
    # A shell starts background jobs with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["interrupted"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


def test_plan_prints_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--context", "5000", "--budget", "64", "--batch", "3", "--method", "quest"]
    options += ["--reserve", "40", "--dtype", "float16"]
    expected = plan(
        config("llama"), context=5000, token_budget=64, batch=3, method="quest", decode_reserve=40, dtype="float16"
    )
    for model in (folder, folder / "config.json"):
        assert main(["plan", "--model", str(model), *options, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == expected.to_dict()
    assert main(["plan", "--model", str(folder), *options]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no/such/model"], "no model configuration in 'no/such/model'"),
        (["--budget", "40", "--reserve", "16", "--method", "rocketkv"], "token_budget must be at least 49"),
    ],
)
def test_plan_refuses_in_one_line(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", str(folder), "--context", "5000", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("rocketkv plan: error: ")
    assert message in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "--budget: must be an integer of at least 1, got '0'"),
        (["--method", "sparkq"], "--method: there is no method 'sparkq'. Did you mean 'sparq'?"),
        (["--batch", "few"], "--batch: must be an integer of at least 1, got 'few'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    ],
)
def test_argparse_refuses_impossible_values(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--model", "any", "--context", "5000", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no-such-type"}'])
def test_plan_refuses_a_broken_configuration(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert main(["plan", "--model", str(tmp_path), "--context", "5000"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line


def test_env_lists_what_differs_from_the_lock_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "tqdm" else real(name))
    assert main(["env", "--json"]) == 0
    differs = json.loads(capsys.readouterr().out)["differs_from_lock"]
    assert differs["tqdm"]["installed"] == "0.1"
    assert main(["env"]) == 0
    assert f"tqdm 0.1 ({differs['tqdm']['locked']})" in capsys.readouterr().out


def test_env_reports_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["versions"]["rocketkv"] == rocketkv._version.__version__
    assert found["versions"]["flash-attn"] is None or importlib.util.find_spec("flash_attn")
    accelerators = torch.cuda.device_count() + torch.xpu.device_count() + torch.backends.mps.is_available()
    assert len(found["devices"]) == 1 + accelerators
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["torch_threads"] == torch.get_num_threads()
    assert 1 <= cpu["usable_threads"] <= cpu["threads"]
    for device in found["devices"]:
        assert device["backend"] == backend_name(torch.device(device["device"]))
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for device in found["devices"]:
        assert device["name"] in text
    for name, version in found["versions"].items():
        assert any(line.split() == [name, version or "-"] for line in text.splitlines()), name
