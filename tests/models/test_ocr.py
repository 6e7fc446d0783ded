"""The ocr reward reads real text in real images, and its text part follows the published formula."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.base import Candidate, InputError, LoadOptions, ModelError, Output, Sample
from models.ocr import Line, OcrReward, ocr_reward, target_text, text_image

ROOT = Path(__file__).parents[2]
WORDS = ["Hello World", "MORNING BREW", "OPEN 24 HOURS", "reward", "42"]


@pytest.fixture(scope="module")
def model() -> OcrReward:
    return OcrReward.load(LoadOptions())


def sample(quoted: str, image: Image.Image, **metadata: Any) -> Sample:
    return Sample(f'a poster with the words "{quoted}"', Candidate(image=image), metadata=metadata)


def outputs(model: OcrReward, samples: Sequence[Sample]) -> list[Output]:
    results = model.run([model.prepare(sample) for sample in samples])
    for result in results:
        assert isinstance(result, Output), result
    return [result for result in results if isinstance(result, Output)]


def wide(text: str) -> Image.Image:
    return text_image(text, (512, 160), 56)


def test_rendered_text_is_read(model: OcrReward) -> None:
    for text, output in zip(WORDS, outputs(model, [sample(text, wide(text)) for text in WORDS]), strict=True):
        assert output.details["recognised"].replace(" ", "") == text.replace(" ", "")
        assert output.score == 1.0
        assert output.outputs["distance"] == 0
        assert output.details["target"] == text


def test_lines_are_joined_from_top_to_bottom_and_left_to_right(model: OcrReward) -> None:
    page = Image.new("RGB", (640, 320), "white")
    for text, corner in (("four", (320, 160)), ("one", (0, 0)), ("three", (0, 160)), ("two", (320, 0))):
        page.paste(text_image(text, (300, 120), 56), corner)
    (output,) = outputs(model, [sample("one two three four", page)])
    assert output.details["recognised"].replace(" ", "") == "onetwothreefour"
    assert output.score == 1.0


def test_another_image_and_another_prompt_have_other_scores(model: OcrReward) -> None:
    same, other_image, other_prompt, near, nothing = outputs(
        model,
        [
            sample("reward", wide("reward")),
            sample("reward", wide("MORNING")),
            sample("policy", wide("reward")),
            sample("rewards!", wide("reward")),
            sample("reward", Image.new("RGB", (512, 160), "white")),
        ],
    )
    assert same.score == 1.0
    assert other_image.score < 0.5
    assert other_prompt.score < 0.5
    assert near.score == 1 - 2 / 8
    assert nothing.score == 0.0
    assert nothing.details["recognised"] == ""


def test_colours_reach_the_reader_as_they_are_seen(model: OcrReward) -> None:
    """Red on blue of equal green: only a reader that gets all channels tells the text from the background."""
    image = wide("COLOUR")
    image = Image.composite(
        Image.new("RGB", image.size, (0, 0, 200)), Image.new("RGB", image.size, (230, 0, 0)), image.convert("L")
    )
    assert outputs(model, [sample("colour", image)])[0].score == 1.0


def test_metadata_target_wins_over_the_prompt(model: OcrReward) -> None:
    output = outputs(model, [sample("something else", wide("reward"), target="Reward")])[0]
    assert output.score == 1.0
    assert output.details["target"] == "Reward"


@pytest.mark.parametrize(
    ("prompt", "metadata", "code"),
    [
        ("no quotes at all", {}, "target_missing"),
        ('an unclosed " quote', {}, "target_missing"),
        ("only “curly” quotes", {}, "target_missing"),
        ('empty ""', {}, "target_empty"),
        ('blank "   "', {}, "target_empty"),
        ('given "x"', {"target": " "}, "target_empty"),
        ('given "x"', {"target": 7}, "target_invalid"),
    ],
)
def test_prompts_without_target_are_input_errors(prompt: str, metadata: dict[str, Any], code: str) -> None:
    with pytest.raises(InputError) as error:
        target_text(prompt, metadata)
    assert error.value.code == code


def test_first_pair_of_quotes_is_the_target() -> None:
    assert target_text('say "one" and "two"', {}) == "one"


def test_engine_failure_is_an_error_of_that_sample_alone() -> None:
    def engine(image: Image.Image) -> list[Line]:
        if image.size == (13, 13):
            raise RuntimeError("broken")
        return [("reward", 0.9)]

    images = [Image.new("RGB", (size, size)) for size in (8, 13, 8)]
    fake = OcrReward(engine)
    results = fake.run([fake.prepare(sample("reward", image)) for image in images])
    assert isinstance(results[1], ModelError)
    assert results[1].code == "ocr_failed"
    assert "broken" not in results[1].message
    assert [result.score for result in results if isinstance(result, Output)] == [1.0, 1.0]


letters = st.text("abAB é\t", min_size=1, max_size=12).filter(lambda text: text.replace(" ", ""))


@given(letters, st.lists(st.tuples(st.text("abAB é", max_size=8), st.sampled_from([0.0, 0.4, 1.0])), max_size=4))
def test_reward_is_in_range_and_matches_a_naive_distance(target: str, lines: list[Line]) -> None:
    result = ocr_reward(target, lines)
    wanted = target.replace(" ", "").lower()
    found = "".join(text for text, confidence in lines if confidence > 0).replace(" ", "").lower()
    distance = 0 if wanted in found else min(naive_levenshtein(found, wanted), len(wanted))
    assert result.distance == distance
    assert result.reward == 1 - distance / len(wanted)
    assert 0 <= result.reward <= 1


@given(letters, letters, letters)
def test_contained_target_scores_one_whatever_surrounds_it(target: str, before: str, after: str) -> None:
    assert ocr_reward(target, [(before, 0.9), (target.upper().lower(), 0.9), (after, 0.9)]).reward == 1.0


def naive_levenshtein(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def test_option_threads_is_checked() -> None:
    with pytest.raises(ValueError, match="threads"):
        OcrReward.load(LoadOptions(options={"threads": 0}))


LOADS_QUIETLY = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("the ocr reward used the network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from models.base import LoadOptions
from models.ocr import OcrReward
model = OcrReward.load(LoadOptions())
assert model.run([model.prepare(model.canary())])[0].score == 1.0
"""


def test_loads_without_network_and_without_a_word() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOADS_QUIETLY], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
