"""The house keeps its own rules: packages import one way, and no folder of the root is importable by its bare name."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each imports only itself and earlier ones; the command line and the harness import what a command needs when it runs.
ORDER = (
    *(
        "_version",
        "budget",
        "config",
        "options",
        "core",
        "state",
        "backend",
        "dispatch",
        "static_step",
        "verify",
        "environment",
    ),
    *("vllm", "hf", "serve", "eval", "figures", "cli"),
)
FACES_TRANSFORMERS = {"hf", "serve", "cli", "eval"}
FILES = sorted(path for top in ("rocketkv", "eval", "kernels") for path in (ROOT / top).rglob("*.py"))


def name_of(path: Path) -> str:
    """Return the dotted name of a file within the library."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "rocketkv" else parts)


def imports(path: Path, *, lazy: bool) -> tuple[set[str], set[str]]:
    """Return the library's modules (dotted) and the other top-level packages that a file imports.

    Args:
        path: the file.
        lazy: whether imports within functions count.
    """
    own: set[str] = set()
    others: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = name_of(path)
    package = name.split(".")[:-1]
    typing = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        for n in ast.walk(node)
        if ast.unparse(node.test) == "TYPE_CHECKING"
    }
    functions = {id(n) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing or (not lazy and id(node) in functions):
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = ".".join([*base, node.module] if node.module else base)
            own |= {module} if module and node.module else {f"{module}.{alias.name}".strip(".") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return own, others


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_import_one_way(path: Path) -> None:
    name = name_of(path)
    top = name.split(".")[0]
    own, others = imports(path, lazy=True)
    if top == "kernels":
        # Another engine may take the folder as it is.
        assert {module.split(".")[0] for module in own} <= {"kernels"}
        compiler = {"numpy", "numba", "llvmlite"} if name.startswith("kernels.cpu.") else {"triton"}
        assert others - sys.stdlib_module_names <= {"torch", *compiler}
        return
    if top == "__init__":
        return
    allowed = set(ORDER[: ORDER.index(top) + 1])
    if top in ("dispatch", "eval"):
        allowed.add("kernels")
    assert {module.split(".")[0] for module in own} <= allowed
    assert "transformers" not in others or top in FACES_TRANSFORMERS
    assert not others & {"rocketkv", "kernels", "eval", "tests", "studies", "tools"}


def test_no_folder_of_the_root_is_importable_by_its_name() -> None:
    assert str(ROOT) not in sys.path
    for name in ("eval", "kernels"):  # pytest itself makes a module `tests`
        spec = importlib.util.find_spec(name)
        found = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
        assert not [place for place in found if Path(place).is_relative_to(ROOT / name)], name


@pytest.mark.parametrize("inside", [False, True], ids=["outside the checkout", "inside"])
def test_the_package_kernels_of_the_same_name_stays_importable(inside: bool, tmp_path: Path) -> None:
    """Hugging Face's `kernels`, which transformers imports where it is installed, and ours are two packages."""
    namesake = pytest.importorskip("kernels").__file__
    code = "import kernels, rocketkv.kernels.decode as ours; print(kernels.__file__, ours.__file__, sep='\\n')"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # as a user's shell
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT if inside else tmp_path, env=env, capture_output=True, text=True, check=True
    )
    theirs, ours = done.stdout.split()
    assert theirs == namesake
    assert Path(ours).resolve() == ROOT / "kernels" / "decode.py"


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*.md"))], ids=lambda p: p.name)
def test_documents_name_files_that_exist(path: Path) -> None:
    named = re.findall(
        r"`((?:rocketkv|eval|kernels|studies|tools|tests)/[\w/]+\.py)`", path.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []
