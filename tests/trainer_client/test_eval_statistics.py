"""Statistics of evaluations, against scipy and naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from trainer_client.eval_statistics import (
    Wins,
    finite_or_none,
    masked_scores,
    mean_interval,
    paired_difference,
    prompt_means,
    rows_by_tag,
    seed_wins,
    win_rate,
)


def random_scores(seed: int, prompts: int = 37, seeds: int = 3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(2.0, 0.3, (prompts, 1)) + generator.normal(0.0, 1.5, (prompts, seeds))


def with_failures(scores: np.ndarray, seed: int = 9) -> np.ndarray:
    """One prompt without any score, and a fifth of the other samples missing."""
    broken = np.where(np.random.default_rng(seed).random(scores.shape) < 0.2, np.nan, scores)
    broken[4] = np.nan
    return broken


def naive_means(scores: np.ndarray) -> list[float]:
    rows = [[value for value in row if not math.isnan(value)] for row in scores.tolist()]
    return [sum(row) / len(row) for row in rows if row]


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_an_interval_is_students_over_prompts(level: float) -> None:
    scores = with_failures(random_scores(0))
    means = naive_means(scores)
    low, high = stats.t.interval(level, len(means) - 1, np.mean(means), stats.sem(means))
    found = mean_interval(scores, level=level)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(means), low, high), rel=1e-12)
    assert (found.prompts, found.samples) == (len(means), int((~np.isnan(scores)).sum()))
    assert len(means) < len(scores)
    assert found.failed == scores.size - found.samples >= 3


def test_more_seeds_of_the_same_prompts_are_no_more_witnesses() -> None:
    """Repeating each score narrows nothing: the prompts are the sample."""
    scores = random_scores(1)
    once, thrice = mean_interval(scores), mean_interval(np.repeat(scores, 3, axis=1))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), rel=1e-12)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 2,000 evaluations of 12 prompts, 95 % must cover; 1.7 % either way is three and a half standard errors."""
    generator = np.random.default_rng(3)
    truth = 0.7
    effects = generator.normal(truth, 1.0, (2000, 12, 1))
    scores = effects + generator.normal(0.0, 1.0, (2000, 12, 4))
    intervals = [mean_interval(each) for each in scores]
    assert np.mean([each.low <= truth <= each.high for each in intervals]) == pytest.approx(0.95, abs=0.017)


def test_a_paired_difference_is_scipys_paired_t_test() -> None:
    first, second = random_scores(4), random_scores(4) - 0.25 + random_scores(5) / 10
    expected = stats.ttest_rel(first.mean(axis=1), second.mean(axis=1))
    low, high = expected.confidence_interval(0.95)
    found = paired_difference(first, second)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.difference.low, found.difference.high) == pytest.approx((low, high), rel=1e-9)
    per_prompt = first.mean(axis=1) - second.mean(axis=1)
    assert found.improved == (per_prompt > 0).mean()
    assert found.improved + found.tied + found.worse == pytest.approx(1.0)
    back = paired_difference(second, first)
    assert back.difference.mean == pytest.approx(-found.difference.mean)
    assert (back.p_value, back.worse) == pytest.approx((found.p_value, found.improved))


def test_a_pair_counts_only_with_both_samples() -> None:
    first, second = with_failures(random_scores(6), 1), with_failures(random_scores(7), 2)
    second[8] = np.nan
    differences = [
        [a - b for a, b in zip(*rows, strict=True) if not math.isnan(a) and not math.isnan(b)]
        for rows in zip(first.tolist(), second.tolist(), strict=True)
    ]
    means = [sum(row) / len(row) for row in differences if row]
    expected = stats.ttest_1samp(means, 0.0)
    found = paired_difference(first, second)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.difference.mean == pytest.approx(np.mean(means), rel=1e-12)
    assert found.difference.prompts == len(means) <= 35
    assert found.difference.samples == sum(map(len, differences))


def test_equal_policies_differ_by_nothing_and_a_constant_shift_for_sure() -> None:
    scores = np.round(random_scores(8) * 4) / 4
    same = paired_difference(scores, scores)
    assert (same.p_value, same.tied, same.difference.low, same.difference.high) == (1.0, 1.0, 0.0, 0.0)
    shifted = paired_difference(scores + 1, scores)
    assert (shifted.p_value, shifted.improved, shifted.difference.low) == (0.0, 1.0, 1.0)


def test_wins_of_each_seed() -> None:
    first = [[1.0, 5.0], [2.0, 5.0], [3.0, np.nan]]
    second = [[0.0, 6.0], [2.0, 6.0], [1.0, 1.0]]
    assert seed_wins(first, second) == [Wins(2, 1, 0), Wins(0, 0, 2)]


def test_a_judges_win_rate() -> None:
    probabilities = np.array([[0.9, 0.5], [0.6, 0.2], [0.7, 0.8], [np.nan, 1.0]])
    found = win_rate(probabilities)
    wins = [0.75, 0.5, 1.0, 1.0]
    assert found.win_rate.mean == pytest.approx(np.mean(wins))
    assert found.p_value == pytest.approx(stats.ttest_1samp(wins, 0.5).pvalue)
    assert found.probability.mean == pytest.approx(np.mean([0.7, 0.4, 0.75, 1.0]))
    assert (found.win_rate.samples, found.win_rate.failed) == (7, 1)
    with pytest.raises(ValueError, match=r"probabilities lie in \[0, 1\]"):
        win_rate([[1.2]])


def test_what_cannot_be_known_is_nan_and_never_a_number() -> None:
    one = mean_interval([[1.0, 3.0]])
    assert (one.mean, one.prompts) == (2.0, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    none = mean_interval([[np.nan, np.nan], [np.nan, np.nan]])
    assert math.isnan(none.mean)
    assert (none.prompts, none.samples, none.failed) == (0, 0, 4)
    unpaired = paired_difference([[1.0], [np.nan]], [[np.nan], [2.0]])
    assert all(math.isnan(value) for value in (unpaired.p_value, unpaired.improved, unpaired.difference.mean))


def test_a_failed_sample_must_be_marked() -> None:
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite and not marked"):
            mean_interval([[1.0, value]], [[True, True]])
    assert mean_interval([[1.0, np.nan]], [[True, False]]).mean == 1.0
    # a failed sample's number, if it has one, does not count
    assert mean_interval([[1.0, 99.0]], [[True, False]]).mean == 1.0
    with pytest.raises(ValueError, match="not finite"):
        mean_interval([[1.0, np.inf]])
    with pytest.raises(ValueError, match="not both"):
        masked_scores([1.0, 2.0])
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([[1.0]], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="confidence level"):
        mean_interval([[1.0]], level=1.0)


def test_tensors_are_taken_as_arrays_are() -> None:
    scores, ok = torch.tensor([[1.0, 2.0], [4.0, float("nan")]]), torch.tensor([[True, True], [True, False]])
    assert mean_interval(scores, ok) == mean_interval([[1.0, 2.0], [4.0, np.nan]])


finite = st.floats(-1e6, 1e6)
table = st.tuples(st.integers(2, 6), st.integers(1, 4)).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=finite)
)


@given(table, finite)
def test_laws_of_the_mean(scores: np.ndarray, shift: float) -> None:
    """The mean lies in its interval; a shift moves both; neither the order of prompts nor of seeds matters."""
    found = mean_interval(scores)
    tolerance = 1e-9 * (np.abs(scores).max() + abs(shift) + 1)
    assert found.low - tolerance <= found.mean <= found.high + tolerance
    moved = mean_interval(scores + shift)
    assert moved.mean == pytest.approx(found.mean + shift, abs=tolerance)
    assert moved.high - moved.low == pytest.approx(found.high - found.low, abs=100 * tolerance)
    turned = mean_interval(scores[::-1, ::-1])
    assert turned.mean == pytest.approx(found.mean, abs=tolerance)


@given(table, st.integers(0, 2**32 - 1))
def test_wins_and_shares_count_every_pair_once(scores: np.ndarray, seed: int) -> None:
    against = np.random.default_rng(seed).permutation(scores.ravel()).reshape(scores.shape)
    for wins in seed_wins(scores, against):
        assert wins.won + wins.tied + wins.lost == len(scores)
    found = paired_difference(scores, against)
    assert found.improved + found.tied + found.worse == pytest.approx(1.0)
    assert 0.0 <= found.p_value <= 1.0


def test_prompt_means_and_tags() -> None:
    np.testing.assert_array_equal(prompt_means([[1.0, 3.0], [np.nan, 5.0], [np.nan, np.nan]]), [2.0, 5.0, np.nan])
    assert rows_by_tag(["colors", "", "counting", "colors"]) == {"colors": [0, 3], "counting": [2]}
    assert rows_by_tag(["", ""]) == {}


def test_json_has_no_nan() -> None:
    nested = {"a": [1.0, math.nan, {"b": (math.inf, 2)}], "c": "nan"}
    assert finite_or_none(nested) == {"a": [1.0, None, {"b": [None, 2]}], "c": "nan"}
