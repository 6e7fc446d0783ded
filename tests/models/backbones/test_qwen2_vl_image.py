"""Qwen2-VL's image preprocessing against its definition, PIL and the library's patch order."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.vision_utils import get_vision_position_ids

from models.backbones.qwen2_vl_image import (
    FACTOR,
    MERGE_SIZE,
    PATCH_SIZE,
    patch_positions,
    patchify,
    resize,
    resize_tensor,
    smart_size,
)
from models.base import InputError
from models.preprocessing import to_uint8_tensor

BUDGET = 256 * 28 * 28
SIDES = st.integers(1, 4000)


@settings(max_examples=300)
@given(height=SIDES, width=SIDES)
def test_smart_size_is_a_grid_of_about_the_budget_and_keeps_the_aspect_ratio(height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InputError, match="200 times") as error:
            smart_size(height, width, BUDGET, BUDGET)
        assert error.value.code == "aspect_ratio"
        return
    found = smart_size(height, width, BUDGET, BUDGET)
    exact = [side * math.sqrt(BUDGET / (height * width)) for side in (height, width)]
    assert all(side % FACTOR == 0 for side in found)
    # Rounding moves a side by less than one cell, or by one where floating point misses a whole number (1151 x 1151).
    assert all(abs(side - ideal) < FACTOR + 1e-6 or side == FACTOR for side, ideal in zip(found, exact, strict=True))


@settings(max_examples=300)
@given(height=SIDES, width=SIDES)
def test_an_area_within_a_wide_budget_is_only_rounded(height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    rounded = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width)]
    found = smart_size(height, width, 4 * FACTOR**2, 16384 * FACTOR**2)
    inside = 4 * FACTOR**2 <= rounded[0] * rounded[1] <= 16384 * FACTOR**2
    assert (list(found) == rounded) == inside
    if not inside:
        assert found[0] * found[1] >= 4 * FACTOR**2


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((448, 448), (448, 448)),  # exactly the budget stays
        ((512, 312), (588, 364)),  # too small: enlarged and rounded up, so it ends above the budget
        ((1024, 1024), (448, 448)),
        ((1151, 1151), (420, 420)),  # 1151 / shrink is 447.99999999999994, in the reference's order of operations too
        ((42, 70), (364, 588)),  # 1.5 and 2.5 grid cells
        ((2000, 10), (6356, 56)),  # at the largest ratio
    ],
)
def test_smart_size_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_size(*size, BUDGET, BUDGET) == expected


def test_a_strip_that_would_round_to_nothing_keeps_one_cell() -> None:
    assert smart_size(5, 900, FACTOR**2, 4 * FACTOR**2) == (FACTOR, 26 * FACTOR)


def test_patches_are_in_the_order_of_a_naive_loop() -> None:
    pixels = torch.randn(2, 3, 2 * FACTOR, 3 * FACTOR, generator=torch.Generator().manual_seed(0))
    found = patchify(pixels)
    for image in range(2):
        expected = []
        for cell_row, cell_column in product(range(2), range(3)):
            for row, column in product(range(MERGE_SIZE), repeat=2):
                top = cell_row * FACTOR + row * PATCH_SIZE
                left = cell_column * FACTOR + column * PATCH_SIZE
                patch = pixels[image, :, top : top + PATCH_SIZE, left : left + PATCH_SIZE]
                expected.append(torch.cat([torch.cat([channel.flatten()] * 2) for channel in patch]))
        assert torch.equal(found[image], torch.stack(expected))


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 6), (26, 42)])
def test_patch_positions_are_the_library_s(rows: int, columns: int) -> None:
    expected = get_vision_position_ids(torch.tensor([[1, rows, columns]]), MERGE_SIZE)
    assert torch.equal(patch_positions(rows, columns), expected)


@pytest.mark.parametrize("size", [(37, 53), (640, 480), (448, 448), (1500, 90)])
def test_the_twin_is_within_the_stated_difference(size: tuple[int, int]) -> None:
    noise = torch.rand(3, size[1] // 8 + 1, size[0] // 8 + 1, generator=torch.Generator().manual_seed(1))
    image = Image.fromarray((noise.permute(1, 2, 0) * 255).to(torch.uint8).numpy()).resize(size)
    exact = resize(image, BUDGET, BUDGET)
    twin = resize_tensor(to_uint8_tensor(image)[None].double() / 255, BUDGET, BUDGET)[0]
    difference = (twin * 255 - exact).abs()
    assert twin.shape == exact.shape
    assert difference.max() <= 1.2
    assert difference.mean() <= 0.35


def test_the_twin_s_gradient_agrees_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    pixels = 0.2 + 0.6 * torch.rand(1, 3, 30, 45, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 3, 56, 84, generator=generator, dtype=torch.float64)
    direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)

    def value(step: float) -> torch.Tensor:
        return (weight * resize_tensor(pixels + step * direction, 6 * FACTOR**2, 6 * FACTOR**2)).sum()

    leaf = pixels.clone().requires_grad_()
    (weight * resize_tensor(leaf, 6 * FACTOR**2, 6 * FACTOR**2)).sum().backward()
    assert leaf.grad is not None
    difference = (value(1e-3) - value(-1e-3)) / 2e-3
    assert float((leaf.grad * direction).sum()) == pytest.approx(float(difference), rel=1e-9)
