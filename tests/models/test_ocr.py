"""The ocr reward reads real text in real images, and its text part follows the published formula."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from models.base import Candidate, InputError, LoadOptions, ModelError, Output, Sample, WeightsError
from models.ocr import Line, OcrReward, model_files, ocr_reward, shipped_files, target_text, text_image

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


@given(letters, st.lists(st.tuples(st.text("abAB é", max_size=8), st.sampled_from([0.0, 0.4, 1.0])), max_size=4))
def test_the_papers_normalisation_has_no_shortcut_and_no_cut(target: str, lines: list[Line]) -> None:
    result = ocr_reward(target, lines, "paper")
    wanted = target.replace(" ", "").lower()
    found = "".join(text for text, confidence in lines if confidence > 0).replace(" ", "").lower()
    assert result.distance == naive_levenshtein(found, wanted)
    assert result.reward == max(1 - result.distance / len(wanted), 0)
    assert result.reward <= ocr_reward(target, lines).reward


def test_the_papers_normalisation_counts_what_surrounds_the_target() -> None:
    lines = [("say", 0.9), ("Hello World", 0.9), ("!", 0.0)]
    assert ocr_reward("hello world", lines).reward == 1.0
    assert ocr_reward("hello world", lines, "paper").reward == 1 - 3 / 10
    assert ocr_reward("hi", [("entirely different", 0.9)], "paper").reward == 0.0
    assert ocr_reward("hi", [("entirely different", 0.9)], "paper").distance > 2


def naive_levenshtein(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


# -- scripts: drawn by hand where Pillow's own font has no letters ----------------------------------------------------

STROKES = {
    "三": [(0.15, 0.1, 0.85, 0.1), (0.2, 0.5, 0.8, 0.5), (0.05, 0.9, 0.95, 0.9)],
    "上": [(0.5, 0.05, 0.5, 0.9), (0.5, 0.4, 0.85, 0.4), (0.05, 0.9, 0.95, 0.9)],
    "中": [
        (0.15, 0.25, 0.85, 0.25),
        (0.15, 0.6, 0.85, 0.6),
        (0.15, 0.25, 0.15, 0.6),
        (0.85, 0.25, 0.85, 0.6),
        (0.5, 0.05, 0.5, 0.95),
    ],
    "山": [(0.5, 0.05, 0.5, 0.9), (0.1, 0.35, 0.1, 0.9), (0.9, 0.35, 0.9, 0.9), (0.1, 0.9, 0.9, 0.9)],
    "日": [
        (0.25, 0.05, 0.75, 0.05),
        (0.25, 0.5, 0.75, 0.5),
        (0.25, 0.95, 0.75, 0.95),
        (0.25, 0.05, 0.25, 0.95),
        (0.75, 0.05, 0.75, 0.95),
    ],
    "王": [(0.15, 0.1, 0.85, 0.1), (0.2, 0.5, 0.8, 0.5), (0.1, 0.9, 0.9, 0.9), (0.5, 0.1, 0.5, 0.9)],
    "田": [
        (0.1, 0.1, 0.9, 0.1),
        (0.1, 0.5, 0.9, 0.5),
        (0.1, 0.9, 0.9, 0.9),
        (0.1, 0.1, 0.1, 0.9),
        (0.9, 0.1, 0.9, 0.9),
        (0.5, 0.1, 0.5, 0.9),
    ],
}
"""Chinese characters of straight strokes: x0, y0, x1, y1 in a unit square."""


def drawn(characters: str, cell: int = 60) -> Image.Image:
    image = Image.new("RGB", (len(characters) * cell * 5 // 4 + 60, cell + 60), "white")
    draw = ImageDraw.Draw(image)
    for index, character in enumerate(characters):
        left = 30 + index * cell * 5 // 4
        for x0, y0, x1, y1 in STROKES[character]:
            line = (left + x0 * cell, 30 + y0 * cell, left + x1 * cell, 30 + y1 * cell)
            draw.line(line, fill="black", width=6)
    return image


def test_chinese_is_read(model: OcrReward) -> None:
    words = ["中日", "山田", "王中王", "上三田"]
    for word, output in zip(words, outputs(model, [sample(word, drawn(word)) for word in words]), strict=True):
        assert output.details["recognised"] == word
        assert output.score == 1.0


def test_digits_and_signs_are_read(model: OcrReward) -> None:
    texts = ["12345", "3.14159", "$99", "1+1=2"]
    assert [output.score for output in outputs(model, [sample(text, wide(text)) for text in texts])] == [1.0] * 4


# -- options ----------------------------------------------------------------------------------------------------------


def test_the_normalisation_is_an_option() -> None:
    paper = OcrReward.load(LoadOptions(options={"normalisation": "paper"}))
    (output,) = outputs(paper, [sample("reward", wide("my reward"))])
    assert output.score == pytest.approx(1 - 2 / 6)
    assert output.outputs["distance"] == 2
    with pytest.raises(ValueError, match="normalisation"):
        OcrReward.load(LoadOptions(options={"normalisation": "relative"}))


def load_with(**options: Any) -> OcrReward:
    return OcrReward.load(LoadOptions(options={name: str(value) for name, value in options.items()}))


def renamed(file: Path, name: str, replacements: dict[bytes, bytes]) -> Path:
    """A copy of an ONNX file with bytes replaced by as many others, which leaves its structure whole."""
    content = file.read_bytes()
    for old, new in replacements.items():
        assert len(old) == len(new)
        assert content.count(old) == 1
        content = content.replace(old, new)
    target = file.parent / name
    target.write_bytes(content)
    return target


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shipped recogniser, which carries its characters."""
    return Path(shutil.copy(shipped_files().recognition, tmp_path_factory.mktemp("recogniser") / "other.onnx"))


@pytest.fixture(scope="module")
def bare(recogniser: Path) -> tuple[Path, Path]:
    """The recogniser under a metadata key that nobody reads, and its characters, each letter R as an L, in a file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(recogniser), providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    dictionary = recogniser.parent / "characters.txt"
    swapped = ["L" if character == "R" else character for character in characters]
    dictionary.write_bytes("\n".join(swapped).encode())
    key = b"\x0a\x09character"  # protobuf: field 1, nine bytes
    return renamed(recogniser, "bare.onnx", {key: b"\x0a\x09carakters"}), dictionary


def test_another_recogniser_is_used(model: OcrReward, recogniser: Path) -> None:
    other = load_with(recogniser=recogniser)
    assert outputs(other, [sample("reward", wide("reward"))])[0].score == 1.0
    assert other.weights_hash.startswith("sha256:")
    assert other.weights_hash != model.weights_hash  # another file by its name
    assert model_files(LoadOptions()) == shipped_files()


def test_a_dictionary_is_what_a_bare_recogniser_reads_with(model: OcrReward, bare: tuple[Path, Path]) -> None:
    file, dictionary = bare
    other = load_with(recogniser=file, dictionary=dictionary)
    assert outputs(other, [sample("LEADY", wide("READY"))])[0].details["recognised"] == "LEADY"
    before = other.weights_hash
    dictionary_of_more = dictionary.with_name("more.txt")
    dictionary_of_more.write_bytes(dictionary.read_bytes() + b"\nx")
    assert load_with(recogniser=file, dictionary=dictionary).weights_hash == before
    with pytest.raises(WeightsError, match=r"lists 18709 characters, the recogniser knows 18708"):
        load_with(recogniser=file, dictionary=dictionary_of_more)


def test_recognisers_that_cannot_be_used_are_refused(recogniser: Path, bare: tuple[Path, Path], tmp_path: Path) -> None:
    file, dictionary = bare
    with pytest.raises(WeightsError, match=r"models\.ocr\.options\.dictionary"):
        load_with(recogniser=file)
    with pytest.raises(ValueError, match="carries its own characters"):
        load_with(recogniser=recogniser, dictionary=dictionary)
    with pytest.raises(ValueError, match="belongs to a recogniser"):
        load_with(dictionary=dictionary)
    with pytest.raises(WeightsError, match=r"models\.ocr\.options\.recogniser"):
        load_with(recogniser=tmp_path / "nowhere.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no protobuf")
    with pytest.raises(WeightsError, match="damaged or not an ONNX file"):
        load_with(recogniser=damaged)


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


@pytest.mark.parametrize(("size", "readable"), [((4000, 33), False), ((4000, 34), True), ((17, 3401), False)])
def test_a_strip_of_which_the_recogniser_leaves_nothing_is_refused(size: tuple[int, int], readable: bool) -> None:
    model = OcrReward.load(LoadOptions())
    sample = Sample('a sign that says "OK"', Candidate(image=Image.new("RGB", size, "white")))
    if readable:
        assert isinstance(model.run([model.prepare(sample)])[0], Output)
        return
    with pytest.raises(InputError) as error:
        model.prepare(sample)
    assert error.value.code == "aspect_ratio"
