"""What the demo scores is what it says it is."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as PILImage

from benchmarks.demo import pictures
from models.shapes.oracle import examine
from models.shapes.prompts import TASKS, Prompt, parse
from models.shapes.rules import Verdict


def verdict(prompt: Prompt, image: PILImage.Image) -> Verdict:
    return examine(prompt, image)[0]


def test_the_photographs_are_six_different_squares_of_one_size() -> None:
    photos = pictures.photographs()
    assert {photo.image.size for photo in photos} == {(pictures.SIDE, pictures.SIDE)}
    assert len({photo.image.tobytes() for photo in photos}) == len(photos) == 6
    assert all(np.asarray(photo.image).std() > 10 for photo in photos)


@pytest.mark.parametrize("prompt", [pictures.ATTRIBUTES, pictures.POSITION], ids=lambda prompt: prompt.task)
def test_the_drawings_are_two_right_ones_and_six_with_the_fault_that_they_name(prompt: Prompt) -> None:
    drawings = {drawing.name: verdict(prompt, drawing.image) for drawing in pictures.drawings(prompt)}
    assert [name for name, found in drawings.items() if found.exact == 1.0] == ["right", "right, blurred and noisy"]
    assert len(drawings) == 8
    assert drawings["swapped attributes"].reason.startswith("no ")
    assert drawings["extra object"].geneval == 1.0  # GenEval's lax rule does not mind it
    assert drawings["missing object"].reason.count("no ") == 1
    if prompt.task == "position":
        assert "is not left of" in drawings["wrong relation"].reason
    else:
        assert "found 2" in drawings["one too many"].reason


def test_the_wrong_drawing_is_wrong_in_its_colour_alone() -> None:
    found = verdict(pictures.POSITION, pictures.wrong_drawing())
    assert found.exact == 0.0
    assert "found 1 red circle, as asked" in found.reason
    assert "1 green square" in found.reason


def test_captions_are_the_same_every_time_cover_all_tasks_and_have_a_best_and_a_worse_drawing() -> None:
    made, again = pictures.captions(2, 5), pictures.captions(2, 5)
    assert [caption.prompt.task for caption in made] == [task for task in TASKS for _ in range(2)]
    for caption, same in zip(made, again, strict=True):
        assert caption.prompt == same.prompt
        assert [image.tobytes() for image in caption.images] == [image.tobytes() for image in same.images]
        prompt = parse(caption.prompt.text)
        assert prompt is not None
        exact = [examine(prompt, image)[0].exact for image in caption.images]
        assert exact[0] == 1.0
        assert min(exact) == 0.0
        assert len(exact) == 5


def test_the_signs_differ_and_the_first_two_ask_for_nothing_else() -> None:
    signs = pictures.signs()
    assert len({sign.image.tobytes() for sign in signs}) == 6
    assert pictures.SIGN_PROMPT.split('"')[1] == pictures.SIGN_TEXT
