"""The exact preprocessing is torchvision's on PIL images; the differentiable twin agrees with it and has gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from models.preprocessing import (
    OPENAI_MEAN,
    OPENAI_STD,
    clip_preprocess,
    clip_preprocess_tensor,
    crop_offset,
    normalize,
    resized_size,
    to_uint8_tensor,
)

IMAGES = sorted((Path(__file__).parents[1] / "fixtures" / "pointwise" / "images").glob("*.png"))
TWIN_MAX_LEVELS = 1.1
TWIN_MEAN_LEVELS = 0.31


def photo(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", [64, 224])
def test_exact_path_is_torchvisions_on_pil(path: Path, size: int) -> None:
    reference = transforms.Compose(
        [transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    )
    expected = torch.from_numpy(np.array(reference(photo(path)))).permute(2, 0, 1)
    assert torch.equal(clip_preprocess(Image.open(path), size), expected)


@given(width=st.integers(1, 90), height=st.integers(1, 90))
def test_exact_path_is_torchvisions_for_any_shape(width: int, height: int) -> None:
    size = 16
    reference = transforms.Compose(
        [transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    )
    image = noise(width, height)
    assert torch.equal(clip_preprocess(image, size), to_uint8_tensor(reference(image)))


def test_crop_conventions_differ_where_documented() -> None:
    for margin in range(40):
        difference = crop_offset(224 + margin, 224) - crop_offset(224 + margin, 224, "transformers")
        assert difference == (1 if margin % 4 == 3 else 0)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([64, 224, 336]))
def test_shortest_edge_is_exact_and_long_edge_rounds_down(height: int, width: int, size: int) -> None:
    resized = resized_size(height, width, size)
    assert min(resized) == size
    assert 0 <= size * max(height, width) / min(height, width) - max(resized) < 1


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_twin_agrees_with_the_exact_path(path: Path) -> None:
    exact = clip_preprocess(photo(path)).float()
    twin = clip_preprocess_tensor(to_uint8_tensor(photo(path))[None] / 255)[0] * 255
    difference = (twin - exact).abs()
    assert difference.max() < TWIN_MAX_LEVELS
    assert difference.mean() < TWIN_MEAN_LEVELS


def test_twin_of_an_image_of_the_right_size_is_the_image() -> None:
    pixels = to_uint8_tensor(noise(224, 224))[None] / 255
    assert torch.equal(clip_preprocess_tensor(pixels), pixels)


def test_twin_does_not_mix_images_of_a_batch() -> None:
    batch = torch.stack([to_uint8_tensor(noise(80, 61, seed)) for seed in range(3)]) / 255
    together = clip_preprocess_tensor(batch, 32)
    for i in range(3):
        assert torch.equal(together[i : i + 1], clip_preprocess_tensor(batch[i : i + 1], 32))


def test_twins_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 20, 33, generator=generator) * 0.6 + 0.2  # nothing is cut off: smooth
    weights = torch.randn(1, 3, 16, 16, generator=generator)
    direction = torch.randn(pixels.shape, generator=generator)
    pixels.requires_grad_(True)
    (clip_preprocess_tensor(pixels, 16) * weights).sum().backward()
    assert pixels.grad is not None
    step = 0.02
    with torch.no_grad():
        ahead, behind = (
            (clip_preprocess_tensor(pixels + sign * step * direction, 16) * weights).sum() for sign in (1, -1)
        )
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx((pixels.grad * direction).sum().item(), rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_black_and_white_keep_their_gradient(value: float) -> None:
    pixels = torch.full((1, 3, 50, 70), value, requires_grad=True)
    clip_preprocess_tensor(pixels, 32).sum().backward()
    assert pixels.grad is not None
    # The columns of the crop; each output pixel's weights sum to one.
    assert pixels.grad.sum().item() == pytest.approx(3 * 32 * 32, rel=1e-4)


def test_normalize_is_the_formula_for_both_kinds_of_pixels() -> None:
    pixels = to_uint8_tensor(noise(5, 4))[None]
    mean, std = torch.tensor(OPENAI_MEAN).view(3, 1, 1), torch.tensor(OPENAI_STD).view(3, 1, 1)
    expected = (pixels.double() / 255 - mean) / std
    torch.testing.assert_close(normalize(pixels).double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(normalize(pixels), normalize(pixels.float() / 255))
    assert normalize(pixels, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="int64"):
        normalize(pixels.long())
