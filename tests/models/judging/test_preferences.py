"""Win rates, ranks and best pairs of groups: laws, naive loops, and failed comparisons that count for nobody."""

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.judging.answers import Category, FlexAnswer
from models.judging.flex import parse_flex
from models.judging.pairs import parse_think
from models.judging.preferences import Vote, best_and_worst, flex_rates, rank_rewards, win_rates

FIXTURES = Path(__file__).parents[2] / "fixtures" / "rl" / "t5_pairwise_reward"
GROUPS = json.loads((FIXTURES / "pref_grpo_win_rate.json").read_text("utf-8"))

groups = st.integers(1, 7).flatmap(
    lambda count: st.lists(
        st.tuples(st.integers(0, count - 1), st.integers(0, count - 1), st.sampled_from([0.0, 0.5, 1.0, 0.3, None])),
        max_size=20,
    ).map(lambda votes: (count, [vote for vote in votes if vote[0] != vote[1]]))
)


def naive(votes: list[Vote], candidate: int) -> float | None:
    won, judged = 0.0, 0
    for first, second, preference in votes:
        if preference is not None and candidate in (first, second):
            won += preference if candidate == first else 1 - preference
            judged += 1
    return won / judged if judged else None


@given(groups)
def test_win_rates_equal_the_naive_loop(group: tuple[int, list[Vote]]) -> None:
    count, votes = group
    found = win_rates(votes, count)
    assert found == [pytest.approx(naive(votes, i)) if naive(votes, i) is not None else None for i in range(count)]


@given(
    st.integers(2, 8).flatmap(lambda n: st.lists(st.floats(0, 1), min_size=n * (n - 1) // 2, max_size=n * (n - 1) // 2))
)
def test_rates_of_a_full_tournament_average_one_half(preferences: list[float]) -> None:
    count = round((1 + math.sqrt(1 + 8 * len(preferences))) / 2)
    votes = [(i, j, p) for (i, j), p in zip(combinations(range(count), 2), preferences, strict=True)]
    rates = win_rates(votes, count)
    assert sum(rates) / count == pytest.approx(0.5)
    assert win_rates([(j, i, 1 - p) for i, j, p in votes], count) == pytest.approx(rates)


def test_a_group_that_was_answered_throughout_has_the_references_reward() -> None:
    group = GROUPS[0]
    votes = [
        (r["first_index"], r["second_index"], parse_think(r["model_output"]).preference) for r in group["responses"]
    ]
    assert None not in [vote for _, _, vote in votes]
    assert win_rates(votes, 4) == pytest.approx(group["overall_reward"], abs=5e-4)


def test_a_failed_comparison_is_no_tie() -> None:
    """The reference gives this group 0.5 each for half of its answers, which nobody could read."""
    group = GROUPS[6]
    answers = [parse_think(r["model_output"]) for r in group["responses"]]
    assert group["overall_reward"] == [0.5] * 5
    assert {answer.status for answer in answers} >= {"ok", "empty", "unparseable"}
    assert win_rates([(0, 1, 1.0), (0, 2, None), (1, 2, None)], 3) == [1.0, 0.0, None]
    assert win_rates([], 1) == [None]


@pytest.mark.parametrize("vote", [(0, 0, 1.0), (0, 3, 1.0), (-1, 0, 1.0), (0, 1, 1.5), (0, 1, math.nan), (0, 3, None)])
def test_impossible_votes_raise(vote: Vote) -> None:
    with pytest.raises(ValueError, match=r"candidates 0 to 2|preference is in"):
        win_rates([vote], 3)


def flex(overall: float | None, **categories: float | None) -> FlexAnswer:
    return FlexAnswer(
        overall,
        "unparseable" if overall is None else "ok",
        tuple(Category(name, preference) for name, preference in categories.items()),
    )


def test_rates_of_categories() -> None:
    comparisons = [
        (0, 1, flex(1.0, align=1.0, quality=0.0)),
        (0, 2, flex(None, align=0.0, quality=None)),
        (1, 2, flex(0.0, align=1.0, mood=1.0)),
    ]
    rates = flex_rates(comparisons, 4)
    assert rates.overall == [1.0, 0.0, 1.0, None]
    assert dict(rates.by_category) == {
        "align": [0.5, 0.5, 0.5, None], "quality": [0.0, 1.0, None, None], "mood": [None, 1.0, 0.0, None],
    }  # fmt: skip
    assert rates.dimension_mean == [0.25, pytest.approx(2.5 / 3), 0.25, None]
    weighted = flex_rates(comparisons, 4, (3, 1, 0))
    assert weighted.dimension_mean == [0.375, 0.625, 0.5, None]
    assert flex_rates(comparisons, 4, (0, 0, 0, 5)).dimension_mean == [None] * 4
    with pytest.raises(ValueError, match="not negative"):
        flex_rates(comparisons, 4, (-1,))


def test_the_weight_of_dimensions_and_template_echoes() -> None:
    """Group 16 asks for a weight of 0 for the dimensions, which the reference forgets."""
    group = GROUPS[16]
    assert group["env"] == {"DIM_WEIGHT": "0"}
    comparisons = [(r["first_index"], r["second_index"], parse_flex(r["model_output"])) for r in group["responses"]]
    assert flex_rates(comparisons, 3).overall == group["reward_if_dim_weight_were_respected"]
    assert group["reward"] != group["reward_if_dim_weight_were_respected"]
    echo = parse_flex('{"categories": [{"name": "A", "cat_winner": "Image 1/2"}], "winner": "Image 1/2"}')
    assert flex_rates([(0, 1, echo)], 2).overall == [None, None]
    assert flex_rates([(0, 1, echo)], 2).by_category == {"A": [None, None]}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12))
def test_ranks_follow_scores_and_average_alike(scores: list[float]) -> None:
    ranks = rank_rewards(scores)
    count = len(scores)
    assert sum(ranks) == pytest.approx((count - 1) / 2)
    for i in range(count):
        below = [other < scores[i] for other in scores]
        level = [other == scores[i] for other in scores]
        assert ranks[i] == pytest.approx((sum(below) + (sum(level) - 1) / 2) / count)


def test_ranks_of_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="finite"):
        rank_rewards([1.0, math.nan])
    assert rank_rewards([]) == []


def test_best_and_worst_compare_numbers() -> None:
    # The reference compares digits as text, and finds "9" above "10".
    assert best_and_worst([9, 10, 8], [10, 9, 7]) == (1, 2)
    assert best_and_worst([4, 5, 3, 5], [1, 3, 1]) == (1, 0)
    assert best_and_worst([2, 2], [2, 3]) is None
    assert best_and_worst([], [1]) is None
