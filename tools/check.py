"""Check what changed, in the minute between two edits: ruff, mypy, and the tests of changed files (`make check`).

What changed is what git has not committed, or else the last commit's files; `--since REVISION` names another start.
Tests come in this order: changed test files and those named after a changed file; tests that import one, themselves or
through tests/helpers, those of the same folder first; the rest of that folder; and last of these the files that take
long, as tests/conftest.py lists them. A test that would begin later than `SECONDS` after the start is left out, and the
summary says how many of which file. mypy runs beside the tests.

This file is also the plugin by which each of pytest's processes keeps that order and that time.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60
END = "ROCKETKV_CHECK_END"  # of the tests, in seconds since the epoch
# What no folder of tests mirrors.
ALSO = {"docs": "tests/test_docs.py", "examples": "tests/test_examples.py", "README.md": "tests/test_readme.py"}
HOUSE = "tests/test_house.py"
LEFT_OUT = "no time left: "


def git(*arguments: str) -> list[str]:
    """Return the lines of git's answer."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def changed(since: str | None) -> list[str]:
    """Return the files that are new or changed and still there, as paths from the root."""
    new = git("ls-files", "--others", "--exclude-standard")
    found = [*git("diff", "--name-only", since or "HEAD"), *new]
    if since is None and not found:
        found = git("diff", "--name-only", "HEAD~")
    return [name for name in dict.fromkeys(found) if (ROOT / name).is_file()]


def module(name: str) -> str:
    """Return the dotted name by which tests import a file, without the library's own."""
    parts = Path(name.removeprefix("rocketkv/").removeprefix("tests/helpers/")).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts)


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, or that may be a name in what it imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imports() -> dict[str, set[str]]:
    """Return what each file of tests imports, itself or through tests/helpers, by its path."""
    paths = sorted((ROOT / "tests").rglob("*.py"))
    own = {
        path.relative_to(ROOT).as_posix(): {name.removeprefix("rocketkv.") for name in imported(path)} for path in paths
    }
    helpers = {module(name): found for name, found in own.items() if name.startswith("tests/helpers/")}

    def reach(names: set[str], seen: set[str]) -> set[str]:
        for helper in (names & set(helpers)) - seen:
            names = names | reach(helpers[helper], seen | names)
        return names

    return {name: reach(found, set()) for name, found in own.items() if Path(name).name.startswith("test_")}


def rank(test: str, name: str, found: set[str]) -> int | None:
    """Return how near a file of tests, which imports `found`, is to a changed file: 0 is nearest, None not near."""
    folder = Path("tests", *module(name).split(".")[:-1])
    while not (ROOT / folder).is_dir():
        folder = folder.parent
    mirrored = Path(test).parent == folder
    if test in (name, ALSO.get(name.split("/")[0])):
        return 0
    if test == HOUSE:  # of any file
        return 2
    if not name.endswith(".py"):
        return None
    if mirrored and Path(test).name.startswith(f"test_{Path(name).stem}"):
        return 0
    if module(name) in found:
        return 1 if mirrored else 2
    return 3 if mirrored and folder.name != "tests" else None


def tests_of(names: list[str]) -> list[str]:
    """Return the files of tests of changed files, the nearest first."""
    conftest = ast.parse((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    [longest] = [
        {f"tests/{path}" for path in ast.literal_eval(node.value)}
        for node in conftest.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LONGEST"
    ]
    near: list[tuple[bool, int, str]] = []
    for test, found in imports().items():
        ranks = [rank(test, name, found) for name in names]
        near += sorted((at > 0 and test in longest, at, test) for at in ranks if at is not None)[:1]
    return [test for *_, test in sorted(near)]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files back into the order in which they were given."""
    order = {(ROOT / name).resolve(): at for at, name in enumerate(config.args)}
    items.sort(key=lambda item: order[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out a test that would begin too late."""
    if time.time() > float(os.environ[END]):
        pytest.skip(f"{LEFT_OUT}{item.path.relative_to(ROOT)}")


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Print no letter for what was left out: the summary counts it."""
    left_out = report.skipped and isinstance(report.longrepr, tuple) and LEFT_OUT in report.longrepr[-1]
    return ("skipped", "", "LEFT OUT") if left_out else None


def main() -> int:
    begun = time.time()
    parser = argparse.ArgumentParser(description="Check what changed.")
    parser.add_argument("--since", metavar="REVISION", help="what changed since then (default: what is not committed)")
    parser.add_argument("--list", action="store_true", help="print the tests in their order, and run nothing")
    options = parser.parse_args()
    names = changed(options.since)
    tests = tests_of(names)
    print("changed:", *names or ["nothing"])
    if options.list:
        print(*tests, sep="\n")
        return 0
    tools = Path(sys.executable).parent

    def failed(*command: str, **others: str) -> bool:
        """Run a tool, with other variables of the environment, and return whether it failed."""
        environment = {**os.environ, **others}
        done = subprocess.run([tools / command[0], *command[1:]], cwd=ROOT, env=environment, check=False)
        return done.returncode != 0

    wrong = [failed("ruff", "check", "."), failed("ruff", "format", "--check", ".")]
    types = subprocess.Popen([tools / "mypy"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if tests:
        path = os.pathsep.join(filter(None, [str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
        command = "pytest -p check -rs --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder"
        wrong.append(failed(*command.split(), *tests, PYTHONPATH=path, **{END: str(begun + SECONDS)}))
    print(types.communicate()[0], end="")
    print(f"{time.time() - begun:.0f} seconds")
    return int(any(wrong) or types.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
