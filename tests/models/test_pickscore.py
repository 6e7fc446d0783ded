"""pickscore: the reference's numbers, its options, its gradient, and what callers get at the edges."""

from math import exp
from pathlib import Path

import pytest
import torch
from PIL import Image

import models.catalog  # noqa: F401
from models.base import Candidate, LoadOptions, Sample, UnsupportedInput, WeightsError
from models.pickscore import PickScore
from models.preprocessing import clip_preprocess
from models.registry import get_info, load_model
from models.towers import TowerReward
from tests.models.clip_checkpoints import (
    IMAGES,
    checkpoint,
    gradient_errors,
    image,
    largest_error,
    largest_pixel_error,
    load,
    opened,
    outputs,
    prompt,
    read,
    score,
    twin_difference,
)

MANIFEST, ORACLE = "manifests/pickscore_small.json", "pickscore_small.json"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("pickscore"), MANIFEST, "model.safetensors")


@pytest.fixture(scope="module")
def model(weights: str) -> TowerReward:
    return load("pickscore", weights)


def test_scores_and_pixels_are_the_references(model: TowerReward) -> None:
    assert largest_error(model, ORACLE) < 2e-6
    assert largest_pixel_error(model, ORACLE) < 1e-6


def test_a_batch_of_all_pairs_scores_like_the_reference(model: TowerReward) -> None:
    batched = read(ORACLE)["batched"]
    samples = [Sample(prompt(text), Candidate(image=image(key))) for key, text in batched["pairs"]]
    found = model.run([model.prepare(sample) for sample in samples])
    for output, expected in zip(found, batched["scores_fp32"], strict=True):
        assert output.score == pytest.approx(expected, abs=2e-6)


def test_the_raw_scale_is_26_times_larger_and_calibrated_for_it(model: TowerReward, weights: str) -> None:
    raw = load("pickscore", weights, scale="raw")
    pictures = [image(key) for key in ("portrait", "square")]
    scores = [score(model, "a cat", picture) for picture in pictures]
    raw_scores = [score(raw, "a cat", picture) for picture in pictures]
    assert raw_scores == pytest.approx([26 * value for value in scores], rel=1e-6)
    expected = 1 / (1 + exp(raw_scores[1] - raw_scores[0]))
    for kind, values in ((model, scores), (raw, raw_scores)):
        assert 1 / (1 + exp((values[1] - values[0]) / kind.info.calibration.temperature)) == pytest.approx(expected)
    assert get_info("pickscore") is PickScore.info is model.info


def test_an_unknown_scale_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="scale is one of flow_grpo, raw; not '100'"):
        load_model("pickscore", LoadOptions(options={"scale": "100"}))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="absent"):
        load("pickscore", str(tmp_path / "absent.safetensors"))


def test_the_score_is_float32_whatever_the_towers_are(model: TowerReward, weights: str) -> None:
    half = load("pickscore", weights, torch.bfloat16)
    assert half.encode_text(half.prepare_text("a cat")[0][None]).dtype == torch.bfloat16
    values = [score(half, "a cat", opened(path)) for path in IMAGES]
    full = [score(model, "a cat", opened(path)) for path in IMAGES]
    assert values == pytest.approx(full, abs=0.02)
    # A bfloat16 score would be a number of eight bits.
    assert all(torch.tensor(value).bfloat16().item() != value for value in values)


def test_the_crop_is_that_of_the_published_image_processor(model: TowerReward) -> None:
    strip = Image.effect_noise((227, 224), 80).convert("RGB")  # margin 3: the two conventions differ
    assert torch.equal(model.prepare_image(strip), clip_preprocess(strip, rounding="transformers"))
    assert not torch.equal(model.prepare_image(strip), clip_preprocess(strip))


@pytest.mark.parametrize("size", [(16, 2000), (2000, 16)])
def test_strips_are_scored(model: TowerReward, size: tuple[int, int]) -> None:
    strip = Image.effect_noise(size, 80).convert("RGB")
    inverted = strip.point(lambda value: 255 - value)
    assert model.prepare_image(strip).shape == (3, 224, 224)
    assert abs(score(model, "a cat", strip) - score(model, "a cat", inverted)) > 1e-4


def test_empty_and_truncated_prompts_are_scored_and_only_the_latter_warns(model: TowerReward) -> None:
    picture = image("square")
    empty, long, longer = outputs(model, [("", picture), (prompt("long"), picture), (prompt("long") + "!", picture)])
    assert empty.warnings == ()
    assert long.warnings == longer.warnings == ("prompt_truncated",)
    assert long.score == longer.score != empty.score


def test_text_after_a_literal_end_token_is_not_read(model: TowerReward) -> None:
    picture = image("square")
    ended, other = (score(model, f"a cat <|endoftext|> {rest}", picture) for rest in ("dog", "sky"))
    assert ended == pytest.approx(other, abs=1e-6)
    assert ended == pytest.approx(score(model, "a cat", picture), abs=1e-6)
    assert score(model, "a cat dog", picture) != pytest.approx(ended, abs=1e-4)


def test_what_is_not_an_image_is_a_typed_error(model: TowerReward) -> None:
    with pytest.raises(UnsupportedInput, match="pickscore"):
        model.prepare(Sample("a cat", Candidate(text="a cat")))


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_the_differentiable_twin_sees_nearly_the_same_pixels(model: TowerReward, path: Path) -> None:
    largest, mean = twin_difference(model, path.stem)
    assert largest < 1.1
    assert 0.1 < mean < 0.31


def test_the_gradient_is_that_of_finite_differences(model: TowerReward, weights: str) -> None:
    double = load("pickscore", weights, torch.float64)
    for seed in range(3):
        in_double, in_single = gradient_errors(double, model, seed)
        assert in_double < 1e-6
        assert in_single < 1e-3


def test_random_checkpoints_have_the_published_structure(tmp_path: Path) -> None:
    options = PickScore.random_checkpoint(tmp_path)
    tiny = PickScore.load(options)
    pictures = [opened(path) for path in IMAGES]
    values = [score(tiny, text, picture) for picture in pictures[:3] for text in ("a cat", "two dogs")]
    assert len(set(values)) == 6
    assert (tmp_path / "model.safetensors").stat().st_size < 25e6
