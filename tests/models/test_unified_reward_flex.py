"""UnifiedReward-Flex: the published text, overall verdict and categories."""

import json

import pytest

from models.judge import AnswerError, Comparison, Preference
from models.unified_reward_flex import UnifiedRewardFlex
from tests.models.judging.questions import A, B, load, parts, preference, sha256

PAIR = Comparison("{prompt}", A, B)


def answer(*winners: str, overall: str) -> str:
    categories = [{"name": f"Category {i}", "cat_winner": winner} for i, winner in enumerate(winners)]
    return json.dumps({"categories": categories, "reason": "because", "winner": overall})


def test_both_images_in_order_and_then_the_published_text() -> None:
    first, second, text = parts(load(UnifiedRewardFlex), PAIR)
    assert (first, second) == (A, B)
    assert sha256(text) == "bd0c2d5635a7b6b3f382416789dad5c71563d9b68eeacfe75ece5795dff5ebda"


def test_overall_and_categories_are_preferences_for_the_first_candidate() -> None:
    text = answer("Image 1", "Image 2", "Image 1/2", "Image 2", overall="Image 2")
    result = preference(load(UnifiedRewardFlex, text), PAIR)
    assert isinstance(result, Preference)
    assert (result.probability, result.outputs) == (0.0, {"semantic_alignment": 1.0, "image_quality": 0.0})
    assert result.details["reasons"] == ["because"]
    assert [category["name"] for category in result.details["categories"][0]] == [f"Category {i}" for i in range(3)]


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (answer("Image 1", overall="Image 1")[:-1], "truncated"), (answer(overall="Image 1/2"), "unparseable"),
        ('{"categories": []}', "incomplete"), ("Image 1 wins", "unparseable"),
    ],
)  # fmt: skip
def test_what_the_reference_calls_a_tie_is_a_failed_comparison(text: str, status: str) -> None:
    result = preference(load(UnifiedRewardFlex, text), PAIR)
    assert isinstance(result, AnswerError)
    assert result.status == status
