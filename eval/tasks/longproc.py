"""Long procedures: a search and a route that the model must write out step by step.

Tasks of this project after two of LongProc (Ye et al., 2025, arXiv:2501.05414), Countdown and Path Traversal. A needle
is read from the cache once; here each of many generated lines depends on the prompt or on earlier lines, so a loss
anywhere shows. The length sets the size of a problem: prompt and right answer fill it together.
"""

from __future__ import annotations

import ast
import functools
import operator
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, islice, pairwise, product
from typing import Any, NamedTuple

from .base import Preparation, Sample, Task, Turn, generated
from .length import prompt_limit, sample_tokens

_MARGIN = 8  # tokens that may be generated in addition to the right answer's, for its end
_ENOUGH = 0.8  # share of the length that counts as full

_TRANSPORT = ("bus", "train", "ferry", "plane")
_NAMES = (  # beginnings, middles and ends of the names of towns
    "Bal Bor Cal Cor Dan Dor Fal Fen Gar Gol Hal Har Jen Jor Kel Kor Lan Lor Mal Mar Nel Nor Pel Por Ran Ros Sel Sol",
    "a e i o u ado ami ani asu eda elo emi iko ila ino oka ori uda uli una",
    "burg by dale ford gate ham holm mouth port stad thorp ton wick worth",
)
_TOWNS = tuple(map("".join, product(*(parts.split() for parts in _NAMES))))
_FEWEST_LEGS = 4
_LEGS_A_DETOUR = 4  # legs of the route for each road from another town onto it
_MOST_LEGS = (len(_TOWNS) - 2) * _LEGS_A_DETOUR // (_LEGS_A_DETOUR + 1)

_ROUTE_CONTEXT = """\
Buses, trains, ferries and planes run between the towns of an invented country, in one direction only, and at most one \
way leads out of each town. To find the route from one town to another, look up where the way out of the first town \
leads, then where the way out of that town leads, and so on until you reach the destination. Write a line for each leg.

Example
The ferry from Cove goes to Elstow.
The bus from Ashby goes to Dunmere.
The train from Elstow goes to Brill.
The plane from Frome goes to Elstow.
The train from Dunmere goes to Cove.

The route from Ashby to Elstow:
<Route>
From Ashby, take the bus to Dunmere.
From Dunmere, take the train to Cove.
From Cove, take the ferry to Elstow.
</Route>

Connections
"""
_ROUTE_QUESTION = """

By these connections, write down the whole route from {start} to {end} in the format of the example.

The route from {start} to {end}:
"""

_LARGEST = 1000  # largest result of a step
_SEARCH_CONTEXT = """\
Countdown: make the target out of the given numbers with + - * and /, using each number exactly once.

Search depth first. Of the numbers, take the first pair, later the other pairs in order. For each pair try the sum, \
the difference, the product and the quotient, in this order and with the larger number first; leave out a step whose \
result is not a whole number from 1 to 1000. Write the result in front of the numbers that are left and go on in the \
same way with these, one space further to the right. When nothing else is left, write yes if the result is the \
target, and stop the search; otherwise write no and go on with the next step. In the end, write the solution as one \
expression.

Example
"""
_SEARCH_QUESTION = "\n\nNow solve this problem in the same way. Write out the whole search, then the solution.\n\n"
_SEARCH_PROBLEM = "Numbers: {numbers}\nTarget: {target}\n"
_SEARCH_PREFIX = "Search:\n"
_LONGEST_EXPRESSION = 100  # characters; right ones have fewer than 40, and the evaluation is recursive
_OPERATIONS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _fit(prepared: Preparation, task: str, build: Callable[[int], Sample], sizes: Sequence[int]) -> Sample:
    """Return the sample of the largest size that fits the length with its right answer.

    Args:
        prepared: with the length.
        task: its name, for the error.
        build: makes the sample of a size; the answer of its turn is the right one.
        sizes: in rising order.

    Raises:
        ValueError: there is no length, or no size fits it.
    """
    limit = prompt_limit(prepared, _MARGIN)
    fitting = bisect_left(sizes, True, key=lambda size: _whole_tokens(prepared, build(size)) > limit)
    if not fitting:
        raise ValueError(
            f"length must leave room for the smallest problem of {task} and its answer, got {prepared.length};"
            " ask for a longer one"
        )
    sample = build(sizes[fitting - 1])
    (turn,) = sample.turns
    return replace(sample, turns=(replace(turn, max_new_tokens=_answer_tokens(prepared, turn) + _MARGIN),))


def _answer_tokens(prepared: Preparation, turn: Turn) -> int:
    return len(prepared.tokenizer(turn.answers[0], add_special_tokens=False)["input_ids"])


def _whole_tokens(prepared: Preparation, sample: Sample) -> int:
    return sample_tokens(prepared, sample) + _answer_tokens(prepared, sample.turns[0])


def _route_sample(prepared: Preparation, index: int) -> Sample:
    name = f"path_finding {prepared.seed} {index}"
    rng = random.Random(name)
    # Each leg takes 14 words, seven to read and seven to write.
    most = min(prompt_limit(prepared, _MARGIN) // 14 + _FEWEST_LEGS, _MOST_LEGS)
    towns = rng.sample(_TOWNS, len(_TOWNS))
    route, beside = towns[: most + 2], towns[most + 2 :]
    rides = [(rng.choice(_TRANSPORT), *leg) for leg in pairwise(route)]
    detours = [
        (rng.choice(_TRANSPORT), beside[number], route[rng.randrange(_LEGS_A_DETOUR * (number + 1))])
        for number in range(most // _LEGS_A_DETOUR)
    ]

    def build(legs: int) -> Sample:
        # A road leaves the destination too: only the question tells where to stop.
        links = rides[: legs + 1] + detours[: legs // _LEGS_A_DETOUR]
        random.Random(f"{name} {legs}").shuffle(links)
        lines = [f"From {start}, take the {ride} to {end}." for ride, start, end in rides[:legs]]
        turn = Turn(
            question=_ROUTE_QUESTION.format(start=route[0], end=route[legs]),
            answers=("\n".join([*lines, "</Route>"]),),
            max_new_tokens=0,
            answer_prefix="<Route>\n",
        )
        return Sample(
            id=str(index),
            context=_ROUTE_CONTEXT + "\n".join(f"The {ride} from {start} goes to {end}." for ride, start, end in links),
            turns=(turn,),
            notes={"legs": legs, "detours": legs // _LEGS_A_DETOUR},
        )

    sample = _fit(prepared, "path_finding", build, range(_FEWEST_LEGS, most + 1))
    if sample.notes["legs"] == _MOST_LEGS:
        raise ValueError(
            f"length must be one that {_MOST_LEGS} legs fill, got {prepared.length}; there are no more names of towns:"
            " ask for a shorter one"
        )
    return sample


def score_route(prediction: str, turn: Turn) -> float:
    """Return the share of the route's legs that an answer has before its first wrong line, times 100.

    This is LongProc's partial accuracy, which counts the first wrong line too. Text after the last leg costs nothing.
    The answer is the text between the tags, or all of it where they are missing.
    """
    written = prediction.partition("</Route>")[0].rpartition("<Route>")[2]
    lines = [" ".join(line.split()) for line in written.splitlines() if line.strip()]
    legs = turn.answers[0].splitlines()[:-1]
    wrong = (number for number, leg in enumerate(legs) if number >= len(lines) or lines[number] != leg)
    return 100.0 * next(wrong, len(legs)) / len(legs)


class _Number(NamedTuple):
    value: int
    expression: str


class _Step(NamedTuple):
    """A line of a search, and the numbers that are left after it; a single one ends a branch."""

    line: str
    left: Sequence[_Number]

    @property
    def ends_branch(self) -> bool:
        return len(self.left) == 1


def _search(numbers: Sequence[_Number], indent: str = "") -> Iterator[_Step]:
    """Yield every step of the depth-first search."""
    for pair in combinations(range(len(numbers)), 2):
        large, small = sorted((numbers[place] for place in pair), key=lambda number: number.value, reverse=True)
        others = [number for place, number in enumerate(numbers) if place not in pair]
        for sign, value in (
            ("+", large.value + small.value),
            ("-", large.value - small.value),
            ("*", large.value * small.value),
            ("/", large.value // small.value if large.value % small.value == 0 else 0),
        ):
            if not 1 <= value <= _LARGEST:
                continue
            left = [_Number(value, f"({large.expression} {sign} {small.expression})"), *others]
            line = f"{indent}{large.value} {sign} {small.value} = {value}"
            yield _Step(f"{line}, left {_listed(left)}" if others else line, left)
            yield from _search(left, indent + " ")


def _listed(numbers: Sequence[_Number]) -> str:
    return " ".join(str(number.value) for number in numbers)


def _solved(steps: Sequence[_Step]) -> tuple[int, str]:
    """Return the target that a search reaches in its last step, and the text of search and solution."""
    (last,) = steps[-1].left
    lines = [f"{step.line}, no" if step.ends_branch else step.line for step in steps[:-1]]
    solution = f"Solution: {last.expression[1:-1]} = {last.value}"
    return last.value, "\n".join([*lines, f"{steps[-1].line}, yes", solution])


def _ends(steps: Sequence[_Step]) -> list[int]:
    """Return the number of steps to the first occurrence of each target, in order."""
    first: dict[int, int] = {}
    for number, step in enumerate(steps, start=1):
        if step.ends_branch:
            first.setdefault(step.left[0].value, number)
    return list(first.values())


def _numbers(values: Sequence[int]) -> list[_Number]:
    return [_Number(value, str(value)) for value in values]


@functools.cache
def _worked_example() -> str:
    numbers = _numbers([6, 3, 5, 2])
    steps = list(islice(_search(numbers), 40))
    target, answer = _solved(steps[: _ends(steps)[6]])
    return _SEARCH_PROBLEM.format(numbers=_listed(numbers), target=target) + _SEARCH_PREFIX + answer


def _countdown_sample(prepared: Preparation, index: int) -> Sample:
    drawn = random.Random(f"countdown {prepared.seed} {index}").sample(range(2, 26), 5)
    sample = _search_sample(prepared, index, _numbers(drawn[:4]))
    if _whole_tokens(prepared, sample) >= _ENOUGH * prompt_limit(prepared, _MARGIN):
        return sample
    # The whole search among four numbers has about a thousand steps.
    return _search_sample(prepared, index, _numbers(drawn))


def _search_sample(prepared: Preparation, index: int, numbers: Sequence[_Number]) -> Sample:
    steps = list(islice(_search(numbers), prompt_limit(prepared, _MARGIN) // 5))  # a step has five words or more

    def build(count: int) -> Sample:
        target, answer = _solved(steps[:count])
        turn = Turn(
            question=_SEARCH_QUESTION + _SEARCH_PROBLEM.format(numbers=_listed(numbers), target=target),
            answers=(answer,),
            max_new_tokens=0,
            answer_prefix=_SEARCH_PREFIX,
            extra={"numbers": [number.value for number in numbers], "target": target},
        )
        return Sample(
            id=str(index),
            context=_SEARCH_CONTEXT + _worked_example(),
            turns=(turn,),
            notes={"numbers": len(numbers), "steps": count},
        )

    return _fit(prepared, "countdown", build, _ends(steps))


def score_countdown(prediction: str, turn: Turn) -> float:
    """Return 100 if the first solution makes the target out of all the numbers, each once, else 0.

    As in LongProc's accuracy, the search itself is not scored. LongProc requires the solution in three equations; here
    it is one expression, with or without `= target` after it.
    """
    match = re.search(r"Solution:([^\n]*)", prediction)
    if match is None:
        return 0.0
    expression, *results = match[1].strip(" \t\r*`$.").split("=")
    if any(result.strip() != str(turn.extra["target"]) for result in results):
        return 0.0
    try:
        value = evaluate(expression, turn.extra["numbers"])
    except (ValueError, SyntaxError, ZeroDivisionError):
        return 0.0
    return 100.0 if value == turn.extra["target"] else 0.0


def evaluate(expression: str, numbers: Sequence[int]) -> Fraction:
    """Evaluate an expression of whole numbers, + - * / and parentheses.

    Args:
        expression: the text.
        numbers: the numbers that it must contain, each once.

    Raises:
        ValueError: it is no such expression, has other numbers, or is too long.
        ZeroDivisionError: it divides by zero.
    """
    if len(expression) > _LONGEST_EXPRESSION:
        raise ValueError(f"an expression must have at most {_LONGEST_EXPRESSION} characters, got {len(expression)}")
    text = expression.translate(str.maketrans("\u00d7\u00f7\u2212", "*/-")).strip()
    if not re.fullmatch(r"[0-9+\-*/() \t]+", text):
        raise ValueError(f"an expression must consist of whole numbers, + - * / and parentheses, got {expression!r}")
    used: list[int] = []

    def value(node: ast.AST) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                used.append(number)
                return Fraction(number)
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
                return _OPERATIONS[type(operation)](value(left), value(right))
        raise ValueError(f"an expression must have an operator between each two numbers, got {expression!r}")

    result = value(ast.parse(text, mode="eval").body)
    if sorted(used) != sorted(numbers):
        raise ValueError(f"the expression must have each of the numbers {list(numbers)} once, got {expression!r}")
    return result


def _task(name: str, **fields: Any) -> Task:
    return Task(name=name, group="longproc", version=1, source="ours, after LongProc (arXiv:2501.05414)", **fields)


TASKS = (
    _task("countdown", metric="accuracy", samples=generated(_countdown_sample), score=score_countdown),
    _task("path_finding", metric="partial_accuracy", samples=generated(_route_sample), score=score_route),
)
