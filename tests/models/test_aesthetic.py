"""aesthetic: the reference's numbers, a head that must fit, and a tower that it shares with clip-score."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import models.catalog  # noqa: F401
from models.aesthetic import HEAD, Aesthetic
from models.backbones.clip import ClipTowers
from models.backbones.mlp import ScoreMLP
from models.base import Candidate, Output, Sample, WeightsError
from models.clip_score import ClipScore
from models.parity_recipe import write_checkpoint
from models.towers import TowerReward
from service.engine.request import Made
from service.settings import ModelSettings, Settings
from tests.models.clip_checkpoints import (
    IMAGES,
    checkpoint,
    gradient_errors,
    image,
    largest_error,
    largest_pixel_error,
    load,
    opened,
    score,
    tensors,
    twin_difference,
)
from tests.service.engine.tiny import ask, serving

TOWER, MLP, ORACLE = "manifests/clip_vit_l14_small.json", "manifests/aesthetic_mlp.json", "aesthetic_small.json"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("tower"), TOWER, "model.safetensors")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("head"), MLP, "sac+logos+ava1-l14-linearMSE.pth")


@pytest.fixture(scope="module")
def model(weights: str, head: str) -> TowerReward:
    return load("aesthetic", weights, head=head)


def test_scores_and_pixels_are_the_references(model: TowerReward) -> None:
    assert largest_error(model, ORACLE) < 5e-7
    assert largest_pixel_error(model, ORACLE) < 1e-6


def test_the_prompt_has_no_part_in_it(model: TowerReward) -> None:
    values = {score(model, text, image("square")) for text in ("", "a cat", "x " * 500)}
    assert len(values) == 1
    assert "prompt" not in model.info.inputs
    assert model.prepare(Sample("x " * 500, Candidate(image=image("square")))).warnings == ()


@pytest.mark.parametrize("change", ["missing", "unknown", "misshapen"])
def test_a_head_that_does_not_fit_is_refused(weights: str, tmp_path: Path, change: str) -> None:
    wrong = dict(tensors(MLP))
    if change == "missing":
        del wrong["layers.7.bias"]
    elif change == "unknown":
        wrong["layers.1.weight"] = torch.zeros(2)
    else:
        wrong["layers.0.weight"] = torch.zeros(1024, 512)
    file = write_checkpoint(wrong, tmp_path / "head.pth")
    with pytest.raises(WeightsError, match=f"aesthetic's head: 1 {change}"):
        load("aesthetic", weights, head=str(file))


def test_a_missing_head_names_its_setting(weights: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="head"):
        load("aesthetic", weights, head=str(tmp_path / "absent.pth"))
    assert HEAD.bytes == 3_714_759


def test_the_head_stays_float32(weights: str, head: str, model: TowerReward) -> None:
    half = load("aesthetic", weights, torch.bfloat16, head=head)
    assert isinstance(half, Aesthetic)
    assert {parameter.dtype for parameter in half.mlp.parameters()} == {torch.float32}
    assert score(half, "", image("square")) == pytest.approx(score(model, "", image("square")), abs=0.01)


def test_the_hash_names_tower_and_head(model: TowerReward, weights: str, head: str, tmp_path: Path) -> None:
    other = dict(tensors(MLP))
    other["layers.7.bias"] = other["layers.7.bias"] + 1
    changed = load("aesthetic", weights, head=str(write_checkpoint(other, tmp_path / "head.pth")))
    assert changed.weights_hash != model.weights_hash
    assert changed.image_key == model.image_key
    assert score(changed, "", image("square")) == pytest.approx(score(model, "", image("square")) + 1, abs=1e-5)


def test_the_five_layers_have_the_published_names() -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in tensors(MLP).items()}
    assert {name: tuple(tensor.shape) for name, tensor in ScoreMLP().state_dict().items()} == expected


# -- shared with clip-score -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("aesthetic", "clip-score"), ("clip-score", "aesthetic")])
def test_one_process_holds_one_tower(weights: str, head: str, order: tuple[str, str]) -> None:
    options: dict[str, dict[str, Any]] = {"aesthetic": {"head": head}, "clip-score": {}}
    first, second = (load(name, weights, **options[name]) for name in order)
    assert isinstance(first, Aesthetic | ClipScore)
    assert isinstance(second, Aesthetic | ClipScore)
    assert first.towers is second.towers
    assert first.towers.clip is second.towers.clip


def test_features_are_shared_exactly_where_the_pixels_are_the_same(model: TowerReward, weights: str) -> None:
    processed = load("clip-score", weights, preprocessing="hf")
    assert processed.image_key == model.image_key
    assert load("clip-score", weights).image_key != model.image_key
    assert processed.text_key != model.text_key
    for path in IMAGES:
        assert torch.equal(processed.prepare_image(opened(path)), model.prepare_image(opened(path)))


@pytest.mark.parametrize(("preprocessing", "rows"), [("hf", 3), ("flow_grpo", 6)])
def test_the_engine_encodes_an_image_once_for_both(
    weights: str, head: str, preprocessing: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three images scored by both: three rows through the image tower with equal preprocessing, otherwise six."""
    settings = Settings(
        models={
            "aesthetic": ModelSettings(weights=weights, options={"head": head}),
            "clip-score": ModelSettings(weights=weights, options={"preprocessing": preprocessing}),
        },
        device="cpu",
        dtype="float32",
        invariance="fast",
    )
    encoded: list[int] = []
    encode_image = ClipTowers.encode_image

    def counted(towers: ClipTowers, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        encoded.extend({hash(row.numpy().tobytes()) for row in pixels_B3SS})
        return encode_image(towers, pixels_B3SS)

    pictures = [image(key) for key in ("portrait", "landscape", "square")]
    samples = [Sample("a cat", Candidate(image=picture)) for picture in pictures]

    async def main() -> None:
        async with serving(settings) as engine:
            monkeypatch.setattr(ClipTowers, "encode_image", counted)
            makers = [lambda sample=sample: Made(sample) for sample in samples]
            results = await ask(engine, ["aesthetic", "clip-score"], makers)
            monkeypatch.undo()
            models = {name: worker.model for name, worker in engine.workers.items()}
        for sample, result in zip(samples, results, strict=True):
            for name, served in models.items():
                outcome = result.outcomes[name]
                assert isinstance(outcome, Output)
                assert isinstance(served, TowerReward)
                assert outcome.score == pytest.approx(score(served, sample.prompt, sample.image(name)), abs=1e-5)

    asyncio.run(main())
    assert len(encoded) == rows


# -- gradient ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_the_differentiable_twin_sees_nearly_the_same_pixels(model: TowerReward, path: Path) -> None:
    largest, mean = twin_difference(model, path.stem)
    assert largest < 1.1
    assert 0.1 < mean < 0.31


def test_the_gradient_is_that_of_finite_differences(model: TowerReward, weights: str, head: str) -> None:
    double = load("aesthetic", weights, torch.float64, head=head)
    for seed in range(3):
        in_double, in_single = gradient_errors(double, model, seed)
        assert in_double < 1e-6
        assert in_single < 1e-3


@pytest.mark.parametrize("size", [(16, 2000), (2000, 16)])
def test_strips_are_scored(model: TowerReward, size: tuple[int, int]) -> None:
    strip = Image.effect_noise(size, 80).convert("RGB")
    inverted = strip.point(lambda value: 255 - value)
    assert abs(score(model, "", strip) - score(model, "", inverted)) > 1e-5


def test_random_checkpoints_have_the_published_structure(tmp_path: Path) -> None:
    tiny = Aesthetic.load(Aesthetic.random_checkpoint(tmp_path))
    assert len({score(tiny, "", opened(path)) for path in IMAGES[:4]}) == 4
