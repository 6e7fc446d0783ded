"""Pref-GRPO's reward: win rates of a group."""

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_client.advantages import PREF_GRPO, group_advantages, win_rates

outcomes = st.integers(2, 8).flatmap(
    lambda n: st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 0.25, None]), min_size=n * (n - 1) // 2, max_size=n * (n - 1) // 2
    ).map(lambda values: (n, values))
)


def matrix(count: int, values: list[float | None]) -> torch.Tensor:
    found, rest = torch.full((count, count), math.nan, dtype=torch.float64), iter(values)
    for i in range(count):
        for j in range(i + 1, count):
            value = next(rest)
            if value is not None:
                found[i, j], found[j, i] = value, 1 - value
    return found


@settings(deadline=None)
@given(outcomes)
def test_the_rate_is_points_by_comparisons(case: tuple[int, list[float | None]]) -> None:
    count, _ = case
    table = matrix(*case)
    rate, ok = win_rates(table)
    for i in range(count):
        judged = [table[i, j].item() for j in range(count) if j != i and not table[i, j].isnan()]
        assert ok[i] == bool(judged)
        if judged:
            assert rate[i].item() == pytest.approx(sum(judged) / len(judged))
        else:
            assert rate[i].isnan()  # no comparison is no reward: 0 would be "lost against everyone"


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**31))
def test_rates_of_a_complete_group_have_mean_one_half(count: int, seed: int) -> None:
    upper = torch.rand((count, count), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu(1)
    table = upper + (1 - upper).triu(1).T - torch.diag(upper.diagonal())
    rate, ok = win_rates(table)
    assert ok.all()
    assert rate.mean().item() == pytest.approx(0.5)


@settings(deadline=None)
@given(outcomes, st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(case: tuple[int, list[float | None]], random: Random) -> None:
    table, order = matrix(*case), list(range(case[0]))
    random.shuffle(order)
    rate, ok = win_rates(table)
    turned, turned_ok = win_rates(table[order][:, order])
    torch.testing.assert_close(rate[order], turned, equal_nan=True)
    assert torch.equal(ok[order], turned_ok)


def test_rates_become_advantages_without_the_failed_candidate() -> None:
    """Four candidates, the third never judged; thirds are rounded to three decimals as the reference does."""
    table = matrix(4, [1.0, None, 1.0, None, 0.5, None])
    rate, ok = win_rates(table, decimals=3)
    assert rate[[0, 1, 3]].tolist() == [1.0, 0.25, 0.25]
    found = group_advantages(rate, torch.zeros(4), ok_B=ok, spread=PREF_GRPO)
    mean, std = 0.5, math.sqrt((0.5**2 + 2 * 0.25**2) / 2)
    assert found.tolist() == pytest.approx([(1 - mean) / std, -0.25 / std, 0.0, -0.25 / std], rel=1e-6)


def test_a_group_of_ties_has_no_advantage() -> None:
    """Three candidates in a cycle, or eight in ties: everyone wins as often as everyone else."""
    cycle, _ = win_rates(matrix(3, [1.0, 0.0, 1.0]), decimals=3)
    ties, _ = win_rates(matrix(8, [0.5] * 28))
    for rate in (cycle, ties):
        assert group_advantages(rate, torch.zeros(len(rate)), spread=PREF_GRPO).tolist() == [0.0] * len(rate)


def test_a_double_third_is_rounded_as_in_python() -> None:
    rate, _ = win_rates(matrix(4, [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]), decimals=3)
    assert rate.tolist() == [round(2 / 3, 3), round(2 / 3, 3), round(1 / 3, 3), round(1 / 3, 3)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[math.nan, 0.7], [0.7, math.nan]], "add up to 1"),
        ([[math.nan, 0.7], [math.nan, math.nan]], "add up to 1"),
        ([[math.nan, 1.5], [-0.5, math.nan]], "in \\[0, 1\\]"),
        ([[math.nan, 0.5]], "\\[N, N\\]"),
    ],
)
def test_what_is_no_table_of_preferences_is_refused(table: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        win_rates(torch.tensor(table))
