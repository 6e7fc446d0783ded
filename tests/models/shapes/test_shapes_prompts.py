"""The grammar reads whatever the world writes, and nothing else."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.shapes.prompts import TASKS, Include, Prompt, Task, compose, parse
from models.shapes.scenes import random_prompt
from models.shapes.world import COLORS, SHAPES


@given(st.integers(0, 2**32), st.sampled_from(TASKS), st.booleans())
def test_reading_gives_back_what_was_written(seed: int, task: Task, paraphrase: bool) -> None:
    prompt = random_prompt(np.random.default_rng(seed), task, paraphrase=paraphrase)
    assert prompt.task == task
    assert parse(prompt.text) == prompt
    shouted = parse(f"  {prompt.text.upper()}. ")
    assert shouted is not None
    assert shouted.include == prompt.include


def test_every_plain_noun_is_understood() -> None:
    for shape, color in product(SHAPES, COLORS):
        prompt = compose("colors", (Include(shape, 1, color),))
        assert parse(prompt.text) == prompt
        assert parse(f"three {Include(shape, 3, color).noun()}") is not None


@pytest.mark.parametrize(
    ("text", "task", "include"),
    [
        ("a circle", "single_object", (Include("circle"),)),
        ("A photo of an orange star.", "colors", (Include("star", 1, "orange"),)),
        ("exactly 3 red crosses", "counting", (Include("cross", 3, "red"),)),
        ("two squares that are blue", "counting", (Include("square", 2, "blue"),)),
        ("a star and also a cross", "two_object", (Include("star"), Include("cross"))),
        (
            "a red circle and a blue circle",
            "color_attr",
            (Include("circle", 1, "red"), Include("circle", 1, "blue")),
        ),
        (
            "a red circle to the left of a blue square",
            "position",
            (Include("square", 1, "blue"), Include("circle", 1, "red", ("left of", 0))),
        ),
        ("a star that is over the cross", "position", (Include("cross"), Include("star", 1, None, ("above", 0)))),
    ],
)
def test_wordings(text: str, task: Task, include: tuple[Include, ...]) -> None:
    assert parse(text) == Prompt(task, include, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red",
        "circle square",
        "a mauve circle",
        "a dog",
        "two circle",
        "a circles",
        "five circles",
        "a red circle that is red",
        "a circle and a red circle",
        "a circle and a square and a star",
        "two circles and a square",
        "two circles left of a square",
        "a circle left of a square left of a star",
        "a circle left of",
        "ignore the grammar: a red circle",
        "a red circle\x00",
        "🔴",
    ],
)
def test_what_is_outside_the_grammar_is_none(text: str) -> None:
    assert parse(text) is None


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    prompt = parse(text)
    assert prompt is None or prompt.text == text


def test_metadata_is_genevals() -> None:
    position = parse("a red circle left of a blue square")
    counting = parse("three stars")
    assert position is not None
    assert counting is not None
    assert position.to_metadata() == {
        "tag": "position",
        "include": [
            {"class": "square", "count": 1, "color": "blue"},
            {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
        "prompt": "a red circle left of a blue square",
    }
    assert counting.to_metadata()["exclude"] == [{"class": "star", "count": 4}]


def test_a_position_prompt_needs_a_position() -> None:
    with pytest.raises(ValueError, match="has a position"):
        compose("position", (Include("circle"), Include("square")))
