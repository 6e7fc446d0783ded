"""Checkpoints of tests/fixtures/pointwise for the tests of CLIP-like rewards, and the oracle's numbers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from models.base import Candidate, LoadOptions, Output, Sample
from models.parity_recipe import build, write_checkpoint
from models.registry import load_model
from models.towers import TowerReward

FIXTURES = Path(__file__).parents[1] / "fixtures" / "pointwise"
IMAGES = sorted((FIXTURES / "images").glob("*.png"))


@cache
def read(name: str) -> dict[str, Any]:
    """A JSON file of the fixtures."""
    content: dict[str, Any] = json.loads((FIXTURES / name).read_text("utf-8"))
    return content


@cache
def tensors(manifest: str) -> dict[str, Tensor]:
    return build(read(manifest), read("inputs.json")["fill_seed"])


def prompt(key: str) -> str:
    return str(read("inputs.json")["prompts"][key])


def opened(path: Path) -> Image.Image:
    """In its own mode, as parity asks."""
    with Image.open(path) as picture:
        return picture.copy()


def image(key: str) -> Image.Image:
    return opened(FIXTURES / read("inputs.json")["images"][key]["file"])


def checkpoint(folder: Path, manifest: str, file: str, *, nested: str | None = None) -> str:
    return str(write_checkpoint(tensors(manifest), folder / file, nested=nested))


def load(name: str, weights: str, dtype: torch.dtype = torch.float32, **options: Any) -> TowerReward:
    model = load_model(name, LoadOptions(dtype=dtype, weights=weights, options=options))
    assert isinstance(model, TowerReward)
    return model


def outputs(model: TowerReward, pairs: list[tuple[str, Image.Image]]) -> list[Output]:
    """Scores of (prompt, image) pairs, one a batch: padding and neighbours have no part in them."""
    found = []
    for text, picture in pairs:
        (output,) = model.run([model.prepare(Sample(text, Candidate(image=picture)))])
        assert isinstance(output, Output), output
        found.append(output)
    return found


def score(model: TowerReward, text: str, picture: Image.Image) -> float:
    return outputs(model, [(text, picture)])[0].score


def largest_error(model: TowerReward, oracle: str) -> float:
    """Of all scores that the reference gives, where it raised those after conversion to RGB; at least six."""
    errors = []
    for entry in read(oracle)["scores"]:
        expected = entry.get("score_fp32", entry.get("score_fp32_after_convert_rgb"))
        if expected is not None:
            text = prompt(entry["prompt"]) if "prompt" in entry else ""
            errors.append(abs(score(model, text, image(entry["image"])) - expected))
    assert len(errors) >= 6
    return max(errors)


def largest_pixel_error(model: TowerReward, oracle: str, *, without: tuple[str, ...] = ()) -> float:
    """Over the probed values of the network's input."""
    errors = []
    for key, entry in read(oracle)["images"].items():
        if key not in without:
            pixels = model.normalize(model.prepare_image(image(key))[None]).flatten()
            errors += [abs(pixels[i].item() - value) for i, value in entry["preprocessed"]["probe"]]
    return max(errors)


def twin_difference(model: TowerReward, key: str) -> tuple[float, float]:
    """Largest and mean difference of the differentiable twin from the exact path, in 8-bit levels."""
    prepared = model.prepare_image(image(key))
    exact = model.normalize(prepared[None])
    rgb = image(key).convert("RGB")
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3)
    twin = model.preprocess_tensor(pixels.permute(2, 0, 1)[None].float() / 255)
    # A normalised unit is std * 255 levels.
    levels = (twin - exact).abs() * torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1) * 255
    return levels.max().item(), levels.mean().item()


def score_of_pixels(model: TowerReward, pixels_B3HW: Tensor, text: str) -> Tensor:
    """The differentiable path as /gradient runs it."""
    tokens, _ = model.prepare_text(text)
    with torch.no_grad():
        text_features = model.encode_text(tokens[None])
    return model.head(model.encode_image(model.preprocess_tensor(pixels_B3HW)), text_features).score_B


def gradient_errors(double: TowerReward, single: TowerReward, seed: int) -> tuple[float, float]:
    """Relative errors of the gradient along a random direction against central differences in float64.

    First that of the float64 model, then that of the float32 one, which is what the service runs. The picture's values
    are in [0.3, 0.7], where no bicubic overshoot is cut off: the score is smooth there.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(1, 3, 90, 131, generator=generator, dtype=torch.float64) * 0.4 + 0.3
    direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (score_of_pixels(double, pixels + sign * step * direction, "two cats") for sign in (1, -1))
    expected = ((ahead - behind) / (2 * step)).item()
    errors = []
    for model, dtype in ((double, torch.float64), (single, torch.float32)):
        leaf = pixels.detach().to(dtype, copy=True).requires_grad_()
        score_of_pixels(model, leaf, "two cats").sum().backward()
        assert leaf.grad is not None
        scale = (leaf.grad.double().norm() * direction.norm()).item() / leaf.numel() ** 0.5
        errors.append(abs((leaf.grad.double() * direction).sum().item() - expected) / scale)
    return errors[0], errors[1]
