"""Accuracy and its interval are what their definitions say."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.shapes.evaluation import accuracy_report, wilson_interval
from models.shapes.oracle import examine
from models.shapes.prompts import Prompt


def by_oracle(prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[float]:
    verdicts = [examine(prompt, image)[0] for prompt, image in zip(prompts, images, strict=True)]
    return [verdict.exact + verdict.soft for verdict in verdicts]


def test_the_oracle_is_right_on_content_and_blind_to_damage_it_sees_through() -> None:
    report = accuracy_report(by_oracle, seed=3, count=144)
    for split in ("held_out", "out_of_domain"):
        assert report[split]["between_prompts"]["accuracy"] == 1.0
        assert report[split]["n"] == 144
        for kind in ("near_miss", "unrelated"):
            assert report[split]["kinds"][kind]["accuracy"] > 0.85
        assert report[split]["kinds"]["degraded"]["accuracy"] < 0.8
        assert sum(row["n"] for row in report[split]["tasks"].values()) == 144
        assert sum(row["n"] for row in report[split]["kinds"].values()) == 144
    assert set(report["out_of_domain"]["tasks"]) == {"counting", "colors", "position", "color_attr"}


def test_a_tie_is_not_right_and_coin_flips_are_half_right() -> None:
    constant = accuracy_report(lambda prompts, images: [0.0] * len(prompts), seed=1, count=24)
    assert constant["held_out"]["accuracy"] == 0.0
    rng = np.random.default_rng(0)
    coin = accuracy_report(lambda prompts, images: rng.random(len(prompts)).tolist(), seed=1, count=600)
    assert coin["held_out"]["accuracy"] == pytest.approx(0.5, abs=0.08)


def test_wilson_interval_of_known_values() -> None:
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(3, 2)


@given(st.integers(1, 500), st.data())
def test_the_interval_holds_the_share_and_mirrors(count: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, count))
    low, high = wilson_interval(right, count)
    assert 0.0 <= low <= right / count + 1e-12
    assert right / count - 1e-12 <= high <= 1.0
    assert wilson_interval(count - right, count) == pytest.approx((1 - high, 1 - low))
