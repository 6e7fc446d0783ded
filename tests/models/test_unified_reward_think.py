"""UnifiedReward-Think: published texts, image order, verdicts, reasons."""

import pytest

from models.base import LoadOptions, UnsupportedInput, WeightsError
from models.judge import AnswerError, Comparison, Preference
from models.unified_reward_think import UnifiedRewardThink
from tests.models.judging.questions import A, B, load, parts, preference, sha256

PAIR = Comparison("{prompt}", A, B)


@pytest.mark.parametrize(
    ("options", "published"),
    [
        ({}, "a8a0d80818246406b783d5cca630336c5fdf1264fef13f09d09bd94d61a139d5"),
        ({"version": "v1"}, "342f6a4bd0efdae0ca754259d78404e534aae5f1c5527dd47f6062028305e3ff"),
    ],
)
def test_both_images_in_order_and_then_the_published_text(options: dict[str, str], published: str) -> None:
    judge = load(UnifiedRewardThink, **options)
    first, second, text = parts(judge, PAIR)
    assert (first, second) == (A, B)
    assert sha256(text) == published
    assert parts(judge, Comparison("{prompt}", B, A)) == (B, A, text)
    assert judge.ask(PAIR)[0].turn.system == ""


@pytest.mark.parametrize(("winner", "probability"), [(1, 1.0), (2, 0.0)])
def test_the_verdict_is_about_the_first_candidate_and_reasons_are_kept(winner: int, probability: float) -> None:
    judge = load(UnifiedRewardThink, f"<think>\nThe sky.\n</think>\n<answer>Image {winner} is better</answer>")
    result = preference(judge, PAIR)
    assert isinstance(result, Preference)
    assert (result.probability, result.details["reasons"]) == (probability, ["The sky."])


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("<think>The sky", "truncated"), ("Image 1 is better", "unparseable"), ("", "empty"),
        ("<answer>Image 1 is better</answer><answer>Image 2 is better</answer>", "contradictory"),
        ("<think>x</think> Sorry, I cannot say.", "refused"),
    ],
)  # fmt: skip
def test_answers_without_a_verdict_are_failed_comparisons(text: str, status: str) -> None:
    result = preference(load(UnifiedRewardThink, text), PAIR)
    assert isinstance(result, AnswerError)
    assert result.code == f"answer_{status}"


def test_the_budget_is_the_published_one() -> None:
    assert load(UnifiedRewardThink).generation.max_tokens == 4096
    assert load(UnifiedRewardThink).generation.temperature == 0


def test_version_1_wants_weights_of_its_own() -> None:
    with pytest.raises(WeightsError, match="UnifiedReward-Think-qwen-7b"):
        UnifiedRewardThink.load(LoadOptions(options={"version": "v1"}))


def test_single_candidates_are_refused() -> None:
    judge = load(UnifiedRewardThink)
    with pytest.raises(UnsupportedInput, match="unified-reward-think compares two"):
        judge.prepare(judge.canary())
