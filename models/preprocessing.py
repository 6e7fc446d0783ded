"""CLIP's image preprocessing: the exact path with PIL, and its differentiable twin in torch.

The exact path is what CLIP-like rewards were trained and published with: RGB, shortest edge to S by PIL's bicubic,
centre crop SxS. PIL resizes horizontally and then vertically, rounds to 8 bit after each pass, and cuts off what
overshoots 0 or 255. The twin does the same in floating point, cuts off the same, and does not round, since rounding
has no gradient.

Measured on the eight images of tests/fixtures at S = 224, twin against exact path in 8-bit levels: at most 1.06, on
average 0.26 to 0.30 (two roundings alone give about that). Cutting off once after both passes instead of after each
would be up to 11.5 levels off.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def to_uint8_tensor(image: PILImage.Image) -> Tensor:
    """The pixels of an RGB image as uint8 [3, H, W] in memory of its own."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def clip_preprocess(image: PILImage.Image, size: int = 224, rounding: CropRounding = "torchvision") -> Tensor:
    """The exact path: RGB conversion, shortest edge to ``size`` (bicubic), centre crop -> uint8 [3, size, size].

    Alpha is dropped, as CLIP's own code does; the service lays images over white before.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    height, width = resized_size(image.height, image.width, size)
    top, left = crop_offset(height, size, rounding), crop_offset(width, size, rounding)
    image = image.resize((width, height), PILImage.Resampling.BICUBIC)
    return to_uint8_tensor(image.crop((left, top, left + size, top + size)))


def clip_preprocess_tensor(pixels_B3HW: Tensor, size: int = 224, rounding: CropRounding = "torchvision") -> Tensor:
    """Differentiable twin of :func:`clip_preprocess`: float [B, 3, H, W] in [0, 1] -> float32 [B, 3, size, size].

    The result is in [0, 1] and not yet normalised. Gradients are those of the function itself: finite differences
    agree with them. Where a resized value overshoots [0, 1] it is cut off, and has no gradient.
    """
    height, width = resized_size(pixels_B3HW.shape[-2], pixels_B3HW.shape[-1], size)
    top, left = crop_offset(height, size, rounding), crop_offset(width, size, rounding)
    resized = pixels_B3HW.float()
    # One axis after the other, because PIL cuts off between the passes.
    for shape in ((resized.shape[-2], width), (height, width)):
        if resized.shape[-2:] != shape:
            resized = F.interpolate(resized, shape, mode="bicubic", align_corners=False, antialias=True)
            resized = resized.clamp(-_CLAMP_SLACK, 1 + _CLAMP_SLACK)
    return resized[..., top : top + size, left : left + size]


def normalize(
    pixels_B3SS: Tensor,
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(x - mean) / std per channel, computed in float32 and cast to ``dtype`` once at the end.

    ``pixels_B3SS`` are uint8 in [0, 255] or floating point in [0, 1]; other dtypes raise TypeError.
    """
    if pixels_B3SS.dtype == torch.uint8:
        pixels = pixels_B3SS.float() / 255
    elif pixels_B3SS.is_floating_point():
        pixels = pixels_B3SS.float()
    else:
        raise TypeError(f"pixels are uint8 or floating point, not {pixels_B3SS.dtype}")
    return ((pixels - _per_channel(mean, pixels.device)) / _per_channel(std, pixels.device)).to(dtype)


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
