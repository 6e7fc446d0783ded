"""Pictures of gradients, and steps along them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.demo import pictures
from benchmarks.demo.gradients import PROBE, STEP, ascent_step, gradient_norm, heat_picture, to_image, to_tensor

seeds = st.integers(0, 2**32 - 1)


@given(seeds)
def test_the_norm_is_that_of_each_pixels_colour_vector(seed: int) -> None:
    gradient = np.random.default_rng(seed).normal(size=(3, 4, 5)).astype(np.float32)
    norm = gradient_norm(gradient)
    assert norm.shape == (4, 5)
    for y in range(4):
        for x in range(5):
            assert norm[y, x] == pytest.approx(float(np.linalg.norm(gradient[:, y, x])), rel=1e-6)


def test_heat_gets_lighter_all_the_way() -> None:
    heat = heat_picture(np.linspace(0, 7, 256)[None])
    grey = np.asarray(heat, np.float64) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(grey[0]) > -0.75).all()  # rounding to 8 bits
    assert grey[0, 0] < 5
    assert grey[0, -1] > 230


def test_heat_is_zoomed_in_whole_pixels_and_nothing_is_black() -> None:
    heat = np.asarray(heat_picture(np.array([[0.0, 1.0], [0.5, 0.0]]), zoom=3))
    assert heat.shape == (6, 6, 3)
    assert (heat[:3, :3] == heat[0, 0]).all()
    assert not np.asarray(heat_picture(np.zeros((4, 4)))).max() > 4


@given(seeds)
def test_an_image_survives_the_way_to_a_tensor_and_back(seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    tensor = to_tensor(to_image(pixels.transpose(2, 0, 1).astype(np.float32) / 255))
    assert (tensor.shape, tensor.dtype) == ((3, 6, 5), np.float32)
    assert np.array_equal(np.asarray(to_image(tensor)), pixels)


@given(seeds)
def test_a_step_goes_uphill_stays_in_range_and_is_no_longer_than_said(seed: int) -> None:
    generator = np.random.default_rng(seed)
    pixels, gradient = generator.random((3, 4, 4), np.float32), generator.normal(size=(3, 4, 4)).astype(np.float32)
    moved = ascent_step(pixels, gradient)
    assert ((moved - pixels) * gradient >= 0).all()
    assert float(np.abs(moved - pixels).max()) <= STEP * (1 + 1e-4)
    assert 0 <= moved.min() <= moved.max() <= 1


def test_the_slope_can_be_measured_on_the_drawing_without_leaving_the_range() -> None:
    pixels = to_tensor(pictures.wrong_drawing())
    assert pixels.min() > PROBE
    assert pixels.max() < 1 - PROBE
