"""Adaptive tournaments: valid, connected, bounded, and in agreement with the whole tournament at a fraction of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.special import expit
from scipy.stats import kendalltau

from service.adaptive import GIVEN_UP_AFTER, Adaptive, default_budget
from service.tournament import CompareResult, JudgedComparison, Pair, PairError, compare_by_judge

Judging = Callable[[int, int], float | None]
Probabilities = NDArray[np.float64]


def play(schedule: Adaptive, judge: Judging) -> tuple[list[JudgedComparison], list[list[Pair]]]:
    """All comparisons and the rounds in which they were asked."""
    judged: list[JudgedComparison] = []
    rounds: list[list[Pair]] = []
    while pairs := schedule.next_pairs(judged):
        rounds.append(pairs)
        answers = [(i, j, judge(i, j)) for i, j in pairs]
        judged += [JudgedComparison(i, j, p, None if p is not None else "answer_empty") for i, j, p in answers]
        assert len(rounds) <= schedule.budget, "it does not end"
    return judged, rounds


def simulated(count: int, seed: int, *, position: float, verdicts: bool) -> Probabilities:
    """P(first preferred) [N, N] of a judge that orders about nine pairs in ten as their true qualities do.

    Part of its noise belongs to the pair, whichever is shown first, and part to the order.
    """
    chance = np.random.default_rng(seed)
    quality = chance.normal(size=count)
    of_pair = np.triu(0.35 * chance.normal(size=(count, count)), 1)
    noise = of_pair - of_pair.T + 0.3 * chance.normal(size=(count, count))
    logits = 2 * (quality[:, None] - quality[None, :] + noise) + position
    return np.where(logits > 0, 1.0, 0.0) if verdicts else np.asarray(expit(logits))


def whole(probabilities: Probabilities) -> CompareResult:
    count = len(probabilities)
    orders = [(i, j) for i in range(count) for j in range(count) if i != j]
    return compare_by_judge([JudgedComparison(i, j, float(probabilities[i, j])) for i, j in orders], count)


def agreement(probabilities: Probabilities, seed: int) -> float:
    """Kendall's tau of an adaptive tournament to the whole one in both orders."""
    count = len(probabilities)
    judged, _ = play(Adaptive(count, seed=seed), lambda i, j: float(probabilities[i, j]))
    found = compare_by_judge(judged, count, position=True)
    return float(kendalltau(found.strength, whole(probabilities).strength).statistic)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 20), st.integers(0, 2**32 - 1), st.data())
def test_rounds_are_valid_never_repeat_and_end_within_the_budget(count: int, seed: int, data: st.DataObject) -> None:
    budget = data.draw(st.one_of(st.none(), st.integers(count - 1, count * (count - 1))))
    answers = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
    schedule = Adaptive(count, seed=seed, budget=budget)
    judged, rounds = play(schedule, lambda i, j: data.draw(answers))
    asked = [(each.first, each.second) for each in judged]
    assert len(set(asked)) == len(asked) <= schedule.budget
    assert all(0 <= i < count and 0 <= j < count and i != j for i, j in asked)
    assert all(pairs == sorted(pairs) for pairs in rounds)  # what shares a first candidate comes together
    graph = np.zeros((count, count))
    for i, j in rounds[0]:
        graph[i, j] = 1
    assert connected_components(graph, directed=False)[0] == 1


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 16), st.integers(0, 2**32 - 1))
def test_the_same_answers_give_the_same_rounds(count: int, seed: int) -> None:
    probabilities = simulated(count, seed, position=0.1, verdicts=False)
    first, second = (play(Adaptive(count, seed=seed), lambda i, j: float(probabilities[i, j])) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("verdicts", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5, 8, 24, 64])
def test_comparisons_grow_as_n_log_n_in_few_rounds_of_at_least_half_n(count: int, verdicts: bool) -> None:
    probabilities = simulated(count, 1, position=0.1, verdicts=verdicts)
    judged, rounds = play(Adaptive(count), lambda i, j: float(probabilities[i, j]))
    # Up to four candidates the first round is all pairs.
    per_bit = 1.2 if verdicts or count < 5 else 0.95
    assert len(judged) <= default_budget(count, graded=not verdicts and count >= 5)
    assert max(2, per_bit * count * np.log2(count) - max(8, count / 2)) <= len(judged)
    assert len(judged) <= max(2, per_bit * count * np.log2(count) + 5)
    assert len(rounds) <= 8
    assert all(len(pairs) >= count / 2 for pairs in rounds)


@pytest.mark.parametrize("count", [8, 24])
def test_the_first_round_shows_each_candidate_first_as_often_as_second(count: int) -> None:
    pairs = Adaptive(count, seed=3).next_pairs([])
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert Counter(i for i, _ in pairs) == Counter(j for _, j in pairs) == dict.fromkeys(range(count), 2)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 16), st.integers(0, 2**32 - 1), st.floats(-0.5, 0.5))
def test_a_perfect_judge_is_ranked_exactly_whatever_place_it_favours(count: int, seed: int, position: float) -> None:
    quality = np.random.default_rng(seed).permutation(count) * 0.5
    judged, _ = play(Adaptive(count, seed=seed), lambda i, j: float(expit(quality[i] - quality[j] + position)))
    assert compare_by_judge(judged, count, position=True).ranking == np.argsort(-quality).tolist()


@pytest.mark.parametrize(("verdicts", "position"), [(False, 0.05), (False, 0.2), (True, 0.1)])
def test_a_quarter_of_the_comparisons_ranks_as_all_of_them_do(verdicts: bool, position: float) -> None:
    assert default_budget(24) <= 552 / 4
    groups = [simulated(24, seed, position=position, verdicts=verdicts) for seed in range(12)]
    taus = [agreement(group, seed) for seed, group in enumerate(groups)]
    assert np.mean(taus) >= 0.9
    assert min(taus) >= 0.75


def test_a_judge_that_goes_in_circles_is_heard_to_the_end() -> None:
    count = 9
    judged, _ = play(Adaptive(count), lambda i, j: float((j - i) % count <= count // 2))  # i beats the next four
    assert len(judged) == default_budget(count)
    strength = compare_by_judge(judged, count, position=True).strength
    assert None not in strength


def test_ties_everywhere_end_with_equal_strengths() -> None:
    judged, _ = play(Adaptive(12), lambda i, j: 0.5)
    found = compare_by_judge(judged, 12, position=True)
    assert found.strength == pytest.approx([0.0] * 12, abs=1e-9)
    assert found.position == pytest.approx(0, abs=1e-9)


def test_a_candidate_that_always_fails_is_given_up_and_the_others_are_ranked() -> None:
    quality = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]

    def judge(i: int, j: int) -> float | None:
        return None if 3 in (i, j) else float(expit(quality[i] - quality[j]))

    judged, rounds = play(Adaptive(8), judge)
    failed = sum(each.probability is None for each in judged)
    assert failed <= GIVEN_UP_AFTER + sum(3 in pair for pair in rounds[0])
    assert compare_by_judge(judged, 8, position=True).ranking == [7, 6, 5, 4, 2, 1, 0, 3]


def test_when_everything_fails_it_ends() -> None:
    judged, _ = play(Adaptive(10), lambda i, j: None)
    assert 0 < len(judged) < default_budget(10)


def test_failures_that_cut_the_group_are_mended() -> None:
    """What fails in the first round leaves two halves without an answer between them: the next asks across."""
    first = Adaptive(10).next_pairs([])
    halves = [JudgedComparison(i, j, 0.7 if i % 2 == j % 2 else None, None) for i, j in first]
    assert len(compare_by_judge(halves, 10, position=True).components) != 1
    assert any(i % 2 != j % 2 for i, j in Adaptive(10).next_pairs(halves))


def test_a_whole_budget_asks_everything_once() -> None:
    judged, rounds = play(Adaptive(5, budget=1000), lambda i, j: 0.6)
    assert len(rounds) == 1
    assert len(judged) == 20


def test_what_is_no_tournament_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Adaptive(1)
    with pytest.raises(ValueError, match="cannot connect"):
        Adaptive(9, budget=7)
    with pytest.raises(PairError):
        Adaptive(8).next_pairs([JudgedComparison(0, 8, 0.5)])
