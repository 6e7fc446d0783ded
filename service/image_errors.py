"""What can be wrong with an image: typed errors with a fixed code and message each.

ImageError                        (models.base.InputError) this image cannot be used; code and message are fixed
├── EmptyImage                    empty_image
├── NotAnImage                    not_an_image
├── UnsupportedFormat             unsupported_format
├── UnsupportedEncoding           unsupported_encoding
├── ImageTooLarge                 image_too_large_bytes
├── TooManyPixels                 image_too_many_pixels
├── SideTooLong                   image_side_too_long
├── ImageTooSmall                 image_too_small
├── TruncatedImage                truncated_image
├── CorruptImage                  corrupt_image
├── ImageOutOfMemory              image_out_of_memory
├── InvalidBase64                 invalid_base64
│   └── DataUrlRefused            data_url_refused
└── InvalidArray                  invalid_image_array
"""

from __future__ import annotations

from typing import ClassVar

from models.base import InputError


class ImageError(InputError):
    """This image cannot be used. Subclasses fix ``code`` and ``text``; neither ever holds an exception's words."""

    code = "invalid_image"
    text: ClassVar[str] = "the image cannot be used"

    def __init__(self) -> None:
        super().__init__(self.text)


class EmptyImage(ImageError):
    code = "empty_image"
    text = "the image has no bytes"


class NotAnImage(ImageError):
    code = "not_an_image"
    text = "the bytes are not a PNG, JPEG or WebP image"


class UnsupportedFormat(ImageError):
    code = "unsupported_format"
    text = "the image is in a format that is not accepted; send PNG, JPEG or WebP"


class UnsupportedEncoding(ImageError):
    code = "unsupported_encoding"
    text = "the image is a PNG, JPEG or WebP of a kind that is not accepted; save it again with common settings"


class ImageTooLarge(ImageError):
    code = "image_too_large_bytes"
    text = "the encoded image has more bytes than the service accepts"


class TooManyPixels(ImageError):
    code = "image_too_many_pixels"
    text = "the image has more pixels than the service accepts"


class SideTooLong(ImageError):
    code = "image_side_too_long"
    text = "the image is wider or higher than the service accepts"


class ImageTooSmall(ImageError):
    code = "image_too_small"
    text = "the image is smaller than the service accepts"


class TruncatedImage(ImageError):
    code = "truncated_image"
    text = "the image ends before its data does"


class CorruptImage(ImageError):
    code = "corrupt_image"
    text = "the image is damaged and cannot be decoded"


class ImageOutOfMemory(ImageError):
    code = "image_out_of_memory"
    text = "there was not enough memory to decode the image"


class InvalidBase64(ImageError):
    code = "invalid_base64"
    text = "an image in JSON is plain base64 (padded, standard alphabet, no line breaks), never a URL or a path"


class DataUrlRefused(InvalidBase64):
    code = "data_url_refused"
    text = "a data: URL is not accepted; send only the base64 after its comma"


class InvalidArray(ImageError):
    code = "invalid_image_array"
    text = "an image tensor is uint8 of shape [height, width, 3]"
