"""Stars: p-values by hand, and Holm's rule over the comparisons of a table."""

from __future__ import annotations

import pytest

from made_records import made_record
from rocketkv.eval.report.gather import gather
from rocketkv.eval.report.page import page
from rocketkv.eval.report.sections import sections
from rocketkv.eval.report.significance import holm, sign_flip_p
from rocketkv.eval.report.write import summary


def test_p_values_by_hand() -> None:
    assert sign_flip_p([[0.0, 0.0]]) == 1
    assert sign_flip_p([[1.0, 1.0, 1.0]]) == 2 / 8  # all signs alike, either way
    assert sign_flip_p([[3.0, 1.0, -1.0]]) == 6 / 8  # sums of 5, 3, 3 and 1, with either sign
    assert sign_flip_p([[4.0], [1.0, 1.0]]) == 2 / 8
    assert sign_flip_p([[1.0] * 20]) == pytest.approx(1e-4)
    assert sign_flip_p([[1.0, -1.0] * 10]) == 1


def test_holm_by_hand() -> None:
    assert holm({"a": 0.012, "b": 0.04, "c": 0.02}) == {"a", "b", "c"}
    assert holm({"a": 0.01, "b": 0.03, "c": 0.03}) == {"a"}
    assert holm({"a": 0.03, "b": 0.04}) == set()
    assert holm({}) == set()


def test_a_star_needs_more_where_there_are_more_comparisons() -> None:
    full = [100.0] * 40
    six = [0.0] * 6 + [100.0] * 34  # p = 2 / 64
    records = [made_record(full), made_record(six, method="rocketkv", token_budget=512)]
    (section,) = sections(records)
    assert section.scores[0].figures[section.arms[1]].p_value == pytest.approx(2 / 64)
    assert "(-15.0*)" in summary(records)
    twin = made_record(six, method="snapkv", token_budget=1024)
    assert "(-15.0)" in summary([*records, twin])
    assert "(-15.0*)" not in summary([*records, twin])
    ten = made_record([0.0] * 10 + [100.0] * 30, method="snapkv", token_budget=512)
    assert "(-25.0*)" in summary([records[0], ten])
    assert 'class="differs"' in page(gather([records[0], ten]))
