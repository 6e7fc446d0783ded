"""The mathematics of a group's tournament: pairs, preferences, win rates, strengths and their errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.tournament import (
    PRIOR_STD,
    BradleyTerry,
    DuplicatePair,
    JudgedComparison,
    Matrix,
    PairError,
    PairOutOfRange,
    PairWithItself,
    all_pairs,
    bradley_terry,
    compare_by_judge,
    compare_by_scores,
    negative_log_posterior,
    preference_from_orders,
    probability_matrix,
    ranking,
    strengths_from_scores,
    validate_pairs,
    win_rate,
)

probability = st.floats(0, 1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def planted(strength: list[float]) -> Matrix:
    """The exact preferences of given strengths."""
    return probability_matrix(
        {(i, j): sigmoid(strength[i] - strength[j]) for i, j in all_pairs(len(strength))}, len(strength)
    )


def numbers(values: list[float | None]) -> NDArray[np.float64]:
    assert None not in values
    return np.array(values, dtype=np.float64)


@st.composite
def tournaments(draw: st.DrawFn) -> tuple[Matrix, NDArray[np.float64]]:
    """Preferences of 2 to 7 candidates, some missing, some certain, and symmetric weights."""
    count = draw(st.integers(2, 7))
    matrix: Matrix = [[None] * count for _ in range(count)]
    weights = np.ones((count, count))
    for i, j in all_pairs(count):
        value = draw(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]), probability))
        if value is not None:
            matrix[i][j], matrix[j][i] = value, 1 - value
        weights[i, j] = weights[j, i] = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 30.0]))
    return matrix, weights


def naive_objective(strength: NDArray[np.float64], matrix: Matrix, weights: NDArray[np.float64]) -> float:
    """The negative log posterior, pair by pair, from its definition."""
    total = sum(value**2 for value in strength) / (2 * PRIOR_STD**2)
    for i, j in all_pairs(len(matrix)):
        value = matrix[i][j]
        if value is not None:
            win = sigmoid(strength[i] - strength[j])
            total -= weights[i, j] * (value * math.log(win) + (1 - value) * math.log(1 - win))
    return total


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_all_pairs() -> None:
    assert all_pairs(0) == all_pairs(1) == []
    assert all_pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert len(set(map(frozenset, all_pairs(24)))) == 24 * 23 // 2


def test_sound_pairs_keep_their_order() -> None:
    assert validate_pairs([(2, 0), (0, 1)], 3) == [(2, 0), (0, 1)]
    assert validate_pairs([], 0) == []


@pytest.mark.parametrize(
    ("pairs", "kind", "words"),
    [
        ([(0, 1), (0, 3)], PairOutOfRange, r"pairs\[1\] is \[0, 3\], but the candidates are 0 to 2"),
        ([(-1, 0)], PairOutOfRange, r"pairs\[0\]"),
        ([(1, 1)], PairWithItself, r"pairs\[0\] compares candidate 1 with itself"),
        ([(0, 1), (1, 2), (0, 1)], DuplicatePair, r"pairs\[2\] .* pairs\[0\]"),
        ([(0, 1), (1, 0)], DuplicatePair, r"pairs\[1\] .* pairs\[0\]"),
    ],
)
def test_impossible_pairs_say_which_and_why(pairs: list[tuple[int, int]], kind: type[PairError], words: str) -> None:
    with pytest.raises(kind, match=words) as raised:
        validate_pairs(pairs, 3)
    assert isinstance(raised.value, ValueError)
    assert raised.value.code == kind.code != PairError.code


# --- preferences -----------------------------------------------------------------------------------------------------


@given(probability, probability)
def test_preferences_of_both_orders_sum_to_one_under_swapping(p_ij: float, p_ji: float) -> None:
    there, back = preference_from_orders(p_ij, p_ji), preference_from_orders(p_ji, p_ij)
    assert 0 <= there <= 1
    assert there + back == pytest.approx(1, abs=1e-15)


def test_a_judge_that_always_takes_the_first_prefers_nobody() -> None:
    assert preference_from_orders(0.9, 0.9) == pytest.approx(0.5)
    assert preference_from_orders(0.9, 0.3) == pytest.approx(0.8)


@pytest.mark.parametrize("wrong", [-0.01, 1.01, math.nan, math.inf])
def test_what_is_no_probability_is_refused(wrong: float) -> None:
    for call in (
        lambda: preference_from_orders(wrong, 0.5),
        lambda: preference_from_orders(0.5, wrong),
        lambda: probability_matrix({(0, 1): wrong}, 2),
        lambda: compare_by_judge([JudgedComparison(0, 1, wrong)], 2),
    ):
        with pytest.raises(ValueError, match="probability"):
            call()


def test_probability_matrix_and_win_rate() -> None:
    matrix = probability_matrix({(0, 1): 0.75, (2, 0): 1.0}, 4)
    assert matrix == [[None, 0.75, 0.0, None], [0.25, None, None, None], [1.0, None, None, None], [None] * 4]
    assert win_rate(matrix) == [0.375, 0.25, 1.0, None]


def test_ranking_puts_the_best_first_keeps_ties_in_order_and_the_unknown_last() -> None:
    assert ranking([0.0, None, 2.0, 0.0, -1.0, None]) == [2, 0, 3, 4, 1, 5]
    assert ranking([]) == []


# --- Bradley-Terry ---------------------------------------------------------------------------------------------------


def test_exact_preferences_give_back_their_strengths() -> None:
    strength = [1.5, -0.5, 0.25, -2.0, 0.75]
    fit = bradley_terry(planted(strength), np.full((5, 5), 1e6))
    assert numbers(fit.strength) == pytest.approx(strength, abs=1e-6)
    assert fit.components == [[0, 1, 2, 3, 4]]


def test_two_candidates_have_the_textbook_strength_and_error() -> None:
    games, wins = 1000, 700
    fit = bradley_terry(probability_matrix({(0, 1): wins / games}, 2), np.full((2, 2), float(games)), prior_std=1e6)
    log_odds = math.log(wins / (games - wins))
    assert numbers(fit.strength) == pytest.approx([log_odds / 2, -log_odds / 2], abs=1e-8)
    # The log odds have variance 1 / (n p (1 - p)); each strength is half of them.
    error = 0.5 / math.sqrt(games * 0.7 * 0.3)
    assert numbers(fit.stderr) == pytest.approx([error, error], rel=1e-6)


def test_errors_cover_the_planted_strengths_of_sampled_games() -> None:
    """Over 200 tournaments of 6 candidates and 40 games a pair, z = (fit - truth) / stderr is a standard normal."""
    random = np.random.default_rng(5)
    truth = np.array([1.0, 0.6, 0.1, -0.2, -0.5, -1.0])
    games = 40
    scores = []
    for _ in range(200):
        wins = {(i, j): random.binomial(games, sigmoid(truth[i] - truth[j])) / games for i, j in all_pairs(6)}
        fit = bradley_terry(probability_matrix(wins, 6), np.full((6, 6), float(games)))
        scores.append((numbers(fit.strength) - truth) / numbers(fit.stderr))
    z = np.array(scores)
    assert np.abs(z.mean(axis=0)).max() < 0.25
    assert 0.93 < z.std() < 1.07
    assert 0.93 < (np.abs(z) < 1.96).mean() < 0.97


def test_errors_equal_the_inverse_of_the_information_measured_by_differences() -> None:
    random = np.random.default_rng(6)
    matrix = probability_matrix({pair: random.uniform() for pair in all_pairs(5)}, 5)
    weights = np.full((5, 5), 3.0)
    fit = bradley_terry(matrix, weights)
    strength = numbers(fit.strength)
    basis = np.linalg.qr(np.eye(5) - 0.2)[0][:, :4]  # an orthonormal basis of the sum-zero subspace
    assert np.abs(basis.sum(axis=0)).max() < 1e-12
    step = 1e-3

    def along(a: float, u: int, b: float, v: int) -> float:
        return naive_objective(strength + a * basis[:, u] + b * basis[:, v], matrix, weights)

    information = [
        [
            (along(step, u, step, v) - along(step, u, -step, v) - along(-step, u, step, v) + along(-step, u, -step, v))
            for v in range(4)
        ]
        for u in range(4)
    ]
    covariance = basis @ np.linalg.inv(np.array(information) / (4 * step**2)) @ basis.T
    assert numbers(fit.stderr) == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-4)


@settings(deadline=None)
@given(tournaments(), st.integers(0, 2**32 - 1))
def test_the_likelihood_is_that_of_a_naive_loop_and_the_fit_is_its_minimum(
    tournament: tuple[Matrix, NDArray[np.float64]], seed: int
) -> None:
    matrix, weights = tournament
    judged = np.array([[value is not None for value in row] for row in matrix])
    preference = np.array([[value or 0.0 for value in row] for row in matrix])
    random = np.random.default_rng(seed)
    anywhere = random.normal(size=len(matrix))
    once = np.triu(np.where(judged, weights, 0))
    fast = negative_log_posterior(anywhere, preference, once, np.full(len(matrix), PRIOR_STD**-2))
    assert fast == pytest.approx(naive_objective(anywhere, matrix, weights), rel=1e-9, abs=1e-9)

    fit = bradley_terry(matrix, weights)
    best = np.array([0.0 if value is None else value for value in fit.strength])
    lowest = naive_objective(best, matrix, weights)
    for size in (1e-3, 0.1, 2.0):
        elsewhere = best + size * random.normal(size=len(matrix))
        assert naive_objective(elsewhere, matrix, weights) >= lowest - 1e-9


@settings(deadline=None)
@given(tournaments(), st.randoms(use_true_random=False))
def test_naming_candidates_otherwise_changes_nothing_else(
    tournament: tuple[Matrix, NDArray[np.float64]], random: object
) -> None:
    matrix, weights = tournament
    order = list(range(len(matrix)))
    random.shuffle(order)  # type: ignore[attr-defined]
    fit = bradley_terry(matrix, weights)
    renamed = bradley_terry([[matrix[i][j] for j in order] for i in order], weights[np.ix_(order, order)])
    for mine, theirs in ((fit.strength, renamed.strength), (fit.stderr, renamed.stderr)):
        assert [theirs[k] is None for k in range(len(order))] == [mine[i] is None for i in order]
        assert [value for value in theirs if value is not None] == pytest.approx(
            [mine[i] for i in order if mine[i] is not None], abs=1e-6
        )
    assert {frozenset(order[k] for k in part) for part in renamed.components} == set(map(frozenset, fit.components))
    assert win_rate([[matrix[i][j] for j in order] for i in order]) == pytest.approx(
        [win_rate(matrix)[i] for i in order]
    )


@settings(deadline=None)
@given(tournaments())
def test_reversing_every_preference_reverses_every_strength(tournament: tuple[Matrix, NDArray[np.float64]]) -> None:
    matrix, weights = tournament
    fit = bradley_terry(matrix, weights)
    reverse = bradley_terry([list(column) for column in zip(*matrix, strict=True)], weights)
    for forward, backward in zip(fit.strength, reverse.strength, strict=True):
        assert (forward is None) == (backward is None)
        if forward is not None and backward is not None:
            assert forward == pytest.approx(-backward, abs=1e-6)
    assert [value for value in reverse.stderr if value] == pytest.approx([v for v in fit.stderr if v], rel=1e-6)


@settings(deadline=None)
@given(tournaments())
def test_strengths_are_finite_and_sum_to_zero_in_each_component(
    tournament: tuple[Matrix, NDArray[np.float64]],
) -> None:
    matrix, weights = tournament
    fit = bradley_terry(matrix, weights)
    in_some = {member for part in fit.components for member in part}
    for i, (value, error) in enumerate(zip(fit.strength, fit.stderr, strict=True)):
        met = any(matrix[i][j] is not None and weights[i, j] > 0 for j in range(len(matrix)))
        assert (value is not None) == (error is not None) == (i in in_some) == met
        if value is not None and error is not None:
            assert math.isfinite(value)
            assert 0 < error <= PRIOR_STD
    for part in fit.components:
        assert sum(numbers([fit.strength[i] for i in part])) == pytest.approx(0, abs=1e-9)


def test_perfect_separation_is_finite_ordered_and_uncertain() -> None:
    matrix = probability_matrix(dict.fromkeys(all_pairs(6), 1.0), 6)
    separated = bradley_terry(matrix)
    assert ranking(separated.strength) == [0, 1, 2, 3, 4, 5]
    assert max(map(abs, numbers(separated.strength))) < 3 * PRIOR_STD
    overlapping = bradley_terry(probability_matrix(dict.fromkeys(all_pairs(6), 0.7), 6))
    assert min(numbers(separated.stderr)) > 2 * max(numbers(overlapping.stderr))


def test_the_prior_is_weak() -> None:
    """One judgement of 0.8 a pair: the prior moves strengths by less than a tenth of their errors."""
    matrix = probability_matrix(dict.fromkeys(all_pairs(4), 0.8), 4)
    with_prior, without = bradley_terry(matrix), bradley_terry(matrix, prior_std=1e5)
    shift = np.abs(numbers(with_prior.strength) - numbers(without.strength))
    assert 0 < shift.max() < 0.1 * min(numbers(without.stderr))


def test_disconnected_groups_are_fitted_apart() -> None:
    preferences = {(0, 2): 0.9, (2, 4): 0.7, (1, 5): 0.6}
    fit = bradley_terry(probability_matrix(preferences, 7))
    assert fit.components == [[0, 2, 4], [1, 5]]
    assert fit.strength[3] is fit.stderr[3] is fit.strength[6] is None
    alone = bradley_terry(probability_matrix({(0, 1): 0.6}, 2))
    assert [fit.strength[1], fit.strength[5]] == pytest.approx(alone.strength)
    assert [fit.stderr[1], fit.stderr[5]] == pytest.approx(alone.stderr)


def test_weights_count_judgements() -> None:
    matrix = probability_matrix({(0, 1): 0.8, (1, 2): 0.6, (0, 2): 0.7}, 3)
    one, many = bradley_terry(matrix), bradley_terry(matrix, np.full((3, 3), 100.0))
    assert numbers(many.stderr) == pytest.approx(numbers(one.stderr) / 10, rel=0.1)
    unjudged = np.ones((3, 3))
    unjudged[[0, 2], [2, 0]] = 0
    assert bradley_terry(matrix, unjudged) == bradley_terry(probability_matrix({(0, 1): 0.8, (1, 2): 0.6}, 3))


def test_groups_of_none_one_and_sixty_four() -> None:
    assert bradley_terry([]) == BradleyTerry([], [], [])
    assert bradley_terry([[None]]) == BradleyTerry([None], [None], [])
    truth = np.random.default_rng(7).normal(0, 2, 64)
    fit = bradley_terry(planted(truth.tolist()), np.full((64, 64), 1e4))
    assert numbers(fit.strength) == pytest.approx(truth - truth.mean(), abs=1e-4)


@pytest.mark.parametrize(
    ("matrix", "weights", "words"),
    [
        ([[None, 0.5]], None, "square"),
        ([[None, 0.5], [None, None]], None, "reverse"),
        ([[0.5, 0.5], [0.5, None]], None, "diagonal"),
        ([[None, 0.7], [0.7, None]], None, "sum to 1"),
        ([[None, 1.2], [-0.2, None]], None, "sum to 1"),
        ([[None, 0.5], [0.5, None]], np.ones((3, 3)), "2 x 2"),
        ([[None, 0.5], [0.5, None]], -np.ones((2, 2)), "not negative"),
        ([[None, 0.5], [0.5, None]], np.full((2, 2), np.nan), "finite"),
        ([[None, 0.5], [0.5, None]], np.array([[1.0, 2.0], [1.0, 1.0]]), "symmetric"),
    ],
)
def test_what_is_no_tournament_is_refused(matrix: Matrix, weights: NDArray[np.float64] | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bradley_terry(matrix, weights)


# --- whole tournaments -----------------------------------------------------------------------------------------------


def test_pointwise_tournament() -> None:
    result = compare_by_scores([0.5, None, 0.1, 0.9], temperature=0.2)
    assert numbers([result.strength[i] for i in (0, 2, 3)]) == pytest.approx([0.0, -2.0, 2.0])
    assert result.strength[1] is None
    assert result.strength_stderr == [None] * 4
    assert result.ranking == [3, 0, 2, 1]
    assert result.components == [[0, 2, 3]]
    assert result.probabilities[0][2] == pytest.approx(sigmoid(2.0))
    assert result.probabilities[2][0] == pytest.approx(1 - sigmoid(2.0))
    assert result.probabilities[1] == [None] * 4
    assert result.win_rate[3] == pytest.approx((sigmoid(2.0) + sigmoid(4.0)) / 2)
    assert result.win_rate[1] is None
    assert [(c.first, c.second) for c in result.comparisons] == all_pairs(4)
    assert {c.code for c in result.comparisons if 1 in (c.first, c.second)} == {"score_missing"}
    assert compare_by_scores([None, None], 1.0).ranking == [0, 1]


def test_a_pointwise_tournament_of_given_pairs_tells_only_those() -> None:
    result = compare_by_scores([3.0, 1.0, 2.0], 1.0, [(2, 0)])
    assert [(c.first, c.second) for c in result.comparisons] == [(2, 0)]
    assert result.probabilities[0] == [None, None, pytest.approx(sigmoid(1.0))]
    assert result.win_rate[1] is None
    assert result.ranking == [0, 2, 1]
    with pytest.raises(PairOutOfRange):
        compare_by_scores([3.0, 1.0], 1.0, [(0, 2)])


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.floats(0.5, 4))
def test_closed_form_strengths_are_what_a_fit_to_all_preferences_finds(scores: list[float], temperature: float) -> None:
    result = compare_by_scores(scores, temperature)
    count = len(scores)
    fit = bradley_terry(result.probabilities, np.full((count, count), 1e5), prior_std=1e4)
    assert numbers(fit.strength) == pytest.approx(numbers(result.strength), abs=1e-4)


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=8), st.floats(1e-3, 1e3))
def test_preferences_of_scores_sum_to_one_under_swapping(scores: list[float | None], temperature: float) -> None:
    result = compare_by_scores(scores, temperature)
    for i, j in all_pairs(len(scores)):
        there, back = result.probabilities[i][j], result.probabilities[j][i]
        assert (there is None) == (back is None) == (scores[i] is None or scores[j] is None)
        if there is not None and back is not None:
            assert there + back == 1


@pytest.mark.parametrize(
    ("scores", "temperature", "words"),
    [
        ([1.0], 0.0, "temperature"),
        ([1.0], -1.0, "temperature"),
        ([1.0], math.nan, "temperature"),
        ([1.0], math.inf, "temperature"),
        ([math.nan, 1.0], 1.0, "finite"),
        ([None, math.inf], 1.0, "finite"),
        ([1e308, -1e308], 1e-3, "too large"),
    ],
)
def test_scores_that_have_no_strength_are_refused(scores: list[float | None], temperature: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        strengths_from_scores(scores, temperature)


def test_a_judged_tournament_uses_both_orders() -> None:
    comparisons = [
        JudgedComparison(0, 1, 0.9, text="the first is sharper"),
        JudgedComparison(1, 0, 0.3),
        JudgedComparison(2, 1, 0.6),
        JudgedComparison(1, 2, None, code="unparseable"),
        JudgedComparison(0, 3, None, code="deadline"),
    ]
    result = compare_by_judge(comparisons, 4)
    assert result.probabilities[0][1] == pytest.approx(0.8)
    assert result.probabilities[1][2] == pytest.approx(0.4)
    assert result.probabilities[3] == [None] * 4
    assert result.win_rate == [pytest.approx(0.8), pytest.approx(0.3), pytest.approx(0.6), None]
    assert result.strength[3] is result.strength_stderr[3] is None
    assert result.ranking == [0, 2, 1, 3]
    assert result.components == [[0, 1, 2]]
    assert result.comparisons == comparisons
    weights = np.array([[0, 2, 0, 0], [2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=np.float64)
    assert result.strength == bradley_terry(result.probabilities, weights).strength


@given(st.permutations([JudgedComparison(i, j, 0.1 * i + 0.2 * j) for i in range(3) for j in range(3) if i != j]))
def test_the_order_of_the_answers_does_not_matter(comparisons: list[JudgedComparison]) -> None:
    reference = compare_by_judge(sorted(comparisons, key=lambda c: (c.first, c.second)), 3)
    result = compare_by_judge(comparisons, 3)
    assert numbers(result.strength) == pytest.approx(numbers(reference.strength), abs=1e-9)
    assert result.ranking == reference.ranking


@pytest.mark.parametrize(
    ("orders", "kind"),
    [([(0, 1), (0, 1)], DuplicatePair), ([(0, 2)], PairOutOfRange), ([(1, 1)], PairWithItself)],
)
def test_impossible_comparisons_are_refused(orders: list[tuple[int, int]], kind: type[PairError]) -> None:
    with pytest.raises(kind):
        compare_by_judge([JudgedComparison(i, j, 0.5) for i, j in orders], 2)


def test_a_judge_with_a_position_bias_ranks_as_without_it() -> None:
    """A judge that adds one logit to whatever it sees first: both orders cancel it, one order alone does not."""
    truth = [0.0, 0.4, -0.4]

    def judge(bias: float) -> Callable[[int, int], JudgedComparison]:
        return lambda i, j: JudgedComparison(i, j, sigmoid(truth[i] - truth[j] + bias))

    both = [judge(1.0)(i, j) for i in range(3) for j in range(3) if i != j]
    one = [judge(1.0)(i, j) for i, j in all_pairs(3)]
    assert compare_by_judge(both, 3).ranking == [1, 0, 2]
    assert compare_by_judge(one, 3).ranking != [1, 0, 2]
