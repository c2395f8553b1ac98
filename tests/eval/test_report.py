"""The report's figures against figures worked out by hand from made records, in every format."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from made_records import HARDWARE, made_record, write_all
from made_report import cells, made_arms
from rocketkv.eval.records import Record
from rocketkv.eval.report import write as report
from rocketkv.eval.report.arms import Arm, arms_of
from rocketkv.eval.report.depths import depth_maps
from rocketkv.eval.report.provenance import provenance
from rocketkv.eval.report.sections import Section, sections

FULL, ROCKET, SNAP, QUEST = Arm("full", None), Arm("rocketkv", 512), Arm("snapkv", 512), Arm("quest", 512)


def section_of(records: Sequence[Record]) -> Section:
    (section,) = sections(records)
    return section


def column(section: Section, name: str) -> Any:
    return next(c for c in (*section.scores, *section.distances, *section.latency) if c.name == name)


def test_scores_and_differences_by_hand() -> None:
    section = section_of(made_arms())
    assert section.arms == (FULL, ROCKET, SNAP, QUEST)
    a, b, kl = (column(section, name) for name in ("a", "b", "kl"))
    assert a.figures[FULL].score == 75
    assert a.figures[FULL].interval == (30.1, 95.4)
    assert a.figures[FULL].difference is None
    assert (a.figures[ROCKET].score, a.figures[ROCKET].difference, a.figures[ROCKET].paired) == (50, -25, 4)
    assert a.figures[ROCKET].difference_interval == pytest.approx((-75, 0))
    assert (b.figures[ROCKET].score, b.figures[ROCKET].difference) == (60, -15)
    assert b.figures[ROCKET].difference_interval == pytest.approx((-20, -10))
    assert (kl.figures[ROCKET].score, kl.figures[ROCKET].difference) == (0.5, 0.5)
    assert [c.name for c in section.scores] == ["a", "b"]
    assert [c.name for c in section.distances] == ["kl"]


def test_arms_are_compared_on_the_samples_that_both_have() -> None:
    section = section_of(made_arms())
    figure = column(section, "a").figures[SNAP]
    assert (figure.samples, figure.paired) == (3, 3)
    assert figure.score == pytest.approx(100 / 3)
    assert figure.difference == pytest.approx(100 / 3 - 200 / 3)
    assert "snapkv 512 on a: 3 samples, full 4; compared on the 3 in common." in section.notes


def test_a_sample_of_another_prompt_is_not_compared() -> None:
    other = made_record([0, 0, 0, 100], task="a", method="rocketkv", token_budget=512, prompts={"0000": "another"})
    figure = column(section_of([made_record([100, 0, 100, 100], task="a"), other]), "a").figures[ROCKET]
    assert (figure.samples, figure.paired) == (4, 3)
    assert figure.difference == pytest.approx(100 / 3 - 200 / 3)


def test_without_common_samples_there_is_no_difference() -> None:
    other = made_record([100, 0], task="a", method="rocketkv", token_budget=512, ids=["x", "y"])
    section = section_of([made_record([100, 0], task="a"), other])
    assert column(section, "a").figures[ROCKET].difference is None
    assert column(section, "a").figures[ROCKET].score == 50
    assert section.notes == ("rocketkv 512 on a: 2 samples, full 2; none in common: not compared.",)


def test_without_a_full_cache_scores_stand_alone() -> None:
    section = section_of([record for record in made_arms() if record["cell"]["method"] != "full"])
    assert column(section, "a").figures[ROCKET].score == 50
    assert column(section, "a").figures[ROCKET].difference is None
    assert section.mean[ROCKET].difference is None
    assert section.costs[0].rows[ROCKET]["kv_bytes"].ratio is None


def test_mean_is_over_the_tasks_that_all_arms_have() -> None:
    section = section_of(made_arms())
    assert section.common == ("a",)  # snapkv has no `b`
    assert section.mean[ROCKET].score == 50
    assert "Not in the mean: b, without a score of snapkv 512." in section.notes

    section = section_of([record for record in made_arms() if record["cell"]["method"] != "snapkv"])
    assert section.common == ("a", "b")
    assert section.mean[FULL].score == (75 + 75) / 2
    assert section.mean[ROCKET].score == (50 + 60) / 2
    assert section.mean[ROCKET].difference == (-25 - 15) / 2
    assert section.mean[ROCKET].paired == 6


def test_an_arm_out_of_memory_has_no_mean_and_takes_no_task_from_others() -> None:
    section = section_of([record for record in made_arms() if record["cell"]["method"] != "snapkv"])
    assert column(section, "b").figures[QUEST].status == "out_of_memory"
    assert (section.mean[QUEST].status, section.mean[QUEST].score) == ("out_of_memory", None)
    assert QUEST not in [point.arm for point in section.points]
    assert "Without a mean, because memory did not suffice for every task: quest 512." in section.notes


def test_of_two_records_of_a_cell_the_larger_counts() -> None:
    few, many = made_record([0], task="a"), made_record([100, 100], task="a")
    for records in ([few, many], [many, few]):
        section = section_of(records)
        assert column(section, "a").figures[FULL].score == 100
        assert "full on a: of two records, the one with more samples is shown." in section.notes


def test_sections_part_what_is_not_compared() -> None:
    records = [
        made_record([100], length=length, mode=mode)
        for length in (8192, 4096, None)
        for mode in ("aware", "agnostic")
    ]  # fmt: skip
    assert [section.title for section in sections(records)] == [
        "4096 tokens, query-aware",
        "8192 tokens, query-aware",
        "the data's own lengths, query-aware",
        "4096 tokens, query-agnostic",
        "8192 tokens, query-agnostic",
        "the data's own lengths, query-agnostic",
    ]


def test_settings_name_an_arm_only_where_a_task_has_several() -> None:
    rocket: dict[str, Any] = {"method": "rocketkv", "token_budget": 512}
    by_task = [
        made_record([1], task=task, settings={"decode_reserve": n}, **rocket) for task, n in (("a", 8), ("b", 9))
    ]
    assert [arm.name for arm in arms_of(by_task)] == ["rocketkv 512", "rocketkv 512"]
    twins = [made_record([1], task="a", settings=settings, **rocket) for settings in ({}, {"window_size": 64})]
    assert [arm.name for arm in arms_of(twins)] == [
        "rocketkv 512 (window_size=default)",
        "rocketkv 512 (window_size=64)",
    ]
    full = [made_record([1], task="a", settings=settings) for settings in ({}, {"window_size": 64})]
    assert {arm.name for arm in arms_of(full)} == {"full"}  # nothing is compressed


def test_versions_of_a_task_are_not_compared() -> None:
    old = made_record([100, 100], task="a")
    new = made_record([0, 0], task="a", method="rocketkv", token_budget=512, task_version=2)
    section = section_of([old, new])
    assert [c.name for c in section.scores] == ["a (version 1)", "a (version 2)"]
    assert column(section, "a (version 2)").figures[ROCKET].difference is None
    assert any("different versions of the task" in warning for warning in provenance([old, new]).warnings)


def test_points_of_the_plots_by_hand() -> None:
    section = section_of([record for record in made_arms() if record["cell"]["method"] not in ("snapkv", "quest")])
    full, rocket = section.points
    assert (full.arm, full.figure.score, full.memory_share, full.step_bytes) == (FULL, 75, 1.0, 800)
    assert (rocket.figure.score, rocket.memory_share, rocket.step_seconds, rocket.step_bytes) == (55, 0.25, 0.005, 80)


def test_costs_are_the_latency_records_where_there_are_any() -> None:
    records = made_arms()
    assert section_of(records).costs[0].source == ("a",)
    kind: dict[str, Any] = {"task": "latency", "metric": "seconds a token", "higher_is_better": False}
    records += [
        made_record([0.02], cost={"step_seconds": 0.02, "peak_decode_bytes": 4e9}, **kind),
        made_record([0.01], method="rocketkv", token_budget=512, cost={"step_seconds": 0.005}, **kind),
        made_record([0.01], method="quest", token_budget=512, status="out_of_memory", **kind),
    ]
    section = section_of(records)
    assert section.costs[0].source == ("latency",)
    row = section.costs[0].rows[ROCKET]
    assert (row["step_seconds"].value, row["step_seconds"].ratio) == (0.005, 0.25)
    assert (row["peak_decode_bytes"].value, row["peak_decode_bytes"].ratio) == (None, None)
    assert section.costs[0].out_of_memory == (QUEST,)
    assert next(point for point in section.points if point.arm == ROCKET).step_seconds == 0.005
    rows = cells(report.markdown(report.gather(records)), "Cost")
    assert rows["full"] == ["20.0", "4.00"]
    assert rows["rocketkv 512"] == ["5.00, 0.25x", "-"]
    assert set(rows["quest 512"]) == {"OOM"}
    assert set(rows["snapkv 512"]) == {"-"}
    assert "latency" not in dict(report.gather(records).facts)["Tasks"]


def test_figures_of_two_machines_stand_in_two_tables() -> None:
    kind: dict[str, Any] = {"task": "latency", "metric": "seconds a token", "higher_is_better": False}
    other = HARDWARE | {"device": "slow"}
    records = [
        *made_arms(),
        made_record([0.02], cost={"step_seconds": 0.02}, **kind),
        made_record([0.01], method="rocketkv", token_budget=512, cost={"step_seconds": 0.01}, **kind),
        made_record([0.9], method="quest", token_budget=512, cost={"step_seconds": 0.9}, hardware=other, **kind),
    ]
    section = section_of(records)
    first, second = section.costs
    assert ("H100" in first.machine, "slow" in second.machine) == (True, True)
    assert (list(first.rows), list(second.rows)) == ([FULL, ROCKET], [QUEST])
    assert first.rows[ROCKET]["step_seconds"].ratio == 0.5
    assert second.rows[QUEST]["step_seconds"] == (0.9, None)  # the full cache was not timed there
    assert {point.arm: point.step_seconds for point in section.points}.get(QUEST) is None
    text = report.markdown(report.gather(records))
    assert list(cells(text, f"Cost, {section.title}, cores 16, device NVIDIA")) == ["Method", "full", "rocketkv 512"]
    assert list(cells(text, f"Cost, {section.title}, cores 16, device slow")) == ["Method", "quest 512"]
    assert "Machine: cores 16, device slow" in text
    rows = list(csv.DictReader(io.StringIO(report.csv_text(report.gather(records)))))
    assert [row["step_seconds_ratio"] for row in rows if row["task"] == "latency"] == ["1.0", "0.5", "", ""]
    assert {row["method"]: "slow" in row["machine"] for row in rows if row["task"] == "latency"} == {
        "full": False, "rocketkv": False, "snapkv": False, "quest": True,
    }  # fmt: skip


def test_markdown_by_hand() -> None:
    text = report.markdown(report.gather(made_arms()))
    rows = cells(text, "Scores, 4096 tokens, query-agnostic")
    assert rows["Method"] == ["mean of 1 task", "a", "b"]
    assert rows["full"][1:] == ["75.0, (30.1 to 95.4)", "75.0"]
    assert rows["rocketkv 512"] == ["50.0, -25.0 (-75.0 to 0.0)"] * 2 + ["60.0, -15.0 (-20.0 to -10.0)"]
    assert rows["snapkv 512"][1] == "33.3, -33.3 (-100.0 to 0.0)"
    assert rows["snapkv 512"][2] == "-"
    assert rows["quest 512"][0] == "OOM"
    assert rows["quest 512"][2] == "OOM"
    assert cells(text, "Distances")["rocketkv 512"] == ["0.500, +0.500 (+0.250 to +0.750)", "9.00"]
    assert cells(text, "Distances")["snapkv 512"] == ["-", "-"]
    assert "compared on the 3 in common" in text


def test_csv_has_the_figures_of_the_markdown() -> None:
    made = report.gather(made_arms())
    rows = list(csv.DictReader(io.StringIO(report.csv_text(made))))
    by_place = {(row["method"], row["task"]): row for row in rows}
    assert len(rows) == 4 * (3 + 1)  # arms; tasks and the mean
    markdown = cells(report.markdown(made), "Scores")
    tasks = ["mean", *markdown["Method"][1:]]
    for name, texts in markdown.items():
        for task, text in zip(tasks, texts, strict=True):
            if name == "Method":
                continue
            row = by_place[name.split()[0], task]
            status = {"OOM": "out_of_memory", "-": "missing"}.get(text, "complete")
            assert row["status"] == status
            assert (row["score"] == "") == (status != "complete")
            figures = [f"{float(row[key]):.1f}" for key in ("score", "difference", "difference_low", "difference_high")
                       if row[key]]  # fmt: skip
            if row["difference"]:
                assert re.findall(r"-?[\d.]+", text) == figures
    assert by_place["rocketkv", "a"]["paired_samples"] == "4"
    assert float(by_place["rocketkv", "a"]["kv_bytes_ratio"]) == 0.25
    assert by_place["rocketkv", "kl"]["values"] == '{"perplexity": 9.0}'
    assert by_place["rocketkv", "a"]["adapter"] == "no"


def test_summary_has_the_same_figures() -> None:
    text = report.summary(made_arms())
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines()}
    assert "query-agnostic" in text.splitlines()[0]
    assert lines["rocketkv 512"][2:] == ["50.0", "(-25.0)", "50.0", "(-25.0)", "60.0", "(-15.0)", "0.500", "(+0.500)"]
    assert lines["quest 512"][2:] == ["OOM", "75.0", "(0.0)", "OOM", "-"]
    assert max(map(len, text.splitlines()[1:6])) <= 100


def test_summary_breaks_wide_tables_into_blocks() -> None:
    records = [made_record([100, 0], task=f"a_task_with_a_long_name_{n}") for n in range(7)]
    lines = report.summary(records).splitlines()[1:]
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("full") for line in lines) >= 2
    assert " ".join(lines).count("50.0") == 8  # seven tasks and their mean


def test_hostile_names_stay_text() -> None:
    hostile = "x|y](http://h/)<b>`*\n# z"
    record = made_record([100], task="=cmd()", method=hostile, token_budget=8, source="![i](http://h/i.png)")
    text = report.markdown(report.gather([record]))
    shown = re.sub(r"\\.", "", text)  # what is escaped is text
    assert not re.search(r"\]\(|<b>|`|^# z", shown, flags=re.MULTILINE)
    (row,) = [line for line in text.splitlines() if line.startswith("| x")][:1]
    assert len(re.split(r"(?<!\\)\|", row)) - 2 == 2  # two cells: the bar in the name parts none
    rows = list(csv.reader(io.StringIO(report.csv_text(report.gather([record])))))
    assert rows[1][4] == "'=cmd()"
    assert rows[1][6] == hostile
    assert "\x1b" not in report.summary([made_record([100], task="\x1b[2J")])


def test_depth_maps_by_hand() -> None:
    depths = [{"depth": 0.0}, {"depth": 0.501}, {"depth": 0.499}, {"depth": 1.0}]
    records = [
        made_record([100, 100, 0, 100], task="needle_grid", notes=depths),
        made_record([0, 0, 0, 100], task="needle_grid", notes=depths, length=8192),
        made_record(
            [0] * 4, task="needle_grid", notes=depths, status="out_of_memory", method="quest", token_budget=512
        ),
        made_record([100], task="plain"),
    ]
    (found,) = depth_maps(records)
    assert (found.task, found.depths, found.lengths) == ("needle_grid", ("0 %", "50 %", "100 %"), ("4096", "8192"))
    assert found.cells[FULL, "50 %", "4096"] == (50, 2)
    assert found.cells[FULL, "0 %", "8192"] == (0, 1)
    assert found.cells[QUEST, "0 %", "4096"] == "OOM"
    assert (QUEST, "0 %", "8192") not in found.cells
    text = report.markdown(report.gather(records)).split("## Scores by depth: needle_grid")[1]
    assert "| 50 % | 50 | 0 |" in text
    assert "| 50 % | OOM | - |" in text


def test_many_depths_are_put_together_in_tenths() -> None:
    depths = [{"depth": n / 39} for n in range(40)]
    (found,) = depth_maps([made_record([100] * 20 + [0] * 20, notes=depths)])
    assert found.depths == tuple(f"{10 * n}-{10 * n + 10} %" for n in range(10))
    assert sum(cell[1] for cell in found.cells.values() if cell != "OOM") == 40
    assert found.cells[FULL, "0-10 %", "4096"] == (100, 4)  # 0, 1, 2, 3 of 39
    assert found.cells[FULL, "90-100 %", "4096"] == (0, 4)  # 36 to 39


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({}, None),
        ({"hardware": HARDWARE | {"device": "another"}}, "different machines"),
        ({"git_hash": "another"}, "different versions of the code"),
        ({"source": "another"}, "made from different data"),
    ],
)
def test_records_that_are_hard_to_compare_are_warned_of(changes: dict[str, Any], warning: str | None) -> None:
    records = [made_record([100]), made_record([100], method="rocketkv", token_budget=512, **changes)]
    warnings = provenance(records).warnings
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]
    assert all(re.sub(r"\W", "", w) in re.sub(r"\W", "", report.markdown(report.gather(records))) for w in warnings)


def test_report_is_written_in_the_format_of_the_suffix(tmp_path: Path) -> None:
    results = write_all(tmp_path / "results", made_arms())
    assert len(report.load(results).records) == len(made_arms())
    for suffix, start in ((".md", "# Evaluation"), (".csv", "model,"), (".html", "<!DOCTYPE html>")):
        report.write_report(results, tmp_path / f"r{suffix}")
        assert (tmp_path / f"r{suffix}").read_text(encoding="utf-8").startswith(start)
    with pytest.raises(ValueError, match=r"must end in \.html, \.md or \.csv, got 'r\.pdf'"):
        report.write_report(results, tmp_path / "r.pdf")
    with pytest.raises(ValueError, match="must be a folder with records"):
        report.load(tmp_path)


def test_an_arm_out_of_memory_stands_in_the_column_of_its_task() -> None:
    far: dict[str, Any] = {"task": "kl", "metric": "KL, nats", "higher_is_better": False}
    rocket: dict[str, Any] = {"method": "rocketkv", "token_budget": 512, "status": "out_of_memory"}
    records = [
        made_record([100]),
        made_record([0], **rocket),
        made_record([0], **far),
        made_record([0], **far, **rocket),
    ]
    assert records[3]["metric"] == ""  # it ended before it knew
    section = section_of(records)
    assert [c.name for c in section.scores] == ["niah"]
    assert [c.name for c in section.distances] == ["kl"]
    assert column(section, "kl").figures[ROCKET].status == "out_of_memory"
    assert provenance(records).warnings == ()


def test_each_batch_size_has_costs_of_its_own_and_baselines_of_latency_no_scores() -> None:
    made = [made_record([100.0, 0.0])]
    for batch, seconds in ((1, 0.02), ("max", 0.05)):
        for method, factor in (("full", 1.0), ("dense", 0.5)):
            cost: Any = {"step_seconds": factor * seconds, "tokens_per_second": 1 / seconds, "batch_size": 3}
            fields: Any = {"metric": "seconds a token", "higher_is_better": False, "cost": cost, "batch_size": batch}
            made.append(made_record([seconds], task="latency", method=method, **fields))
    text = report.markdown(report.gather(made))
    assert "dense" not in cells(text, "Scores, 4096 tokens, query-agnostic")
    costs = cells(text, "Cost, 4096 tokens, query-agnostic, latency (batch max)")
    place = costs["Method"].index("Time per output token, median, ms")
    assert costs["dense"][place] == "25.0, 0.50x"
    assert "10.0, 0.50x" in cells(text, "Cost, 4096 tokens, query-agnostic, latency (batch 1)")["dense"]
    assert "Batch, sequences" in costs["Method"]
    assert "machine" not in text.split("Cost, 4096 tokens")[0]
