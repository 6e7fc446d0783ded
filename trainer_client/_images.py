"""Images of PIL, numpy or torch -> the arrays that travel. One conversion and one rounding for the whole package.

Layouts: PIL of any 8-bit mode (EXIF orientation applied, alpha over white) or 16-bit grey. numpy [H, W, 3] if the last
axis has 3 or 1 entries, else [3, H, W], or grey [H, W]; torch [3, H, W], [1, H, W] or grey [H, W]. Integer images are
uint8 (or bool: True is white), float images lie in [0, 1].
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

RANGE_TOLERANCE = 1e-3
"""How far a float image may leave [0, 1] and still be clipped; further out it was scaled differently."""


@runtime_checkable
class TensorLike(Protocol):
    """A torch tensor, known by what it can do: this package never imports torch."""

    def detach(self) -> Any: ...

    def cpu(self) -> Any: ...


ImageLike: TypeAlias = Image.Image | npt.NDArray[Any] | TensorLike
"""A PIL image, a numpy array or a torch tensor."""
Bytes_HW3: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]


def to_uint8(image: ImageLike) -> Bytes_HW3:
    """uint8 [H, W, 3], C-contiguous and the caller's to keep; floats are rounded: round(x * 255), half to even.

    Raises TypeError for what is no image, ValueError for a wrong shape, range or a value that is not finite.
    """
    array_HW3 = _to_hw3(image)
    if array_HW3.dtype != np.uint8:
        scaled = _unit_range(array_HW3)
        scaled *= np.float32(255)
        array_HW3 = np.rint(scaled, out=scaled).astype(np.uint8)
    if array_HW3.flags.c_contiguous:
        return array_HW3.copy()
    # channel by channel: numpy copies [3, H, W] into [H, W, 3] four times slower in one go
    interleaved = np.empty(array_HW3.shape, np.uint8)
    for channel in range(3):
        interleaved[:, :, channel] = array_HW3[:, :, channel]
    return interleaved


def to_float32(image: ImageLike) -> Floats:
    """float32 [3, H, W] in [0, 1], C-contiguous and the caller's to keep; uint8 is divided by 255.

    Raises as :func:`to_uint8` does.
    """
    array_HW3 = _to_hw3(image)
    values = array_HW3 / np.float32(255) if array_HW3.dtype == np.uint8 else _unit_range(array_HW3)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def to_base64_png(array_HW3: Bytes_HW3) -> str:
    """Base64 of a (lossless) PNG of a uint8 [H, W, 3] array."""
    buffer = io.BytesIO()
    Image.fromarray(array_HW3).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def iterate_images(images: Any) -> Iterator[ImageLike]:
    """The images of a sequence, or of a batch array or tensor [B, ...]; a lone image raises TypeError."""
    if isinstance(images, Image.Image) or getattr(images, "ndim", 4) != 4:
        raise TypeError("images is one image where a sequence of images, or a batch with 4 axes, is needed")
    return iter(images)


def _to_hw3(image: ImageLike) -> npt.NDArray[Any]:
    """uint8 or float32 [H, W, 3], perhaps a view."""
    if isinstance(image, Image.Image):
        return _pil_to_hw3(image)
    if isinstance(image, np.ndarray):
        return _layout(_known_dtype(image), channels_first=False)
    if isinstance(image, TensorLike):
        return _layout(_known_dtype(_tensor_to_numpy(image)), channels_first=True)
    raise TypeError(f"an image is a PIL image, a numpy array or a torch tensor, not {type(image).__name__}")


def _pil_to_hw3(image: Image.Image) -> npt.NDArray[np.uint8]:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        grey_HW = np.rint(np.asarray(image).astype(np.float32) / np.float32(257)).astype(np.uint8)
        return _layout(grey_HW, channels_first=False)
    if image.mode in ("I", "F"):
        raise ValueError(f"a PIL image of mode {image.mode} has no fixed range; convert it to RGB or L first")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return np.asarray(image.convert("RGB"))


def _tensor_to_numpy(tensor: TensorLike) -> npt.NDArray[Any]:
    local: Any = tensor.detach().cpu()
    # numpy knows no bfloat16; every float that a tensor can hold at lower precision is exact in float32.
    converted: npt.NDArray[Any] = (local.float() if local.is_floating_point() else local).numpy()
    return converted


def _known_dtype(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(array.dtype, np.floating):
        return array.astype(np.float32)
    raise ValueError(f"an image array is uint8 or float in [0, 1], not {array.dtype}")


def _layout(array: npt.NDArray[Any], *, channels_first: bool) -> npt.NDArray[Any]:
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3 and not channels_first and shape[2] in (1, 3):
        pass
    elif array.ndim == 3 and shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    else:
        expected = "[3, H, W]" if channels_first else "[H, W, 3] or [3, H, W]"
        raise ValueError(f"an image is {expected} or grey [H, W], not {list(shape)}")
    if array.size == 0:
        raise ValueError(f"an image of shape {list(shape)} has no pixels")
    return np.broadcast_to(array, (*array.shape[:2], 3))


def _unit_range(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A new array, clipped to [0, 1]."""
    low, high = float(values.min()), float(values.max())
    # written so that NaN, which compares as false, is refused too
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(
            f"float images lie in [0, 1]; this one spans [{low:g}, {high:g}] "
            "(from [-1, 1]: (x + 1) / 2; from [0, 255]: make it uint8; then clip)"
        )
    clipped: npt.NDArray[Any] = np.clip(values, 0, 1)
    return clipped
