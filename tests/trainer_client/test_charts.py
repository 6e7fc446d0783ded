"""Charts: what is drawn is what was given."""

from __future__ import annotations

import math
import re
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer_client.report_page import Page
from trainer_client._charts import Axis, Mark, Series, line_chart, moving_mean, stacked_chart, thinned


def test_a_curve_is_broken_where_a_number_is_missing() -> None:
    values = [1.0, 2.0, math.nan, 4.0, 5.0]
    page = Page(line_chart([Series("a", range(5), values)], Axis("step", "")))
    assert [way for way, _, _ in page.curve("a")[0]] == ["M", "L", "M", "L"]


def test_areas_stand_upon_each_other() -> None:
    x = [1.0, 2.0, 3.0]
    page = Page(stacked_chart(x, [Series("low", x, [1, 1, 1], 0), Series("high", x, [2, 3, 2], 1)], Axis("step", "s")))
    (low,), (high,) = page.curve("low"), page.curve("high")
    top_of_low, bottom_of_high = min(y for _, _, y in low), max(y for _, _, y in high)
    assert top_of_low == pytest.approx(bottom_of_high, abs=0.02)
    height_of_low = max(y for _, _, y in low) - top_of_low
    assert bottom_of_high - min(y for _, _, y in high) == pytest.approx(3 * height_of_low, abs=0.05)


def test_small_ticks_are_not_rounded_away() -> None:
    page = Page(line_chart([Series("a", [0, 1], [0.0102, 0.0118])], Axis("step", "")))
    ticks = [float(text) for text in page.texts if re.fullmatch(r"0\.\d+", text)]
    assert len(set(ticks)) >= 3
    assert all(0.0095 < tick < 0.0125 for tick in ticks)


@given(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), max_size=30), st.integers(0, 9))
def test_moving_mean_is_the_mean_of_neighbours(values: list[float], window: int) -> None:
    found = moving_mean(values, window)
    for place, value in enumerate(found):
        around = [v for v in values[max(place - window // 2, 0) : place + window // 2 + 1] if not math.isnan(v)]
        assert value == pytest.approx(statistics.fmean(around), abs=1e-9) if around else math.isnan(value)


def test_long_curves_are_averaged() -> None:
    values = [float(step % 2) for step in range(5000)]
    assert len(thinned(values)) == 1000
    assert np.mean(thinned(values)) == pytest.approx(0.5)
    assert thinned([1.0, math.nan]) == pytest.approx([1.0, math.nan], nan_ok=True)
    assert all(math.isnan(value) for value in thinned([math.nan] * 2000))


def test_a_mark_stands_at_its_step() -> None:
    chart = line_chart([Series("a", [0, 100], [0, 1])], Axis("step", ""), [Mark(50, "guard: warn")])
    page = Page(chart)
    (curve,) = page.curve("a")
    middle = (curve[0][1] + curve[1][1]) / 2
    marked = re.search(r'<path d="M ([\d.]+) [\d.]+\s+L ([\d.]+) [\d.]+\s*"[^>]*stroke: var\(--bad\)', chart)
    assert marked is not None
    assert float(marked[1]) == float(marked[2]) == pytest.approx(middle, abs=0.02)
    assert "guard: warn" in page.texts
