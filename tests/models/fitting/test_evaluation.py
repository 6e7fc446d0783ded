"""Agreement with people: each measure against a naive loop, cases made by hand, and the laws that it keeps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.fitting.agreement import inversion_score, pair_accuracy
from models.fitting.evaluation import (
    TIE_THRESHOLDS,
    JudgedPairs,
    best_tie_threshold,
    by_prompt,
    credit_with_ties,
    expected_calibration_error,
    kendall_tau_b,
    position_bias,
    ranking_agreement,
    reliability,
    right_of_untied,
    weighted_mean,
)

shares = st.integers(0, 1000).map(lambda k: k / 1000)
rows = st.lists(
    st.tuples(shares, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(1, 50).map(lambda k: k / 10)),
    min_size=1,
    max_size=40,
)


def pairs_of(rows: list[tuple[float, float, float]]) -> JudgedPairs:
    """Pairs of (probability, label, weight); every pair is its own prompt."""
    probability, label, weight = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    return JudgedPairs(probability - 0.5, probability, label, np.arange(len(rows)), weight)


def test_equal_scores_are_wrong_and_soft_labels_count_by_their_side() -> None:
    pairs = pairs_of([(0.9, 1.0, 1), (0.5, 1.0, 1), (0.2, 1.0, 1), (0.2, 0.3, 1), (0.5, 0.0, 1)])
    assert right_of_untied(pairs).tolist() == [1, 0, 0, 1, 0]


def test_ties_of_people_have_no_right_verdict_but_can_be_left_out() -> None:
    pairs = pairs_of([(0.9, 1.0, 1), (0.9, 0.5, 1)])
    with pytest.raises(ValueError, match="tied"):
        right_of_untied(pairs)
    assert right_of_untied(pairs.untied).tolist() == [1]


def test_accuracy_is_that_of_the_pairs_of_a_ranking() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, ranks = rng.integers(0, 5, 6).astype(float), rng.integers(1, 5, 6).astype(float)
        if len(set(ranks.tolist())) == 1:
            continue
        both = list(itertools.combinations(range(6), 2))
        label = np.array([0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j]) for i, j in both])
        margin = np.array([scores[i] - scores[j] for i, j in both])
        pairs = JudgedPairs(margin, (np.sign(margin) + 1) / 2, label, np.zeros(len(both), np.int64), np.ones(len(both)))
        assert right_of_untied(pairs.untied).mean() == pytest.approx(pair_accuracy(scores.tolist(), ranks.tolist()))


def test_pick_a_pic_gives_half_a_point_where_exactly_one_side_ties() -> None:
    #  model:  first, first, first, tie (gap .2), tie, second
    #  people: first, tie,  second, first,        tie, tie
    pairs = pairs_of([(0.9, 1, 1), (0.9, 0.5, 1), (0.9, 0, 1), (0.6, 1, 1), (0.4, 0.5, 1), (0.1, 0.5, 1)])
    assert credit_with_ties(pairs, 0.3).tolist() == [1, 0.5, 0, 0.5, 1, 0.5]
    assert credit_with_ties(pairs, 0.3, half=0.0).tolist() == [1, 0, 0, 0, 1, 0]
    assert credit_with_ties(pairs, 0.0).tolist() == [1, 0.5, 0, 1, 0.5, 0.5]
    assert credit_with_ties(pairs, 1.0, half=0.0).tolist() == [0, 1, 0, 0, 1, 1]


@given(rows)
def test_the_tuned_threshold_is_the_first_best_of_the_grid(rows: list[tuple[float, float, float]]) -> None:
    pairs = pairs_of(rows)
    best, mean = 0.0, -1.0
    for threshold in TIE_THRESHOLDS:
        points = 0.0
        for probability, label, weight in rows:
            tie = abs(2 * probability - 1) <= threshold
            verdict = 0.5 if tie or probability == 0.5 else float(probability > 0.5)
            truth = 0.5 if label == 0.5 else float(label > 0.5)
            points += weight * (1 if verdict == truth else 0.5 if 0.5 in (verdict, truth) else 0)
        if points > mean + 1e-6:
            best, mean = threshold, points
    assert best_tie_threshold(pairs) == pytest.approx(best)


def test_a_threshold_wants_pairs() -> None:
    empty = JudgedPairs(*(np.zeros(0) for _ in range(3)), np.zeros(0, np.int64), np.zeros(0))
    with pytest.raises(ValueError, match="at least one pair"):
        best_tie_threshold(empty)
    with pytest.raises(ValueError, match="no calibration"):
        expected_calibration_error(empty)


@given(st.permutations(range(5)), st.permutations(range(5)))
def test_without_ties_ranking_agreement_is_the_inversion_score(places: list[int], ranks: list[int]) -> None:
    scores = -np.array(places, dtype=float)
    agreement = ranking_agreement(scores, np.array(ranks, dtype=float))
    assert agreement == pytest.approx(inversion_score(places, ranks))
    tau = kendall_tau_b(scores, np.array(ranks, dtype=float))
    assert tau is not None
    assert tau == pytest.approx(2 * agreement - 1)


def test_tied_scores_are_worth_what_breaking_them_by_chance_gives() -> None:
    ranks = np.array([1.0, 2.0, 3.0, 3.0])
    scores = np.array([5.0, 5.0, 5.0, 1.0])
    broken = [
        ranking_agreement(scores + np.array([*order, 0]) * 1e-6, ranks) for order in itertools.permutations(range(3))
    ]
    assert ranking_agreement(scores, ranks) == pytest.approx(np.mean(broken))
    assert ranking_agreement(np.array([2.0, 1.0]), np.array([1.0, 1.0])) == 1.0
    with pytest.raises(ValueError, match="two or more"):
        ranking_agreement(np.array([1.0]), np.array([1.0]))


def test_tau_b_counts_ties_as_kendall_does() -> None:
    scores, ranks = np.array([3.0, 2.0, 2.0, 1.0, 0.0]), np.array([1.0, 1.0, 2.0, 4.0, 3.0])
    concordant = discordant = tied_scores = tied_ranks = 0
    for i, j in itertools.combinations(range(5), 2):
        product = (scores[i] - scores[j]) * (ranks[j] - ranks[i])
        concordant, discordant = concordant + (product > 0), discordant + (product < 0)
        tied_scores, tied_ranks = tied_scores + (scores[i] == scores[j]), tied_ranks + (ranks[i] == ranks[j])
    expected = (concordant - discordant) / ((10 - tied_scores) * (10 - tied_ranks)) ** 0.5
    assert kendall_tau_b(scores, ranks) == pytest.approx(expected)
    assert kendall_tau_b(np.ones(5), ranks) is None
    assert kendall_tau_b(scores, np.ones(5)) is None


def test_by_prompt_leaves_out_and_counts_prompts_without_a_value() -> None:
    ranks = [np.array([1.0, 2.0, 3.0])] * 3
    scores = [np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 3.0]), np.zeros(3)]
    estimate, without = by_prompt(kendall_tau_b, scores, ranks)
    assert (estimate.value, estimate.count, without) == (0.0, 2, 1)


def test_the_interval_is_drawn_over_prompts_and_not_over_pairs() -> None:
    rng = np.random.default_rng(1)
    of_prompts = (rng.random(100) < 0.7).astype(float)
    values, prompt = np.repeat(of_prompts, 20), np.repeat(np.arange(100), 20)
    clustered, naive = weighted_mean(values, prompt), weighted_mean(values, np.arange(2000))
    assert clustered.value == naive.value == pytest.approx(of_prompts.mean())
    assert clustered.low is not None
    assert clustered.high is not None
    error = of_prompts.std() / 10
    assert clustered.high - clustered.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert naive.low is not None
    assert naive.high is not None
    assert naive.high - naive.low == pytest.approx(2 * 1.96 * error / 20**0.5, rel=0.1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        values = (rng.random(80) < 0.6).astype(float)
        found = weighted_mean(values, np.arange(80), resamples=400, seed=trial)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.6 <= found.high
    assert 178 <= covered <= 199  # 95 % of 200, with more than three standard errors (3.1) to either side


def test_means_are_weighted_and_few_prompts_have_no_interval() -> None:
    found = weighted_mean(np.array([1.0, 0.0]), np.array([0, 0]), np.array([3.0, 1.0]))
    assert (found.value, found.low, found.high, found.count) == (0.75, None, None, 2)
    nothing = weighted_mean(np.zeros(0), np.zeros(0, np.int64))
    assert (nothing.value, nothing.count) == (None, 0)
    assert weighted_mean(np.arange(9.0), np.arange(9), seed=4) == weighted_mean(np.arange(9.0), np.arange(9), seed=4)


@given(rows)
def test_calibration_error_is_that_of_a_loop_over_bins(rows: list[tuple[float, float, float]]) -> None:
    edges = np.linspace(0.5, 1, 11)
    bins: list[list[tuple[float, float, float]]] = [[] for _ in range(10)]
    for probability, label, weight in rows:
        confidence = max(probability, 1 - probability)
        agreement = 0.5 if probability == 0.5 else label if probability > 0.5 else 1 - label
        number = max(k for k in range(10) if confidence >= edges[k])
        bins[number].append((confidence, agreement, weight))
    total = sum(weight for _, _, weight in rows)
    error = 0.0
    for inside in filter(None, bins):
        mass = sum(w for _, _, w in inside)
        error += mass / total * abs(sum(w * (c - a) for c, a, w in inside)) / mass
    pairs = pairs_of(rows)
    assert expected_calibration_error(pairs) == pytest.approx(error, abs=1e-12)
    table = reliability(pairs)
    assert [row.count for row in table] == [len(inside) for inside in bins if inside]
    assert all(row.low - 1e-12 <= row.confidence <= row.high + 1e-12 for row in table)


@given(rows)
def test_which_image_is_named_first_does_not_matter(rows: list[tuple[float, float, float]]) -> None:
    pairs, turned = pairs_of(rows), pairs_of([(1 - p, 1 - label, weight) for p, label, weight in rows])
    assert expected_calibration_error(turned) == pytest.approx(expected_calibration_error(pairs), abs=1e-9)
    if len(pairs.untied):
        assert right_of_untied(pairs.untied).tolist() == right_of_untied(turned.untied).tolist()


def test_probabilities_that_are_true_are_calibrated() -> None:
    rng = np.random.default_rng(3)
    probability = rng.random(40_000)
    label = (rng.random(40_000) < probability).astype(float)
    honest = JudgedPairs(probability - 0.5, probability, label, np.arange(40_000), np.ones(40_000))
    assert expected_calibration_error(honest) < 0.01
    sure = (probability > 0.5).astype(float)
    overconfident = JudgedPairs(sure - 0.5, sure, label, np.arange(40_000), np.ones(40_000))
    assert expected_calibration_error(overconfident) == pytest.approx(0.25, abs=0.01)


def test_a_judge_that_likes_what_it_sees_first_is_found_out() -> None:
    rng = np.random.default_rng(4)
    quality = rng.uniform(0.3, 0.7, 500)
    first_shown, second_shown = quality + 0.1, quality - 0.1
    found = position_bias(first_shown, second_shown, np.arange(500))
    assert found.bias.value == pytest.approx(0.1)
    assert found.flips.value == pytest.approx(np.mean(np.abs(quality - 0.5) < 0.1))
    fair = position_bias(quality, quality, np.arange(500))
    assert (fair.bias.value, fair.flips.value) == (pytest.approx(0), 0)
    always_first = position_bias(np.ones(3), np.zeros(3), np.arange(3))
    assert (always_first.bias.value, always_first.flips.value) == (0.5, 1.0)
    with pytest.raises(ValueError, match="orders"):
        position_bias(np.ones(3), np.ones(2), np.arange(3))


@pytest.mark.parametrize(
    ("column", "value"), [(0, np.inf), (1, 1.5), (1, np.nan), (2, -0.1), (4, 0.0), (4, np.inf)]
)  # fmt: skip
def test_pairs_that_make_no_sense_are_refused(column: int, value: float) -> None:
    columns = [np.array([0.1]), np.array([0.6]), np.array([1.0]), np.array([0]), np.array([1.0])]
    JudgedPairs(*columns)
    columns[column] = np.array([value])
    with pytest.raises(ValueError, match=r"margins|probability|label|weights"):
        JudgedPairs(*columns)
    with pytest.raises(ValueError, match="one length"):
        JudgedPairs(*columns[:4], np.ones(2))
