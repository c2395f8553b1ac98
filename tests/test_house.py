"""The house keeps its own rules: imports point one way, and no folder of the root is importable by its bare name."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREE = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("\nkernels/")[0]
ORDER = re.findall(r"^  (\w+)\.py ", TREE, flags=re.MULTILINE)  # as the README lists them: each imports earlier ones
FACES_TRANSFORMERS = {"layer", "cache", "models", "interface", "compiled", "generation", "hf", "plan", "saving"}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Return the library's own modules and the other top-level packages that a file imports."""
    own: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            own.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            others.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return own - {"_version", ""}, others


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_those_before_it(module: str) -> None:
    own, others = imports(ROOT / "rocketkv" / f"{module}.py")
    if module == "backend":
        own -= {"kernels"}  # the only one that imports them
    assert own <= set(ORDER[: ORDER.index(module)])
    assert "transformers" not in others or module in FACES_TRANSFORMERS
    assert not others & {"triton", "kernels", "eval", "tests"}


def test_no_folder_of_the_root_is_importable_by_its_name() -> None:
    assert str(ROOT) not in sys.path
    for name in ("eval", "kernels"):  # pytest itself makes a module `tests`
        spec = importlib.util.find_spec(name)
        found = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
        assert not [place for place in found if place.startswith(str(ROOT))], name
