"""`make check` finds the tests of what changed, the nearest first."""

from __future__ import annotations

from tools import check


def test_tests_named_after_a_file_come_first_then_those_that_import_it() -> None:
    found = check.tests_of(["rocketkv/core/pages.py"])
    assert found[:3] == ["tests/core/test_pages.py", "tests/core/test_pages_dtype.py", "tests/core/test_attention.py"]
    assert "tests/state/test_protection.py" in found
    assert found.index("tests/kernels/cpu/test_step.py") > found.index("tests/core/test_dense.py")  # by a helper; slow
    assert "tests/hf/test_chat.py" not in found


def test_other_files_have_tests_too() -> None:
    for name, first in {
        "eval/tasks/needle.py": "tests/eval/test_needle.py",
        "kernels/evict.py": "tests/kernels/test_evict.py",
        "rocketkv/budget.py": "tests/test_budget.py",
        "studies/recall.py": "tests/studies/test_recall.py",
        "docs/kernels.md": "tests/test_docs.py",
        "README.md": "tests/test_readme.py",
    }.items():
        assert check.tests_of([name])[0] == first
    assert check.tests_of(["LICENSE"]) == [check.HOUSE]
    assert check.tests_of([]) == []
