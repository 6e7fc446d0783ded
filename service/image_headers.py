"""What a PNG, JPEG or WebP file says before a pixel is decoded, and the file without what a score does not need.

Pure functions over untrusted bytes: no Pillow, no allocation larger than the input. Reading the container here, and
not in Pillow, means that sizes are known before any decoder runs, that compressed text and colour profiles (PNG zTXt,
iTXt, iCCP), EXIF, XMP, MPF and Photoshop blocks of PNG and JPEG never reach a parser, and that "cut short" and
"damaged" are told apart by structure and not by the text of an exception.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Literal

from service.image_errors import (
    CorruptImage,
    EmptyImage,
    NotAnImage,
    TruncatedImage,
    UnsupportedEncoding,
    UnsupportedFormat,
)

Format = Literal["PNG", "JPEG", "WEBP"]

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"

MAX_CHUNKS = 16_384
"""Most chunks or segments of one file: walking them costs Python time, and real files of 10 MiB have about 1,300."""
MAX_JPEG_SCANS = 32
"""Most scans of a progressive JPEG: each one costs a pass over all coefficients; encoders write 10 to 20."""


@dataclass(frozen=True)
class Header:
    """What the container says.

    ``width`` and ``height`` are in pixels before orientation; ``orientation`` is EXIF's, 1 to 8; ``payload`` is the
    file for the decoder, without metadata (PNG, JPEG); ``complete`` is whether the end marker is there. ``bit_depth``,
    ``color_type`` and ``color_key`` (tRNS of grey and RGB files: 1 or 3 sample values) are PNG's.
    """

    format: Format
    width: int
    height: int
    payload: bytes
    orientation: int = 1
    animated: bool = False
    complete: bool = True
    bit_depth: int = 8
    color_type: int = 2
    color_key: tuple[int, ...] = ()


def read_header(data: bytes) -> Header:
    """Read the container of a whole file; raises :class:`ImageError`."""
    if not data:
        raise EmptyImage
    if data.startswith(PNG_MAGIC):
        return _read_png(data)
    if data.startswith(JPEG_MAGIC):
        return _read_jpeg(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _read_webp(data)
    raise UnsupportedFormat if _is_known_format(data) else NotAnImage


def _is_known_format(data: bytes) -> bool:
    """Whether this is a GIF, BMP, TIFF, SVG ...: an image, or a document of one, that is recognised but not taken."""
    signatures = (
        *(b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*", b"%PDF-", b"%!PS", b"8BPS", b"\x00\x00\x01\x00"),
        *(b"\xff\x0a", b"\x00\x00\x00\x0cJXL ", b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51", b"qoif", b"DDS "),
    )
    if data.startswith(signatures) or data[4:8] == b"ftyp":
        return True
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith(b"<svg") or (head.startswith((b"<?xml", b"<!--", b"<!doctype")) and b"<svg" in head)


# --- PNG (W3C PNG Specification, third edition) ----------------------------------------------------------------------

_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def _read_png(data: bytes) -> Header:
    """Walk the chunks, check the checksums of those that matter and keep only them."""
    kept: dict[bytes, list[memoryview]] = {}
    metadata: dict[bytes, memoryview] = {}
    view = memoryview(data)
    position, chunks, kind = len(PNG_MAGIC), 0, b""
    while kind != b"IEND":
        if position + 8 > len(data):
            raise TruncatedImage
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if not kind.isalpha() or length >= 2**31 or (chunks == 0) != (kind == b"IHDR"):
            raise CorruptImage
        if end > len(data):
            raise TruncatedImage
        chunks += 1
        if chunks > MAX_CHUNKS:
            raise UnsupportedEncoding
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"):
            if zlib.crc32(view[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
                raise CorruptImage
            kept.setdefault(kind, []).append(view[position:end])
        elif kind[0] & 0x20 == 0:  # an unknown chunk that says it is critical
            raise UnsupportedEncoding
        elif kind in (b"eXIf", b"acTL", b"fcTL") and (kind == b"eXIf" or b"IDAT" not in kept):
            metadata.setdefault(kind, view[position + 8 : end - 4])
        position = end
    return _png_header(kept, metadata)


def _png_header(kept: dict[bytes, list[memoryview]], metadata: dict[bytes, memoryview]) -> Header:
    ihdr = kept[b"IHDR"][0]
    if len(ihdr) != 12 + 13 or b"IDAT" not in kept:
        raise CorruptImage
    width, height, depth, color, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", ihdr, 8)
    if depth not in _PNG_DEPTHS.get(color, ()) or compression or filtering or interlace > 1:
        raise CorruptImage
    palette = kept.get(b"PLTE", []) if color == 3 else []
    transparency = kept.get(b"tRNS", [])
    if len(transparency) > 1 or (color == 3 and not _is_palette(palette)):
        raise CorruptImage
    color_key: tuple[int, ...] = ()
    if transparency and color in (0, 2):
        samples = 1 if color == 0 else 3
        if len(transparency[0]) != 12 + 2 * samples:
            raise CorruptImage
        color_key = struct.unpack_from(f">{samples}H", transparency[0], 8)
    elif transparency and color == 3 and not 1 <= len(transparency[0]) - 12 <= 256:
        raise CorruptImage
    alpha_of_palette = transparency if color == 3 else []
    parts: list[bytes | memoryview] = [PNG_MAGIC, ihdr, *palette, *alpha_of_palette, *kept[b"IDAT"], kept[b"IEND"][0]]
    # An animation whose IDAT image is not one of its frames (no fcTL before IDAT) has that default image beside them.
    control = metadata.get(b"acTL", memoryview(b""))
    frames = int.from_bytes(control[:4], "big") + (b"fcTL" not in metadata) if len(control) == 8 else 1
    orientation = exif_orientation(metadata[b"eXIf"]) if b"eXIf" in metadata else 1
    return Header(
        *("PNG", width, height, b"".join(parts), orientation, frames > 1),
        bit_depth=depth,
        color_type=color,
        color_key=color_key,
    )


def _is_palette(chunks: list[memoryview]) -> bool:
    """Exactly one PLTE with 1 to 256 RGB entries."""
    return len(chunks) == 1 and 1 <= len(chunks[0]) // 3 - 4 <= 256 and len(chunks[0]) % 3 == 0


# --- JPEG (ITU-T T.81, annex B) --------------------------------------------------------------------------------------

_SOF_ACCEPTED = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # baseline, extended, progressive; with Huffman or arithmetic coding
_SOF_ALL = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))


def _read_jpeg(data: bytes) -> Header:
    """Walk the segments up to the first scan; keep the tables, JFIF and Adobe (they decide the colour transform)."""
    view = memoryview(data)
    kept: list[memoryview] = [view[:2]]
    size: tuple[int, int] | None = None
    orientation = 0
    position = 2
    for _ in range(MAX_CHUNKS):
        marker, start = _next_marker(data, position)
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # TEM, RSTn: markers without a segment
            position = start
            continue
        if start + 2 > len(data):
            raise TruncatedImage
        end = start + int.from_bytes(data[start : start + 2], "big")
        if marker in (0x00, 0xD8, 0xD9) or end < start + 2:
            raise CorruptImage
        if end > len(data):
            raise TruncatedImage
        body = data[start + 2 : end]
        if marker in _SOF_ALL:
            if size is not None:
                raise CorruptImage
            size = _frame_size(marker, body)
        if marker == 0xDA:
            if size is None:
                raise CorruptImage
            return _jpeg_header(kept, data[start - 2 :], size, orientation or 1)
        if marker == 0xE1 and not orientation and body[:6] == b"Exif\0\0":
            orientation = exif_orientation(body)
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        decides_colour = (marker, body[:5]) in ((0xE0, b"JFIF\0"), (0xEE, b"Adobe"))
        if decides_colour or not is_metadata:
            kept.append(view[start - 2 : end])
        position = end
    raise UnsupportedEncoding


def _next_marker(data: bytes, position: int) -> tuple[int, int]:
    """The marker at ``position``, after at most 16 fill bytes, and the position behind it."""
    for place in range(position + 1, position + 18):
        if place >= len(data):
            raise TruncatedImage
        if data[place - 1] != 0xFF:
            raise CorruptImage
        if data[place] != 0xFF:
            return data[place], place + 1
    raise CorruptImage


def _frame_size(marker: int, body: bytes) -> tuple[int, int]:
    if len(body) < 6:
        raise CorruptImage
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    # Height 0 means that the scan tells it (DNL), which no decoder here supports; 12 bits and lossless are rare.
    if marker not in _SOF_ACCEPTED or precision != 8 or components not in (1, 3, 4) or height == 0:
        raise UnsupportedEncoding
    return width, height


def _jpeg_header(kept: list[memoryview], scans: bytes, size: tuple[int, int], orientation: int) -> Header:
    # In entropy-coded data 0xFF is followed by 0 or a restart marker, so these two bytes are a scan's start.
    if scans.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise UnsupportedEncoding
    return Header("JPEG", *size, b"".join([*kept, scans]), orientation, complete=b"\xff\xd9" in scans)


# --- WebP (RFC 9649) -------------------------------------------------------------------------------------------------


def _read_webp(data: bytes) -> Header:
    """Walk the RIFF chunks. The file goes to libwebp as it is, without what follows the RIFF container."""
    total = 8 + int.from_bytes(data[4:8], "little")
    if total > len(data) or len(data) < 30:
        raise TruncatedImage
    size, orientation, frames = _webp_size(data), 0, 0
    position = 12
    for _ in range(MAX_CHUNKS):
        if position + 8 > total:
            return Header("WEBP", *size, data[:total], orientation or 1, frames > 1)
        kind, length = struct.unpack_from("<4sI", data, position)
        body, position = position + 8, position + 8 + length + length % 2
        if body + length > total:
            raise CorruptImage
        frames += kind == b"ANMF"
        if kind == b"EXIF" and not orientation:
            orientation = exif_orientation(memoryview(data)[body : body + length])
    raise UnsupportedEncoding


def _webp_size(data: bytes) -> tuple[int, int]:
    """The canvas of the first chunk, which is VP8 (lossy), VP8L (lossless) or VP8X (extended)."""
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    raise CorruptImage


# --- EXIF ------------------------------------------------------------------------------------------------------------


def exif_orientation(exif: bytes | memoryview) -> int:
    """Orientation (tag 0x0112 of the first directory), 1 to 8; 1 where the block is damaged or says nothing of it."""
    tiff = bytes(exif[6:] if exif[:6] == b"Exif\0\0" else exif)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    magic, offset = struct.unpack_from(order + "HI", tiff, 2)
    if magic != 42 or offset + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, offset)
    last = min(offset + 2 + 12 * entries, len(tiff) - 11)
    for entry in range(offset + 2, last, 12):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == 0x0112:
            return value if kind == 3 and count == 1 and 1 <= value <= 8 else 1
    return 1
