"""Plan of a step for each request: read a chunk of its prompt, or decode a token from its row of the slab.

Model runner V1 reports no identity of a request. Its row and its prompt's end are read from the marker in the block
table (`spec`). Until there is one, a prompt is known by the block of its last token, which no other request writes.
Model runner V2 reports `req_idx`, which is constant while a request runs; it is the row.

Letters: H query heads, D head dim, W observation window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..state.queries import last_of_window
from ..state.store import KVStore


class StepRow(NamedTuple):
    """One request in a step, as the engine reports it.

    Attributes:
        place: its row in the batch.
        start: tokens of the sequence before the step.
        stop: tokens of the sequence after the step.
        first: first token in the batch's flat tokens.
        row: row of the slab, or None if it is not known yet.
        prompt_end: tokens of the prompt, if known: with a row on V1; None on V2.
        prefilling: whether the tokens are a prompt's, generated ones that are recomputed included.
        tail: block of the last token before the step, None at the start.
        last: block of the step's last token.
    """

    place: int
    start: int
    stop: int
    first: int
    row: int | None
    prompt_end: int | None
    prefilling: bool
    tail: int | None
    last: int


@dataclass(eq=False)
class OpenPrompt:
    """A prompt that is being read.

    Attributes:
        end: tokens read so far.
        queries: [1, H, <= W, D] by layer, the queries of the last tokens.
    """

    end: int = 0
    queries: dict[str, Tensor] = field(default_factory=dict)

    def remember(self, layer: str, query: Tensor, window_size: int) -> None:
        """Keep the queries of the last W tokens; `query` [n, H, D] has the newest."""
        newest = query.transpose(0, 1).unsqueeze(0)
        self.queries[layer] = last_of_window(self.queries.get(layer), newest, window_size)


@dataclass(eq=False)
class DecodingSequence:
    """A sequence that decodes from its row.

    Attributes:
        row: row of the slab.
        seen: tokens of the sequence so far.
        room: tokens that the row has room for.
        stores: its store in each layer, by name.
    """

    row: int
    seen: int
    room: int = 0
    stores: dict[str, KVStore] = field(default_factory=dict)


class Chunk(NamedTuple):
    """A chunk of a prompt: its first and last token among the batch's flat tokens, and its prompt."""

    first: int
    last: int
    prompt: OpenPrompt


class Decode(NamedTuple):
    """A decode step of one sequence: its token among the batch's flat tokens, and the sequence."""

    token: int
    sequence: DecodingSequence


class Closing(NamedTuple):
    """A prompt that has been read, and whose first decode step follows.

    Attributes:
        place: the request's row in the batch.
        tokens: tokens of the prompt.
        prompt: the prompt.
        sequence: the sequence that decodes from now on.
    """

    place: int
    tokens: int
    prompt: OpenPrompt
    sequence: DecodingSequence


@dataclass(eq=False)
class StepPlan:
    """Plan of a step.

    Attributes:
        chunks: chunks of prompts.
        decodes: decode steps.
        closings: prompts to end before the step.
    """

    chunks: list[Chunk] = field(default_factory=list)
    decodes: list[Decode] = field(default_factory=list)
    closings: list[Closing] = field(default_factory=list)


class RequestTable:
    """The requests of one engine on one worker.

    Attributes:
        sequences: decoding sequences by row.
        read: prompts that have been read, by row, until their first decode step.
        reading: prompts of which more is to be read, by block of their last token (V1) or by row (V2).
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sequences: dict[int, DecodingSequence] = {}
        self.read: dict[int, OpenPrompt] = {}
        self.reading: dict[tuple[str, int], OpenPrompt] = {}

    def plan(self, rows: Sequence[StepRow]) -> StepPlan:
        """Return what a step does with its requests.

        Raises:
            RuntimeError: the engine reports a step that does not follow the earlier ones.
        """
        plan = StepPlan()
        # Look up all prompts before any is filed again: in one step, a request may take over another one's block.
        found = [self._open_prompt(row) if row.prefilling else None for row in rows]
        for row, prompt in zip(rows, found, strict=True):
            if prompt is None:
                self._decode(row, plan)
                continue
            prompt.end = row.stop
            self._file(row, prompt)
            plan.chunks.append(Chunk(row.first, row.first + row.stop - row.start, prompt))
        return plan

    def _key(self, row: StepRow, block: int | None) -> tuple[str, int]:
        if row.prompt_end is None and row.row is not None:
            return "row", row.row
        return "block", -1 if block is None else block

    def _open_prompt(self, row: StepRow) -> OpenPrompt:
        """Return the prompt that a chunk continues, or a new one: at the start, or after a prefix hit."""
        prompt = self.reading.pop(self._key(row, row.tail), None)
        # After a prefix hit, the tail is another request's block; the window's queries all follow.
        return prompt if prompt is not None and prompt.end == row.start > 0 else OpenPrompt()

    def _file(self, row: StepRow, prompt: OpenPrompt) -> None:
        """Keep an open prompt until its next chunk or its first decode step."""
        if row.row is not None and row.prompt_end == row.stop:
            self.read[row.row] = prompt
            return
        self.reading[self._key(row, row.last)] = prompt
        while len(self.reading) > 2 * self.rows:  # of requests that were aborted: at most `rows` prompts are read
            del self.reading[next(iter(self.reading))]

    def _decode(self, row: StepRow, plan: StepPlan) -> None:
        """Plan a decode step; the first one of a sequence ends its prompt."""
        if row.row is None or row.stop != row.start + 1:
            raise RuntimeError(
                f"rocketkv: a step of {row.stop - row.start} tokens after the prompt has ended; a request whose prompt "
                "goes on after its answer cannot be served, start a new request with the whole conversation"
            )
        if row.prompt_end is None:
            prompt = self.reading.pop(("row", row.row), None)
        else:
            prompt = self.read.pop(row.row, None) if row.start == row.prompt_end else None
        if prompt is not None:
            if prompt.end != row.start:
                raise RuntimeError(f"rocketkv: a prompt of {prompt.end} tokens is decoded from token {row.start}")
            sequence = self.sequences[row.row] = DecodingSequence(row.row, row.start)
            plan.closings.append(Closing(row.place, row.start, prompt, sequence))
        known = self.sequences.get(row.row)
        if known is None or known.seen != row.start:
            seen = "none" if known is None else known.seen
            raise RuntimeError(
                f"rocketkv: row {row.row} of the slab has {seen} tokens, but the step decodes token {row.start}"
            )
        known.seen += 1
        plan.decodes.append(Decode(row.first, known))
