"""The command line: what it prints, what it refuses, and that a command costs nothing until it is asked for."""

from __future__ import annotations

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
from rocketkv.cli.plan import plan
from rocketkv.dispatch import backend_name
from tiny import config

pytestmark = pytest.mark.integration


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


def test_help_names_every_command_and_imports_none() -> None:
    script = (
        "import sys\n"
        "from rocketkv.cli.main import COMMANDS, main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    code = end.code\n"
        "names = {'rocketkv' + module for module, _ in COMMANDS.values()}\n"
        "sys.exit(code or ', '.join(names & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, (_, summary) in COMMANDS.items():
        assert name in done.stdout
        assert summary.split(maxsplit=1)[0] in done.stdout


def test_every_command_has_a_module() -> None:
    assert set(COMMANDS) == {"demo", "compress", "ask", "plan", "env", "bench", "eval", "oracle", "lm-eval"}
    for module, _ in COMMANDS.values():
        assert importlib.util.find_spec(module, "rocketkv") is not None


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
    expected = plan(config("llama"), context=5000, budget=64, batch=3, method="quest", reserve=40, dtype="float16")
    for model in (folder, folder / "config.json"):
        assert main(["plan", "--model", str(model), *options, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == expected.to_dict()
    assert main(["plan", "--model", str(folder), *options]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no/such/model"], "no model configuration in 'no/such/model'"),
        (["--budget", "0"], "token_budget must be at least 1"),
        (["--budget", "40", "--reserve", "16"], "token_budget must be at least 49"),
        (["--method", "sparkq"], "Did you mean 'sparq'?"),
        (["--batch", "0"], "batch must be at least 1"),
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


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no-such-type"}'])
def test_plan_refuses_a_broken_configuration(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert main(["plan", "--model", str(tmp_path), "--context", "5000"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line


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
