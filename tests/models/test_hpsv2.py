"""hpsv2 and hpsv2.1: the reference's numbers, also where it raises, their preprocessing and their gradient."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import models.catalog  # noqa: F401
from models.base import WeightsError
from models.hpsv2 import HPSv2, HPSv21
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
    tensors,
    twin_difference,
)

MANIFEST, ORACLE = "manifests/hpsv2_small.json", "hpsv2_small.json"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("hpsv2"), MANIFEST, "HPS_v2_compressed.pt", nested="state_dict")


@pytest.fixture(scope="module")
def model(weights: str) -> TowerReward:
    return load("hpsv2", weights)


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
def test_scores_and_pixels_are_the_references(name: str, weights: str) -> None:
    model = load(name, weights)
    assert model.info.name == name
    assert largest_error(model, ORACLE) < 1e-6
    # It leaves edge224 without padding and rgba with four channels, and raises on both.
    assert largest_pixel_error(model, ORACLE, without=("edge224", "rgba")) < 2e-6


def test_both_names_share_towers_but_come_from_different_files(weights: str) -> None:
    first, second = load("hpsv2", weights), load("hpsv2.1", weights)
    assert isinstance(first, HPSv2)
    assert isinstance(second, HPSv21)
    assert first.towers is second.towers
    assert HPSv2.info.sources != HPSv21.info.sources


def test_what_the_reference_cannot_score_is_scored(model: TowerReward) -> None:
    raised = [entry for entry in read(ORACLE)["scores"] if "reference_error" in entry]
    assert {entry["image"] for entry in raised} == {"rgba", "edge224"}
    edge = image("edge224")
    padded = Image.new("RGB", (224, 224))
    padded.paste(edge, (0, 32))
    assert score(model, "a cat", edge) == score(model, "a cat", padded)
    assert score(model, "a cat", image("rgba")) == score(model, "a cat", image("rgba").convert("RGB"))


def test_the_logit_scale_is_not_part_of_the_score(model: TowerReward, tmp_path: Path) -> None:
    other = dict(tensors(MANIFEST))
    other["logit_scale"] = torch.tensor(1.0)
    torch.save({"state_dict": other}, tmp_path / "other.pt")
    changed = load("hpsv2", str(tmp_path / "other.pt"))
    assert score(changed, "a cat", image("square")) == score(model, "a cat", image("square"))
    assert changed.weights_hash != model.weights_hash


def test_no_part_of_the_image_is_cropped_away(model: TowerReward) -> None:
    strip = Image.new("RGB", (400, 100), "gray")
    marked = strip.copy()
    marked.paste((255, 0, 0), (0, 0, 20, 100))
    assert abs(score(model, "a cat", strip) - score(model, "a cat", marked)) > 1e-4


@pytest.mark.parametrize("size", [(16, 2000), (2000, 16)])
def test_strips_are_scored(model: TowerReward, size: tuple[int, int]) -> None:
    dark, light = Image.new("RGB", size, "black"), Image.new("RGB", size, "white")
    assert model.prepare_image(light).shape == (3, 224, 224)
    assert (model.prepare_image(light) > 0.5).sum() == 3 * 2 * 224
    assert abs(score(model, "a cat", dark) - score(model, "a cat", light)) > 1e-4


def test_empty_and_truncated_prompts_are_scored_and_only_the_latter_warns(model: TowerReward) -> None:
    picture = image("square")
    empty, long, longer = outputs(model, [("", picture), (prompt("long"), picture), (prompt("long") + "!", picture)])
    assert empty.warnings == ()
    assert long.warnings == longer.warnings == ("prompt_truncated",)
    assert long.score == longer.score != empty.score


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, "manifests/aesthetic_mlp.json", "head.pth")
    with pytest.raises(WeightsError, match="not those of hpsv2"):
        load("hpsv2", file)


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_the_differentiable_path_is_the_exact_one(model: TowerReward, path: Path) -> None:
    largest, _ = twin_difference(model, path.stem)
    assert largest < 1e-3


def test_the_gradient_is_that_of_finite_differences(model: TowerReward, weights: str) -> None:
    double = load("hpsv2", weights, torch.float64)
    for seed in range(3):
        in_double, in_single = gradient_errors(double, model, seed)
        assert in_double < 1e-6
        assert in_single < 1e-3


def test_random_checkpoints_have_the_published_structure(tmp_path: Path) -> None:
    options = HPSv2.random_checkpoint(tmp_path)
    assert options.weights is not None
    assert list(torch.load(options.weights, weights_only=True)) == ["state_dict"]
    tiny = HPSv2.load(options)
    values = [score(tiny, text, opened(path)) for path in IMAGES[:3] for text in ("a cat", "two dogs")]
    assert len(set(values)) == 6
