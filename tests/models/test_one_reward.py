"""OneReward: tasks, criteria, the source image, and whose probability it is."""

import pytest
from PIL import Image

from models.base import Candidate, Context, InputError, LoadOptions, Sample, SampleError, UnsupportedInput, WeightsError
from models.judge import Comparison, Preference, Turn
from models.judging.templates import MissingField, load_template
from models.one_reward import CRITERIA, TASK_CRITERIA, TASKS, OneReward, task_of
from tests.models.judging.questions import SOURCE, A, B, load, parts, preference
from tests.models.judging.scripted_chat import ScriptedChat


def asked(context: Context | None, **options: object) -> list[tuple[str, object]]:
    """Name and text of each question."""
    return [(q.name, q.turn.parts[-1]) for q in load(OneReward, **options).ask(Comparison("a cat", A, B, context))]


@pytest.mark.parametrize("task", TASKS)
def test_every_criterion_of_a_task_is_a_question_of_its_own(task: str) -> None:
    questions = asked(Context(task=task))
    assert tuple(name for name, _ in questions) == TASK_CRITERIA[task]
    for name, text in questions:
        values = {"task": TASKS[task], "criterion": CRITERIA[name]}
        if name == "text_alignment":
            assert text == load_template("one_reward_text_alignment").fill(prompt="a cat", **values)
        else:
            assert text == load_template("one_reward").fill(**values)
            assert "a cat" not in str(text)


@pytest.mark.parametrize(
    ("task", "criterion", "found"),
    [
        ("fill", "structure", ("fill", ("structure",))), ("Render Text", None, ("render_text", TASK_CRITERIA["fill"])),
        ("remove", "Removal-Quality", ("remove", ("removal_quality",))),
        ("extend", "Aesthetic, text alignment,aesthetic", ("extend", ("aesthetic", "text_alignment"))),
    ],
)  # fmt: skip
def test_tasks_and_criteria_as_people_write_them(task: str, criterion: str | None, found: object) -> None:
    assert task_of(Context(task=task, criterion=criterion)) == found


@pytest.mark.parametrize(
    ("context", "code"),
    [
        (None, MissingField.code), (Context(criterion="structure"), MissingField.code),
        (Context(task="paint"), "unknown_task"), (Context(task=""), "unknown_task"),
        (Context(task="fill", criterion="removal quality"), "unknown_criterion"),
        (Context(task="fill", criterion="structure,"), "unknown_criterion"),
    ],
)  # fmt: skip
def test_what_the_context_must_say(context: Context | None, code: str) -> None:
    with pytest.raises(InputError) as caught:
        asked(context)
    assert caught.value.code == code
    assert "one-reward" in caught.value.message


def test_yes_prefers_the_first_image() -> None:
    def probabilities(turn: Turn) -> dict[str, float]:
        return {"yes": 0.8, "no": 0.1} if turn.parts[0] is A else {"yes": 0.1, "no": 0.8}

    judge = OneReward.load(LoadOptions(chat=ScriptedChat(probabilities=probabilities)))
    context = Context(task="remove")
    assert parts(judge, Comparison("", A, B, context))[:2] == (A, B)
    for pair, expected in (((A, B), 8 / 9), ((B, A), 1 / 9)):
        result = preference(judge, Comparison("", *pair, context))
        assert isinstance(result, Preference)
        assert result.probability == pytest.approx(expected)
        assert result.outputs == pytest.approx({"removal_quality": expected, "mass": 0.9})


def test_a_criterion_without_an_answer_fails_the_comparison() -> None:
    chat = ScriptedChat(probabilities=lambda turn: {} if "Aesthetic" in str(turn.parts[-1]) else {"yes": 1.0})
    result = preference(OneReward.load(LoadOptions(chat=chat)), Comparison("", A, B, Context(task="fill")))
    assert isinstance(result, SampleError)
    assert result.code == "answer_unparseable"


def test_the_source_and_its_mask_are_shown_where_it_is_set() -> None:
    mask = Image.new("L", (8, 8), 255)
    context = Context(image=SOURCE.image, mask=mask, task="remove")
    assert parts(load(OneReward), Comparison("", A, B, context))[:2] == (A, B)
    judge = load(OneReward, show_source=True)
    said = parts(judge, Comparison("", A, B, context))
    pictures = [part for part in said if isinstance(part, Candidate)]
    assert pictures[2:] == [A, B]
    assert pictures[0].digest == SOURCE.digest
    assert pictures[1].image is not None
    assert pictures[1].image.getpixel((0, 0)) == (255, 255, 255)
    assert len(parts(judge, Comparison("", A, B, Context(image=SOURCE.image, task="remove")))) == len(said) - 2
    with pytest.raises(MissingField, match=r"context\.image"):
        judge.ask(Comparison("", A, B, Context(task="remove")))


def test_other_candidates_and_weights_that_nobody_published() -> None:
    with pytest.raises(UnsupportedInput, match="one-reward judges images"):
        load(OneReward).ask(Comparison("", A, Candidate(text="x"), Context(task="fill")))
    with pytest.raises(UnsupportedInput, match="one-reward compares two"):
        load(OneReward).prepare(Sample("", A))
    with pytest.raises(WeightsError, match="no weights of one-reward are published"):
        OneReward.load(LoadOptions())
