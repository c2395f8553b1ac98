"""lm-eval's command line and harness with the methods in them: stock tasks, log-likelihoods, and caches of answers."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval._cli import HarnessCLI

from eval_case import make_session, save, tokenizer, words
from presses import KeepFirst, module
from rocketkv.cli.main import main
from rocketkv.eval.lm import RocketKVLM
from rocketkv.eval.lm_eval_cli import set_model
from rocketkv.eval.methods import Full, find_method
from rocketkv.eval.records import records
from rocketkv.eval.sweep.cells import Session, run_whole
from rocketkv.eval.sweep.plan import Loaded, Plan, cells
from rocketkv.eval.sweep.run import run_cells
from rocketkv.hf.loading import load_model
from tiny import NEVER

WORDS = tokenizer()
BUDGET = 40
ROWS = [{"text": words(n, 50), "question": f"what is number {n}?", "right": f"{n}", "gold": n % 2} for n in range(4)]
CHOICES = [" the grass", " is green"]

pytestmark = pytest.mark.filterwarnings("ignore:log-likelihoods are computed by teacher-forced decoding")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of lm-eval's own kind, over a local file."""
    found = tmp_path_factory.mktemp("tasks")
    data = found / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    (found / "mine_generate.yaml").write_text(
        f"task: mine_generate\n{common}"
        'output_type: generate_until\ndoc_to_text: "{{text}} {{question}}"\ndoc_to_target: "{{right}}"\n'
        "generation_kwargs: {do_sample: false, until: [], max_gen_toks: 6}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1.0}\n",
        encoding="utf-8",
    )
    (found / "mine_choice.yaml").write_text(
        f"task: mine_choice\n{common}"
        'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{gold}}"\n'
        f"doc_to_choice: {json.dumps(CHOICES)}\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1.0}\n",
        encoding="utf-8",
    )
    (found / "mine.yaml").write_text("group: mine\ntask: [mine_generate, mine_choice]\n", encoding="utf-8")
    return found


@pytest.fixture(autouse=True)
def _own_tasks_alone(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare lm-eval the reading of its thousands of task files, and find ours without being told where they are."""
    from lm_eval.tasks import TaskManager

    begin = TaskManager.__init__

    def begun(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs | {"include_defaults": False, "include_path": str(tasks)})

    monkeypatch.setattr(TaskManager, "__init__", begun)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def evaluate(folder: Path, tasks: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Run `rocketkv lm-eval` on a task; return its results and its samples."""
    calls = 0

    def run(task: str, model_args: str, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        nonlocal calls
        calls += 1
        out = tmp_path / f"out{calls}"
        arguments = [
            "lm-eval", "--tasks", task, "--include_path", str(tasks), "--model_args",
            f"pretrained={folder},{model_args}",
            "--output_path", str(out), "--log_samples", "--device", "cpu", "--batch_size", "1", *more,
        ]  # fmt: skip
        assert main(arguments) == 0
        (results,) = out.rglob("results_*.json")
        (logged,) = out.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in logged.read_text(encoding="utf-8").splitlines()]
        return json.loads(results.read_text(encoding="utf-8")), sorted(lines, key=lambda line: line["doc_id"])

    return run


def replies(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["resps"][0][0] for sample in samples]


def test_a_stock_task_runs_by_a_method(folder: Path, evaluate: Any) -> None:
    results, samples = evaluate("mine_generate", f"method=streaming,token_budget={BUDGET}")
    config = results["config"]
    assert (config["model"], config["method"], config["token_budget"]) == ("rocketkv", "streaming", BUDGET)
    assert results["results"]["mine_generate"]["exact_match,none"] == 0.0
    model, words_of = load_model(str(folder))
    method = find_method("streaming", BUDGET)
    for row, sample in zip(ROWS, samples, strict=True):
        ids = torch.tensor([words_of(f"{row['text']} {row['question']}")["input_ids"]])
        with method.attached(model):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert sample["resps"][0][0] == words_of.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    costs = config["costs"]
    assert len(costs) == len(ROWS)
    for cost in costs:
        assert cost["new_tokens"] <= 6
        assert cost["kv_bytes"] > 0
    _, stock = evaluate("mine_generate", "method=full")
    assert replies(stock) != replies(samples)


def test_the_librarys_settings_are_model_arguments(folder: Path) -> None:
    lm = RocketKVLM(str(folder), token_budget="64", window_size=16, device="cpu")
    assert (lm.method.name, lm.method.token_budget) == ("rocketkv+", 64)
    assert lm.method.config.window_size == 16  # type: ignore[attr-defined]
    assert RocketKVLM(str(folder), device="cpu").method.token_budget is not None
    with pytest.raises(ValueError, match="takes neither a budget nor settings"):
        RocketKVLM(str(folder), method="full", window_size=16)


def stock_logprob(folder: Path, context: str, choice: str) -> tuple[float, bool]:
    """Score a continuation by one forward of the stock model, in the plainest way."""
    model, words_of = load_model(str(folder))
    whole = torch.tensor([words_of(context + choice)["input_ids"]])
    length = len(words_of(context)["input_ids"])
    with torch.no_grad():
        rows = model(whole).logits[0, length - 1 : -1].log_softmax(-1)
    targets = whole[0, length:]
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(1) == targets).all())


@pytest.mark.parametrize("method", ["method=full", "method=rocketkv,token_budget=4096"])
def test_log_likelihoods_over_the_full_cache_are_those_of_one_forward(method: str, folder: Path, evaluate: Any) -> None:
    _, samples = evaluate("mine_choice", method)
    for row, sample in zip(ROWS, samples, strict=True):
        for choice, (reply,) in zip(CHOICES, sample["resps"], strict=True):
            expected, greedy = stock_logprob(folder, row["text"], choice)
            assert float(reply[0]) == pytest.approx(expected, abs=1e-4)
            assert str(reply[1]) == str(greedy)


def test_a_small_budget_shows_in_log_likelihoods(folder: Path, evaluate: Any) -> None:
    _, samples = evaluate("mine_choice", "method=streaming,token_budget=16,window_size=4,decode_reserve=4")
    differences = [
        abs(float(reply[0]) - stock_logprob(folder, row["text"], choice)[0])
        for row, sample in zip(ROWS, samples, strict=True)
        for choice, (reply,) in zip(CHOICES, sample["resps"], strict=True)
    ]
    assert max(differences) > 0.1


def test_it_is_said_that_log_likelihoods_take_steps(folder: Path) -> None:
    lm = RocketKVLM(str(folder), method="full", device="cpu")
    with pytest.warns(UserWarning, match="teacher-forced decoding, a step a token"):
        lm._loglikelihood_tokens([(("a", "b"), [5, 6], [7])], disable_tqdm=True)


@pytest.mark.parametrize("task", ["mine_generate", "mine_choice"])
def test_a_cache_of_answers_is_one_methods_alone(task: str, tmp_path: Path, evaluate: Any) -> None:
    cache = tmp_path / "answers"
    arms = [f"method=streaming,token_budget={BUDGET}", "method=streaming,token_budget=24"]
    cached = [replies(evaluate(task, arm, "--use_cache", str(cache))[1]) for arm in arms]
    assert cached[0] != cached[1]
    assert len(list(tmp_path.glob("answers-*"))) == len(arms)
    with pytest.MonkeyPatch.context() as patched:  # now they come from the cache: the model is not asked again
        for name in ("_loglikelihood_tokens", "_model_generate"):
            patched.setattr(RocketKVLM, name, lambda *_, **__: pytest.fail("asked again"))
        again = [replies(evaluate(task, arm, f"--use_cache={cache}")[1]) for arm in arms]
    assert again == cached


def test_a_rolling_log_likelihood_is_the_methods_and_cached_by_its_text(folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook

    lm = RocketKVLM(str(folder), method="full", device="cpu")
    hook = CacheHook(None)
    hook.dbdict = {}
    lm.cache_hook = hook
    text = words(1, 40)
    (total,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ids = torch.tensor([[lm.prefix_token_id, *WORDS(text)["input_ids"]]])
    with torch.no_grad():
        rows = lm.model(ids).logits[0, :-1].log_softmax(-1)
    assert total == pytest.approx(float(rows.gather(1, ids[0, 1:, None]).sum()), abs=1e-3)
    assert list(hook.dbdict.values()) == [total]


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["lm_eval", *arguments])
    args: argparse.Namespace = HarnessCLI().parse_args()
    set_model(args)
    return args


def test_every_model_argument_is_in_the_name_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        ("--model_args", "pretrained=a/b,method=quest,token_budget=8"),
        ("--model_args", "pretrained=a/b,method=quest,token_budget=16"),
        ("--model_args", "pretrained=a/c,method=quest,token_budget=8"),
        ("--model_args", "pretrained=a/b,method=quest,token_budget=8,window_size=4"),
        ("-a", "pretrained=a/b", "method=snapkv", "token_budget=8"),
        ("--model_args", '{"method": "quest"}'),
        (),
    ]
    files = []
    for method in ("quest", "snapkv"):
        file = tmp_path / f"{method}.yaml"
        file.write_text(f"model_args: {{method: {method}}}\nuse_cache: cache\n", encoding="utf-8")
        files.append(("--config", str(file), "--limit", "1"))
    caches = [parsed(monkeypatch, *arguments, "--use_cache", "cache").use_cache for arguments in asked]
    caches += [parsed(monkeypatch, *arguments).use_cache for arguments in files]
    assert all(cache.startswith("cache-") for cache in caches)
    assert len(set(caches)) == len(asked) + len(files)
    assert parsed(monkeypatch, *asked[0], "-c", "cache").use_cache == caches[0]
    assert parsed(monkeypatch, *asked[0]).use_cache is None


def test_the_model_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--tasks", "a"], ["run", "--tasks", "a"], ["--model=rocketkv", "--tasks", "a"]):
        assert parsed(monkeypatch, *arguments).model == "rocketkv"
    file = tmp_path / "hf.yaml"
    file.write_text("model: hf\n", encoding="utf-8")
    for arguments in (["--model", "hf"], ["--model=hf", "--limit", "1"], ["-M", "hf"], ["--config", str(file)]):
        with pytest.raises(ValueError, match="runs the model 'rocketkv', got --model hf; use lm_eval for others"):
            parsed(monkeypatch, *arguments)


@pytest.fixture
def session(folder: Path, tmp_path: Path) -> Session:
    return make_session(folder, tmp_path)


def stock_cells(task: str, **fields: Any) -> list[Any]:
    known: dict[str, Any] = {"tasks": (f"lm-eval:{task}",), "methods": ("full", "rocketkv"), "budgets": (BUDGET,)}
    return cells(Plan(**{"model": "tiny", "samples": 2, "max_new_tokens": 5, **known, **fields}), Loaded(chat=False))


def test_a_stock_task_is_a_cell_of_a_sweep(session: Session) -> None:
    made = [run_whole(session, cell) for cell in stock_cells("mine_generate")]
    for record in made:
        assert record["metric"] == "exact_match"
        assert [sample["id"] for sample in record["samples"]] == ["0", "1"]
        assert len({sample["prompt_sha256"] for sample in record["samples"]}) == 2
        for row, sample in zip(ROWS, record["samples"], strict=False):
            assert sample["turns"][0]["answers"] == [row["right"]]
            prompt = f"{row['text']} {row['question']}"
            assert sample["cost"]["prompt_tokens"] == len(WORDS(prompt)["input_ids"])
            assert sample["cost"]["new_tokens"] <= 5
            assert sample["cost"]["kv_bytes"] > 0
    full, ours = ([sample["prompt_sha256"] for sample in record["samples"]] for record in made)
    assert full == ours
    replies = [[sample["turns"][0]["prediction"] for sample in record["samples"]] for record in made]
    assert replies[0] != replies[1]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stock_tasks_prompt_is_in_the_chat_template_where_asked(chat: bool, session: Session) -> None:
    (cell,) = stock_cells("mine_generate", methods=("full",), samples=1, chat=chat)
    (sample,) = run_whole(session, cell)["samples"]
    prompt = f"{ROWS[0]['text']} {ROWS[0]['question']}"
    ids = WORDS(f"<|user|>{prompt}<|end|><|assistant|>" if chat else prompt)["input_ids"]
    assert sample["cost"]["prompt_tokens"] == len(ids)


def test_a_stock_task_that_generates_nothing_is_refused(session: Session) -> None:
    for task, message in (
        ("mine_choice", "must generate text and score it with a number; its output type is multiple_choice"),
        ("mine", "must be a single task, but 'mine' is a group of lm-eval: name its tasks one by one"),
        ("mine_generated", "must be a single task, but 'mine_generated' is no task of lm-eval"),
    ):
        with pytest.raises(ValueError, match=message):  # before any cell has run
            run_cells(session, [*stock_cells("mine_generate"), *stock_cells(task, methods=("full",))])
    assert not list(records(session.results))


def test_logs_and_warnings_of_a_stock_task_are_shown(
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    generate = RocketKVLM._model_generate

    def loud(self: RocketKVLM, *args: Any, **kwargs: Any) -> torch.Tensor:
        sys.stderr.write("decode steps run on PyTorch\n")
        logging.getLogger("lm_eval").warning("a warning of lm-eval")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(RocketKVLM, "_model_generate", loud)
    run_whole(session, stock_cells("mine_generate", methods=("full",), samples=1)[0])
    assert "decode steps run on PyTorch" in capsys.readouterr().err
    assert "a warning of lm-eval" in caplog.text


def test_batches_are_for_methods_that_pad(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "kvpress", KeepFirst=KeepFirst)
    lm = RocketKVLM(str(folder), method="full", device="cpu")
    lm.model.generation_config.eos_token_id = NEVER
    rows = torch.tensor([WORDS(words(n, 30))["input_ids"][:40] for n in (1, 2)])
    mask = torch.ones_like(rows)
    for method in (Full(), find_method("rocketkv", 24, {"window_size": 8, "decode_reserve": 8})):
        lm.method = method
        both = lm._model_generate(rows, 46, [], attention_mask=mask)
        for row in range(2):
            alone = lm._model_generate(rows[row : row + 1], 46, [], attention_mask=mask[:1])
            assert torch.equal(both[row], alone[0])
    lm.method = find_method("kvpress:KeepFirst", 24)
    with pytest.raises(ValueError, match=r"'kvpress:KeepFirst' makes a cache for one sequence, got 2; set batch_size"):
        lm._model_generate(rows, 46, [], attention_mask=mask)
    lm.tok_batch_encode(["a prompt"])
    lm._model_generate(rows[:1], 46, [], attention_mask=mask[:1])
    cost = lm.costs["a prompt"]
    assert (
        cost["kv_bytes"] == (24 + 5) * 2 * 2 * 2 * 16 * 4
    )  # kept, and written after: layers, heads, K and V, channels
