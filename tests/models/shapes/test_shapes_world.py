"""Pictures show what their scene says, at every size, and never two objects that touch."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from models.shapes.scenes import CELLS, random_scene
from models.shapes.world import (
    BACKGROUNDS,
    COLORS,
    GRID,
    SHAPES,
    Scene,
    SceneObject,
    degrade,
    place,
    render,
    render_batch,
)

BLACK = len(BACKGROUNDS) - 1
SIZES = (32, 48, 64, 96, 224)


@given(st.integers(0, 10_000), st.integers(0, 9), st.sampled_from(SIZES))
def test_every_object_is_one_separate_patch_of_its_colour_in_its_cell(seed: int, count: int, size: int) -> None:
    scene = random_scene(np.random.default_rng(seed), count)
    pixels = render_batch([replace(scene, background=BLACK)], size)[0].astype(int)
    changed = pixels.max(axis=2) > 110  # about half covered
    _, patches = ndimage.label(changed, np.ones((3, 3)))
    assert patches == count
    for entry in scene.objects:
        x, y = entry.center
        assert (int(y * GRID), int(x * GRID)) == entry.cell
        if entry.shape != "triangle":
            assert tuple(pixels[int(y * size), int(x * size)]) == COLORS[entry.color]


@given(st.integers(0, 10_000))
def test_a_picture_does_not_depend_on_its_batch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, int(rng.integers(0, 6))) for _ in range(5)]
    together = render_batch(scenes, 40)
    for scene, pixels in zip(scenes, together, strict=True):
        assert np.array_equal(np.asarray(render(scene, 40)), pixels)


@pytest.mark.parametrize("size", SIZES)
def test_shapes_have_the_area_of_their_geometry_at_every_size(size: int) -> None:
    """Areas in squared radii: pi, (2 * 0.88)^2, 2.1 * 1.95 / 2, 2 * 2.1 * 0.72 - 0.72^2, 5 * 1.15 * 0.5 * sin 36."""
    expected = {"circle": 3.1416, "square": 3.0976, "triangle": 2.0475, "cross": 2.5056, "star": 1.6899}
    assert set(expected) == set(SHAPES)
    for shape, area in expected.items():
        pixels = render_batch([Scene((SceneObject(shape, "red", (1, 1)),), background=BLACK)], size)[0].astype(float)
        covered = ((pixels[:, :, 0] - 15) / (230 - 15)).sum() / (0.13 * size) ** 2
        assert covered == pytest.approx(area, rel=0.05)


def test_sizes_show_the_same_picture() -> None:
    scene = random_scene(np.random.default_rng(4), 6)
    large = render_batch([scene], 192)[0].astype(float)
    small = render_batch([scene], 32)[0].astype(float)
    averaged = large.reshape(32, 6, 32, 6, 3).mean(axis=(1, 3))
    assert np.abs(averaged - small).mean() < 2.0


def test_the_same_seed_gives_the_same_object_and_another_seed_another() -> None:
    first, same, other = (place("star", "pink", (0, 1), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_two_objects_cannot_share_a_cell() -> None:
    with pytest.raises(ValueError, match="share a cell"):
        Scene((SceneObject("star", "red", CELLS[0]), SceneObject("cross", "blue", CELLS[0])))


def test_too_small_a_picture_raises() -> None:
    with pytest.raises(ValueError, match="8 pixels"):
        render_batch([Scene()], 7)


def test_degrading_blurs_and_adds_noise_of_the_strength_asked_for() -> None:
    pixels = np.full((1, 64, 64, 3), 128, np.uint8)
    noisy = degrade(pixels, np.random.default_rng(0), noise=0.1).astype(float) / 255
    assert noisy.std() == pytest.approx(0.1, rel=0.05)
    edge = render_batch([Scene((SceneObject("square", "red", (1, 1)),))], 64)
    blurred = degrade(edge, np.random.default_rng(0), blur=2.0)
    assert np.abs(np.diff(blurred.astype(int), axis=1)).max() < np.abs(np.diff(edge.astype(int), axis=1)).max() / 2
    assert np.array_equal(degrade(edge, np.random.default_rng(0)), edge)
