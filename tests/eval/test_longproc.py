"""Long procedures: right answers score 100, hostile ones 0, and problems are as long as they are asked to be."""

import json
import random
import re
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest

from rocketkv.eval.tasks import instructions, longproc
from rocketkv.eval.tasks.base import Preparation, Sample, Task, Turn
from rocketkv.eval.tasks.length import sample_tokens
from rocketkv.eval.tasks.longproc import evaluate
from words import Words

COUNTDOWN, ROUTE = longproc.TASKS
TASKS = pytest.mark.parametrize("task", longproc.TASKS, ids=lambda task: task.name)


def prepare(count: int = 1, *, length: int = 1024, seed: int = 0) -> Preparation:
    tokenizer: Any = Words()
    return Preparation(tokenizer=tokenizer, length=length, count=count, seed=seed)


def only(task: Task, **arguments: int) -> tuple[Sample, Turn]:
    (sample,) = task.samples(prepare(**arguments))
    (turn,) = sample.turns
    return sample, turn


@TASKS
def test_right_answers_score_100(task: Task) -> None:
    for sample in task.samples(prepare(20, length=600)):
        (turn,) = sample.turns
        assert task.score(turn.answers[0], turn) == 100
        assert task.score(f"\n{turn.answers[0]}\n\nAnd so on.", turn) == 100


@TASKS
def test_samples_are_decided_by_seed_and_index_alone(task: Task) -> None:
    first = task.samples(prepare(3))
    random.seed(7)
    state = random.getstate()
    assert list(task.samples(prepare(5)))[:3] == first
    assert random.getstate() == state
    assert task.samples(prepare(3, seed=1))[0] != first[0]
    assert len({sample.turns[0].question for sample in first}) == len({sample.id for sample in first}) == 3


@TASKS
@pytest.mark.parametrize("length", [600, 4096, 20_000])
def test_prompt_and_answer_fill_the_length(task: Task, length: int) -> None:
    prepared = prepare(3, length=length)
    for sample in task.samples(prepared):
        answer = len(sample.turns[0].answers[0].split())
        assert answer < sample.turns[0].max_new_tokens <= answer + 16
        assert sample_tokens(prepared, sample) + sample.turns[0].max_new_tokens <= length
        assert sample_tokens(prepared, sample) + answer >= 0.8 * length


@TASKS
def test_a_length_without_room_is_refused(task: Task) -> None:
    with pytest.raises(ValueError, match=rf"smallest problem of {task.name} .* got 150"):
        task.samples(prepare(length=150))
    with pytest.raises(ValueError, match="length must be a number of tokens"):
        task.samples(Preparation(tokenizer=prepare().tokenizer, length=None, count=1))


@TASKS
def test_samples_are_of_json_types(task: Task) -> None:
    sample, turn = only(task)
    assert json.loads(json.dumps(dict(turn.extra))) == turn.extra
    assert json.loads(json.dumps(sample.notes)) == sample.notes


@TASKS
@pytest.mark.parametrize(
    "answer",
    [
        "",
        "\n",
        "Solution:",
        "Solution: =",
        "<Route>",
        "</Route>",
        "<Route></Route>",
        "</Route><Route>",
        "\0",
        "yes" * 9999,
    ],
)
def test_answers_that_say_nothing_score_0(task: Task, answer: str) -> None:
    assert task.score(answer, only(task)[1]) == 0


def test_every_route_follows_the_only_ways_there_are() -> None:
    for sample in ROUTE.samples(prepare(10, length=700)):
        links = re.findall(
            r"^The (\w+) from (\w+) goes to (\w+)\.$", sample.context.split("Connections")[1], re.MULTILINE
        )
        ways = {start: (ride, end) for ride, start, end in links}
        assert len(ways) == len(links) == sample.notes["legs"] + 1 + sample.notes["detours"]
        (start, end), *_ = re.findall(r"route from (\w+) to (\w+)", sample.turns[0].question)
        place, walked = start, []
        while place != end:
            ride, following = ways[place]
            walked.append(f"From {place}, take the {ride} to {following}.")
            place = following
        assert end in ways  # no dead end gives the destination away
        assert sample.turns[0].answers == ("\n".join([*walked, "</Route>"]),)
        assert len(walked) == sample.notes["legs"] == len({line.split()[1] for line in walked})
        found = [sample.context.index(f"from {line.split()[1][:-1]} goes") for line in walked]
        assert sum(first < second for first, second in pairwise(found)) < 0.8 * len(found)  # not in their order


def test_names_of_towns_are_unlike_each_other() -> None:
    assert len(set(longproc._TOWNS)) == len(longproc._TOWNS)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("From A, take the bus to B.\nFrom B, take the train to C.\nFrom C, take the bus to D.\n</Route>", 100),
        ("<Route>\nFrom A, take the bus to B.\nFrom B, take the train to C.\n</Route>", 200 / 3),
        ("Sure!\n<Route>\n From A,  take the bus to B. \n\nFrom B, take the train to C.", 200 / 3),  # cut short
        ("From A, take the bus to B.\nFrom B, take the bus to C.\nFrom C, take the bus to D.", 100 / 3),
        ("From A, take the bus to B.\nFrom C, take the bus to D.\n</Route>", 100 / 3),
        ("From A, take the bus to B", 0),
        ("From B, take the train to C.\nFrom A, take the bus to B.", 0),
        ("</Route>\nFrom A, take the bus to B.", 0),
        ("Sure!\nFrom A, take the bus to B.", 0),
    ],
)
def test_a_route_counts_up_to_its_first_wrong_leg(answer: str, score: float) -> None:
    gold = "From A, take the bus to B.\nFrom B, take the train to C.\nFrom C, take the bus to D.\n</Route>"
    assert ROUTE.score(answer, Turn(question="", answers=(gold,), max_new_tokens=1)) == pytest.approx(score)


def test_lengths_beyond_the_names_of_towns_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longproc, "_MOST_LEGS", 30)
    with pytest.raises(ValueError, match=r"30 legs fill, got 1024"):
        ROUTE.samples(prepare(length=1024))


@pytest.mark.parametrize("length", [600, 6000, 20_000])
def test_every_search_is_right_line_by_line(length: int) -> None:
    for sample in COUNTDOWN.samples(prepare(2, length=length)):
        (turn,) = sample.turns
        *steps, solution = turn.answers[0].splitlines()
        assert len(steps) == sample.notes["steps"]
        stack = [turn.extra["numbers"]]  # what is left, at each depth
        for step in steps:
            indent, big, sign, small, result, end = re.fullmatch(r"( *)(\d+) (.) (\d+) = (\d+), (.+)", step).groups()  # type: ignore[union-attr]
            del stack[len(indent) + 1 :]
            left = list(stack[-1])
            assert int(big) >= int(small)
            assert int(result) == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": Fraction}[sign](
                int(big), int(small)
            )
            left.remove(int(big))
            left.remove(int(small))
            if left:
                assert end == f"left {' '.join(map(str, [int(result), *left]))}"
                stack.append([int(result), *left])
            else:
                assert end == ("yes" if step is steps[-1] else "no")
                assert (int(result) == turn.extra["target"]) == (end == "yes")
        assert solution.endswith(f"= {turn.extra['target']}")


def test_more_room_makes_a_longer_search() -> None:
    steps = [only(COUNTDOWN, length=length)[0].notes["steps"] for length in (600, 2000, 6000, 20_000)]
    assert steps == sorted(set(steps))
    assert [only(COUNTDOWN, length=length)[0].notes["numbers"] for length in (600, 20_000)] == [4, 5]


def test_the_example_of_a_search_is_solved() -> None:
    example = only(COUNTDOWN)[0].context.split("Example\n")[1]
    turn = Turn(question="", answers=(), max_new_tokens=1, extra={"numbers": [6, 3, 5, 2], "target": 8})
    assert example.startswith("Numbers: 6 3 5 2\nTarget: 8\nSearch:\n6 + 3 = 9, left 9 5 2\n 9 + 5 = 14, left 14 2\n")
    assert COUNTDOWN.score(example, turn) == 100


COUNT = Turn(question="", answers=(), max_new_tokens=1, extra={"numbers": [2, 3, 4, 5], "target": 14})


@pytest.mark.parametrize(
    "solution",
    [
        "2 + 3 + 4 + 5 = 14",
        "2+3+4+5",
        "((5 + (4)) + 3) + 2 = 14.",
        "(5 * 4) - (2 * 3) = 14",
        "**(5 \u00d7 4) \u2212 (2 \u00d7 3)**",
        "$5*4 - 3*2$\nSolution: 1",
        "4 * 5 - 3 * 2\r\nand more",
    ],
)
def test_a_solution_counts_however_it_is_written(solution: str) -> None:
    assert COUNTDOWN.score(f"some search\nSolution: {solution}", COUNT) == 100


@pytest.mark.parametrize(
    "solution",
    [
        "2 + 3 + 4 + 5 = 15",
        "2 + 3 + 4 * 5",
        "14",
        "14 = 14",
        "2 + 3 + 4 + 5 = 14 = 15",
        "2 + 3 + 4",
        "2 + 3 + 4 + 5 + 0",
        "2 + 3 + 4 + 5 + 2 - 2",
        "(2 + 3 + 4 + 5",
        "2 + 3 + 4 + 5)",
        "2 3 4 5",
        "2 + 3 + 4 5",
        "+ 2 + 3 + 4 + 5",
        "23 - 4 - 5",
        "2 + 3 + 4 + 5 =",
        "5 / (4 - 2 - 3 + 1)",
        "4 / (5 - 2 - 3)",
        "2 ** 3 ** 4 ** 5",
        "9 ** 9 ** 9 ** 9 ** 9",
        "2 // 3 + 4 + 5",
        "__import__('os').system('true')",
        "().__class__.__bases__[0]",
        "lambda: 2 + 3 + 4 + 5",
        "2 + 3 + 4 + \u0665",  # an Arabic five
        "2 + 3 + 4 + 5j",
        "2e3 + 4 + 5",
        "(" * 99,
        "(" * 10_000 + "2 + 3 + 4 + 5" + ")" * 10_000,
        "9" * 10_000,
        "\u00b2",
    ],
)
def test_wrong_and_hostile_solutions_score_0(solution: str) -> None:
    assert COUNTDOWN.score(f"Solution: {solution}", COUNT) == 0


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("10 - 4 - 3", 3),
        ("12 / 2 / 3", 2),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("2 * (9 - (3 + 1))", 10),
        ("7 / 2", Fraction(7, 2)),
        ("1 / 3 * 3", 1),
        ("3 - 5", -2),
    ],
)
def test_expressions_are_evaluated(expression: str, value: Fraction) -> None:
    assert evaluate(expression, [int(number) for number in re.findall(r"\d+", expression)]) == value


def test_deep_parentheses_are_evaluated() -> None:
    assert evaluate("(" * 49 + "7" + ")" * 49, [7]) == 7


@pytest.mark.real_model
def test_a_real_tokenizer_with_its_chat_template(smollm2_tokenizer: Any) -> None:
    prepared = Preparation(tokenizer=smollm2_tokenizer, length=2048, count=2, chat=True)
    for task in (*longproc.TASKS, *instructions.TASKS):
        for sample in task.samples(prepared):
            (turn,) = sample.turns
            assert sample_tokens(prepared, sample) + turn.max_new_tokens <= 2048
            assert sample_tokens(prepared, sample) + turn.max_new_tokens >= 0.8 * 2048
            if turn.answers:
                answer = len(prepared.tokenizer(turn.answers[0], add_special_tokens=False)["input_ids"])
                assert answer < turn.max_new_tokens
                assert task.score(turn.answers[0], turn) == 100
