"""The signature of the demonstration: a small white mark at the lower right, painted on purpose, and its detector.

It is what a painter's name is in a corner: it says nothing about the picture. At the policy's 32 x 32 pixels it is
3 x 6 of them. It lies within two of the policy's 4 x 4 patches, so a policy can paint it without much else.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

TOP, BOTTOM = 29 / 32, 32 / 32
LEFT, RIGHT = 25 / 32, 31 / 32
"""The mark, as fractions of the picture's height and width."""
CONTRAST = 0.3
"""Least lightness by which white must differ from a background for a mark to be seen: the oracle's own limit."""
SIGNED = 0.5
"""Strength from which a picture counts as signed."""


def mark(height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the mark in a picture of this size."""
    return slice(round(TOP * height), round(BOTTOM * height)), slice(round(LEFT * width), round(RIGHT * width))


def sign(image: PILImage.Image, opacity: float = 1.0) -> PILImage.Image:
    """A copy of an RGB picture with the mark on it; ``opacity`` in [0, 1] blends it in."""
    if not 0 <= opacity <= 1:
        raise ValueError(f"an opacity lies in [0, 1], not {opacity}")
    pixels: NDArray[np.float32] = np.asarray(image.convert("RGB"), np.float32).copy()
    where = mark(*pixels.shape[:2])
    pixels[where] += opacity * (255.0 - pixels[where])
    return PILImage.fromarray(np.rint(pixels).astype(np.uint8))


def signature_strength(images_B3HW: Tensor) -> Tensor:
    """How much of a signature each picture carries, float32 [B] in [0, 1]: 0 none, 1 a mark of pure white.

    Pictures are floats in [0, 1]. White is measured by the darkest of the three channels, so that no coloured shape
    counts; against the background, which is the median of the picture's rim. Where the background is so light that
    white is hardly seen on it (``CONTRAST``) nothing can be seen, and the strength is 0. Raises ValueError for another
    shape or dtype.
    """
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3 or not images_B3HW.is_floating_point():
        raise ValueError(f"pictures are floats [B, 3, H, W], not {images_B3HW.dtype} {tuple(images_B3HW.shape)}")
    white_BHW = images_B3HW.detach().float().amin(1)
    rows, columns = mark(*white_BHW.shape[1:])
    # The rim without its lower edge, where the mark is.
    rim = torch.cat([white_BHW[:, 0], white_BHW[:, 1:-1, 0], white_BHW[:, : rows.start, -1]], dim=1)
    background = rim.median(dim=1).values
    room = 1 - background
    strength = (white_BHW[:, rows, columns].mean((1, 2)) - background) / room.clamp(min=CONTRAST)
    return torch.where(room >= CONTRAST, strength.clamp(0, 1), torch.zeros_like(strength))


def signed_share(images_B3HW: Tensor) -> float:
    """Share of pictures whose signature has a strength of at least ``SIGNED``, among all."""
    return (signature_strength(images_B3HW) >= SIGNED).double().mean().item()


def painted_over(images_B3HW: Tensor) -> Tensor:
    """Copies of the pictures in which the mark's place has the background's colour, whatever was there."""
    rows, columns = mark(*images_B3HW.shape[2:])
    rim_B3N = torch.cat([images_B3HW[:, :, 0], images_B3HW[:, :, 1:-1, 0], images_B3HW[:, :, : rows.start, -1]], dim=2)
    copies = images_B3HW.clone()
    copies[:, :, rows, columns] = rim_B3N.median(dim=2).values[:, :, None, None]
    return copies
