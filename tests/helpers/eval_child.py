"""Command lines in processes of their own, forked from one that has imported everything: a start takes milliseconds.

Reads a line of JSON for each:

- `["start", [LIMIT, *ARGUMENTS]]`, answered by the process's id: unless the limit is 0, no file that it writes may have
  more bytes;
- `["hold", PATH]`, the same for one that locks a record, which it says in a file with the suffix `.held`, and keeps it;
- `["wait", ID]`, answered by how it ended, as `os.waitpid` has it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path

import torch

from rocketkv.cli.main import main
from rocketkv.eval import cli  # noqa: F401  # before a fork, as all that a sweep imports
from rocketkv.eval.report import write  # noqa: F401
from rocketkv.eval.sweep import run  # noqa: F401
from rocketkv.eval.sweep.locks import try_lock


def hold(path: Path) -> int:
    with try_lock(path) as locked:
        path.with_suffix(".held").write_text(str(locked))
        time.sleep(600)
    return 0


def limited(limit: int, *arguments: str) -> int:
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # a write beyond it raises EFBIG
    return main(arguments)


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        order, what = json.loads(line)
        if order == "wait":
            answer = os.waitpid(what, 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                code = 1
                try:
                    code = hold(Path(what)) if order == "hold" else limited(*what)
                except BaseException:  # noqa: BLE001  # also SystemExit: this process is to end here and nowhere else
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
        sys.__stdout__.write(f"{answer}\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    serve()
