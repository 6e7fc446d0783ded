"""The benchmark of judges: its arithmetic, its report, and one real measurement of a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import models.catalog  # noqa: F401
from benchmarks.judge import agreement, timing
from benchmarks.judge.summary import Case, markdown, mean, shares
from benchmarks.judge.timing import Timing
from models.backbones.vlm_loading import write_random_chat


def case(count: int = 24, tokens: int = 64, dtype: str = "bfloat16") -> Case:
    """Two comparisons of 0.1 s and one of 0.4 s one by one; all pairs in 11.04 s, adaptive in 3.68 s."""
    before = Timing(0.2, {(0, 1): 0.5, (1, 0): 0.25}, {}, 150)
    after = Timing(0.4, {(2, 1): 0.75}, {}, 150)
    every = Timing(11.04, dict.fromkeys(timing.orders(count), 0.5), {"ends": 9.0, "vision": 2.04}, 150)
    return Case(count, tokens, dtype, (before, after), every, Timing(3.68, {(0, 1): 0.5}, {}, 150))


def test_ratios_scale_what_was_measured_to_all_pairs() -> None:
    one = case()
    assert one.naive_pairs == 3
    assert one.naive_each == pytest.approx(0.2)
    assert one.naive_all == pytest.approx(0.2 * 552)
    assert one.exact_ratio == pytest.approx(10)
    assert one.adaptive_ratio == pytest.approx(30)
    assert one.difference == 0.25
    assert one.every.each == pytest.approx(0.02)


def test_targets_are_of_24_candidates_in_bfloat16() -> None:
    assert [case(tokens=n).target() for n in (64, 256, 100)] == [4.0, 6.0, None]
    assert case(count=8).target() is case(dtype="float32").target() is None
    assert replace(case(), layout=timing.TEXT_FIRST).target() is None


def test_shares_and_means() -> None:
    assert shares({"vision": 1.0, "ends": 3.0}) == "ends 75 %, vision 25 %"
    with pytest.raises(ValueError, match="nothing"):
        mean([])


def test_the_report_says_what_was_met_and_whether_the_machine_was_quiet() -> None:
    about = {"cores": 2, "cpu": "a CPU", "instructions": "AVX2", "threads": 1, "torch": "2", "load_average_before": 0.1}
    found = [agreement.Agreement(138, 5, 0.95), agreement.Agreement(138, 5, 0.75)]
    text = markdown([case()], {"yes_no": found}, about | {"under_load": True})
    assert "10.0x (≥ 4: meets)" in text
    assert "30.0x (≥ 15: meets)" in text
    assert "0.850 (least 0.75) with 138 comparisons" in text
    assert "target ≥ 0.9: misses" in text
    assert "Measured under load" in text
    assert "Measured under load" not in markdown([case()], {"yes_no": found}, about | {"under_load": False})


def test_pairs_are_drawn_without_repetition() -> None:
    chosen = timing.some_orders(8, 20, seed=1)
    assert len(set(chosen)) == 20
    assert set(chosen) < set(timing.orders(8))


@pytest.mark.parametrize("layout", [timing.IMAGES_FIRST, timing.TEXT_FIRST])
def test_the_cached_and_the_naive_path_say_the_same(layout: str, tmp_path: Path) -> None:
    write_random_chat(tmp_path, "qwen2_vl")
    model, processor = timing.random_model(tmp_path, torch.float32)
    shared, plain = (timing.group_of(model, processor, 3, 64, shared=on, layout=layout) for on in (True, False))
    every, naive = timing.all_pairs_of(shared, 3), timing.one_by_one(plain, timing.orders(3))
    assert every.probabilities == pytest.approx(naive.probabilities, abs=1e-5)
    assert len({round(p, 4) for p in every.probabilities.values()}) > 1
    assert set(every.parts) == {"vision", "prefixes", "ends", "head and Python"}
    assert set(naive.parts) == {"vision", "ends", "head and Python"}
    assert sum(every.parts.values()) == pytest.approx(every.seconds)
    few = timing.adaptive(shared, 3)
    assert few.probabilities == pytest.approx(every.probabilities, abs=1e-5)
