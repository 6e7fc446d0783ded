"""How scores and rankings agree: naive counts, laws, and ties as the papers treat them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from models.fitting.agreement import inversion_score, pair_accuracy, pairs_of_ranking

rankings = st.integers(2, 8).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.permutations(range(n))))


@given(rankings)
def test_inversions_are_kendalls_tau(pair: tuple[list[int], list[int]]) -> None:
    predicted, truth = pair
    assert 2 * inversion_score(predicted, truth) - 1 == pytest.approx(kendalltau(predicted, truth).statistic)
    assert inversion_score(truth, truth) == 1
    assert inversion_score([-rank for rank in truth], truth) == 0


@given(st.lists(st.integers(0, 3), min_size=2, max_size=7))
def test_pairs_name_the_better_first_and_skip_ties(ranking: list[int]) -> None:
    pairs = pairs_of_ranking(ranking)
    naive = {(i, j) for i in range(len(ranking)) for j in range(len(ranking)) if ranking[i] < ranking[j]}
    assert set(pairs) == naive
    assert len(pairs) == len(naive)
    if naive:
        assert pair_accuracy([-rank for rank in ranking], ranking) == 1
        assert pair_accuracy(ranking, ranking) == 0
        assert pair_accuracy([1.0] * len(ranking), ranking) == 0  # a tie of scores tells nothing


def test_accuracy_counts_pairs() -> None:
    assert pair_accuracy([0.9, 0.5, 0.7], [0, 1, 2]) == pytest.approx(2 / 3)
    assert pair_accuracy([0.9, 0.5, 0.5], [0, 1, 1]) == 1


def test_what_has_no_agreement_raises() -> None:
    for scores, ranking in [([1.0], [0]), ([1.0, 2.0], [0, 0]), ([1.0], [0, 1])]:
        with pytest.raises(ValueError, match="no accuracy"):
            pair_accuracy(scores, ranking)
    for predicted, truth in [([0], [0]), ([0, 0], [0, 1]), ([0, 1], [1, 1]), ([0, 1, 2], [0, 1])]:
        with pytest.raises(ValueError, match="without ties"):
            inversion_score(predicted, truth)
