"""Find the shapes in a picture of any size, and judge them.

The picture is brought to a shortest side of 64 pixels, the background's tone is taken from its rim, and every pixel
becomes a vector in the chroma plane (the RGB differences, without lightness). Since backgrounds are grey, a blurred
edge shortens that vector and keeps its direction: the direction names the colour, the length tells how much of the
pixel is covered. Connected pixels of one colour are an object; its shape is the template with the largest soft
intersection over union. Things without colour that stand out by their lightness are found too, as grey ones.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from scipy import ndimage

from models.shapes.prompts import Prompt
from models.shapes.rules import Found, Verdict, judge
from models.shapes.world import COLORS, OBJECT_RADIUS, SHAPES, coverage

WORKING_SIZE = 64
MAX_ASPECT = 4.0
MIN_COVERAGE = 0.45
"""Share of a pixel that must be covered for it to belong to an object."""
MIN_AREA = 45.0
"""Least covered area of an object, in working pixels; the smallest shape covers about 90."""
MIN_FIT = 0.55
"""Least soft IoU with a template; below it the thing has no known shape."""
GREY_CONTRAST = 0.3
"""Least lightness difference to the background of a thing without colour, on [0, 1]."""

Float = NDArray[np.float32]

_TO_CHROMA = np.array([[1.0, -0.5, -0.5], [0.0, 3**0.5 / 2, -(3**0.5) / 2]], np.float32)
_NAMES = tuple(COLORS)
_PALETTE = (np.array(list(COLORS.values()), np.float32) / 255.0) @ _TO_CHROMA.T
_STRENGTH = np.linalg.norm(_PALETTE, axis=1)
_DIRECTIONS = _PALETTE / _STRENGTH[:, None]

_HALF = 13
_SHIFTS = (-0.375, -0.125, 0.125, 0.375)
_SCALES = (0.88, 1.0, 1.12)
_BLURS = (0.6, 1.2, 2.0, 2.8)


@lru_cache(maxsize=1)
def _templates() -> dict[tuple[int, int], tuple[tuple[str, ...], Float]]:
    """Blurred shapes of several scales with their centroid at each sub-pixel shift: (names [T], coverage [T, P*P])."""
    side = 2 * _HALF + 1
    names: list[str] = []
    rows: list[list[Float]] = [[] for _ in range(len(_SHIFTS) ** 2)]
    for shape in SHAPES:
        for scale in _SCALES:
            radius = np.array([OBJECT_RADIUS * WORKING_SIZE * scale], np.float32)
            for blur in _BLURS:
                names.append(shape)
                centred = _blurred_shape(shape, np.array([[_HALF + 0.5] * 2], np.float32), radius, side, blur)
                axis = np.arange(side, dtype=np.float32) + 0.5
                offset_x = float((centred.sum(0) * axis).sum() / centred.sum()) - _HALF - 0.5
                offset_y = float((centred.sum(1) * axis).sum() / centred.sum()) - _HALF - 0.5
                for k, (dy, dx) in enumerate((dy, dx) for dy in _SHIFTS for dx in _SHIFTS):
                    center = np.array([[_HALF + 0.5 + dx - offset_x, _HALF + 0.5 + dy - offset_y]], np.float32)
                    rows[k].append(_blurred_shape(shape, center, radius, side, blur).ravel())
    pairs = [(i, j) for i in range(len(_SHIFTS)) for j in range(len(_SHIFTS))]
    return {pair: (tuple(names), np.stack(row)) for pair, row in zip(pairs, rows, strict=True)}


def _blurred_shape(shape: str, center_12: Float, radius_1: Float, side: int, blur: float) -> Float:
    sharp = coverage(shape, center_12, radius_1, np.zeros((1, 2), np.float32), side)[0]
    return cast(Float, ndimage.gaussian_filter(sharp, blur))


def _working_pixels(image: PILImage.Image) -> Float:
    """RGB on [0, 1] with a shortest side of 64 pixels, [H, W, 3]; a very long side is squeezed to four times that."""
    width, height = image.size
    scale = WORKING_SIZE / min(width, height)
    longest = int(WORKING_SIZE * MAX_ASPECT)
    size = (min(longest, round(width * scale)), min(longest, round(height * scale)))
    rgb = image.convert("RGB")
    if rgb.size != size:
        rgb = rgb.resize(size, PILImage.Resampling.BICUBIC)
    return np.asarray(rgb, np.float32) / 255.0


def _rim(values: Float) -> Float:
    """Median over the two outermost rows and columns, per channel."""
    channels = values.shape[2]
    parts = (values[:2], values[-2:], values[2:-2, :2], values[2:-2, -2:])
    return cast(Float, np.median(np.concatenate([part.reshape(-1, channels) for part in parts]), axis=0))


def _noise(plane: Float) -> float:
    """Standard deviation of pixel noise, from the median absolute diagonal difference (Immerkaer-like, robust)."""
    detail = plane[:-1, :-1] - plane[1:, :-1] - plane[:-1, 1:] + plane[1:, 1:]
    return float(np.median(np.abs(detail))) / (0.6745 * 2.0)


def _smooth(pixels: Float) -> Float:
    """Take away pixel noise where there is any; a clean picture is left as it is."""
    noise = _noise(pixels[:, :, 0] - pixels[:, :, 2])
    sigma = min(1.6, 14.0 * noise) if noise > 0.01 else 0.0
    if sigma < 0.3:
        return pixels
    return cast(Float, ndimage.gaussian_filter(pixels, (sigma, sigma, 0.0), mode="nearest"))


def detect(image: PILImage.Image) -> tuple[Found, ...]:
    """Every object in the picture, in reading order of its centre; positions are fractions of width and height.

    Accepts any mode and size that PIL can convert to RGB.
    """
    pixels = _smooth(_working_pixels(image))
    background = _rim(pixels)
    chroma = (pixels - background) @ _TO_CHROMA.T
    along = chroma @ _DIRECTIONS.T
    label = np.argmax(along, axis=2)
    covered = np.take_along_axis(along, label[:, :, None], 2)[:, :, 0] / _STRENGTH[label]
    foreground = covered >= MIN_COVERAGE
    found: list[Found] = []
    for color in np.unique(label[foreground]).tolist():
        mask = foreground & (label == color)
        found += _objects(mask, along[:, :, color] / _STRENGTH[color], chroma)
    contrast = np.abs((pixels - background).mean(axis=2))
    grey = (contrast >= GREY_CONTRAST) & (np.linalg.norm(chroma, axis=2) < 0.12)
    if grey.sum() >= MIN_AREA:
        level = float(np.median(contrast[grey]))
        found += _objects(grey, np.where(covered < 0.3, contrast / level, 0.0), None)
    return tuple(sorted(found, key=lambda thing: (round(thing.y * 3 - 0.5), thing.x)))


def _objects(mask: NDArray[np.bool_], alpha: NDArray[Any], chroma: NDArray[Any] | None) -> list[Found]:
    """The connected parts of ``mask`` that are large enough, named by their mean chroma and best template."""
    parts, _ = ndimage.label(mask)
    found = []
    for i, box in enumerate(ndimage.find_objects(parts), start=1):
        part = parts[box] == i
        if part.sum() < MIN_AREA * 0.5:
            continue
        rows, columns = (slice(max(axis.start - 3, 0), axis.stop + 3) for axis in box)
        own = parts[rows, columns] == i
        near = ndimage.binary_dilation(own, iterations=2) & ((parts[rows, columns] == 0) | own)
        weight = np.clip(alpha[rows, columns], 0.0, 1.0) * near
        area = float(weight.sum())
        if area < MIN_AREA:
            continue
        color = _color_of(chroma[rows, columns], own) if chroma is not None else None
        found.append(_describe(weight, (rows.start, columns.start), color, box, mask.shape))
    return found


def _color_of(chroma: NDArray[Any], own: NDArray[np.bool_]) -> str:
    mean = chroma[own].mean(axis=0)
    return _NAMES[int(np.argmax(_DIRECTIONS @ mean))]


def _describe(
    weight: NDArray[Any], origin: tuple[int, int], color: str | None, box: tuple[slice, slice], shape: tuple[int, ...]
) -> Found:
    """Name one part by the template that fits best around its centroid."""
    area = float(weight.sum())
    height, width = weight.shape
    x = float(weight.sum(axis=0) @ (np.arange(width) + 0.5)) / area
    y = float(weight.sum(axis=1) @ (np.arange(height) + 0.5)) / area
    left, top = int(np.floor(x)), int(np.floor(y))
    bins = len(_SHIFTS)
    names, templates = _templates()[min(bins - 1, int((y - top) * bins)), min(bins - 1, int((x - left) * bins))]
    padded = np.zeros((height + 2 * _HALF + 1, width + 2 * _HALF + 1), np.float32)
    padded[_HALF : _HALF + height, _HALF : _HALF + width] = weight
    patch = padded[top : top + 2 * _HALF + 1, left : left + 2 * _HALF + 1].ravel()
    outside = area - float(patch.sum())
    overlap = np.minimum(templates, patch).sum(axis=1)
    fit = overlap / (templates.sum(axis=1) + patch.sum() - overlap + outside)
    best = int(np.argmax(fit))
    rows, columns = shape[:2]
    return Found(
        names[best] if fit[best] >= MIN_FIT else None,
        color,
        (origin[1] + x) / columns,
        (origin[0] + y) / rows,
        (box[1].stop - box[1].start) / columns,
        (box[0].stop - box[0].start) / rows,
        min(1.0, float(fit[best])),
    )


def examine(prompt: Prompt, image: PILImage.Image) -> tuple[Verdict, tuple[Found, ...]]:
    """Detect, then judge: the three scores with their reason, and what was found."""
    found = detect(image)
    return judge(prompt, found), found
