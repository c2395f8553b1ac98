"""`rocketkv tune`: windows, search, certificate, the file that `patch` takes; a run goes on where it stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from scipy.stats import beta
from transformers import AutoModelForCausalLM

import eval_case
import rocketkv
from rocketkv.cli.main import main
from rocketkv.eval import tune as tuning
from rocketkv.eval.intervals import at_least, mean_interval
from rocketkv.eval.measures.kl import decode_logprobs, divergence
from rocketkv.eval.methods import Compressed, Full
from rocketkv.eval.tune import Measured, Text, TuneSettings, certificate, cut_windows, largest_within

PROMPT, STEPS, WINDOWS = 500, 3, 4
SMALL = {"prompt": PROMPT, "steps": STEPS, "windows": WINDOWS}
LADDER = (0.4, 0.28, 0.2)  # whose mean KL is about 0.15, 0.08 and 0.06
NOTHING, ALL = 0.001, 100.0  # targets that no candidate keeps, and that all do


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eval_case.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def short_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "LADDER", LADDER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two texts."""
    for number, name in enumerate(("a.txt", "b.txt")):
        (tmp_path / name).write_bytes(words(number, 1200).encode() + b"\r\n")
    return tmp_path


def words(seed: int, count: int) -> str:
    """Return a text that does not repeat itself, unlike that of `eval_case`."""
    known = eval_case.words(0, 40).split()
    return " ".join(random.Random(seed).choices(known, k=count))


def arguments(folder: Path, model: Path, target: float, *options: Any) -> list[str]:
    sizes = [part for name, value in SMALL.items() for part in (f"--{name}", value)]
    given = ["tune", model, folder / "a.txt", folder / "b.txt", "--target-kl", target, "--threads", 1]
    return [str(part) for part in (*given, *sizes, "-o", folder / "out.json", *options)]


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> list[tuple[str, float]]:
    """List what is measured from now on; interrupt the measurement of a number."""
    found: list[tuple[str, float]] = []
    measure = tuning.Measurer._figures

    def counting(self: Any, window: Any, config: Any) -> tuple[float, float]:
        if len(found) + 1 == stop_at:
            raise KeyboardInterrupt
        found.append((window.id, config.max_error))
        return measure(self, window, config)

    monkeypatch.setattr(tuning.Measurer, "_figures", counting)
    return found


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_bisection_finds_the_largest_within_the_target(count: int) -> None:
    ladder = [1 / number for number in range(2, count + 2)]
    for place in range(count + 1):
        asked: list[float] = []

        def within(value: float, place: int = place, asked: list[float] = asked) -> bool:
            asked.append(value)
            return ladder.index(value) >= place

        found = largest_within(ladder, within)
        assert found == (ladder[place] if place < count else None)
        assert len(asked) == len(set(asked)) <= count.bit_length()
        assert found is None or found in asked


@pytest.mark.parametrize(("right", "count"), [(9, 12), (12, 12), (1, 3), (0, 5)])
def test_the_bound_of_a_share_is_clopper_and_pearsons(right: int, count: int) -> None:
    expected = beta.ppf(0.05, right, count - right + 1) if right else 0.0
    assert at_least(right, count) == pytest.approx(expected, abs=1e-9)


def test_certificate_figures() -> None:
    kl = [0.01, 0.02, 0.03, 0.015]
    found = certificate(Measured(0.1, kl, [0.5, 0.4, 0.6, 0.5]), 0.02)
    assert found == {
        "windows": 4,
        "within_target": 3,
        "share_at_least": pytest.approx(float(beta.ppf(0.05, 3, 2))),
        "confidence": 0.95,
        "mean_kl": pytest.approx(0.01875),
        "interval": list(mean_interval(kl, percent=False) or ()),
        "stored_share": pytest.approx(0.5),
        "largest_kl": 0.03,
    }


def settings(**fields: Any) -> TuneSettings:
    return TuneSettings(model="tiny", target_kl=0.1, **{**SMALL, **fields})


def test_windows_do_not_overlap_and_halves_are_apart() -> None:
    tokenizer = eval_case.tokenizer()
    texts = [Text(name, words(number, 4000)) for number, name in enumerate("ab")]
    calibration, held_out = cut_windows(tokenizer, texts, settings(windows=10))
    assert len(calibration) == len(held_out) == 5
    for text in texts:
        tokens = tokenizer(text.content)["input_ids"]
        ends = []
        for half, windows in enumerate((calibration, held_out)):
            own = [window for window in windows if window.notes["text"] == text.name]
            assert len(own) == (3 if text.name == "a" else 2)
            for window in own:
                offset = int(window.id.split()[1])
                assert window.ids == tokens[offset : offset + PROMPT + STEPS]
                assert half * (len(tokens) // 2) - 4 <= offset <= (half + 1) * len(tokens) // 2 - len(window.ids)
                ends.append((offset, offset + len(window.ids)))
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
    assert cut_windows(tokenizer, texts, settings(windows=10))[0] == calibration
    assert cut_windows(tokenizer, texts, settings(windows=10, seed=1))[0] != calibration


def test_a_run_writes_what_patch_takes(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = counted(monkeypatch)
    assert main(arguments(folder, model_folder, NOTHING)) == 1
    assert f"No max_error keeps the mean KL within {NOTHING}" in capsys.readouterr().out
    assert not (folder / "out.json").exists()
    assert [max_error for _, max_error in measured[::2]] == [LADDER[1], LADDER[2]]
    assert main(arguments(folder, model_folder, ALL)) == 0
    output = capsys.readouterr().out
    assert not (folder / "out.json.journal").exists()
    assert len(set(measured)) == len(measured)  # the first run's figures were taken from the journal
    found = figures(folder)
    assert [row["max_error"] for row in found["calibration"]["candidates"]] == list(LADDER[:2])
    assert found["settings"]["max_error"] == LADDER[0]
    assert found["certificate"]["windows"] == found["certificate"]["within_target"] == WINDOWS // 2
    assert found["certificate"]["share_at_least"] == pytest.approx(0.05 ** (2 / WINDOWS))
    assert found["measured_with"]["texts"] == [
        {"name": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name in ("a.txt", "b.txt")
    ]
    assert "2 windows are within 100" in output
    assert "This is the largest candidate" in output
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with rocketkv.patch(model, folder / "out.json") as handle:
        assert handle.config == rocketkv.RocketKVConfig(method="rocketkv+", max_error=LADDER[0])


def test_the_largest_within_the_target_is_chosen(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, model_folder, ALL)) == 0
    upper = [row["interval"][1] for row in figures(folder)["calibration"]["candidates"]]
    assert upper[1] < 0.9 * upper[0]
    capsys.readouterr()
    for target, chosen in (((upper[0] + upper[1]) / 2, LADDER[1]), (1.01 * upper[0], LADDER[0])):
        assert main(arguments(folder, model_folder, target)) == 0
        found = figures(folder)
        within = {row["max_error"]: row["interval"][1] <= target for row in found["calibration"]["candidates"]}
        assert within == {LADDER[0]: chosen == LADDER[0], LADDER[1]: True}
        assert found["settings"]["max_error"] == chosen
        assert found["target_kl"] == target
        assert ("This is the largest candidate" in capsys.readouterr().out) == (chosen == LADDER[0])


def test_figures_are_those_of_a_loop_from_the_first_token(folder: Path, model_folder: Path) -> None:
    assert main(arguments(folder, model_folder, ALL)) == 0
    found = figures(folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    texts = [Text(name, (folder / name).read_bytes().decode()) for name in ("a.txt", "b.txt")]
    _, held_out = cut_windows(eval_case.tokenizer(), texts, settings())
    config = rocketkv.RocketKVConfig(method="rocketkv+", max_error=found["settings"]["max_error"])
    kl = []
    for window in held_out:
        parts = window.ids[:PROMPT], window.ids[PROMPT:]
        full, ours = (decode_logprobs(model, method, *parts) for method in (Full(), Compressed(config)))
        kl.append(divergence(full, ours, parts[1])["kl"])
    assert found["certificate"]["mean_kl"] == pytest.approx(fmean(kl), rel=1e-3)
    assert min(kl) > 1e-3


def test_an_interrupted_run_goes_on(folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        whole = counted(patched)
        assert main(arguments(folder, model_folder, ALL)) == 0
    expected = (folder / "out.json").read_bytes()
    (folder / "out.json").unlink()
    with monkeypatch.context() as patched:
        first = counted(patched, stop_at=4)
        assert main(arguments(folder, model_folder, ALL)) == 130
    assert not (folder / "out.json").exists()
    with (folder / "out.json.journal").open("ab") as journal:
        journal.write(b'["a line that a kill')
    rest = counted(monkeypatch)
    assert main(arguments(folder, model_folder, ALL)) == 0
    assert first + rest == whole
    assert (folder / "out.json").read_bytes() == expected
    assert not (folder / "out.json.journal").exists()


def test_a_journal_of_another_model_or_setting_is_not_used(
    folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(arguments(folder, model_folder, NOTHING)) == 1
    other = eval_case.save(tmp_path / "other")
    eval_case.model(seed=1).save_pretrained(other)
    for given, options in ((other, ()), (model_folder, ("--dtype", "bfloat16"))):
        measured = counted(monkeypatch)
        assert main(arguments(folder, given, NOTHING, *options)) == 1
        assert len(measured) == 2 * WINDOWS // 2


def test_prompts_that_do_not_fit_in_memory_are_read_again(
    folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = tuning.read_prompt

    def counting(model: Any, prompts: Any) -> Any:
        reads.append(len(prompts))
        return read(model, prompts)

    monkeypatch.setattr(tuning, "read_prompt", counting)
    assert main(arguments(folder, model_folder, ALL)) == 0
    expected = (folder / "out.json").read_bytes()
    assert len(reads) == WINDOWS  # each once
    reads.clear()
    monkeypatch.setattr(tuning, "KEPT_BYTES", 0)
    assert main(arguments(folder, model_folder, ALL)) == 0
    assert len(reads) == WINDOWS // 2 * 3
    assert (folder / "out.json").read_bytes() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "100"], "prompt must be at least 128 tokens, got 100"),
        (["--steps", "1"], "steps must be at least 2"),
        (["--windows", "5"], "windows must be even and at least 4"),
        (["--method", "streaming"], "max_error=0.4 is for methods that rank tokens by attention"),
        (["--prompt", "4096"], "a.txt must have at least 8198 tokens for 2 windows of 4099"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(
    options: list[str], message: str, folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, model_folder, 0.1, *options)) == 2
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()[-1:]
    assert line.startswith("rocketkv tune: error: ")
    assert message in line
    assert captured.out == ""
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.txt", None, "No such file"),
        ("b.txt", b"\xff\xfe", "b.txt must be a text in UTF-8"),
        ("b.txt", b"the same", "texts must have different names and contents"),
    ],
    ids=["missing", "binary", "twice"],
)
def test_texts_that_cannot_be_used(
    name: str, content: bytes | None, message: str, folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
        (folder / "a.txt").write_bytes(b"the same")
    assert main(arguments(folder, model_folder, 0.1)) == 2
    assert message in capsys.readouterr().err


def test_a_target_must_be_above_0(capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("0", "-1", "nan", "few"):
        with pytest.raises(SystemExit, match="2"):
            main(["tune", "smollm2", "text", "--target-kl", target])
        assert f"--target-kl: must be a number above 0, got '{target}'" in capsys.readouterr().err
