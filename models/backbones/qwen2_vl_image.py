"""Image preprocessing of Qwen2-VL (Wang et al. 2024, arXiv:2409.12191): smart resize and patches.

An image keeps its aspect ratio, roughly: both sides become multiples of 28 pixels (patches of 14, merged two by two),
and the area is brought into a budget of pixels. The exact path resizes with PIL's bicubic filter; its differentiable
twin does the same in floating point.

Measured on the eight images of tests/fixtures/pointwise at 256*28*28 pixels, twin against exact path in 8-bit levels:
at most 1.11, on average 0.24 to 0.31 (PIL rounds after each axis, the twin does not).
"""

from __future__ import annotations

import math

import torch
from PIL import Image as PILImage
from torch import Tensor

from models.base import InputError
from models.preprocessing import at_least_float32, bicubic_tensor, to_uint8_tensor

PATCH_SIZE = 14
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2
FACTOR = PATCH_SIZE * MERGE_SIZE
MAX_ASPECT_RATIO = 200


def smart_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of 28 with an area of about ``min_pixels`` to ``max_pixels``.

    Each side is rounded (half to even); where the area is then too large both sides are shrunk by one factor and
    rounded down, where it is too small enlarged and rounded up. With ``min_pixels`` equal to ``max_pixels`` the result
    may lie on either side of it. Raises :class:`InputError` ("aspect_ratio") for sides that differ over 200 times.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InputError(
            f"the image is {width}x{height}: its sides may differ {MAX_ASPECT_RATIO} times at most", code="aspect_ratio"
        )
    rounded = (max(FACTOR, round(height / FACTOR) * FACTOR), max(FACTOR, round(width / FACTOR) * FACTOR))
    area = rounded[0] * rounded[1]
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return (
            max(FACTOR, math.floor(height / shrink / FACTOR) * FACTOR),
            max(FACTOR, math.floor(width / shrink / FACTOR) * FACTOR),
        )
    if area < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * enlarge / FACTOR) * FACTOR, math.ceil(width * enlarge / FACTOR) * FACTOR
    return rounded


def resize(image: PILImage.Image, min_pixels: int, max_pixels: int) -> Tensor:
    """The exact path: RGB (alpha is dropped), :func:`smart_size`, PIL's bicubic -> uint8 [3, H, W]."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    height, width = smart_size(image.height, image.width, min_pixels, max_pixels)
    return to_uint8_tensor(image.resize((width, height), PILImage.Resampling.BICUBIC))


def resize_tensor(pixels_B3HW: Tensor, min_pixels: int, max_pixels: int) -> Tensor:
    """Differentiable twin of :func:`resize`: floating point [B, 3, H, W] in [0, 1] -> the same at the smart size.

    Values that overshoot [0, 1] are cut off after each axis, as PIL does, and have no gradient.
    """
    height, width = smart_size(pixels_B3HW.shape[-2], pixels_B3HW.shape[-1], min_pixels, max_pixels)
    return bicubic_tensor(at_least_float32(pixels_B3HW), height, width)


def patchify(pixels_BCHW: Tensor) -> Tensor:
    """Images [B, C, H, W] -> patches [B, H/14 * W/14, C * 2 * 14 * 14] in the order of the vision tower.

    The four patches that are merged into one token follow each other; within a patch the order is channel, time, row,
    column. An image is a video of one frame, shown twice because the tower's patches are two frames deep. H and W are
    multiples of 28.
    """
    batch, channels, height, width = pixels_BCHW.shape
    rows, columns = height // FACTOR, width // FACTOR
    split = pixels_BCHW.reshape(batch, channels, rows, MERGE_SIZE, PATCH_SIZE, columns, MERGE_SIZE, PATCH_SIZE)
    patches = split.permute(0, 2, 5, 3, 6, 1, 4, 7)
    frames = patches.unsqueeze(-3).expand(*(-1,) * 6, TEMPORAL_PATCH_SIZE, -1, -1)
    return frames.reshape(batch, rows * columns * MERGE_SIZE**2, -1)


def patch_positions(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Row and column of each patch of a grid, int64 [rows * columns, 2], in the order of :func:`patchify`."""
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    blocks = (rows // MERGE_SIZE, MERGE_SIZE, columns // MERGE_SIZE, MERGE_SIZE)
    return torch.stack([axis.reshape(blocks).transpose(1, 2).flatten() for axis in (row, column)], dim=-1)
