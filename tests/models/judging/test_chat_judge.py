"""The machinery of all judges, with a chat model that answers as it is told."""

from collections.abc import Mapping

import pytest
import torch
from PIL import Image

from models.base import Candidate, Context, LoadOptions, ModelError, Output, Sample, UnsupportedInput
from models.judge import Answer, AnswerError, Comparison, Preference, Turn
from models.one_reward import OneReward
from models.reward_dance import RewardDance
from models.unified_reward import UnifiedReward
from models.unified_reward_think import UnifiedRewardThink
from tests.models.judging.scripted_chat import Reply, ScriptedChat, ScriptedGradientChat

A, B, C = (Candidate(image=Image.new("RGB", (8, 8), color)) for color in ("red", "blue", "green"))
FIRST, SECOND = "<think>so</think>\n<answer>Image 1 is better</answer>", "<answer>Image 2 is better</answer>"


def by_prompt(replies: Mapping[str, Reply]) -> ScriptedChat:
    """Answers by the prompt that the turn holds."""

    def reply(turn: Turn) -> Reply:
        return next(text for prompt, text in replies.items() if f"「{prompt}」" in str(turn.parts[-1]))

    return ScriptedChat(reply)


def think(chat: ScriptedChat, **options: object) -> UnifiedRewardThink:
    return UnifiedRewardThink.load(LoadOptions(chat=chat, options=options))


def test_each_comparison_has_its_own_answer_and_a_failure_is_its_own() -> None:
    broken = ModelError("the server is gone", code="remote_unavailable")
    judge = think(by_prompt({"a": FIRST, "b": SECOND, "c": "well", "d": broken, "e": Answer(FIRST[:9], False)}))
    prepared = [judge.prepare_comparison(Comparison(prompt, A, B)) for prompt in "abcde"]
    first, second, garbage, gone, cut = judge.compare(prepared)
    assert isinstance(first, Preference)
    assert (first.probability, first.details["reasons"], first.details["texts"]) == (1.0, ["so"], [FIRST])
    assert isinstance(second, Preference)
    assert second.probability == 0.0
    assert isinstance(garbage, AnswerError)
    assert (garbage.code, garbage.texts) == ("answer_unparseable", ("well",))
    assert gone is broken
    assert isinstance(cut, AnswerError)
    assert cut.code == "answer_truncated"


def test_settings_reach_the_generation_and_the_turn() -> None:
    chat = ScriptedChat(lambda turn: FIRST)
    judge = think(chat, max_tokens=77, temperature=0.7, samples=3, seed=5, system="Be fair.")
    judge.compare([judge.prepare_comparison(Comparison("a", A, B))])
    (how,) = chat.generations
    assert (how.max_tokens, how.temperature, how.samples, how.seed) == (77, 0.7, 3, 5)
    assert [turn.system for turn in chat.asked] == ["Be fair."]


def test_samples_are_voted() -> None:
    judge = think(ScriptedChat(lambda turn: [FIRST, SECOND, FIRST, "?"]), samples=4, temperature=1.0)
    (result,) = judge.compare([judge.prepare_comparison(Comparison("a", A, B))])
    assert isinstance(result, Preference)
    assert result.probability == pytest.approx(2 / 3)
    assert result.details["statuses"] == ["ok", "ok", "ok", "unparseable"]


def test_what_was_prepared_tells_cost_prefix_and_warnings() -> None:
    judge = think(ScriptedChat(lambda turn: FIRST, warnings=("image_shrunk",)))
    one, other, swapped = (judge.prepare_comparison(Comparison("a", *pair)) for pair in ((A, B), (A, C), (B, A)))
    assert one.prefix == other.prefix != swapped.prefix
    assert one.tokens > 100
    (result,) = judge.compare([one])
    assert isinstance(result, Preference)
    assert result.warnings == ("image_shrunk",)


def test_an_empty_batch_asks_nothing() -> None:
    chat = ScriptedChat()
    assert think(chat).compare([]) == []
    assert chat.asked == []


def test_a_chat_that_answers_too_few_turns_is_not_believed() -> None:
    class Forgetful(ScriptedChat):
        def generate(self, *arguments: object) -> list[object]:  # type: ignore[override]
            return []

    judge = think(Forgetful())
    with pytest.raises(ValueError, match="zip"):
        judge.compare([judge.prepare_comparison(Comparison("a", A, B))])


def test_several_questions_of_several_comparisons_stay_apart() -> None:
    table = {"Structure": 0.9, "Consistency": 0.7, "Text Alignment": 0.5, "Aesthetic": 0.3}

    def probabilities(turn: Turn) -> dict[str, float]:
        (yes,) = (value for name, value in table.items() if f"only: {name}." in str(turn.parts[-1]))
        yes = yes if turn.parts[0] is A else 1 - yes
        return {"yes": yes, "no": 1 - yes}

    judge = OneReward.load(LoadOptions(chat=ScriptedChat(probabilities=probabilities)))
    context = Context(task="fill")
    prepared = [judge.prepare_comparison(Comparison("x", *pair, context)) for pair in ((A, B), (B, A))]
    prepared.append(judge.prepare_comparison(Comparison("x", A, B, Context(task="fill", criterion="structure"))))
    for result, expected in zip(judge.compare(prepared), (0.6, 0.4, 0.9), strict=True):
        assert isinstance(result, Preference)
        assert result.probability == pytest.approx(expected)
    assert prepared[0].tokens > 3 * prepared[2].tokens


def test_scores_of_single_candidates_and_their_failures() -> None:
    text = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 5"
    judge = UnifiedReward.load(LoadOptions(chat=ScriptedChat(lambda turn: text if turn.parts[0] is A else "no idea")))
    good, bad = judge.run([judge.prepare(Sample("x", candidate)) for candidate in (A, B)])
    assert isinstance(good, Output)
    assert (good.score, good.outputs) == (4.0, {"alignment": 4.0, "coherence": 3.0, "style": 5.0})
    assert isinstance(bad, AnswerError)
    assert bad.code == "answer_unparseable"


def test_reasons_that_follow_a_scored_verdict_change_no_number() -> None:
    failed = ModelError("gone")

    def reply(turn: Turn) -> Reply:
        return failed if "fails" in str(turn.parts[-1]) else "yes, it is sharper"

    chat = ScriptedChat(reply, lambda turn: {} if "unsure" in str(turn.parts[-1]) else {"yes": 0.6, "no": 0.2})
    judge = RewardDance.load(LoadOptions(chat=chat, options={"write_reasons": True}))
    prepared = [judge.prepare_comparison(Comparison(prompt, A, B)) for prompt in ("fine", "unsure", "fails")]
    fine, unsure, fails = judge.compare(prepared)
    assert isinstance(fine, Preference)
    assert fine.probability == pytest.approx(0.75)
    assert fine.details["reasons"] == ["yes, it is sharper"]
    assert isinstance(unsure, AnswerError)
    assert fails is failed
    # What has no verdict is not asked for reasons.
    assert len(chat.asked) == 5


def test_the_gradient_is_of_the_probability_that_the_first_is_preferred() -> None:
    pixels = torch.full((3, 4, 6), 0.25)
    for options, score, sign in (({}, 0.25, 1), ({"asked": "reference"}, 0.75, -1)):
        chat = ScriptedGradientChat()
        judge = RewardDance.load(LoadOptions(chat=chat, options=options))
        output, gradient = judge.gradient(Comparison("x", B, B), pixels)
        assert output.score == pytest.approx(score)
        assert gradient == pytest.approx(torch.full_like(pixels, sign / pixels.numel()))
        assert [part is pixels for part in chat.asked[0].parts] == [False, True, False]
        assert chat.asked[0].parts[0] is B


def test_the_gradient_of_the_second_place_is_of_the_same_probability() -> None:
    pixels = torch.full((3, 4, 6), 0.25)
    chat = ScriptedGradientChat()
    output, gradient = RewardDance.load(LoadOptions(chat=chat)).gradient(Comparison("x", B, A), pixels, "second")
    assert output.score == pytest.approx(0.25)
    assert gradient == pytest.approx(torch.full_like(pixels, 1 / pixels.numel()))
    # The reference comes first, as in the paper.
    assert [part is pixels for part in chat.asked[0].parts] == [True, False, False]
    assert chat.asked[0].parts[1] is B


def test_the_gradient_of_several_criteria_is_their_mean() -> None:
    judge = OneReward.load(LoadOptions(chat=ScriptedGradientChat()))
    pixels = torch.full((3, 4, 6), 0.25)
    output, gradient = judge.gradient(Comparison("x", A, B, Context(task="extend")), pixels)
    assert output.score == pytest.approx(0.25)
    assert len(output.outputs) == 5
    assert gradient == pytest.approx(torch.full_like(pixels, 1 / pixels.numel()))


def test_no_gradient_behind_a_server_and_of_written_answers() -> None:
    pixels = torch.zeros(3, 4, 4)
    with pytest.raises(UnsupportedInput, match="reward-dance is behind a server"):
        RewardDance.load(LoadOptions(chat=ScriptedChat())).gradient(Comparison("x", A, B), pixels)
    written = RewardDance.load(LoadOptions(chat=ScriptedGradientChat(), options={"reasons": "before"}))
    with pytest.raises(UnsupportedInput, match="writes its answers"):
        written.gradient(Comparison("x", A, B), pixels)
