"""What a reader takes home: the Pareto front, error bars, and a sentence for each task."""

from __future__ import annotations

from typing import Any

import pytest

from made_records import made_record
from made_report import made_arms
from rocketkv.eval.records import CostDict
from rocketkv.eval.report.gather import gather
from rocketkv.eval.report.plots import distance_plots, pareto_front, score_plots, styles
from rocketkv.eval.report.sections import Section, sections
from rocketkv.eval.report.verdicts import verdicts
from rocketkv.eval.report.write import markdown


def compared() -> Section:
    (section,) = sections([r for r in made_arms() if r["cell"]["method"] not in ("snapkv", "quest")])
    return section


def test_the_front_holds_what_no_other_beats() -> None:
    assert pareto_front([]) == []
    assert pareto_front([(3, 9), (1, 5), (2, 4), (2, 7), (4, 9), (1, 3)]) == [1, 3, 0]
    assert pareto_front([(1, 5), (1, 5)]) == [0]


def test_bars_are_the_paired_intervals_around_the_figures() -> None:
    section = compared()
    memory = score_plots(section, styles(section.arms))[0].data
    full, rocket = memory["lines"]
    ends = section.mean[section.arms[1]].difference_interval
    assert ends is not None
    assert (full["up"], full["down"]) == ([None], [None])
    assert (rocket["y"][0] + rocket["up"][0], rocket["y"][0] - rocket["down"][0]) == pytest.approx(
        (75 + ends[1], 75 + ends[0])
    )
    assert (full["front"], rocket["front"]) == ([True], [True])
    assert memory["front"] == [[0.25, 55.0], [1.0, 75.0]]

    stored, read = distance_plots(section, styles(section.arms))
    assert stored.title == "kl against KV memory"
    assert [line["x"] for line in stored.data["lines"]] == [[1.0], [0.25]]
    assert [line["x"] for line in read.data["lines"]] == [[800.0], [80.0]]


def test_of_a_distance_less_is_better() -> None:
    far: dict[str, Any] = {"task": "kl", "metric": "KL, nats", "higher_is_better": False}
    costs: list[CostDict] = [{"kv_bytes": n, "full_kv_bytes": 100.0, "step_bytes": n} for n in (100.0, 50.0, 60.0)]
    records = [
        made_record([0.0, 0.0], cost=costs[0], **far),
        made_record([0.1, 0.2], cost=costs[1], method="rocketkv", token_budget=8, **far),
        made_record([0.4, 0.5], cost=costs[2], method="quest", token_budget=8, **far),
    ]
    (section,) = sections(records)
    stored, read = distance_plots(section, styles(section.arms))
    assert [line["front"] for line in stored.data["lines"]] == [[True], [True], [False]]
    assert stored.data["front"] == [[0.5, pytest.approx(0.15)], [1.0, 0.0]]
    assert read.data["front"][0][0] == 50.0


def test_a_sentence_names_the_smallest_cache_near_the_full_one() -> None:
    def arm(scores: list[float], kept: float, read: float, **changes: Any) -> Any:
        return made_record(scores, cost={"kv_bytes": kept, "full_kv_bytes": 100.0, "step_bytes": read}, **changes)

    same = [100.0, 0.0, 100.0, 100.0] * 5
    records = [
        arm(same, 100, 100),
        arm(same, 40, 30, method="rocketkv", token_budget=512),
        arm(same, 30, 40, method="rocketkv", token_budget=1024),
        arm([0.0] * 20, 10, 10, method="snapkv", token_budget=512),
        arm(same, 106, 5, method="quest", token_budget=512),
    ]
    ((name, text),) = verdicts(sections(records)[0])
    assert name == "niah"
    assert text == (
        "the smallest cache within 1 point of full is rocketkv 1024: 30 % of the full cache's bytes, 0.0 (0.0 to 0.0) "
        "points on 20 samples. The fewest bytes per step within 1 point are read by quest 512: 5 % of the full cache's "
        "bytes read, 0.0 (0.0 to 0.0) points on 20 samples."
    )
    assert f"- **niah**: {text}" in markdown(gather(records))

    near = arm([100.0, 0.0, 100.0, 100.0] * 4 + [100.0, 100.0, 0.0, 100.0], 20, 20, method="snapkv", token_budget=1024)
    ((_, text),) = verdicts(sections([*records, near])[0])
    assert text.startswith("the smallest cache within 1 point of full is snapkv 1024: 20 % of the full cache's bytes, ")
    assert ", so a larger loss is not excluded. The" in text

    ((_, text),) = verdicts(sections([records[0], records[3], records[4]])[0])
    assert text.startswith("no smaller cache is within 1 point of full. The fewest")
    ((_, text),) = verdicts(sections(records[:1])[0])
    assert text == "no cache is compared with the full one."


def test_the_mean_has_a_sentence_of_its_own() -> None:
    assert [name for name, _ in verdicts(compared())] == ["mean", "a", "b"]
