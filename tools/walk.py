"""Print the files and functions of the library that one forward passes through: `python tools/walk.py [--trace]`.

A tiny random Llama runs on the CPU, through the PyTorch reference. `sys.setprofile` sees every Python function that
starts, and those whose file is in `rocketkv/` or `kernels/` count:

- *files*: files of the library with at least one call, in a whole forward of the model;
- *calls a layer*: calls between the start and the end of one decoder layer, the second one. Comprehensions, generator
  expressions and lambdas are calls, and so is each time a generator resumes. Python 3.12 and newer run comprehensions
  without a call, so compare figures of one Python version;
- *switches a layer*: calls in that layer whose file is not that of the call before; its first call is one, too;
- *calls outside*: calls of the forward that are in no decoder layer.

A loop with a `RocketKVCache` and its `prompt_length` runs the model. Of the first decode steps, the one with the most
calls is shown: one that completes a page.

Depth of imports: the number of files in the longest chain in which each imports the next at module level (under
`TYPE_CHECKING` too, which is how `__init__` lists what it exports), and the same for packages, where a module beside
the packages counts as one and `__init__` does not. Of `rocketkv/` alone, without the links to `eval/` and `kernels/`.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import rocketkv

LIBRARY = Path(rocketkv.__file__).resolve().parent
FOLDERS = (f"{LIBRARY}{os.sep}", f"{LIBRARY.parent / 'kernels'}{os.sep}")
SHOWN_LAYER = 1
PROMPT, STEPS, BUDGET = 1024, 4, 64
# Name, and the settings of the cache.
ARMS: dict[str, dict[str, Any]] = {
    "rocketkv, growing": {"method": "rocketkv"},
    "rocketkv, static": {"method": "rocketkv", "decode_capacity": 64},
    "rocketkv+, growing": {"method": "rocketkv+"},
    "rocketkv+, static": {"method": "rocketkv+", "decode_capacity": 64},
}


class Walk:
    """The library's calls in one forward: which code, and in which decoder layer (None outside)."""

    def __init__(self) -> None:
        self.calls: list[tuple[CodeType, int | None]] = []
        self.layer: int | None = None

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        """Note a call, for `sys.setprofile`."""
        if event == "call" and file_of(frame.f_code) is not None:
            self.calls.append((frame.f_code, self.layer))

    @property
    def files(self) -> set[str | None]:
        return {file_of(code) for code, _ in self.calls}

    def of_layer(self, layer: int | None) -> list[CodeType]:
        return [code for code, where in self.calls if where == layer]

    def figures(self) -> tuple[int, int, int, int]:
        """Return files, calls a layer, switches a layer and calls outside, as the module's docstring defines them."""
        inside = self.of_layer(SHOWN_LAYER)
        switches = 1 + sum(file_of(a) != file_of(b) for a, b in itertools.pairwise(inside))
        return len(self.files), len(inside), switches, len(self.of_layer(None))


@functools.cache
def file_of(code: CodeType) -> str | None:
    """Return the file of code within the library, None for other code."""
    path = os.path.realpath(code.co_filename)
    return os.path.relpath(path, LIBRARY.parent) if path.startswith(FOLDERS) else None


def walk_forward(model: PreTrainedModel, forward: Callable[[], Any]) -> Walk:
    """Record the library's calls while `forward` runs the model once."""
    walk = Walk()

    def enter(number: int, *_: object) -> None:
        walk.layer = number

    def leave(*_: object) -> None:
        walk.layer = None

    hooks = []
    for number, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(functools.partial(enter, number)))
        hooks.append(layer.register_forward_hook(leave))
    sys.setprofile(walk.profile)
    try:
        forward()
    finally:
        sys.setprofile(None)
        for hook in hooks:
            hook.remove()
    return walk


def walks(model: PreTrainedModel, settings: dict[str, Any]) -> tuple[Walk, Walk]:
    """Return the walks of a prompt and of a decode step after it."""
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with rocketkv.patch(model, token_budget=BUDGET), torch.inference_mode():
        cache = rocketkv.RocketKVCache(model.config, prompt_length=PROMPT, token_budget=BUDGET, **settings)

        def step(ids: Tensor) -> None:
            model(ids, cache=cache, logits_to_keep=1)

        prefill = walk_forward(model, lambda: step(prompt))
        decode = [walk_forward(model, lambda: step(prompt[:, :1])) for _ in range(STEPS)]
        return prefill, max(decode, key=lambda walk: len(walk.of_layer(SHOWN_LAYER)))


def tiny_llama() -> PreTrainedModel:
    """Return a Llama of four layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
    )
    model: PreTrainedModel = LlamaForCausalLM(config).eval()
    return model


def module_imports() -> dict[str, set[str]]:
    """Return each module of `rocketkv` with those that it imports at module level."""
    linked = {path for path in LIBRARY.iterdir() if path.name in ("eval", "kernels")}
    paths = [path for path in LIBRARY.rglob("*.py") if not linked & set(path.parents)]
    names = {".".join(path.relative_to(LIBRARY).with_suffix("").parts): path for path in paths}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        package = name.split(".")[:-1]
        found[name] = set()
        for node in imports_of(ast.parse(path.read_text(encoding="utf-8")).body):
            base = package[: len(package) - node.level + 1]
            module = [*base, *(node.module or "").split(".")] if node.module else base
            for target in (".".join(module), *(".".join([*module, alias.name]) for alias in node.names)):
                found[name] |= {target, f"{target}.__init__"} & names.keys() - {name}
    return found


def imports_of(body: list[ast.stmt]) -> list[ast.ImportFrom]:
    """Return the relative imports of statements that run on import, those in `if` and `try` among them."""
    found = []
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(node)
        elif isinstance(node, ast.Try) or (isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING"):
            found += imports_of([*node.body, *node.orelse])
    return found


def longest_chain(imports: dict[str, set[str]]) -> list[str]:
    """Return the longest chain of modules, each of which imports the next.

    Raises:
        ValueError: modules import each other in a cycle.
    """
    chains: dict[str, list[str] | None] = {}

    def chain(name: str) -> list[str]:
        known = chains.get(name, ())
        if known is None:
            raise ValueError(f"{name} imports itself by way of others")
        if not known:
            chains[name] = None
            chains[name] = known = [name, *max((chain(other) for other in sorted(imports[name])), key=len, default=[])]
        return list(known)

    return max((chain(name) for name in sorted(imports)), key=len)


def package_imports(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the same for packages; a module beside the packages counts as one."""
    found: dict[str, set[str]] = {}
    for name, others in imports.items():
        package = name.split(".")[0]
        if package == "__init__":
            continue
        found.setdefault(package, set()).update({other.split(".")[0] for other in others} - {package})
    return found


def print_trace(title: str, codes: list[CodeType]) -> None:
    """Print calls in their order, those of one file under its name."""
    print(f"\n{title}, layer {SHOWN_LAYER}")
    last = None
    for code in codes:
        if file_of(code) != last:
            last = file_of(code)
            print(f"  {last}")
        print(f"      {getattr(code, 'co_qualname', code.co_name)}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="The library's files and functions that one forward passes through.")
    parser.add_argument("--trace", action="store_true", help="print the calls of one layer and the files as well")
    args = parser.parse_args()
    model = tiny_llama()
    found: dict[str, Walk] = {}
    for name, settings in ARMS.items():
        prefill, decode = walks(model, settings)
        found[f"decode step, {name}"] = decode
        if "growing" in name:
            found[f"prompt, {settings['method']}"] = prefill
    print(f"{'':32}{'files':>6}{'calls a layer':>15}{'switches a layer':>18}{'calls outside':>15}")
    for name, walk in sorted(found.items()):
        files, calls, switches, outside = walk.figures()
        print(f"{name:32}{files:6}{calls:15}{switches:18}{outside:15}")
    imports = module_imports()
    for what, graph in (("files", imports), ("packages", package_imports(imports))):
        names = longest_chain(graph)
        print(f"\ndepth of imports, {what}: {len(names)}\n  {' > '.join(names)}")
    if args.trace:
        for name, walk in sorted(found.items()):
            print_trace(name, walk.of_layer(SHOWN_LAYER))
            counts = Counter(file_of(code) for code, _ in walk.calls)
            print(f"{name}: calls by file in the whole forward: {dict(counts.most_common())}")


if __name__ == "__main__":
    main()
