"""clip-score: the reference's numbers, its options, its preprocessing and its gradient."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import models.catalog  # noqa: F401
from models.base import LoadOptions, WeightsError
from models.clip_score import SOURCES, ClipScore
from models.registry import load_model
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

MANIFEST, ORACLE = "manifests/clip_vit_l14_small.json", "clipscore_small.json"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("clip"), MANIFEST, "model.safetensors")


@pytest.fixture(scope="module")
def model(weights: str) -> TowerReward:
    return load("clip-score", weights)


def test_scores_and_pixels_are_the_references(model: TowerReward) -> None:
    assert largest_error(model, ORACLE) < 1e-6
    assert largest_pixel_error(model, ORACLE) < 2e-6


def test_the_hf_option_takes_the_image_processors_pixels(model: TowerReward, weights: str) -> None:
    processed = load("clip-score", weights, preprocessing="hf")
    assert largest_pixel_error(processed, "aesthetic_small.json") < 1e-6
    assert processed.image_key != model.image_key
    assert processed.text_key == model.text_key
    values = [
        abs(score(processed, "a cat", image(key)) - score(model, "a cat", image(key))) for key in ("gray", "tiny")
    ]
    assert 1e-6 < max(values) < 0.01


def test_vit_h_14_is_another_activation_head_width_and_source(tmp_path: Path) -> None:
    """PickScore is a fine-tuned ViT-H/14 in the same form: its oracle holds for the option, times 26 / 100."""
    file = checkpoint(tmp_path, "manifests/pickscore_small.json", "model.safetensors")
    large = load("clip-score", file, architecture="vit-h-14", preprocessing="hf")
    for entry in read("pickscore_small.json")["scores"]:
        found = score(large, prompt(entry["prompt"]), image(entry["image"]))
        assert found == pytest.approx(entry["score_times_26"] / 100, abs=2e-6)
    with pytest.raises(WeightsError, match="160 channels"):
        load("clip-score", file)
    assert SOURCES["vit-h-14"].source.startswith("hf:laion/CLIP-ViT-H-14-laion2B-s32B-b79K/")


@pytest.mark.parametrize("option", ["preprocessing", "architecture"])
def test_an_unknown_option_value_is_refused_before_anything_is_loaded(option: str) -> None:
    with pytest.raises(ValueError, match=f"option {option} is one of"):
        load_model("clip-score", LoadOptions(options={option: "new"}))


def test_another_activation_is_another_tower(model: TowerReward, weights: str) -> None:
    """What the tensors do not tell is part of the key that features are shared by."""
    assert "/vit-l-14/" in model.image_key
    assert "/vit-l-14/" in model.text_key
    assert model.weights_hash in model.image_key


@pytest.mark.parametrize("size", [(16, 2000), (2000, 16), (1, 300)])
def test_strips_are_scored(model: TowerReward, size: tuple[int, int]) -> None:
    strip = Image.effect_noise(size, 80).convert("RGB")
    inverted = strip.point(lambda value: 255 - value)
    assert model.prepare_image(strip).shape == (3, 224, 224)
    assert abs(score(model, "a cat", strip) - score(model, "a cat", inverted)) > 1e-5


def test_empty_and_truncated_prompts_are_scored_and_only_the_latter_warns(model: TowerReward) -> None:
    picture = image("square")
    empty, long, longer = outputs(model, [("", picture), (prompt("long"), picture), (prompt("long") + "!", picture)])
    assert empty.warnings == ()
    assert long.warnings == longer.warnings == ("prompt_truncated",)
    assert long.score == longer.score != empty.score


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_the_differentiable_path_is_the_exact_one(model: TowerReward, path: Path) -> None:
    largest, _ = twin_difference(model, path.stem)
    assert largest < 1e-3


@pytest.mark.parametrize("preprocessing", ["flow_grpo", "hf"])
def test_the_gradient_is_that_of_finite_differences(weights: str, preprocessing: str) -> None:
    double, single = (
        load("clip-score", weights, dtype, preprocessing=preprocessing) for dtype in (torch.float64, torch.float32)
    )
    for seed in range(3):
        in_double, in_single = gradient_errors(double, single, seed)
        assert in_double < 1e-6
        assert in_single < 1e-3


def test_random_checkpoints_have_the_published_structure(tmp_path: Path) -> None:
    tiny = ClipScore.load(ClipScore.random_checkpoint(tmp_path))
    values = [score(tiny, text, opened(path)) for path in IMAGES[:3] for text in ("a cat", "two dogs")]
    assert len(set(values)) == 6
