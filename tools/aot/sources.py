"""The kernels' sources: which pointer each line loads from."""

import ast
import functools
from pathlib import Path
from typing import Any

from triton.runtime.jit import JITFunction

from rocketkv.kernels import decode


def _pointer(expression: ast.expr) -> str:
    """Return the name that an address starts from: `keys` of `keys + slot * D`."""
    while not isinstance(expression, ast.Name):
        if isinstance(expression, ast.BinOp):
            expression = expression.left
        elif isinstance(expression, ast.Call) and expression.args:
            expression = expression.args[0]
        else:
            return ast.unparse(expression)
    return expression.id


def _is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == f"tl.{name}"


@functools.cache
def kernel_trees() -> dict[str, ast.Module]:
    """Return the syntax trees of the kernels' files, as they were at the first call."""
    return {
        path.name: ast.parse(path.read_text(encoding="utf-8")) for path in Path(decode.__file__).parent.glob("*.py")
    }


@functools.cache
def _loads() -> list[tuple[str, ast.Call]]:
    """Return every call of `tl.load` in the kernels' files, with its file's name."""
    return [
        (name, node)
        for name, tree in kernel_trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _is_call(node, "load")
    ]


@functools.cache
def load_sites(kernel: JITFunction[Any]) -> dict[tuple[str, int], tuple[str, bool]]:
    """Return the pointer that each line of the kernels' files loads from, and whether in the kernel's main loop.

    The main loop is every loop of the kernel's body with a matrix product, or the whole body where there is none.
    """
    functions = [node for tree in kernel_trees().values() for node in tree.body if isinstance(node, ast.FunctionDef)]
    body = next(node for node in functions if node.name == kernel.fn.__name__)
    loops = [
        loop
        for loop in ast.walk(body)
        if isinstance(loop, ast.For | ast.While) and any(_is_call(node, "dot") for node in ast.walk(loop))
    ]
    inside = {node for loop in loops for node in ast.walk(loop)}
    return {
        (name, line): (_pointer(node.args[0]), node in inside or not loops)
        for name, node in _loads()
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
