"""AIME and MATH-500: the answer that counts, its comparison with the right one, samples of files, sampled answers."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from eval_case import tokenizer
from rocketkv.cli.main import main
from rocketkv.eval.intervals import mean_interval
from rocketkv.eval.records import records
from rocketkv.eval.sweep.plan import Loaded, Plan, cells
from rocketkv.eval.tasks import mathematics
from rocketkv.eval.tasks.base import Preparation, Turn, find_tasks
from rocketkv.eval.tasks.mathematics import last_boxed
from rocketkv.hf.prompts import encode, render
from thinkers import save

TASKS = {task.name: task for task in mathematics.TASKS}
PROBLEM = "What is the number of many numbers?"
ROWS: dict[str, list[dict[str, Any]]] = {
    "aime24": [{"ID": "2024-I-1", "Problem": PROBLEM, "Answer": 33}, {"ID": "b", "Problem": "the grass", "Answer": 7}],
    "aime25": [{"id": "0", "problem": PROBLEM, "answer": "070"}],
    "math500": [
        {"unique_id": "test/a/1.json", "problem": f" {PROBLEM}\n", "answer": "\\frac{1}{2}", "subject": "Algebra",
         "level": 2, "solution": "the half"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So it is $\\boxed{\\frac{1}{2}}$, which was asked.", "\\frac{1}{2}"),
        ("first \\boxed{1}, or rather \\boxed{2}.", "2"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed {5}", "5"),
        ("first \\boxed{1}, or rather \\boxed{2", None),
        ("the answer is 5", None),
        ("\\boxed", None),
    ],
)
def test_the_last_box_counts(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("right", "answer", "same"),
    [
        ("\\frac{14}{3}", "14/3", True),
        ("\\frac{14}{3}", "4.66", False),
        ("1.25", "1\\frac14", True),
        ("204", "204.0", True),
        ("204", "204\\text{ minutes}", True),
        ("33", "033", True),
        ("90^\\circ", "90", True),
        ("5", "5\\text{ cm}^2", True),
        ("10,\\!080", "10080", True),
        ("12\\%", "12", True),
        ("(3,4]", "\\left(3, 4\\right]", True),
        ("(3,4]", "[3,4]", False),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)", True),
        ("1,-2", "-2, 1", True),
        ("1,-2", "1", False),
        ("5", "x = 5", True),
        ("6r^2-4r-24", "2(3r^2 - 2r - 12)", True),
        ("\\text{Evelyn}", "\\text{Evelyn}", True),
        ("\\text{east}", "\\text{west}", False),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
        ("5", "", False),
        ("5", "\\frac{", False),
    ],
)
def test_answers_are_compared_by_value(right: str, answer: str, same: bool) -> None:
    turn = Turn(question="", answers=(right,), max_new_tokens=1)
    score = TASKS["math500"].score
    assert score(f"It is 7, thus\n\\[\\boxed{{{answer}}}\\]", turn) == 100.0 * same
    assert score(f"the answer is {answer}", turn) == 0


def test_an_answer_that_takes_too_long_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "_SECONDS", 1)
    assert not mathematics.equal("9^{9^{9^{9}}}", "204")
    found = []
    other = threading.Thread(target=lambda: found.append(mathematics.equal("0.5", "\\frac{1}{2}")))
    other.start()
    other.join()
    assert found == [True]  # where no alarm can be set


def data_folder(folder: Path) -> Path:
    """A folder with all three: one as a copy of the hub's folder, one in Parquet."""
    (folder / "MATH-500").mkdir(parents=True)
    for name, path in {"aime25": "aime25.jsonl", "math500": "MATH-500/test.jsonl"}.items():
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS["aime24"]), folder / "aime24.parquet")
    return folder


def test_samples_are_those_of_the_files(tmp_path: Path) -> None:
    words, folder = tokenizer(), data_folder(tmp_path / "data")

    def samples(name: str, **fields: Any) -> Any:
        known = {"tokenizer": words, "length": None, "count": 9, "data_dir": folder, "chat": True}
        return TASKS[name].samples(Preparation(**known | fields))

    (made,) = samples("math500")
    assert (made.id, made.context, made.notes) == ("test/a/1.json", PROBLEM, {"subject": "Algebra", "level": "2"})
    assert made.turns[0].question.endswith("put your final answer within \\boxed{}.")
    prompt = render(words, made.context, made.turns[0].question, chat=True)
    assert made.turns[0].max_new_tokens + len(encode(words, prompt)[0]) == 8192  # of the model
    assert samples("math500", max_length=100_000)[0].turns[0].max_new_tokens == mathematics.MAX_NEW_TOKENS
    assert samples("math500", length=512)[0].turns[0].max_new_tokens == made.turns[0].max_new_tokens - 8192 + 512
    assert samples("aime25")[0].turns[0].answers == ("70",)
    assert [sample.turns[0].answers for sample in samples("aime24")] == [("33",), ("7",)]
    assert len(samples("aime24", count=1)) == 1
    with pytest.raises(ValueError, match="row 1 of math500 leaves no room for an answer within 40 tokens"):
        samples("math500", length=40)
    (folder / "aime25.jsonl").write_text('{"id": "0", "question": "?"}\n')
    with pytest.raises(ValueError, match="row 1 of aime25 must have the fields id, problem, answer; problem, answer"):
        samples("aime25")
    with pytest.raises(OSError, match=r"resolve/main/test.jsonl elsewhere, put it into a folder as aime25.jsonl and"):
        samples("aime25", data_dir=None)
    (folder / "aime24.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"aime24.parquet is not a whole Parquet file .* download it again"):
        samples("aime24")


def test_a_model_answers_each_problem_several_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = iter(["\\boxed{33}", "none", "\\boxed{7.0}", "\\boxed{7}"])
    monkeypatch.setattr("rocketkv.eval.answers.Written", boxed(boxes))
    flags = ["--tasks", "aime24", "--methods", "full", "--generation", "card", "--answers", "2", "--device", "cpu"]
    flags += ["--data-dir", str(data_folder(tmp_path / "data")), "--max-new-tokens", "70"]
    folder, results = save(tmp_path / "model", "qwen3"), tmp_path / "results"
    assert main(["eval", "run", "--model", str(folder), *flags, "-o", str(results)]) == 0
    (record,) = records(results)
    assert record["cell"]["answers"] == 2
    one, other = record["samples"]
    assert [turn["prediction"] for turn in one["turns"]] == ["\\boxed{33}", "none"]
    assert [turn["score"] for turn in (*one["turns"], *other["turns"])] == [100, 0, 100, 100]
    assert (one["score"], other["score"], record["score"]) == (50, 100, 75)
    assert record["interval"] == list(mean_interval([50, 100]) or ())  # of problems, not of answers
    turns = [*one["turns"], *other["turns"]]
    assert len({turn["new_tokens"] for turn in turns} | {str(turn["kv_bytes"]) for turn in turns}) > 1
    for sample in (one, other):
        read = sample["cost"]["prompt_tokens"]
        for turn in sample["turns"]:
            assert turn["cut"] is (turn["new_tokens"] == 70)
            read_of = [(tokens, nbytes) for tokens, nbytes in turn["kv_bytes"]]
            assert [tokens for tokens, _ in read_of] == [0, *([64] if turn["new_tokens"] > 64 else []), read_of[-1][0]]
            a_token = read_of[0][1] / read
            assert all(abs(nbytes - a_token * (read + tokens)) <= a_token for tokens, nbytes in read_of)
    assert record["values"]["answer_tokens"] == fmean(turn["new_tokens"] for turn in turns)
    assert record["values"]["answers_cut_percent"] == 100 * fmean(turn["cut"] for turn in turns)


def boxed(texts: Any) -> Any:
    """Return what stands for an answer, with a text of one's own and the true length."""
    from rocketkv.eval.answers import Written

    return lambda answer, **fields: Written(answer=next(texts), **fields)


def test_several_answers_need_sampling() -> None:
    with pytest.raises(ValueError, match="answers must be 1 where generation is greedy, got 4; use"):
        Plan(answers=4)
    asked = Plan(answers=4, generation="card", tasks=("aime24",))
    with pytest.raises(ValueError, match=r"answers must be 1 where the model's card is greedy \(no do_sample\), got 4"):
        cells(asked, Loaded(chat=False, sampling={"repetition_penalty": 1.1}))
    assert [task.name for task in find_tasks(["math"])] == ["aime24", "aime25", "math500"]


def test_a_missing_package_shows_before_any_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    require = TASKS["aime24"].require
    assert require is not None
    with pytest.raises(ImportError, match=r"not installed: pip install 'rocketkv\[math\]'"):
        require()
