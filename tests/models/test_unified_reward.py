"""UnifiedReward: which template each version and task sends, byte for byte, and what its answers say."""

from dataclasses import replace
from pathlib import Path

import pytest

from models.backbones.vlm_loading import Family, write_random_chat
from models.base import Candidate, Context, LoadOptions, Output, Sample, UnsupportedInput, WeightsError
from models.judge import AnswerError, Comparison, Preference
from models.judging.templates import MissingField, load_template
from models.unified_reward import TASKS, VERSIONS, UnifiedReward
from tests.models.judging.questions import SOURCE, A, B, load, parts, preference, sha256

IMAGE = A.image
assert IMAGE is not None
VIDEO, OTHER_VIDEO = (Candidate(frames=(IMAGE,) * count, fps=2.0) for count in (2, 3))
YES, NO = Candidate(text="Yes."), Candidate(text="No.")
PAIR, POINT = Comparison("{prompt}", A, B), Sample("{prompt}", A)
AXES = "Alignment Score (1-5): {}\n{} Score (1-5): {}\nStyle Score (1-5): {}"


@pytest.mark.parametrize(
    ("version", "published"),
    [
        ("v2", "828e9ab2f81c3b6d42fb68dd5b8ea1b7647063c4b5d79a98d003ff25de5c5ca8"),
        ("v1-qwen", "0fd2f5c43a06516503fde3e64ffc98fff6f3a8815b5eac8dc5f0d81cee686614"),
    ],
)
def test_a_pair_of_images_comes_before_the_published_text(version: str, published: str) -> None:
    first, second, text = parts(load(UnifiedReward, version=version), PAIR)
    assert (first, second) == (A, B)
    assert sha256(text) == published


@pytest.mark.parametrize("version", ["v1-llava", "v1.5"])
def test_llavas_pair_has_the_images_in_the_places_of_its_markers(version: str) -> None:
    first, between, second, text = parts(load(UnifiedReward, version=version), PAIR)
    assert (first, second) == (A, B)
    published = "238e0ad4624e5d43440c58b440c624688368160c767883a5f4234a6f241ba11b"
    assert sha256(f"<image>{between}<image>{text}") == published


@pytest.mark.parametrize(
    ("version", "published"),
    [
        ("v2", "75d52d3ae771f89b682db3b74cdaca1c7bde373a39162bc1c9dabd63cdc9b851"),
        ("v1-qwen", "f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b"),
        ("v1-llava", "f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b"),
        ("v1.5", "88d1d1c5f0fba9dc6f112022ffbabf86f6ad64df58047a7c7293814f91c39ea9"),
    ],
)
def test_one_image_comes_before_the_published_text(version: str, published: str) -> None:
    image, text = parts(load(UnifiedReward, version=version), POINT)
    assert image is A
    assert isinstance(text, str)
    llava = version in ("v1-llava", "v1.5")
    assert text.startswith("\n") == llava
    assert sha256(text.removeprefix("\n")) == published


def test_flow_grpos_short_text_is_a_template_of_version_1() -> None:
    judge = load(UnifiedReward, "Final Score: 4.5", version="v1-llava", point_template="ur_point_flowgrpo")
    image, text = parts(judge, POINT)
    assert image is A
    assert sha256(f"<image>{text}") == "d68ab1dcf4dc3a39ec5dfab963d17fe30a6e5f713eb49f743ed88a4c8ce4317f"
    (output,) = judge.run([judge.prepare(POINT)])
    assert isinstance(output, Output)
    assert output.score == 4.5


def test_videos() -> None:
    judge = load(UnifiedReward, task="video_generation")
    video, text = parts(judge, Sample("{prompt}", VIDEO))
    assert video is VIDEO
    assert sha256(text) == "707411fb9175547e74f145ae3efa459d621f11afcca076659a5588848e91e1c7"
    assert parts(judge, Comparison("a cat", VIDEO, OTHER_VIDEO))[:2] == (VIDEO, OTHER_VIDEO)
    older = load(UnifiedReward, task="video_generation", version="v1-qwen")
    assert parts(older, Sample("a cat", VIDEO))[1] == load_template("ur_point_video").fill(prompt="a cat")


@pytest.mark.parametrize("medium", ["image", "video"])
def test_answers_about_what_the_context_shows(medium: str) -> None:
    judge = load(UnifiedReward, "Overall Judgment: Answer 2 is better.", task=f"{medium}_understanding")
    shown = Context(image=SOURCE.image) if medium == "image" else Context(frames=VIDEO.frames)
    context = Context(shown.image, shown.frames, question="Is it red?")
    comparison = Comparison("unused", YES, NO, context)
    picture, text = parts(judge, comparison)
    assert isinstance(picture, Candidate)
    assert picture.kind == medium
    assert picture is parts(judge, comparison)[0]
    template = load_template(f"understanding_{medium}_pair")
    assert text == template.fill(question="Is it red?", answer_1="Yes.", answer_2="No.")
    result = preference(judge, comparison)
    assert isinstance(result, Preference)
    assert result.probability == 0
    alone = parts(judge, Sample("unused", NO, context))
    assert alone[1] == load_template(f"understanding_{medium}_point").fill(question="Is it red?", answer="No.")


@pytest.mark.parametrize("medium", ["image", "video"])
def test_what_understanding_needs_is_named(medium: str) -> None:
    judge = load(UnifiedReward, task=f"{medium}_understanding")
    with pytest.raises(MissingField, match=r"context\.(image|frames)"):
        judge.ask(Comparison("x", YES, NO, Context(question="?")))
    with pytest.raises(MissingField, match=r"context\.question"):
        judge.ask_about(Sample("x", YES, Context(image=IMAGE, frames=VIDEO.frames)))
    with pytest.raises(MissingField):
        judge.ask(Comparison("x", YES, NO))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_task_takes_its_own_kind_of_candidate(task: str, version: str) -> None:
    judge = load(UnifiedReward, task=task, version=version)
    context = Context(IMAGE, VIDEO.frames, question="?")
    takes = {"image_generation": A, "video_generation": VIDEO}.get(task, YES)
    for candidate in (A, VIDEO, YES):
        if candidate is takes:
            assert judge.ask(Comparison("x", candidate, candidate, context))
            assert judge.ask_about(Sample("x", candidate, context))
            continue
        with pytest.raises(UnsupportedInput, match=f"unified-reward .* {candidate.kind}"):
            judge.ask(Comparison("x", takes, candidate, context))
        with pytest.raises(UnsupportedInput, match=candidate.kind):
            judge.ask_about(Sample("x", candidate, context))
    assert judge.ask(judge.canary_comparison())
    assert judge.ask_about(judge.canary())


@pytest.mark.parametrize(
    ("version", "text", "probability"),
    [
        ("v1-qwen", "Image 1 is better.", 1.0), ("v1-qwen", "Image 2 is better.", 0.0),
        ("v1-llava", "Image 2 is better than Image 1.", 0.0), ("v1.5", "Both images are equally good.", 0.5),
    ],
)  # fmt: skip
def test_image_1_is_the_first_candidate(version: str, text: str, probability: float) -> None:
    result = preference(load(UnifiedReward, text, version=version), PAIR)
    assert isinstance(result, Preference)
    assert result.probability == probability


def test_version_2s_shares_are_outputs() -> None:
    form = "{0} Score:\n Image 1: {1}\n Image 2: {2}\n\n"
    shares = {"Alignment": (0.9, 0.1), "Coherence": (0.3, 0.7), "Style": (0.6, 0.4)}
    result = preference(load(UnifiedReward, "".join(form.format(a, *s) for a, s in shares.items())), PAIR)
    assert isinstance(result, Preference)
    assert result.probability == pytest.approx(0.6)
    assert result.outputs == pytest.approx({"alignment": 0.9, "coherence": 0.3, "style": 0.6})


def test_videos_have_physics_in_place_of_coherence() -> None:
    judge = load(UnifiedReward, AXES.format(5, "Physics", 2, 2), task="video_generation")
    (output,) = judge.run([judge.prepare(Sample("x", VIDEO))])
    assert isinstance(output, Output)
    assert (output.score, output.outputs) == (3.0, {"alignment": 5.0, "physics": 2.0, "style": 2.0})
    judge = load(UnifiedReward, "Video 2 is better.", task="video_generation")
    result = preference(judge, Comparison("x", VIDEO, OTHER_VIDEO))
    assert isinstance(result, Preference)
    assert result.probability == 0.0


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", "empty"), ("I cannot compare these.", "refused"), ("lovely pictures", "unparseable"),
        ("Alignment Score: Image 1: 0.9 Image 2: 0.1", "incomplete"),
        ("Alignment Score: Image 1: 0.9 Image 2: 0.9", "contradictory"),
        ("Alignment Score: Image 1: 9 Image 2: 0.9", "out_of_range"),
    ],
)  # fmt: skip
def test_answers_without_a_verdict_are_failed_comparisons(text: str, status: str) -> None:
    result = preference(load(UnifiedReward, text), PAIR)
    assert isinstance(result, AnswerError)
    assert (result.status, result.texts) == (status, (text,))


def test_another_version_wants_weights_of_its_own() -> None:
    with pytest.raises(WeightsError, match="UnifiedReward-qwen-7b"):
        UnifiedReward.load(LoadOptions(options={"version": "v1-qwen"}))
    with pytest.raises(ValueError, match=r"version of unified-reward is one of v2, v1\.5"):
        load(UnifiedReward, version="2.0")


def test_tiles_are_an_option_of_llavas_pairs(tmp_path: Path) -> None:
    weights = str(write_random_chat(tmp_path / "chat", "llava_onevision"))
    options = {"version": "v1-llava", "max_tokens": 4}
    few, many = (
        UnifiedReward.load(LoadOptions(weights=weights, options=given))
        for given in (options, {**options, "pair_tiles": True})
    )
    assert many.prepare_comparison(PAIR).tokens > few.prepare_comparison(PAIR).tokens
    assert many.prepare(POINT).tokens == few.prepare(POINT).tokens
    assert isinstance(preference(many, PAIR), AnswerError)
    for refused in ({"version": "v2"}, {"version": "v1-llava", "task": "image_understanding"}):
        with pytest.raises(ValueError, match="pair_tiles"):
            UnifiedReward.load(LoadOptions(weights=weights, options={**refused, "pair_tiles": True}))
    with pytest.raises(ValueError, match="pair_tiles"):
        load(UnifiedReward, version="v1-llava", pair_tiles=True)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_answered_by_a_network_in_words(task: str, tmp_path: Path) -> None:
    """A random one: what it says has no verdict, and is the same every time."""
    options = UnifiedReward.random_checkpoint(tmp_path)
    judge = UnifiedReward.load(replace(options, options={**options.options, "task": task}))
    comparison, sample = judge.canary_comparison(), judge.canary()
    prepared = judge.prepare_comparison(comparison)
    (first, second), (alone,) = judge.compare([prepared, prepared]), judge.run([judge.prepare(sample)])
    for result in (first, second, alone):
        assert isinstance(result, AnswerError)
        assert result.status in ("truncated", "unparseable", "empty")
    assert str(first) == str(second)


@pytest.mark.parametrize(("family", "version"), [("llava_onevision", "v1-llava"), ("internvl", "v1-qwen")])
def test_other_families_of_networks_take_their_templates(family: Family, version: str, tmp_path: Path) -> None:
    weights = str(write_random_chat(tmp_path / "chat", family))
    judge = UnifiedReward.load(LoadOptions(weights=weights, options={"version": version, "max_tokens": 4}))
    (pair,), (alone,) = judge.compare([judge.prepare_comparison(PAIR)]), judge.run([judge.prepare(POINT)])
    assert isinstance(pair, AnswerError)
    assert isinstance(alone, AnswerError)
