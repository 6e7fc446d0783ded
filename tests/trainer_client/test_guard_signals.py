"""The levels at which the guard tests: what a whole run adds up to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_client.guard_signals import LEAST_JUMPS, level_of_best, level_of_look

ALPHA = 0.05


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
@pytest.mark.parametrize("first", [1, 4])
def test_the_looks_that_every_alarm_holds_one_of_have_alpha_together(patience: int, first: int) -> None:
    levels = [level_of_look(ALPHA, look, patience, first) for look in range(first, 20_000)]
    assert levels == sorted(levels, reverse=True)
    last_of_each_row = sum(levels[patience - 1 :: patience])
    assert 0.2 * ALPHA < last_of_each_row <= ALPHA
    if patience == 1:
        assert last_of_each_row == pytest.approx(ALPHA, rel=1e-3)  # nothing is given away


@given(st.integers(2, 6), st.integers(1, 200))
def test_a_row_of_firings_holds_one_of_them(patience: int, start: int) -> None:
    row = range(start, start + patience)
    assert sum(look % patience == patience - 1 for look in row) == 1


def test_a_comparison_with_the_best_of_many_pays_for_the_choice() -> None:
    first = LEAST_JUMPS + 1
    for look in (first, 2 * first, 10 * first):
        assert look * level_of_best(ALPHA, look, 2) == pytest.approx(level_of_look(ALPHA, look, 2, first))
    pairs = [look * level_of_best(ALPHA, look, 2) for look in range(first, 20_000)]
    assert sum(pairs[1::2]) <= ALPHA
