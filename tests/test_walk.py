"""A reader follows a decode step through few files: the figures that `tools/walk.py` prints stay small."""

from __future__ import annotations

import pytest

from tools.walk import ARMS, Walk, longest_chain, module_imports, package_imports, tiny_llama, walks


@pytest.fixture(scope="module")
def decode_walks() -> dict[str, Walk]:
    model = tiny_llama()
    return {name: walks(model, settings)[1] for name, settings in ARMS.items()}


def test_a_decode_step_passes_through_few_files(decode_walks: dict[str, Walk]) -> None:
    for name, walk in decode_walks.items():
        files, calls, switches, _ = walk.figures()
        assert (files <= 12, calls <= 45, switches <= 20) == (True, True, True), (name, walk.figures())


def test_growing_and_static_steps_pass_through_the_same_files(decode_walks: dict[str, Walk]) -> None:
    for method in ("rocketkv", "rocketkv+"):
        growing, static = (decode_walks[f"{method}, {kind}"] for kind in ("growing", "static"))
        assert growing.files == static.files


def test_imports_are_shallow_and_have_no_cycle() -> None:
    imports = module_imports()
    library = {name: found for name, found in imports.items() if not name.startswith("serve.")}
    assert len(longest_chain(library)) <= 13
    assert len(longest_chain(imports)) <= 19  # the server stands on the library
    assert len(longest_chain(package_imports(imports))) <= 7
