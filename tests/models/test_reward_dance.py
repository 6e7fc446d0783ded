"""RewardDance: the order of the images, what is asked, and whose probability it is."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.base import Context, LoadOptions, Output, Sample, UnsupportedInput, WeightsError
from models.judge import AnswerError, Comparison, Preference, Turn
from models.reward_dance import INSTRUCTION, POINT_INSTRUCTION, RewardDance
from tests.models.judging.questions import A, B, load, parts, preference
from tests.models.judging.scripted_chat import ScriptedChat, ScriptedGradientChat

PAIR = Comparison("a cat", A, B)
"""A is the candidate, B the reference."""


def better_is(good: object) -> ScriptedChat:
    """Finds the image ``good`` better than any other, and reads the question for what it is."""

    def probabilities(turn: Turn) -> dict[str, float]:
        images, text = turn.parts[:2], str(turn.parts[-1])
        asked = 0 if "Is image 1 better than image 2?" in text else 1
        assert asked == 0 or "Is image 2 better than image 1?" in text
        yes = 0.6 if images[asked] is good else 0.15
        return {"yes": yes, "no": 0.75 - yes}

    def reply(turn: Turn) -> str:
        said = probabilities(turn)
        return "The whiskers.\nSo: " + ("yes" if said["yes"] > said["no"] else "no")

    return ScriptedChat(reply, probabilities)


def test_the_papers_question_has_the_reference_first() -> None:
    first, second, text = parts(load(RewardDance), PAIR)
    assert (first, second) == (B, A)
    assert text == (
        f'Please evaluate two images generated from the prompt: "a cat". {INSTRUCTION}\n'
        'Is image 2 better than image 1? Please answer "yes" or "no", and given the detailed reason.'
    )


@pytest.mark.parametrize("reasons", ["none", "after", "before"])
@pytest.mark.parametrize("asked", ["candidate", "reference"])
@pytest.mark.parametrize("position", [1, 2])
def test_the_probability_is_that_of_the_first_candidate_in_every_form(position: int, asked: str, reasons: str) -> None:
    options = {"reference_position": position, "asked": asked, "reasons": reasons}
    for good, scored, written in ((A, 0.8, 1.0), (B, 0.2, 0.0)):
        judge = RewardDance.load(LoadOptions(chat=better_is(good), options=options))
        assert parts(judge, PAIR)[:2] == ((B, A) if position == 1 else (A, B))
        result = preference(judge, PAIR)
        assert isinstance(result, Preference)
        assert result.probability == pytest.approx(written if reasons == "before" else scored)
        assert ("mass" in result.outputs) == (reasons != "before")
        swapped = preference(judge, Comparison("a cat", B, A))
        assert isinstance(swapped, Preference)
        assert swapped.probability == pytest.approx(1 - result.probability)


def test_instructions_and_the_system_text_are_settings() -> None:
    judge = load(RewardDance, instruction="Look at the hands.")
    assert '"a cat". Look at the hands.\n' in str(parts(judge, PAIR)[-1])
    told = Comparison("a cat", A, B, Context(criterion="Look at the eyes."))
    assert '"a cat". Look at the eyes.\n' in str(parts(judge, told)[-1])
    assert load(RewardDance).ask(PAIR)[0].turn.system == "You will act as a professional image quality evaluator."
    assert load(RewardDance, reasons="none").ask(PAIR)[0].turn.system == ""
    assert load(RewardDance, system="Be brief.").ask(PAIR)[0].turn.system == "Be brief."
    with pytest.raises(ValueError, match='reasons "after" only'):
        load(RewardDance, reasons="none", write_reasons=True)


def test_neither_word_is_no_verdict_and_little_of_them_is_a_warning() -> None:
    silent = RewardDance.load(LoadOptions(chat=ScriptedChat()))
    result = preference(silent, PAIR)
    assert isinstance(result, AnswerError)
    assert result.code == "answer_unparseable"
    unsure = RewardDance.load(LoadOptions(chat=ScriptedChat(probabilities=lambda turn: {"yes": 0.02, "no": 0.01})))
    result = preference(unsure, PAIR)
    assert isinstance(result, Preference)
    assert result.probability == pytest.approx(2 / 3)
    assert result.outputs["mass"] == pytest.approx(0.03)
    assert result.warnings == ("low_answer_mass",)


def test_reasons_that_never_reach_a_verdict_are_a_failed_comparison() -> None:
    result = preference(load(RewardDance, "The first looks yes and no", reasons="before"), PAIR)
    assert isinstance(result, AnswerError)
    assert result.status == "contradictory"


def liked(turn: Turn) -> dict[str, float]:
    """Of A yes with 0.6 against 0.2, of any other image with 0.1 against 0.3."""
    return {"yes": 0.6, "no": 0.2} if turn.parts[0] is A else {"yes": 0.1, "no": 0.3}


def test_the_pointwise_variant_scores_one_image_by_its_probability_of_yes() -> None:
    judge = RewardDance.load(LoadOptions(chat=ScriptedChat(probabilities=liked), options={"form": "pointwise"}))
    image, text = judge.ask_about(Sample("a cat", A))[0].turn.parts
    assert image is A
    assert text == (
        f'Please evaluate the image generated from the prompt: "a cat". {POINT_INSTRUCTION}\n'
        'Is the image good? Please answer "yes" or "no".'
    )
    good, bad = judge.run([judge.prepare(Sample("a cat", candidate)) for candidate in (A, B)])
    assert isinstance(good, Output)
    assert isinstance(bad, Output)
    assert [good.score, bad.score] == pytest.approx([0.75, 0.25])
    assert judge.pointwise
    told = judge.ask_about(Sample("a cat", A, Context(criterion="Look at the eyes.")))[0].turn
    assert '"a cat". Look at the eyes.\n' in str(told.parts[-1])


def test_the_pointwise_variant_compares_by_bradley_terry_of_two_scores() -> None:
    judge = RewardDance.load(LoadOptions(chat=ScriptedChat(probabilities=liked), options={"form": "pointwise"}))
    for pair, difference in (((A, B), 0.5), ((B, A), -0.5), ((A, A), 0.0)):
        result = preference(judge, Comparison("a cat", *pair))
        assert isinstance(result, Preference)
        assert result.probability == pytest.approx(1 / (1 + math.exp(-difference)))
        assert result.outputs["mass"] == pytest.approx(0.8 if pair == (A, A) else 0.4)
        assert ("low_answer_mass" in result.warnings) == (B in pair)


def test_an_image_without_a_verdict_fails_its_comparisons() -> None:
    chat = ScriptedChat(probabilities=lambda turn: liked(turn) if turn.parts[0] is A else {})
    judge = RewardDance.load(LoadOptions(chat=chat, options={"form": "pointwise"}))
    for pair in ((A, B), (B, A)):
        result = preference(judge, Comparison("a cat", *pair))
        assert isinstance(result, AnswerError)
        assert result.code == "answer_unparseable"
    good, bad = judge.run([judge.prepare(Sample("a cat", candidate)) for candidate in (A, B)])
    assert isinstance(good, Output)
    assert isinstance(bad, AnswerError)


def test_the_pointwise_variant_has_no_options_of_pairs_and_no_gradient() -> None:
    for option in ({"reference_position": 2}, {"asked": "reference"}, {"reasons": "none"}, {"write_reasons": True}):
        with pytest.raises(ValueError, match="is of pairs"):
            load(RewardDance, form="pointwise", **option)
    judge = RewardDance.load(LoadOptions(chat=ScriptedGradientChat(), options={"form": "pointwise"}))
    assert not judge.gives_gradients
    with pytest.raises(UnsupportedInput, match="pointwise form"):
        judge.gradient(PAIR, torch.zeros(3, 4, 4))
    with pytest.raises(UnsupportedInput, match="does not score one alone"):
        load(RewardDance).prepare(Sample("a cat", A))


def test_a_network_scores_single_images_alike_whatever_stands_beside_them(tmp_path: Path) -> None:
    options = RewardDance.random_checkpoint(tmp_path)
    judge = RewardDance.load(replace(options, options={"form": "pointwise"}))
    prepared = [judge.prepare(Sample(prompt, image)) for prompt in ("a cat", "a dog") for image in (A, B)]
    scores = [output.score for output in judge.run(prepared) if isinstance(output, Output)]
    assert len(set(scores)) == 4
    for entry, score in zip(prepared, scores, strict=True):
        (alone,) = judge.run([entry])
        assert isinstance(alone, Output)
        assert alone.score == score
    compared = preference(judge, Comparison("a dog", A, B))
    assert isinstance(compared, Preference)
    assert compared.probability == pytest.approx(1 / (1 + math.exp(scores[3] - scores[2])))


def test_without_weights_the_message_says_that_none_are_published() -> None:
    with pytest.raises(WeightsError, match=r"no weights of reward-dance are published: .*models\.reward-dance\.remote"):
        RewardDance.load(LoadOptions())


def test_options_of_written_answers_belong_to_forms_that_write() -> None:
    for option in ({"max_tokens": 5}, {"samples": 2, "temperature": 1.0}, {"seed": 1}):
        with pytest.raises(ValueError, match="of reward-dance is of written answers"):
            load(RewardDance, **option)
        assert load(RewardDance, reasons="before", **option).generation
        assert load(RewardDance, write_reasons=True, **option).generation
