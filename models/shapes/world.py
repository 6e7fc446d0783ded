"""Scenes of coloured shapes on a 3x3 grid, and their rendering at any size.

Coordinates are fractions of the image side, x to the right and y down. Every object has nearly the same size and sits
in a cell of its own with a slight jitter, so objects never touch: they are at least half a pixel apart at 32 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from scipy.ndimage import gaussian_filter

GRID = 3
OBJECT_RADIUS = 0.13
"""Nominal half extent of an object, as a fraction of the image side."""
MAX_SHIFT = 0.01
"""Largest jitter of a centre."""
MAX_SCALE_JITTER = 0.04
"""Largest relative jitter of the radius."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 30, 30),
    "orange": (255, 130, 15),
    "yellow": (245, 235, 20),
    "green": (20, 180, 50),
    "cyan": (30, 200, 220),
    "blue": (40, 70, 230),
    "purple": (150, 30, 220),
    "pink": (255, 60, 170),
}
"""Colour names to RGB. Hues are at least 24 degrees apart in the chroma plane, saturation is high for all."""

BACKGROUNDS: tuple[tuple[int, int, int], ...] = (
    (250, 250, 250),
    (215, 215, 215),
    (130, 130, 130),
    (60, 60, 60),
    (15, 15, 15),
)
"""Grey tones: a blend of an object with its background keeps the object's hue, so edges never change colour."""

Float = NDArray[np.float32]


def _circle(x: Any, y: Any) -> Any:
    return np.sqrt(x * x + y * y) - 1.0


def _square(x: Any, y: Any) -> Any:
    return np.maximum(np.abs(x), np.abs(y)) - 0.88


def _triangle(x: Any, y: Any) -> Any:
    """Isosceles, pointing up: corners (0, -1.05), (-1.05, 0.9), (1.05, 0.9)."""
    run, rise = 1.05, 1.95
    side = (np.abs(x) * rise - (y + 1.05) * run) / np.hypot(run, rise)
    return np.maximum(side, y - 0.9)


def _cross(x: Any, y: Any) -> Any:
    ax, ay = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(ax - 1.05, ay - 0.36), np.maximum(ax - 0.36, ay - 1.05))


def _star(x: Any, y: Any) -> Any:
    """Five points upwards, outer radius 1.15, inner radius 0.5."""
    outer, inner, sector = 1.15, 0.5, np.pi / 5
    y = y - 0.08
    angle = np.arctan2(x, -y)
    folded = np.abs((angle + sector) % (2 * sector) - sector)
    radius = np.sqrt(x * x + y * y)
    along, across = radius * np.cos(folded), radius * np.sin(folded)
    edge_x, edge_y = inner * np.cos(sector) - outer, inner * np.sin(sector)
    return ((along - outer) * edge_y - across * edge_x) / np.hypot(edge_x, edge_y)


SHAPES: dict[str, Callable[[Any, Any], Any]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
}
"""Shape names to functions of (x, y) in radii from the centre: negative inside, about the distance outside."""


@dataclass(frozen=True)
class SceneObject:
    """One object: its cell is (row, column) in 0..2, its shift a fraction of the image, its scale close to 1."""

    shape: str
    color: str
    cell: tuple[int, int]
    shift: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) as fractions of the image side."""
        row, column = self.cell
        return (column + 0.5) / GRID + self.shift[0], (row + 0.5) / GRID + self.shift[1]


@dataclass(frozen=True)
class Scene:
    """Objects in distinct cells before a grey background (an index into ``BACKGROUNDS``)."""

    objects: tuple[SceneObject, ...] = ()
    background: int = 0

    def __post_init__(self) -> None:
        cells = [entry.cell for entry in self.objects]
        if len(set(cells)) != len(cells):
            raise ValueError(f"two objects share a cell: {cells}")


def place(shape: str, color: str, cell: tuple[int, int], rng: np.random.Generator) -> SceneObject:
    """An object in ``cell`` with random jitter."""
    dx, dy, ds = rng.uniform(-1.0, 1.0, 3).tolist()
    return SceneObject(shape, color, cell, (dx * MAX_SHIFT, dy * MAX_SHIFT), 1.0 + ds * MAX_SCALE_JITTER)


def coverage(shape: str, center_M2: Float, radius_M: Float, origin_M2: Float, window: int) -> Float:
    """Antialiased coverage [M, window, window] in [0, 1] of M objects of one shape; all lengths in pixels.

    ``origin_M2`` is the (x, y) of each window's first pixel.
    """
    pixel = np.arange(window, dtype=np.float32) + 0.5
    x = (pixel[None, :] + origin_M2[:, :1] - center_M2[:, :1]) / radius_M[:, None]
    y = (pixel[None, :] + origin_M2[:, 1:] - center_M2[:, 1:]) / radius_M[:, None]
    distance = SHAPES[shape](x[:, None, :], y[:, :, None]) * radius_M[:, None, None]
    covered: Float = np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)
    return covered


def render_batch(scenes: Sequence[Scene], size: int = 64) -> NDArray[np.uint8]:
    """Render scenes as uint8 RGB [N, size, size, 3]; a scene's picture doesn't depend on the others of the batch.

    Raises ValueError for a size under 8 pixels.
    """
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, not {size}")
    backgrounds = np.array(BACKGROUNDS, np.float32)[[scene.background for scene in scenes]]
    canvas = np.empty((len(scenes), size, size, 3), np.float32)
    canvas[:] = backgrounds[:, None, None, :]
    window = min(size, int(np.ceil(2.5 * OBJECT_RADIUS * (1 + MAX_SCALE_JITTER) * size)) + 3)
    for shape in SHAPES:
        chosen = [(i, entry) for i, scene in enumerate(scenes) for entry in scene.objects if entry.shape == shape]
        if not chosen:
            continue
        center = np.array([entry.center for _, entry in chosen], np.float32) * size
        radius = np.array([entry.scale for _, entry in chosen], np.float32) * (OBJECT_RADIUS * size)
        origin = np.clip(np.floor(center - window / 2), 0, size - window)
        alpha = coverage(shape, center, radius, origin, window)
        colors = np.array([COLORS[entry.color] for _, entry in chosen], np.float32)
        for (i, _), (left, top), mask, color in zip(chosen, origin.astype(int).tolist(), alpha, colors, strict=True):
            view = canvas[i, top : top + window, left : left + window]
            view += mask[:, :, None] * (color - view)
    return np.rint(canvas).astype(np.uint8)


def render(scene: Scene, size: int = 64) -> PILImage.Image:
    """Render one scene as an RGB picture of ``size`` x ``size`` pixels."""
    return PILImage.fromarray(render_batch([scene], size)[0])


def degrade(
    pixels_NHWC: NDArray[np.uint8], rng: np.random.Generator, *, blur: float = 0.0, noise: float = 0.0
) -> NDArray[np.uint8]:
    """Blur with a Gaussian of ``blur`` pixels, then add Gaussian noise of standard deviation ``noise`` on [0, 1]."""
    values = pixels_NHWC.astype(np.float32) / 255.0
    if blur > 0:
        values = gaussian_filter(values, (0.0, blur, blur, 0.0), mode="nearest")
    if noise > 0:
        values = values + rng.normal(0.0, noise, values.shape).astype(np.float32)
    result: NDArray[np.uint8] = np.rint(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)
    return result
