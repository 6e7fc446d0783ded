"""Bradley-Terry with a position term: what the place of a candidate is worth, and strengths that are free of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from service.bradley_terry import POSITION_PRIOR_STD, PRIOR_STD, Matrix, bradley_terry_with_position
from service.tournament import JudgedComparison, compare_by_judge


@st.composite
def ordered(draw: st.DrawFn) -> Matrix:
    """Ordered comparisons of 2 to 6 candidates, at least one of them answered."""
    count = draw(st.integers(2, 6))
    answer = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
    matrix: Matrix = [[None if i == j else draw(answer) for j in range(count)] for i in range(count)]
    matrix[0][1] = draw(st.floats(0, 1))
    return matrix


def naive(strength: list[float], position: float, matrix: Matrix) -> float:
    total = sum(value**2 for value in strength) / (2 * PRIOR_STD**2) + position**2 / (2 * POSITION_PRIOR_STD**2)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if value is not None:
                logit = strength[i] - strength[j] + position
                win = 1 / (1 + math.exp(-logit))
                total -= value * math.log(win) + (1 - value) * math.log(1 - win)
    return total


@settings(deadline=None)
@given(ordered(), st.integers(0, 2**32 - 1))
def test_the_fit_is_the_minimum_of_the_naive_loop(matrix: Matrix, seed: int) -> None:
    found = bradley_terry_with_position(matrix)
    assert found.position is not None
    best = np.array([*(value or 0.0 for value in found.fit.strength), found.position])
    lowest = naive(best[:-1].tolist(), best[-1], matrix)
    chance = np.random.default_rng(seed)
    for size in (1e-3, 0.1, 1.0):
        elsewhere = best + size * chance.normal(size=len(best))
        assert naive(elsewhere[:-1].tolist(), elsewhere[-1], matrix) >= lowest - 1e-9
    for part in found.fit.components:
        assert sum(found.fit.strength[i] or 0.0 for i in part) == pytest.approx(0, abs=1e-9)


@settings(deadline=None)
@given(ordered())
def test_swapping_every_order_turns_the_position_and_nothing_else(matrix: Matrix) -> None:
    """(i, j) with p becomes (j, i) with 1 - p: the same preferences, the other place."""
    count = len(matrix)
    turned: Matrix = [[None if (p := matrix[j][i]) is None else 1 - p for j in range(count)] for i in range(count)]
    here, there = bradley_terry_with_position(matrix), bradley_terry_with_position(turned)
    assert here.position is not None
    assert there.position == pytest.approx(-here.position, abs=1e-6)
    assert there.position_stderr == pytest.approx(here.position_stderr, rel=1e-5)
    assert there.fit.components == here.fit.components
    for mine, theirs in zip(here.fit.strength, there.fit.strength, strict=True):
        assert theirs == (None if mine is None else pytest.approx(mine, abs=1e-6))


def test_errors_cover_what_was_planted() -> None:
    """400 groups, 40 verdicts an ordered comparison: (fit - truth) / error is about standard normal."""
    chance = np.random.default_rng(2)
    truth, bias = np.array([0.8, 0.3, 0.0, -0.4, -0.7]), 0.4
    z_strength, z_position = [], []
    for _ in range(400):
        rates = chance.binomial(40, expit(truth[:, None] - truth[None, :] + bias)) / 40
        matrix: Matrix = [[None if i == j else float(rates[i, j]) for j in range(5)] for i in range(5)]
        found = bradley_terry_with_position(matrix)
        assert found.position is not None
        assert found.position_stderr is not None
        # 40 verdicts stand behind each preference, which the fit counts as one.
        z_position.append((found.position - bias) / found.position_stderr * math.sqrt(40))
        strength, stderr = np.array(found.fit.strength, dtype=float), np.array(found.fit.stderr, dtype=float)
        z_strength.append((strength - truth) / stderr * math.sqrt(40))
    assert 0.9 < np.std(z_strength) < 1.1
    assert 0.9 < np.std(z_position) < 1.1


def test_single_orders_are_freed_of_the_position() -> None:
    """12 candidates and 0.7 logits for the first place: in one order or both, the position and strengths are found."""
    quality, bias = np.linspace(-1.5, 1.5, 12), 0.7

    def asked(orders: list[tuple[int, int]]) -> list[JudgedComparison]:
        return [JudgedComparison(i, j, float(expit(quality[i] - quality[j] + bias))) for i, j in orders]

    single = [(i, (i + step) % 12) for step in (1, 2, 3, 5) for i in range(12)]
    one = compare_by_judge(asked(single), 12, position=True)
    both = compare_by_judge(asked([*single, *((j, i) for i, j in single)]), 12, position=True)
    plain = compare_by_judge(asked(single), 12)
    assert both.position == pytest.approx(bias, abs=0.05)
    assert one.position == pytest.approx(bias, abs=0.1)
    assert one.position_stderr is not None
    assert both.position_stderr is not None
    assert one.position_stderr > both.position_stderr > 0
    assert plain.position is plain.position_stderr is None
    free = float(expit(quality[11] - quality[0]))
    assert one.probabilities[11][0] == pytest.approx(free, abs=0.01)
    assert abs((plain.probabilities[11][0] or 0) - free) > 0.02


def test_nothing_judged_has_no_position() -> None:
    for matrix in ([], [[None]], [[None, None], [None, None]]):
        found = bradley_terry_with_position(matrix)
        assert found.position is found.position_stderr is None
        assert found.fit.components == []


@pytest.mark.parametrize(
    ("matrix", "words"),
    [([[0.5, None], [None, None]], "diagonal"), ([[None, 1.5], [None, None]], r"\[0, 1\]"), ([[None]] * 2, "square")],
)
def test_what_is_no_tournament_is_refused(matrix: Matrix, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bradley_terry_with_position(matrix)
