"""shapes-judge: what it asks in its two modes, and whose probability it is. Its accuracy: tests/models/shapes."""

from pathlib import Path

import pytest

from models.base import Candidate, LoadOptions, WeightsError
from models.judge import Comparison, Preference
from models.shapes.judge_evaluation import draw_pairs, held_out_pairs
from models.shapes.judge_text import check_reasons, think_answer
from models.shapes_judge import ShapesJudge
from tests.models.judging.questions import A, B, load, parts, preference
from tests.models.judging.scripted_chat import ScriptedChat, ScriptedGradientChat

PAIR = Comparison("a red circle", A, B)


def test_yes_says_that_the_second_image_is_better() -> None:
    chat = ScriptedChat(probabilities=lambda turn: {"yes": 0.9, "no": 0.06})
    judge = ShapesJudge.load(LoadOptions(chat=chat))
    first, second, text = parts(judge, PAIR)
    assert (first, second) == (A, B)
    assert text == "Text Caption: [a red circle] Is image 2 better than image 1? Answer yes or no."
    result = preference(judge, PAIR)
    assert isinstance(result, Preference)
    assert result.probability == pytest.approx(0.06 / 0.96)
    assert result.outputs["mass"] == pytest.approx(0.96)


def test_thinking_answers_in_unified_reward_thinks_form() -> None:
    judge = load(ShapesJudge, "<think>\na red circle\n</think>\n<answer>Image 1 is better</answer>", mode="think")
    assert parts(judge, PAIR)[-1] == "Which of the following images is better? Text Caption: [a red circle]"
    result = preference(judge, PAIR)
    assert isinstance(result, Preference)
    assert (result.probability, result.details["reasons"]) == (1.0, ["a red circle"])


def test_with_the_text_first_the_images_are_independent() -> None:
    chat = ScriptedGradientChat(probabilities=lambda turn: {"yes": 0.2, "no": 0.6})
    judge = ShapesJudge.load(LoadOptions(chat=chat, options={"mode": "text_first"}))
    text = "Text Caption: [a red circle] Is image 2 better than image 1? Answer yes or no. Image 1: "
    assert parts(judge, PAIR) == (text, A, " Image 2: ", B)
    result = preference(judge, PAIR)
    assert isinstance(result, Preference)
    assert result.probability == pytest.approx(0.75)
    assert all(turn.independent for turn in chat.asked)
    other = ShapesJudge.load(LoadOptions(chat=chat))
    assert other.preprocessing != judge.preprocessing
    chat.asked.clear()
    preference(other, PAIR)
    assert not any(turn.independent for turn in chat.asked)


def test_a_server_cannot_read_images_independently() -> None:
    chat = ScriptedChat(probabilities=lambda turn: {"yes": 0.2, "no": 0.6})
    with pytest.raises(ValueError, match="independent"):
        ShapesJudge.load(LoadOptions(chat=chat, options={"mode": "text_first"}))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"train_judge"):
        ShapesJudge.load(LoadOptions(weights=str(tmp_path / "none")))


def test_what_it_was_trained_to_say_is_read_as_the_oracle_means_it() -> None:
    for pair in held_out_pairs(24):
        text = think_answer(pair.prompt, pair.scenes)
        result = preference(load(ShapesJudge, text, mode="think"), Comparison(pair.prompt.text, A, B))
        assert isinstance(result, Preference)
        assert result.probability == float(pair.first_is_better)
        (reasons,) = result.details["reasons"]
        statements = check_reasons(reasons, pair.prompt, pair.scenes)
        assert statements
        assert all(statements)


def test_a_random_network_of_its_form_is_loaded_and_graded(tmp_path: Path) -> None:
    judge = ShapesJudge.load(ShapesJudge.random_checkpoint(tmp_path))
    pairs = held_out_pairs(8)
    shown = [tuple(Candidate(image=image) for image in images) for images in draw_pairs(pairs)]
    asked = [Comparison(pair.prompt.text, *both) for pair, both in zip(pairs, shown, strict=True)]
    found = judge.compare([judge.prepare_comparison(comparison) for comparison in asked])
    probabilities = {result.probability for result in found if isinstance(result, Preference)}
    assert len(probabilities) == len(asked)
