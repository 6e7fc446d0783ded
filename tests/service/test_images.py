"""Untrusted images: what each kind of file becomes, what each bad one is called, and that nothing else can happen."""

from __future__ import annotations

import base64
import io
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from models.base import InputError
from service import image_headers, images
from service.images import ImageError, ImageLimits, decode_base64, decode_image, from_array

WIDTH, HEIGHT = 40, 24
Pixels = NDArray[np.uint8]


def photo(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Pixels:
    """Smooth colour with noise: nothing in it is symmetric, so a wrong turn or a swapped channel shows."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([6 * x, 10 * y, 3 * (x + y)], axis=2)
    noise = np.random.default_rng(seed).integers(0, 8, (height, width, 3))
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def encode(image: Image.Image | Pixels, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def decoded(data: bytes, limits: ImageLimits | None = None) -> Pixels:
    image = decode_image(data, limits).image
    assert image.mode == "RGB"
    return np.asarray(image)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_rows(samples: NDArray[np.integer], depth: int, filtering: int = 0) -> bytes:
    """Filtered scanlines of samples [H, W, C]; filters none, sub and up (PNG specification, section 9)."""
    height = samples.shape[0]
    if depth == 16:
        rows = np.frombuffer(samples.astype(">u2").tobytes(), np.uint8).reshape(height, -1)
    elif depth == 8:
        rows = samples.astype(np.uint8).reshape(height, -1)
    else:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :].reshape(height, -1)
        rows = np.packbits(bits, axis=1)
    step = max(1, samples.shape[2] * depth // 8)
    before = np.zeros_like(rows)
    if filtering == 1:
        before[:, step:] = rows[:, :-step]
    elif filtering == 2:
        before[1:] = rows[:-1]
    filtered = rows - before
    return b"".join(bytes([filtering]) + row.tobytes() for row in filtered)


def png(
    samples: NDArray[np.integer],
    depth: int,
    color: int,
    *,
    extra: bytes = b"",
    filtering: int = 0,
    interlaced: bool = False,
) -> bytes:
    """A PNG of samples [H, W, C] written by hand: Pillow cannot write most of these kinds."""
    height, width, _ = samples.shape
    adam7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    passes = [samples[y::dy, x::dx] for y, x, dy, dx in adam7] if interlaced else [samples]
    body = b"".join(png_rows(part, depth, filtering) for part in passes if part.size)
    ihdr = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    return b"".join(
        [
            image_headers.PNG_MAGIC,
            chunk(b"IHDR", ihdr),
            extra,
            chunk(b"IDAT", zlib.compress(body)),
            chunk(b"IEND", b""),
        ]
    )


def exif(orientation: int, order: str = "<") -> bytes:
    mark = b"II" if order == "<" else b"MM"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + mark + struct.pack(order + "HIH", 42, 8, 1) + entry + struct.pack(order + "I", 0)


def samples_16(channels: int) -> NDArray[np.uint16]:
    return np.random.default_rng(channels).integers(0, 65536, (HEIGHT, WIDTH, channels)).astype(np.uint16)


def over_white(rgb: NDArray[np.integer], alpha: NDArray[np.integer]) -> NDArray[np.float64]:
    weight = alpha[..., None] / 255
    return np.asarray(rgb * weight + 255 * (1 - weight))


# --- what a good image becomes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [bytes, memoryview])
@pytest.mark.parametrize("options", [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_give_their_pixels(options: tuple[str, dict[str, bool]], wrap: Callable[[bytes], bytes]) -> None:
    result = decode_image(wrap(encode(photo(), options[0], **options[1])))
    assert np.array_equal(np.asarray(result.image), photo())
    assert result.warnings == ()
    assert result.image.info == {}


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 75, "progressive": True}),
        ("JPEG", {"quality": 95, "subsampling": 0, "restart_marker_blocks": 1}),
        ("WEBP", {"quality": 80}),
    ],
)
def test_lossy_files_give_what_their_decoder_gives(file_format: str, options: dict[str, int]) -> None:
    data = encode(photo(), file_format, **options)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decoded(data), reference)
    assert np.abs(decoded(data).astype(int) - photo()).mean() < 12


def test_grey_and_palette() -> None:
    grey = photo()[..., 0]
    assert np.array_equal(decoded(encode(grey, "PNG")), np.repeat(grey[..., None], 3, axis=2))
    grey_jpeg = encode(grey, "JPEG", quality=100)
    assert np.ptp(decoded(grey_jpeg), axis=2).max() == 0
    assert np.abs(decoded(grey_jpeg)[..., 0].astype(int) - grey).max() <= 2
    palette = Image.fromarray(photo()).quantize(16)
    assert np.array_equal(decoded(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_of_few_bits_is_stretched_to_the_full_range(depth: int, interlaced: bool) -> None:
    top = 2**depth - 1
    values = np.random.default_rng(depth).integers(0, top + 1, (HEIGHT, WIDTH, 1))
    result = decoded(png(values, depth, 0, interlaced=interlaced))
    assert np.array_equal(result, np.repeat(values * 255 // top, 3, axis=2))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("filtering", [0, 1, 2])
@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3)])
def test_16_bit_samples_are_rounded(color: int, channels: int, filtering: int, interlaced: bool) -> None:
    samples = samples_16(channels)
    expected = np.round(samples / 257).astype(np.uint8)
    result = decoded(png(samples, 16, color, filtering=filtering, interlaced=interlaced))
    assert np.array_equal(result, np.broadcast_to(expected, (HEIGHT, WIDTH, 3)))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("color", "channels"), [(4, 2), (6, 4)])
def test_16_bit_samples_with_alpha_are_rounded_and_put_over_white(color: int, channels: int, interlaced: bool) -> None:
    rounded = np.round(samples_16(channels) / 257)
    expected = over_white(rounded[..., :-1], rounded[..., -1])
    result = decoded(png(samples_16(channels), 16, color, interlaced=interlaced))
    assert np.abs(result - expected).max() <= 0.51


def test_rounding_of_all_65536_values() -> None:
    values = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(images.round_to_8_bit(values), np.round(values / 257))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_alpha_goes_over_white(file_format: str) -> None:
    alpha = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    rgba = np.dstack([photo(), alpha])
    result = decoded(encode(rgba, file_format, **({"lossless": True, "exact": True} if file_format == "WEBP" else {})))
    assert np.abs(result - over_white(photo(), alpha)).max() <= 0.51
    assert (result[0, 0] == 255).all()
    assert (result[-1, -1] == photo()[-1, -1]).all()


def test_alpha_of_grey_and_of_a_palette_goes_over_white() -> None:
    alpha = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    grey = photo()[..., :1]
    result = decoded(png(np.dstack([grey, alpha]), 8, 4))
    assert np.abs(result - over_white(np.repeat(grey, 3, axis=2), alpha)).max() <= 0.51

    colors, alphas = np.array([[255, 0, 0], [0, 99, 0], [0, 0, 255]], np.uint8), np.array([0, 128, 255], np.uint8)
    index = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 1) % 3
    extra = chunk(b"PLTE", colors.tobytes()) + chunk(b"tRNS", alphas[:2].tobytes())
    result = decoded(png(index, 2, 3, extra=extra))
    assert np.abs(result - over_white(colors[index[..., 0]], alphas[index[..., 0]])).max() <= 0.51


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_grey_is_white(depth: int) -> None:
    top = 2**depth - 1
    values = np.random.default_rng(depth).integers(0, top + 1, (HEIGHT, WIDTH, 1))
    key = int(values[3, 5, 0])
    expected = np.repeat(np.round(values * (255 / top)), 3, axis=2)
    expected[values[..., 0] == key] = 255
    assert np.array_equal(decoded(png(values, depth, 0, extra=chunk(b"tRNS", struct.pack(">H", key)))), expected)


@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_colour_is_white_only_where_all_three_samples_match(depth: int) -> None:
    samples = (photo().astype(np.uint16) * 257 + 1) if depth == 16 else photo().astype(np.uint16)
    samples[0, 1, :2] = samples[0, 0, :2]
    samples[0, 1, 2] = samples[0, 0, 2] + 1  # rounds to the same 8 bits at depth 16, and is another colour
    key = tuple(int(value) for value in samples[0, 0])
    result = decoded(png(samples, depth, 2, extra=chunk(b"tRNS", struct.pack(">3H", *key))))
    expected = np.round(samples / 257) if depth == 16 else samples.copy()
    expected[(samples == np.array(key)).all(axis=2)] = 255
    assert np.array_equal(result, expected)
    assert (result[0, 0] == 255).all()
    assert not (result[0, 1] == 255).all()


def test_cmyk_and_ycck_jpeg() -> None:
    data = encode(Image.fromarray(photo()).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decoded(data).astype(int) - photo()).mean() < 4
    adobe = data.index(b"Adobe")
    ycck = data[: adobe + 11] + b"\x02" + data[adobe + 12 :]
    reference = np.asarray(Image.open(io.BytesIO(ycck)).convert("RGB"))
    assert np.array_equal(decoded(ycck), reference)
    assert not np.array_equal(decoded(ycck), decoded(data))


def test_jpeg_that_stores_rgb_keeps_its_colour_transform() -> None:
    data = encode(photo(), "JPEG", quality=95, keep_rgb=True)
    assert np.abs(decoded(data).astype(int) - photo()).mean() < 4


def test_colour_profiles_do_not_change_pixels() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for file_format, options in (("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True})):
        plain = decoded(encode(photo(), file_format, **options))
        assert np.array_equal(decoded(encode(photo(), file_format, icc_profile=profile, **options)), plain)


# --- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_applied(file_format: str, orientation: int) -> None:
    for order in "<>":
        data = encode(photo(), file_format, exif=exif(orientation, order))
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(decoded(data), np.asarray(upright.convert("RGB")))
        assert decode_image(data).image.size == ((WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH))


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0XX*\0\x08\0\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff\0\1",
        exif(0),
        exif(9),
        exif(6)[:-8],
        exif(6).replace(struct.pack("<H", 0x0112), b"\xff\xff"),
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\0" * 40,
    ],
)
def test_damaged_exif_counts_as_none(block: bytes) -> None:
    plain = encode(photo(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    assert np.array_equal(decoded(plain[:2] + segment + plain[2:]), decoded(plain))


@given(st.binary(max_size=80), st.sampled_from([b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", exif(6)[:-8]]))
def test_any_exif_block_gives_an_orientation(noise: bytes, start: bytes) -> None:
    assert image_headers.exif_orientation(start + noise) in range(1, 9)


# --- animations ------------------------------------------------------------------------------------------------------


def test_animated_webp_gives_its_first_frame_and_says_so() -> None:
    frames = [Image.fromarray(photo(seed=seed)).rotate(seed) for seed in (0, 90, 180)]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(decoded(data), photo())
    assert decode_image(data).warnings == ("animated_first_frame",)
    single = encode(frames[0], "WEBP", save_all=True, lossless=True)
    assert decode_image(single).warnings == ()


@pytest.mark.parametrize("default_image", [False, True])
def test_animated_png_gives_the_still_image_and_says_so(default_image: bool) -> None:
    frames = [Image.fromarray(photo(seed=seed)).rotate(seed) for seed in (0, 90, 180)]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=default_image)
    assert b"acTL" in data
    assert np.array_equal(decoded(data), photo())
    assert decode_image(data).warnings == ("animated_first_frame",)


# --- what a bad image is called --------------------------------------------------------------------------------------


def with_size(width: int, height: int) -> bytes:
    """A PNG that claims a size it has no data for."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return image_headers.PNG_MAGIC + chunk(b"IHDR", ihdr) + idat + chunk(b"IEND", b"")


def webp_canvas(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_size(width: int, height: int, precision: int = 8, marker: int = 0xC0) -> bytes:
    data = encode(photo(), "JPEG")
    place = data.index(b"\xff\xc0")
    frame = bytes([0xFF, marker, *data[place + 2 : place + 4], precision]) + struct.pack(">HH", height, width)
    return data[:place] + frame + data[place + 9 :]


def corrupted_idat() -> bytes:
    """Valid checksums around image data that does not inflate."""
    good = encode(photo(), "PNG")
    return good[:33] + chunk(b"IDAT", b"\x78\x9c" + b"\xff" * 50) + chunk(b"IEND", b"")


PNG = encode(photo(), "PNG")
JPEG = encode(photo(), "JPEG")
WEBP = encode(photo(), "WEBP", lossless=True)

BAD = {
    "empty": (b"", "empty_image"),
    "text": (b"this is not an image at all", "not_an_image"),
    "zeros": (bytes(1000), "not_an_image"),
    "magic of half a PNG": (PNG[:5], "not_an_image"),
    "wrong magic": (b"\x00" + PNG[1:], "not_an_image"),
    "RIFF that is sound": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), "not_an_image"),
    "GIF": (encode(photo(), "GIF"), "unsupported_format"),
    "BMP": (encode(photo(), "BMP"), "unsupported_format"),
    "TIFF": (encode(photo(), "TIFF"), "unsupported_format"),
    "ICO": (encode(photo(), "ICO"), "unsupported_format"),
    "JPEG 2000": (encode(photo(), "JPEG2000"), "unsupported_format"),
    "AVIF": (b"\0\0\0\x20ftypavif" + bytes(40), "unsupported_format"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported_format"),
    "1x1 PNG": (encode(photo(1, 1), "PNG"), "image_too_small"),
    "1x1 JPEG": (encode(photo(1, 1), "JPEG"), "image_too_small"),
    "1x1 WebP": (encode(photo(1, 1), "WEBP"), "image_too_small"),
    "0x0 PNG": (with_size(0, 0), "image_too_small"),
    "thin": (encode(photo(300, 15), "PNG"), "image_too_small"),
    "PNG bomb": (with_size(60_000, 60_000), "image_too_many_pixels"),
    "PNG of the largest size": (with_size(2**31 - 1, 2**31 - 1), "image_too_many_pixels"),
    "JPEG bomb": (jpeg_of_size(65_000, 65_000), "image_too_many_pixels"),
    "WebP bomb": (webp_canvas(2**24, 2**24), "image_too_many_pixels"),
    "long PNG": (with_size(100_000, 16), "image_side_too_long"),
    "PNG with too little data": (with_size(512, 512), "corrupt_image"),
    "PNG cut in its data": (PNG[:-40], "truncated_image"),
    "PNG without its end": (PNG[:-12], "truncated_image"),
    "JPEG cut": (JPEG[: len(JPEG) * 2 // 3], "truncated_image"),
    "JPEG cut in its tables": (JPEG[:100], "truncated_image"),
    "WebP cut": (WEBP[:-20], "truncated_image"),
    "PNG with a wrong checksum": (PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], "corrupt_image"),
    "PNG that does not inflate": (corrupted_idat(), "corrupt_image"),
    "PNG without image data": (PNG[:33] + chunk(b"IEND", b""), "corrupt_image"),
    "PNG with two headers": (PNG[:33] + PNG[8:], "corrupt_image"),
    "PNG palette without entries": (png(np.zeros((16, 16, 1)), 8, 3), "corrupt_image"),
    "PNG of an impossible depth": (png(np.zeros((16, 16, 3)), 8, 2).replace(b"\x08\x02", b"\x03\x02"), "corrupt_image"),
    "JPEG without a frame": (JPEG.replace(b"\xff\xc0", b"\xff\xfe"), "corrupt_image"),
    "JPEG with a hole": (JPEG[:20] + b"\0\0" + JPEG[20:], "corrupt_image"),
    "12-bit JPEG": (jpeg_of_size(WIDTH, HEIGHT, precision=12), "unsupported_encoding"),
    "lossless JPEG": (jpeg_of_size(WIDTH, HEIGHT, marker=0xC3), "unsupported_encoding"),
    "WebP with damaged data": (WEBP[:30] + bytes(len(WEBP) - 30), "corrupt_image"),
    "PNG of a hundred thousand chunks": (PNG[:33] + chunk(b"tEXt", b"") * 100_000 + PNG[33:], "unsupported_encoding"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_have_names(name: str) -> None:
    data, code = BAD[name]
    with pytest.raises(ImageError) as raised:
        decode_image(data)
    assert raised.value.code == code
    assert raised.value.message == type(raised.value).text
    assert isinstance(raised.value, InputError)


def test_codes_and_messages_are_distinct() -> None:
    classes = [getattr(images, name) for name in images.__all__]
    errors = [kind for kind in classes if isinstance(kind, type) and issubclass(kind, ImageError)]
    assert len(errors) == 15
    assert len({kind.code for kind in errors}) == len({kind.text for kind in errors}) == len(errors)


def test_caps_hold_at_their_edges() -> None:
    size = len(PNG)
    assert decoded(PNG, ImageLimits(max_bytes=size)).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(images.ImageTooLarge):
        decode_image(PNG, ImageLimits(max_bytes=size - 1))
    assert decoded(PNG, ImageLimits(max_pixels=WIDTH * HEIGHT)).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(images.TooManyPixels):
        decode_image(PNG, ImageLimits(max_pixels=WIDTH * HEIGHT - 1))
    assert decoded(PNG, ImageLimits(min_side=HEIGHT, max_side=WIDTH)).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(images.ImageTooSmall):
        decode_image(PNG, ImageLimits(min_side=HEIGHT + 1))
    with pytest.raises(images.SideTooLong):
        decode_image(PNG, ImageLimits(max_side=WIDTH - 1))


@pytest.mark.parametrize(
    "limits",
    [
        {"max_bytes": 0},
        {"min_side": 0},
        {"min_side": 9, "max_side": 8},
        {"max_pixels": 255},
        {"max_pixels": 100_000_000},
    ],
)
def test_senseless_limits_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"max_bytes|min_side|max_pixels"):
        ImageLimits(**limits)


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_compressed_text_and_profiles_are_never_inflated() -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    extra = chunk(b"zTXt", b"comment\0\0" + bomb) + chunk(b"iTXt", b"comment\0\1\0\0\0" + bomb)
    extra += chunk(b"iCCP", b"profile\0\0" + bomb)
    data = png(photo(), 8, 2, extra=extra * 4)
    assert np.array_equal(decoded(data), photo())
    assert peak_bytes(lambda: decode_image(data)) < 4 * len(data)


def test_image_data_behind_the_last_row_is_never_inflated() -> None:
    rows = png_rows(photo(), 8)
    data = PNG[:33] + chunk(b"IDAT", zlib.compress(rows + bytes(50_000_000), 9)) + chunk(b"IEND", b"")
    assert np.array_equal(decoded(data), photo())
    assert peak_bytes(lambda: decode_image(data)) < 4 * len(data)


def test_a_progressive_jpeg_of_endless_scans_is_refused() -> None:
    data = encode(photo(), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xc4") : -2]
    repeated = [data[:-2] + last_scan * count + b"\xff\xd9" for count in (5, 500)]
    assert decoded(repeated[0]).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(images.UnsupportedEncoding):
        decode_image(repeated[1])


def test_pillow_is_left_as_it_was() -> None:
    decode_image(PNG)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == images._PILLOW_MAX_PIXELS


# --- nothing else can happen -----------------------------------------------------------------------------------------


def fix_checksums(data: bytes) -> bytes:
    """Right checksums for a damaged PNG: without them damage would never reach the decoder."""
    fixed, position = bytearray(data), 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        struct.pack_into(">I", fixed, end - 4, zlib.crc32(data[position + 4 : end - 4]))
        position = end
    return bytes(fixed)


def seeds() -> Iterator[bytes]:
    small = photo(20, 17)
    rgba = np.dstack([small, small[..., :1]])
    index = np.arange(20 * 17).reshape(17, 20, 1) % 3
    palette = chunk(b"PLTE", bytes(range(9))) + chunk(b"tRNS", b"\0\x80")
    frames = [Image.fromarray(photo(20, 17, seed)) for seed in (0, 1)]
    yield encode(small, "PNG", exif=exif(6))
    yield encode(rgba, "PNG")
    yield png(index, 2, 3, extra=palette)
    yield png(small.astype(np.uint16) * 257, 16, 2, extra=chunk(b"tRNS", bytes(6)), interlaced=True)
    yield png(np.dstack([small[..., 0]] * 2).astype(np.uint16) * 257, 16, 4)
    yield encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield encode(small, "JPEG", exif=exif(5))
    yield encode(small, "JPEG", progressive=True)
    yield encode(Image.fromarray(small).convert("CMYK"), "JPEG")
    yield encode(small[..., 0], "JPEG")
    yield encode(small, "WEBP", exif=exif(3))
    yield encode(rgba, "WEBP", lossless=True)
    yield encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])


SEEDS = list(seeds())
SMALL = ImageLimits(max_pixels=500_000)


def decodes_or_raises_image_error(data: bytes) -> str | None:
    """The code of its error, or None; any other exception, and any warning, fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            result = decode_image(data, SMALL)
        except ImageError as error:
            return error.code
    assert result.image.mode == "RGB"
    assert min(result.image.size) >= SMALL.min_side
    assert result.image.width * result.image.height <= SMALL.max_pixels
    return None


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_every_prefix_of_a_file_is_an_error_or_an_image(seed: int) -> None:
    data = SEEDS[seed]
    codes = {length: decodes_or_raises_image_error(data[:length]) for length in range(0, len(data), 2)}
    assert codes[0] == "empty_image"
    assert {"truncated_image", "not_an_image"} <= set(codes.values())
    # A JPEG may lack its end marker and still have all its pixels; nothing else may lack a byte.
    spare = 4 if data.startswith(image_headers.JPEG_MAGIC) else 0
    assert [length for length, code in codes.items() if code is None and length < len(data) - spare] == []


@settings(max_examples=1500, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.one_of(st.none(), st.floats(0, 1)),
    honest_checksums=st.booleans(),
)
@example(seed=SEEDS[0], edits=[(0.0, 0x89)], cut=None, honest_checksums=True)
def test_damaged_files_are_errors_or_images(
    seed: bytes, edits: list[tuple[float, int]], cut: float | None, honest_checksums: bool
) -> None:
    damaged = bytearray(seed)
    for place, value in edits:
        damaged[int(place * len(damaged))] = value
    if cut is not None:
        del damaged[int(cut * len(damaged)) :]
    data = bytes(damaged)
    decodes_or_raises_image_error(fix_checksums(data) if honest_checksums else data)


@settings(max_examples=400, deadline=None)
@given(
    start=st.sampled_from([b"", image_headers.PNG_MAGIC, image_headers.JPEG_MAGIC, b"RIFF\xff\0\0\0WEBPVP8X"]),
    seed=st.sampled_from(SEEDS),
    place=st.floats(0, 1),
    noise=st.binary(min_size=1, max_size=300),
)
def test_noise_is_an_error_or_an_image(start: bytes, seed: bytes, place: float, noise: bytes) -> None:
    decodes_or_raises_image_error(start + noise)
    position = int(place * len(seed))
    decodes_or_raises_image_error(fix_checksums(seed[:position] + noise + seed[position:]))


# --- digests, arrays, base64, threads --------------------------------------------------------------------------------


def test_equal_pixels_have_equal_digests_however_they_were_sent() -> None:
    opaque = Image.fromarray(photo()).convert("RGBA")
    sent = [PNG, WEBP, encode(photo(), "PNG", compress_level=1), encode(opaque, "PNG")]
    digests = {decode_image(data).digest for data in sent} | {from_array(photo()).digest}
    assert len(digests) == 1
    assert len(digests.pop()) == 32


@given(st.integers(0, HEIGHT - 1), st.integers(0, WIDTH - 1), st.integers(0, 2), st.integers(1, 255))
def test_one_changed_sample_changes_the_digest(row: int, column: int, channel: int, change: int) -> None:
    changed = photo()
    changed[row, column, channel] ^= np.uint8(change)
    assert from_array(changed).digest != from_array(photo()).digest


def test_the_shape_is_part_of_the_digest() -> None:
    assert from_array(photo()).digest != from_array(photo().reshape(WIDTH, HEIGHT, 3)).digest


def test_arrays_may_be_read_only_or_strided_and_are_not_kept() -> None:
    array = photo()
    array.flags.writeable = False
    assert np.array_equal(np.asarray(from_array(array).image), photo())
    strided = np.repeat(photo(), 2, axis=1)[::-1, ::2]
    assert np.array_equal(np.asarray(from_array(strided).image), photo()[::-1])
    mine = photo()
    result = from_array(mine)
    mine[:] = 0
    assert np.array_equal(np.asarray(result.image), photo())


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (photo().astype(np.float32), "invalid_image_array"),
        (photo().astype(np.int8), "invalid_image_array"),
        (photo()[..., :2], "invalid_image_array"),
        (photo()[..., 0], "invalid_image_array"),
        (photo().transpose(2, 0, 1), "invalid_image_array"),
        (photo()[None], "invalid_image_array"),
        (photo()[:0], "image_too_small"),
        (photo(1, 1), "image_too_small"),
        (np.broadcast_to(np.uint8(0), (5000, 5000, 3)), "image_too_many_pixels"),
        (np.broadcast_to(np.uint8(0), (16, 9000, 3)), "image_side_too_long"),
    ],
)
def test_wrong_arrays_have_names(array: NDArray[np.generic], code: str) -> None:
    with pytest.raises(ImageError) as raised:
        from_array(array)
    assert raised.value.code == code


def test_base64() -> None:
    assert decode_base64(base64.b64encode(PNG).decode()).digest == from_array(photo()).digest


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "empty_image"),
        ("data:image/png;base64," + base64.b64encode(PNG).decode(), "data_url_refused"),
        ("DATA:,x", "data_url_refused"),
        ("https://example.org/a.png", "invalid_base64"),
        ("file:///etc/hostname", "invalid_base64"),
        ("../../etc/hostname", "invalid_base64"),
        ("/etc/abcdefg", "not_an_image"),
        (base64.b64encode(PNG).decode().rstrip("=") + "=", "invalid_base64"),
        (base64.b64encode(PNG).decode() + "====", "invalid_base64"),
        (base64.encodebytes(PNG).decode(), "invalid_base64"),
        ("\n" + base64.b64encode(PNG).decode() + "\n  ", "invalid_base64"),
        ("Pz8_Pz8_", "invalid_base64"),
        ("ä" * 8, "invalid_base64"),
        ("\ud800" * 8, "invalid_base64"),
        ("iVBOR w0KGgo", "invalid_base64"),
        (base64.b64encode(b"hello world").decode(), "not_an_image"),
    ],
)
def test_text_that_is_not_an_image_has_a_name(text: str, code: str) -> None:
    with pytest.raises(ImageError) as raised:
        decode_base64(text)
    assert raised.value.code == code


def test_base64_is_capped_before_it_is_decoded() -> None:
    limits = ImageLimits(max_bytes=3000)
    text = "!" * 4_000_000  # not base64 either: the cap has to answer first
    with pytest.raises(images.ImageTooLarge):
        decode_base64(text, limits)
    exact = base64.b64encode(PNG).decode()
    assert decode_base64(exact, ImageLimits(max_bytes=len(PNG))).image.size == (WIDTH, HEIGHT)
    with pytest.raises(images.ImageTooLarge):
        decode_base64(exact, ImageLimits(max_bytes=len(PNG) - 1))


def test_threads_do_not_disturb_each_other() -> None:
    def outcome(data: bytes) -> str | None:
        try:
            return decode_image(data).digest
        except ImageError as error:
            return error.code

    files = [*SEEDS, *(data for data, _ in BAD.values() if len(data) < 100_000)]
    alone = [outcome(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(outcome, files * 20))
    assert together == alone * 20
