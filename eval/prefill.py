"""Read a prompt once, and start every method from it.

The library's methods and the full cache attend densely to a prompt, so that one forward serves all of them: each starts
in exactly the state that its own forward would leave. Methods with another prefill (presses, custom ones) read the
prompt themselves.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..config import RocketKVConfig
from ..hf.cache import RocketKVCache
from ..hf.fork import begin_after, can_begin_after, open_cache
from ..hf.layer import RocketKVLayer
from ..hf.models import find_decoder
from ..hf.patch import patch
from .generate import DecodeLoop, Ids
from .methods import Method

WINDOW = 128  # queries that are kept of a prompt; a method with a larger observation window reads the prompt itself


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadPrompt:
    """A batch of prompts that was read once; see `read_prompt`.

    Attributes:
        ids: its tokens.
        cache: all keys and values, and the last queries.
        loop: the loop that read it, over that cache.
    """

    ids: Ids
    cache: RocketKVCache
    loop: DecodeLoop

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and queries of the layers that methods compress."""
        layers = [layer for layer in self.cache.layers if isinstance(layer, RocketKVLayer)]
        return sum(tensor.nbytes for layer in layers for tensor in layer.store.tensors().values())


def shares_prefill(method: Method) -> bool:
    """Whether a method attends densely to a prompt and compresses at its end, so that it can start from a read one."""
    return bool(getattr(method, "dense_prefill", False))


def read_prompt(model: PreTrainedModel, ids: Ids) -> ReadPrompt:
    """Read a prompt, for `start`.

    Args:
        model: a model with no method attached.
        ids: the prompt; rows are padded on the left where their lengths differ.

    Raises:
        ValueError: the model has no layer that can be compressed.
    """
    with patch(model, RocketKVConfig(method="full")):
        cache = open_cache(find_decoder(model)[0].config, window_size=WINDOW)
        loop = DecodeLoop(model=model, cache=cache)
        loop.step(ids)
    return ReadPrompt(ids=ids, cache=cache, loop=loop)


def start(model: PreTrainedModel, method: Method, prompt: ReadPrompt) -> DecodeLoop:
    """Return a loop that has read a prompt by a method, which must be attached to the model.

    Where the method's own prefill would not give exactly what was read, the loop reads the prompt again.

    Args:
        model: the model.
        method: how to compress.
        prompt: stays unchanged.
    """
    read = prompt.loop
    loop = DecodeLoop(model=model, cache=method.new_cache(model, read.seen))
    attention = find_decoder(model)[0].config._attn_implementation
    if shares_prefill(method) and can_begin_after(loop.cache, prompt.cache, attention):
        begin_after(loop.cache, prompt.cache)
        loop.seen, loop.mask, loop.logits, loop.token = read.seen, read.mask, read.logits, read.token
    else:
        loop.prefill(prompt.ids)
    return loop


class Prefills:
    """The last prompt that was read, for methods that answer the same sample one after the other.

    Args:
        model: a model with no method attached whenever `read` is called.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.name = uuid.uuid4().hex  # no other has it
        self._model = model
        self._last: ReadPrompt | None = None

    def read(self, ids: list[int]) -> ReadPrompt:
        """Return a prompt of one sequence, which is read unless it is the last one."""
        if self._last is None or self._last.ids != [ids]:
            self._last = None  # its memory is needed
            self._last = read_prompt(self._model, [ids])
        return self._last


@contextmanager
def after_prompt(
    model: PreTrainedModel, method: Method, ids: list[int], prefills: Prefills | None = None
) -> Iterator[DecodeLoop]:
    """Attach a method to a model inside the context, which gets a loop that has read a prompt of one sequence.

    Args:
        model: a model with no method attached.
        method: how to compress.
        ids: tokens of the prompt.
        prefills: reads the prompt once for several methods; None: the method reads it itself.
    """
    read = prefills.read(ids) if prefills is not None and shares_prefill(method) else None
    with method.attached(model):
        if read is None:
            loop = DecodeLoop(model=model, cache=method.new_cache(model, len(ids)))
            loop.prefill([ids])
        else:
            loop = start(model, method, read)
        yield loop
