"""The exact preprocessing is torchvision's on PIL images; the differentiable twin agrees with it and has gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from models.preprocessing import (
    LONGEST_STRIP,
    OPENAI_MEAN,
    OPENAI_STD,
    ImagePreprocessing,
    bilinear_crop,
    clip_preprocess,
    clip_preprocess_tensor,
    crop_offset,
    cut_far_ends,
    fit_and_pad,
    normalize,
    resized_size,
    to_float_tensor,
    to_uint8_tensor,
    without_far_ends,
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
    image = cut_far_ends(noise(width, height))  # beyond 64:1: see the next test
    assert torch.equal(clip_preprocess(image, size), to_uint8_tensor(reference(image)))


@pytest.mark.parametrize(("width", "height"), [(3, 3000), (3000, 3), (1, 65), (65, 1), (16, 8192)])
def test_of_a_strip_only_the_middle_is_resized_and_it_hardly_moves(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 8
    image = noise(width, height)
    whole = image.resize(resized_size(height, width, size)[::-1], Image.Resampling.BICUBIC)
    top, left = crop_offset(whole.height, size), crop_offset(whole.width, size)
    expected = to_uint8_tensor(whole.crop((left, top, left + size, top + size))).float()
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, given: tuple[int, int], *arguments: Any) -> Image.Image:
        sizes.append(given)
        return resize(self, given, *arguments)

    monkeypatch.setattr(Image.Image, "resize", watched)
    found = clip_preprocess(image, size)
    assert max(sizes[0]) <= LONGEST_STRIP * size
    correlation = torch.corrcoef(torch.stack([found.float().flatten(), expected.flatten()]))[0, 1]
    assert float(correlation) > 0.8
    twin = clip_preprocess_tensor(to_uint8_tensor(image)[None] / 255, size)[0]
    assert float((twin * 255 - found).abs().max()) <= 2 * TWIN_MAX_LEVELS


@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_the_part_that_is_kept_is_the_middle_and_everything_up_to_64_to_1(width: int, height: int) -> None:
    top, left, kept_height, kept_width = without_far_ends(height, width)
    assert max(kept_height, kept_width) <= 64 * min(kept_height, kept_width)
    assert (2 * top, 2 * left) == (height - kept_height, width - kept_width)
    assert kept_height >= min(height, 64 * width) - 1
    assert kept_width >= min(width, 64 * height) - 1
    if max(width, height) <= 64 * min(width, height):
        assert (kept_height, kept_width) == (height, width)


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


def test_double_precision_stays_double() -> None:
    pixels = torch.rand(1, 3, 30, 41, dtype=torch.float64)
    for function in (clip_preprocess_tensor, bilinear_crop, fit_and_pad):
        result = function(pixels, 16)
        assert result.dtype == torch.float64
        assert function(pixels.to(torch.bfloat16), 16).dtype == torch.float32
    assert normalize(pixels, dtype=torch.float64).dtype == torch.float64
    exact = normalize(to_uint8_tensor(noise(5, 4))[None], dtype=torch.float64)
    assert not torch.equal(exact, exact.float().double())


# -- paths on floats --------------------------------------------------------------------------------------------------


def lying(
    function: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, *, upright: bool = False
) -> torch.Tensor:
    """The function of the image turned so that it is wide: torch 2.14 resizes single columns wrongly on a CPU."""
    if pixels.shape[-2] > pixels.shape[-1] and not upright:
        return function(pixels.mT.contiguous()).mT
    return function(pixels)


@example(width=1, height=15)
@given(width=st.integers(1, 90), height=st.integers(1, 90))
def test_bilinear_crop_is_torchvisions_on_floats(width: int, height: int) -> None:
    reference = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16)])
    pixels = to_float_tensor(noise(width, height))
    result = bilinear_crop(pixels[None], 16)[0]
    torch.testing.assert_close(result, lying(reference, pixels, upright=width > 1), atol=1e-6, rtol=0)


def test_turning_an_image_turns_the_result() -> None:
    for width, height in ((1, 40), (2, 40), (3, 90), (30, 41)):
        pixels = to_float_tensor(noise(width, height))[None]
        for function in (bilinear_crop, fit_and_pad):
            turned = function(pixels.mT.contiguous(), 16).mT
            torch.testing.assert_close(function(pixels, 16), turned, atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_bilinear_crop_of_photographs_is_torchvisions(path: Path) -> None:
    reference = transforms.Compose([transforms.Resize(224), transforms.CenterCrop(224)])
    pixels = to_float_tensor(photo(path))
    torch.testing.assert_close(bilinear_crop(pixels[None])[0], reference(pixels), atol=1e-6, rtol=0)


def test_bilinear_crop_of_a_strip_never_holds_the_whole_resized_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    interpolate = torch.nn.functional.interpolate

    def watched(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal largest
        result: torch.Tensor = interpolate(*args, **kwargs)  # type: ignore[arg-type]
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch.nn.functional, "interpolate", watched)
    for shape in ((2, 1000), (1000, 2)):
        assert bilinear_crop(torch.rand(1, 3, *shape)).shape == (1, 3, 224, 224)
    assert largest == 3 * 2 * 112_000  # in full it is 112 times that


def reference_fit_and_pad(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """The steps of FACTS A3 with torchvision's functions; a side is at least one pixel."""
    scale = size / max(pixels.shape[-2:])
    height, width = (max(1, round(length * scale)) for length in pixels.shape[-2:])
    resized = functional.resize(pixels, [height, width], transforms.InterpolationMode.BICUBIC, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return functional.pad(resized, [left, top, size - width - left, size - height - top], 0)


@example(width=1, height=60)
@example(width=5, height=90)
@given(width=st.integers(1, 90), height=st.integers(1, 90))
def test_fit_and_pad_is_its_definition_for_any_shape(width: int, height: int) -> None:
    pixels = to_float_tensor(noise(width, height))
    upright = round(width * 17 / max(width, height)) > 1
    expected = lying(lambda turned: reference_fit_and_pad(turned, 17), pixels, upright=upright)
    torch.testing.assert_close(fit_and_pad(pixels[None], 17)[0], expected, atol=1e-6, rtol=0)


def test_fit_and_pad_keeps_what_overshoots_and_pads_with_black() -> None:
    stripes = torch.zeros(1, 3, 60, 200)
    stripes[..., 50:150] = 1
    result = fit_and_pad(stripes, 101)
    assert result.max() > 1.001
    assert result.min() < -0.001
    height = round(60 * 101 / 200)
    top = (101 - height) // 2
    assert result[..., :top, :].abs().max() == 0
    assert result[..., top + height :, :].abs().max() == 0
    assert result[..., top : top + height, 50].min() > 0.9
    assert 101 - top - height == top + 1  # the odd row is at the bottom


def test_fit_and_pad_of_a_fitting_image_is_the_image_with_bars() -> None:
    pixels = to_float_tensor(noise(24, 10))[None]
    assert torch.equal(fit_and_pad(pixels, 24)[..., 7:17, :], pixels)


@pytest.mark.parametrize("function", [bilinear_crop, fit_and_pad])
def test_gradients_of_linear_paths_are_exact(function: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 20, 33, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64)
    (function(pixels, 16) * weights).sum().backward()
    assert pixels.grad is not None
    other = torch.rand(pixels.shape, generator=generator, dtype=torch.float64)
    difference = ((function(other, 16) - function(pixels.detach(), 16)) * weights).sum().item()
    assert ((other - pixels.detach()) * pixels.grad).sum().item() == pytest.approx(difference, rel=1e-9)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    image = noise(40, 30).convert(mode)
    expected = to_uint8_tensor(image.convert("RGB"))
    assert torch.equal(to_float_tensor(image), expected.float() / 255)


def test_a_preprocessings_exact_path_and_twin_belong_together() -> None:
    image = noise(70, 50)
    pixels = to_float_tensor(image)[None]
    for preprocessing in (
        ImagePreprocessing.on_floats("bilinear-crop", bilinear_crop, 32),
        ImagePreprocessing.on_floats("fit-and-pad", fit_and_pad, 32),
    ):
        assert preprocessing.exact(image).dtype == torch.float32
        assert torch.equal(preprocessing.exact(image), preprocessing.twin(pixels)[0])
    torchvision, processor = (ImagePreprocessing.bicubic_crop(32, kind) for kind in ("torchvision", "transformers"))
    assert torch.equal(processor.exact(image), clip_preprocess(image, 32, "transformers"))
    assert torch.equal(processor.twin(pixels), clip_preprocess_tensor(pixels, 32, "transformers"))
    assert len({torchvision.name, processor.name, "bilinear-crop32", "fit-and-pad32"}) == 4
