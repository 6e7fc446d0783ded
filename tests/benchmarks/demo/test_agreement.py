"""Agreement with the truth: the arithmetic against plain loops."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.demo.agreement import judge
from benchmarks.demo.agreement_statistics import bootstrap_interval, pairwise_outcomes

truths = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=2, max_size=9)


@given(truths, st.randoms(use_true_random=False))
def test_pairwise_outcomes_are_those_of_a_plain_loop(truth: list[float], random: object) -> None:
    scores = [random.choice([-1.0, 0.0, 3.0]) for _ in truth]  # type: ignore[attr-defined]
    expected = []
    for i in range(len(truth)):
        for j in range(i + 1, len(truth)):
            if truth[i] > truth[j]:
                expected.append(scores[i] > scores[j])
            elif truth[i] < truth[j]:
                expected.append(scores[i] < scores[j])
    assert pairwise_outcomes(scores, truth) == expected


@given(truths)
def test_the_truth_agrees_with_itself_and_its_opposite_never(truth: list[float]) -> None:
    assert all(pairwise_outcomes([3 * value - 1 for value in truth], truth))
    assert not any(pairwise_outcomes([-value for value in truth], truth))


def test_a_tie_in_the_scores_is_not_agreement() -> None:
    assert pairwise_outcomes([1.0, 1.0], [0.0, 1.0]) == [False]
    with pytest.raises(ValueError, match="3 scores and 2 truths"):
        pairwise_outcomes([1.0, 2.0, 3.0], [1.0, 2.0])


def test_the_interval_holds_the_share_and_widens_where_whole_groups_fail() -> None:
    spread = [[True] * 9 + [False]] * 40
    lumped = [[True] * 10] * 36 + [[False] * 10] * 4
    for groups in (spread, lumped):
        low, high = bootstrap_interval(groups)
        assert low <= 0.9 <= high
    low, high = bootstrap_interval(spread)
    assert high - low == pytest.approx(0)
    low, high = bootstrap_interval(lumped)
    assert 0.1 < high - low < 0.3  # binomial with 40 groups: 4 x sqrt(0.9 x 0.1 / 40) = 0.19


def test_no_outcome_has_no_interval() -> None:
    with pytest.raises(ValueError, match="no pair"):
        bootstrap_interval([[], []])


def test_one_caption_is_judged_by_exact_plus_soft() -> None:
    judged = judge("colors", scores=[5.0, 1.0, 2.0, -3.0], exact=[1.0, 0.0, 0.0, 0.0], soft=[1.0, 0.5, 0.25, 0.25])
    assert judged.favourite_exact
    # the truth is 2, 0.5, 0.25, 0.25: of five pairs that differ, (1, 2) is ordered wrongly
    assert (sum(judged.outcomes), len(judged.outcomes)) == (4, 5)
    assert judged.tau == pytest.approx((4 - 1) / (6 * 5) ** 0.5)
    assert not judge("colors", [0.0, 1.0], [1.0, 0.0], [1.0, 0.5]).favourite_exact
