"""shapes-oracle as a reward model: scores, outputs, reasons and typed errors."""

import json

import pytest
from PIL import Image

from models.base import Candidate, InputError, LoadOptions, Output, Sample, UnsupportedInput
from models.shapes.world import Scene, SceneObject, render
from models.shapes_oracle import ShapesOracle

RED_CIRCLE = SceneObject("circle", "red", (1, 0))
BLUE_SQUARE = SceneObject("square", "blue", (1, 2))
PROMPT = "a red circle left of a blue square"


def score(prompt: str, image: Image.Image) -> Output:
    model = ShapesOracle.load(LoadOptions())
    (output,) = model.run([model.prepare(Sample(prompt, Candidate(image=image)))])
    return output


def test_the_score_is_the_exact_one_and_the_others_are_outputs() -> None:
    filled = Scene((RED_CIRCLE, BLUE_SQUARE, SceneObject("star", "green", (0, 1))))
    right, extra = score(PROMPT, render(Scene((RED_CIRCLE, BLUE_SQUARE)))), score(PROMPT, render(filled))
    assert right.score == 1.0
    assert right.outputs == {"exact": 1.0, "geneval": 1.0, "soft": 1.0}
    assert extra.score == 0.0
    assert extra.outputs == {"exact": 0.0, "geneval": 1.0, "soft": 0.75}
    assert "the red circle is left of the blue square" in right.details["reason"]
    assert "also found 1 green star" in extra.details["reason"]


def test_details_can_travel_as_json_and_say_where_things_are() -> None:
    details = json.loads(json.dumps(score(PROMPT, render(Scene((RED_CIRCLE, BLUE_SQUARE)), 128)).details))
    assert [(row["color"], row["shape"]) for row in details["objects"]] == [("red", "circle"), ("blue", "square")]
    assert [row["x"] for row in details["objects"]] == pytest.approx([1 / 6, 5 / 6], abs=0.02)
    assert all(0.6 < row["confidence"] <= 1.0 for row in details["objects"])


def test_the_prompt_and_the_picture_matter() -> None:
    image = render(Scene((RED_CIRCLE, BLUE_SQUARE)), 32)
    assert score("a red circle and a blue square", image).score == 1.0
    assert score("a red circle right of a blue square", image).score == 0.0
    assert score("a red square left of a blue circle", image).score == 0.0
    assert score(PROMPT, render(Scene((BLUE_SQUARE,)), 32)).score == 0.0


def test_what_cannot_be_scored_is_a_typed_error_with_a_fixed_message() -> None:
    model = ShapesOracle.load(LoadOptions())
    image = Candidate(image=render(Scene()))
    with pytest.raises(InputError) as not_understood:
        model.prepare(Sample("a portrait of a secret", image))
    assert not_understood.value.code == "prompt_not_understood"
    assert "secret" not in not_understood.value.message
    with pytest.raises(InputError) as too_small:
        model.prepare(Sample(PROMPT, Candidate(image=Image.new("RGB", (400, 15)))))
    assert too_small.value.code == "image_too_small"
    with pytest.raises(UnsupportedInput, match="shapes-oracle"):
        model.prepare(Sample(PROMPT, Candidate(text="a red circle")))


def test_the_canary_is_right() -> None:
    canary = ShapesOracle.load(LoadOptions()).canary()
    assert score(canary.prompt, canary.image("shapes-oracle")).score == 1.0
