"""Compile the entries of a step once for each dtype, on disk for later processes, and say so if it takes long."""

import functools
import hashlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from .entry import append_and_score, attend_and_combine
from .prompt import measure_values, sum_weighted, write_sketch
from .weigh import weigh_chosen

# Elements of keys and bounds as compiled code reads them; see `lowlevel.widen`.
ELEMENTS = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
    torch.float8_e5m2: np.uint8,
}
PATIENCE = 2.0  # seconds after which a compilation is announced
_LOCK = threading.Lock()


@functools.cache  # constant for an installation
def _fingerprint() -> str:
    """Return a hash of what the compiled code is made of."""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache  # one line, however many entries there are
def _announce() -> None:
    sys.stderr.write("rocketkv: compiling the decode step for this CPU, once\n")


def _compiled(make: Callable[..., Any], *kinds: Any) -> Any:
    """Compile an entry, from the cache on disk where a folder can be written."""
    timer = threading.Timer(PATIENCE, _announce)
    timer.daemon = True
    timer.start()
    try:
        with _LOCK:
            try:
                return make(_fingerprint(), *kinds, True)
            except RuntimeError as error:
                if "no locator" not in str(error):
                    raise
                return make(_fingerprint(), *kinds, False)
    finally:
        timer.cancel()


@functools.cache
def first_entry(dtype: torch.dtype, index_dtype: torch.dtype | None, sketched: bool) -> Any:
    """Return the entry that appends and scores, for keys and page bounds of these dtypes."""
    return _compiled(append_and_score, ELEMENTS[dtype], ELEMENTS[index_dtype or dtype], sketched)


@functools.cache
def second_entry(dtype: torch.dtype) -> Any:
    """Return the entry that attends and combines, for keys and values of this dtype."""
    return _compiled(attend_and_combine, ELEMENTS[dtype])


class PromptEntries(NamedTuple):
    """The entries of a prompt's end for keys or values of one dtype."""

    write_sketch: Any
    sum_weighted: Any
    measure_values: Any


@functools.cache
def prompt_entries(dtype: torch.dtype) -> PromptEntries:
    """Return the entries of a prompt's end for keys and values of this dtype."""
    return PromptEntries(*(_compiled(make, ELEMENTS[dtype]) for make in (write_sketch, sum_weighted, measure_values)))


@functools.cache
def weigh_entry() -> Any:
    """Return the entry of the calibration, whose numbers are float32."""
    return _compiled(weigh_chosen)
