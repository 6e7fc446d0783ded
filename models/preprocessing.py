"""CLIP's image preprocessing: the exact paths, and their differentiable twins in torch.

The usual path (:func:`clip_preprocess`) is what CLIP-like rewards were trained and published with: RGB, shortest edge
to S by PIL's bicubic, centre crop SxS. PIL resizes horizontally and then vertically, rounds to 8 bit after each pass,
and cuts off what overshoots 0 or 255. The twin does the same in floating point, cuts off the same, and does not round,
since rounding has no gradient.

Measured on the eight images of tests/fixtures at S = 224, twin against exact path in 8-bit levels: at most 1.06, on
average 0.26 to 0.30 (two roundings alone give about that). Cutting off once after both passes instead of after each
would be up to 11.5 levels off.

Two other paths of published rewards resize the float tensor and round nothing, so that one function is both the exact
path and its own twin: :func:`bilinear_crop` and :func:`fit_and_pad`. A :class:`ImagePreprocessing` holds a path with
its twin and a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

CropRounding = Literal["torchvision", "transformers"]

# A flat white area interpolates to 1 + 1e-7; cutting that off would lose the gradient of every saturated pixel.
_CLAMP_SLACK = 1e-5


def resized_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the shortest edge ``size``; the other one is rounded down (torchvision, transformers)."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def crop_offset(length: int, size: int, rounding: CropRounding = "torchvision") -> int:
    """First row or column of a centred window of ``size`` in ``length`` >= size pixels.

    For an odd margin torchvision's CenterCrop rounds half to even, while the image processors of transformers round
    down: they differ by one pixel where margin mod 4 is 3.
    """
    margin = length - size
    return round(margin / 2) if rounding == "torchvision" else margin // 2


LONGEST_STRIP = 64
"""Sides of an image longer than this many of the other's are cut down to it before a centre crop resizes them."""


def without_far_ends(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the part of an image that is resized before a centre crop: nearly always all of it.

    A strip of pixels would grow to hundreds of megabytes of which the crop keeps a square. Beyond 64:1 its ends are cut
    off first; what is left may then lie a fraction of a pixel beside what the published code would have kept.
    """
    new_height, new_width = min(height, LONGEST_STRIP * width), min(width, LONGEST_STRIP * height)
    # As much at one end as at the other, so that the middle stays the middle.
    new_height -= (height - new_height) % 2
    new_width -= (width - new_width) % 2
    return (height - new_height) // 2, (width - new_width) // 2, new_height, new_width


def cut_far_ends(image: PILImage.Image) -> PILImage.Image:
    """The image, or the middle of a very long strip: see :func:`without_far_ends`."""
    top, left, height, width = without_far_ends(image.height, image.width)
    if (height, width) == (image.height, image.width):
        return image
    return image.crop((left, top, left + width, top + height))


def to_uint8_tensor(image: PILImage.Image) -> Tensor:
    """The pixels of an RGB image as uint8 [3, H, W] in memory of its own."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def clip_preprocess(image: PILImage.Image, size: int = 224, rounding: CropRounding = "torchvision") -> Tensor:
    """The exact path: RGB conversion, shortest edge to ``size`` (bicubic), centre crop -> uint8 [3, size, size].

    Alpha is dropped, as CLIP's own code does; the service lays images over white before.
    """
    image = cut_far_ends(image if image.mode == "RGB" else image.convert("RGB"))
    height, width = resized_size(image.height, image.width, size)
    top, left = crop_offset(height, size, rounding), crop_offset(width, size, rounding)
    image = image.resize((width, height), PILImage.Resampling.BICUBIC)
    return to_uint8_tensor(image.crop((left, top, left + size, top + size)))


def clip_preprocess_tensor(pixels_B3HW: Tensor, size: int = 224, rounding: CropRounding = "torchvision") -> Tensor:
    """Differentiable twin of :func:`clip_preprocess`: float [B, 3, H, W] in [0, 1] -> [B, 3, size, size].

    The result is in [0, 1], not yet normalised, and float32 (float64 for float64 pixels). Gradients are those of the
    function itself: finite differences agree with them. Where a resized value overshoots [0, 1] it is cut off, and has
    no gradient.
    """
    top, left, height, width = without_far_ends(*pixels_B3HW.shape[-2:])
    resized = at_least_float32(pixels_B3HW[..., top : top + height, left : left + width])
    height, width = resized_size(height, width, size)
    top, left = crop_offset(height, size, rounding), crop_offset(width, size, rounding)
    resized = bicubic_tensor(resized, height, width)
    return resized[..., top : top + size, left : left + size]


def bicubic_tensor(pixels_B3HW: Tensor, height: int, width: int) -> Tensor:
    """PIL's bicubic resize without its rounding: float [B, 3, H, W] in [0, 1] -> [B, 3, height, width] in [0, 1]."""
    # One axis after the other, because PIL cuts off between the passes.
    for shape in ((pixels_B3HW.shape[-2], width), (height, width)):
        if pixels_B3HW.shape[-2:] != shape:
            pixels_B3HW = F.interpolate(pixels_B3HW, shape, mode="bicubic", align_corners=False, antialias=True)
            pixels_B3HW = pixels_B3HW.clamp(-_CLAMP_SLACK, 1 + _CLAMP_SLACK)
    return pixels_B3HW


def normalize(
    pixels_B3SS: Tensor,
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(x - mean) / std per channel, computed in float32 (or float64, if asked for) and cast to ``dtype`` at the end.

    ``pixels_B3SS`` are uint8 in [0, 255] or floating point in [0, 1]; other dtypes raise TypeError.
    """
    if pixels_B3SS.dtype == torch.uint8:
        pixels = pixels_B3SS.to(torch.promote_types(dtype, torch.float32)) / 255
    elif pixels_B3SS.is_floating_point():
        pixels = at_least_float32(pixels_B3SS)
    else:
        raise TypeError(f"pixels are uint8 or floating point, not {pixels_B3SS.dtype}")
    return ((pixels - _per_channel(mean, pixels)) / _per_channel(std, pixels)).to(dtype)


def at_least_float32(values: Tensor) -> Tensor:
    """Floating-point values in float32, float64 ones as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    # Filled on the device: a tensor made of numbers would be copied there and waited for.
    return torch.stack([like.new_full((1, 1), value) for value in values])


def to_float_tensor(image: PILImage.Image) -> Tensor:
    """The pixels of an image as float32 [3, H, W] in [0, 1]; other modes are converted to RGB, alpha is dropped."""
    return to_uint8_tensor(image if image.mode == "RGB" else image.convert("RGB")).float() / 255


def bilinear_crop(pixels_B3HW: Tensor, size: int = 224) -> Tensor:
    """Shortest edge to ``size`` (bilinear, antialiased), centre crop: [B, 3, H, W] -> [B, 3, size, size].

    What Flow-GRPO and DiffusionNFT give to CLIPScore: torchvision's Resize(size) and CenterCrop(size) on the float
    tensor. The long axis goes first and is cropped before the short one is resized, so a strip of pixels does not grow
    to a huge image on the way; for upright images the result differs from torchvision's by float rounding.
    """
    height, width = resized_size(pixels_B3HW.shape[-2], pixels_B3HW.shape[-1], size)
    top, left = crop_offset(height, size), crop_offset(width, size)
    pixels = at_least_float32(pixels_B3HW)
    for axis in ("width", "height") if width >= height else ("height", "width"):
        if axis == "width":
            pixels = _interpolate(pixels, (pixels.shape[-2], width), "bilinear")[..., left : left + size]
        else:
            pixels = _interpolate(pixels, (height, pixels.shape[-1]), "bilinear")[..., top : top + size, :]
    return pixels


def fit_and_pad(pixels_B3HW: Tensor, size: int = 224) -> Tensor:
    """Longest side to ``size`` (bicubic, antialiased), black bars around it: [B, 3, H, W] -> [B, 3, size, size].

    HPSv2's evaluation transform on the float tensor: values that overshoot [0, 1] are kept, zeros are padded before
    normalisation, an odd margin has its larger half at the bottom or right. Unlike the reference it also pads an image
    whose longest side is ``size`` already, and a side never shrinks to nothing.
    """
    shape = pixels_B3HW.shape[-2:]
    scale = size / max(shape)
    height, width = (max(1, round(length * scale)) for length in shape)
    resized = _interpolate(at_least_float32(pixels_B3HW), (height, width), "bicubic")
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(resized, (left, size - width - left, top, size - height - top))


def _interpolate(pixels_B3HW: Tensor, shape: tuple[int, int], mode: Literal["bilinear", "bicubic"]) -> Tensor:
    if pixels_B3HW.shape[-2:] == shape:
        return pixels_B3HW
    height, width = shape
    if width == 1:  # torch 2.14 on a CPU mixes up the rows of a single column; it resizes a single row rightly
        lying = F.interpolate(pixels_B3HW.mT.contiguous(), (width, height), mode=mode, antialias=True)
        return lying.mT
    return F.interpolate(pixels_B3HW, shape, mode=mode, align_corners=False, antialias=True)


@dataclass(frozen=True)
class ImagePreprocessing:
    """An exact path and its differentiable twin, both before normalisation; the name is part of the features' key.

    ``exact``: any PIL image -> uint8 or float [3, S, S]. ``twin``: float [B, 3, H, W] in [0, 1] -> float [B, 3, S, S].
    """

    name: str
    exact: Callable[[PILImage.Image], Tensor]
    twin: Callable[[Tensor], Tensor]

    @classmethod
    def bicubic_crop(cls, size: int, rounding: CropRounding = "torchvision") -> ImagePreprocessing:
        """CLIP's own, in PIL; ``rounding="transformers"`` is that of the published image processors."""
        return cls(
            f"clip{size}" if rounding == "torchvision" else f"clip{size}-{rounding}",
            partial(clip_preprocess, size=size, rounding=rounding),
            partial(clip_preprocess_tensor, size=size, rounding=rounding),
        )

    @classmethod
    def on_floats(cls, name: str, function: Callable[[Tensor, int], Tensor], size: int) -> ImagePreprocessing:
        """A path that rounds nothing, :func:`bilinear_crop` or :func:`fit_and_pad`: the twin is the function itself."""

        def exact(image: PILImage.Image) -> Tensor:
            return function(to_float_tensor(image)[None], size)[0]

        def twin(pixels_B3HW: Tensor) -> Tensor:
            return function(pixels_B3HW, size)

        return cls(f"{name}{size}", exact, twin)
