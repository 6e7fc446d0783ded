"""Untrusted bytes -> validated RGB image. Every cap on an image lives here.

PNG, JPEG and WebP only, named by their first bytes. What an image becomes:

- 8-bit RGB. Grey, palette, 1-bit and CMYK are converted; 16-bit samples are rounded to 8 bits (v / 257).
- EXIF orientation is applied; a damaged EXIF block counts as none.
- Alpha, in all its forms, is composited over white.
- Colour profiles and gamma are ignored: reward models were trained on samples read as sRGB without management.
- Of an animation the first frame is used and the warning ``animated_first_frame`` is given. Of an APNG that is the
  image that every still viewer shows, also where that default image is not part of the animation.

No function here takes a URL or a path: text is base64, or refused. All are pure and may be called from any thread.
"""

from __future__ import annotations

import binascii
import hashlib
import struct
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.Image import Transpose

from models.base import InputError
from service.image_errors import (
    CorruptImage,
    DataUrlRefused,
    EmptyImage,
    ImageError,
    ImageOutOfMemory,
    ImageTooLarge,
    ImageTooSmall,
    InvalidArray,
    InvalidBase64,
    NotAnImage,
    SideTooLong,
    TooManyPixels,
    TruncatedImage,
    UnsupportedEncoding,
    UnsupportedFormat,
)
from service.image_headers import Header, read_header

__all__ = [
    "CorruptImage",
    "DataUrlRefused",
    "DecodedImage",
    "EmptyImage",
    "ImageError",
    "ImageLimits",
    "ImageOutOfMemory",
    "ImageTooLarge",
    "ImageTooSmall",
    "InvalidArray",
    "InvalidBase64",
    "NotAnImage",
    "SideTooLong",
    "TooManyPixels",
    "TruncatedImage",
    "UnsupportedEncoding",
    "UnsupportedFormat",
    "decode_base64",
    "decode_image",
    "from_array",
]

ANIMATED_FIRST_FRAME = "animated_first_frame"

_PILLOW_MAX_PIXELS = 89_478_485
"""Pillow's own warning level: above it a second, process-wide cap would answer in place of ours."""

_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageLimits:
    """Caps on one image: encoded bytes, pixels (width * height), and sides in pixels. Raises ValueError if senseless.

    ``min_side`` and ``max_side`` together bound the aspect ratio, and with it what a "resize the shorter side"
    preprocessing can blow an image up to.
    """

    max_bytes: int = 10 * 2**20
    max_pixels: int = 16_777_216
    min_side: int = 16
    max_side: int = 8192

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes is at least 1, not {self.max_bytes}")
        if not 1 <= self.min_side <= self.max_side:
            raise ValueError(f"1 <= min_side <= max_side, not {self.min_side} and {self.max_side}")
        if not self.min_side**2 <= self.max_pixels <= _PILLOW_MAX_PIXELS:
            raise ValueError(f"max_pixels is from min_side**2 to {_PILLOW_MAX_PIXELS}, not {self.max_pixels}")

    def check_bytes(self, size: int) -> None:
        """Raise :class:`EmptyImage` or :class:`ImageTooLarge` for an encoded image of ``size`` bytes."""
        if size == 0:
            raise EmptyImage
        if size > self.max_bytes:
            raise ImageTooLarge

    def check_size(self, width: int, height: int) -> None:
        """Raise :class:`ImageTooSmall`, :class:`SideTooLong` or :class:`TooManyPixels` for a size in pixels."""
        if min(width, height) < self.min_side:
            raise ImageTooSmall
        if width * height > self.max_pixels:
            raise TooManyPixels
        if max(width, height) > self.max_side:
            raise SideTooLong


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An upright 8-bit RGB image; equal ``digest`` means equal size and pixels, whatever they were sent as."""

    image: Image.Image
    digest: str
    warnings: tuple[str, ...] = ()


def decode_image(data: bytes | memoryview, limits: ImageLimits | None = None) -> DecodedImage:
    """Decode one untrusted PNG, JPEG or WebP file.

    ``limits`` defaults to ``ImageLimits()``. Sizes are checked against the header before any pixel is decoded. Raises
    :class:`ImageError` and nothing else, whatever the bytes are. What a JPEG decoder fills in silently (damaged
    coefficients, scans cut short but closed by an end marker) cannot be seen here: JPEG has no checksums.
    """
    limits = limits or ImageLimits()
    limits.check_bytes(len(data) if isinstance(data, bytes) else data.nbytes)
    header = read_header(bytes(data))
    limits.check_size(header.width, header.height)
    try:
        image = _render(header)
    except MemoryError as error:
        raise ImageOutOfMemory from error
    except Exception as error:
        # Pillow and the libraries below it raise what they like on hostile bytes; only their calls are in _render.
        raise (CorruptImage if header.complete else TruncatedImage) from error
    warnings = (ANIMATED_FIRST_FRAME,) if header.animated else ()
    return DecodedImage(image, _digest(image.size, image.tobytes()), warnings)


def decode_base64(text: str, limits: ImageLimits | None = None) -> DecodedImage:
    """Decode one image sent as text: standard padded base64, no line breaks. Raises :class:`ImageError`.

    A ``data:`` URL has its own error, as the likeliest mistake; any other URL, and a path, is not base64 of an image.
    """
    limits = limits or ImageLimits()
    if text[:5].lower() == "data:":
        raise DataUrlRefused
    if len(text) % 4:
        raise InvalidBase64
    limits.check_bytes(len(text) // 4 * 3 - text[-2:].count("="))
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:  # binascii.Error, or a character outside ASCII
        raise InvalidBase64 from error
    return decode_image(data, limits)


def from_array(array: NDArray[Any], limits: ImageLimits | None = None) -> DecodedImage:
    """An image that came as a uint8 array [height, width, 3], RGB; it may be read-only and is not kept.

    Pillow stores RGB in four bytes a pixel, so one repacking copy in C remains; an array that is contiguous is not
    copied otherwise. Raises :class:`ImageError`.
    """
    limits = limits or ImageLimits()
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise InvalidArray
    height, width, _ = array.shape
    limits.check_size(width, height)
    pixels = np.ascontiguousarray(array)
    image = Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
    return DecodedImage(image, _digest((width, height), pixels.data))


def checked_pixels(array: NDArray[Any], limits: ImageLimits) -> NDArray[np.float32]:
    """A copy of float32 [3, H, W] pixels in [0, 1]; raises InputError for anything else."""
    if array.dtype != np.float32 or array.ndim != 3 or array.shape[0] != 3:
        raise InputError("a gradient wants float32 pixels of shape [3, H, W]", code="invalid_image_array")
    limits.check_size(array.shape[2], array.shape[1])
    if not np.isfinite(array).all():
        raise InputError("the pixels hold numbers that are not finite", code="pixels_not_finite")
    if array.min() < 0 or array.max() > 1:
        raise InputError("the pixels are not within [0, 1]", code="pixels_out_of_range")
    return np.array(array, dtype=np.float32)


def from_pixels(array: NDArray[Any], limits: ImageLimits) -> DecodedImage:
    """An image that came as float32 [3, H, W] pixels in [0, 1], rounded to 8 bits; raises InputError."""
    rounded = np.rint(checked_pixels(array, limits).transpose(1, 2, 0) * 255).astype(np.uint8)
    return from_array(rounded, limits)


def _digest(size: tuple[int, int], pixels: bytes | memoryview) -> str:
    """sha256 (cut to 128 bits) over the size and the RGB bytes: equal for equal pixels, however they were encoded.

    Processors with SHA instructions hash a 512x512 image in half the time of blake2b.
    """
    hasher = hashlib.sha256(b"rgb-image" + struct.pack(">II", *size))
    hasher.update(pixels)
    return hasher.hexdigest()[:32]


def _render(header: Header) -> Image.Image:
    """Decode, convert to RGB over white, and turn upright. Raises whatever Pillow raises."""
    image = _render_16_bit(header) if header.bit_depth == 16 else _render_8_bit(header)
    if header.orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[header.orientation])
    return image


def _open(header: Header) -> ImageFile.ImageFile:
    image = Image.open(BytesIO(header.payload), formats=(header.format,))
    if image.size != (header.width, header.height):  # the caps were checked against the header's size
        raise ValueError(f"the decoder sees {image.size}, the header {header.width} x {header.height}")
    return image


def _render_8_bit(header: Header) -> Image.Image:
    with _open(header) as image:
        if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
            return _over_white(image.convert("RGBA"))
        rgb = image.convert("RGB")
    rgb.info = {}
    if header.color_key:
        # A key of grey is on the scale of the file's samples; Pillow has stretched 1, 2 and 4 bits to 8.
        scale = 255 // (2**header.bit_depth - 1) if header.color_type == 0 else 1
        pixels = np.array(rgb)
        pixels[_equals_key(pixels, tuple(scale * value for value in header.color_key))] = 255
        return Image.fromarray(pixels)
    return rgb


def _render_16_bit(header: Header) -> Image.Image:
    """Round 16-bit samples to 8 bits as v / 257, which Pillow does not do (it drops the low byte, or clips)."""
    if header.color_type == 0:
        samples = _load_as(header, "I;16B").astype(np.uint16)[..., None]
    elif header.color_type == 4:
        # Two 16-bit samples a pixel are as many bytes as RGBA of 8 bits, so the decoder gives them all in one pass.
        planes = _load_as(header, "RGBA")
        samples = _join_bytes(planes[..., 0::2], planes[..., 1::2])
    else:
        # Pillow's raw modes give the first (;16B) or the second (;16L) byte of each sample: high and low in a PNG.
        mode = "RGB" if header.color_type == 2 else "RGBA"
        samples = _join_bytes(_load_as(header, f"{mode};16B"), _load_as(header, f"{mode};16L"))
    pixels = round_to_8_bit(samples)
    if header.color_key:
        pixels[_equals_key(samples, header.color_key)] = 255
    if header.color_type in (0, 4):
        grey = np.repeat(pixels[..., :1], 3, axis=2)
        pixels = np.concatenate([grey, pixels[..., 1:]], axis=2)
    image = Image.fromarray(pixels)
    return _over_white(image) if image.mode == "RGBA" else image


def _load_as(header: Header, raw_mode: str) -> NDArray[Any]:
    """The pixels of a PNG, unpacked as ``raw_mode`` in place of the raw mode that Pillow chose."""
    with _open(header) as image:
        image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        return np.asarray(image)


def _join_bytes(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint16]:
    samples = high.astype(np.uint16)
    samples <<= 8
    samples |= low
    return samples


def round_to_8_bit(samples: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """round(v / 257) of 16-bit samples; all in 16 bits, so that a large image needs no wider copy."""
    quotient = samples // 257
    return (quotient + (samples - quotient * 257 > 128)).astype(np.uint8)


def _equals_key(samples: NDArray[Any], key: tuple[int, ...]) -> NDArray[np.bool_]:
    """Where all samples [H, W, C] of a pixel equal the transparent colour: bool [H, W]."""
    return np.asarray((samples == np.asarray(key)).all(axis=2))


def _over_white(rgba: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", rgba.size, (255, 255, 255))
    canvas.paste(rgba, (0, 0), rgba)
    return canvas
