"""One picture is one array, whichever library holds it."""

from __future__ import annotations

import base64
import io

import hypothesis.extra.numpy as numpy_strategies
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer_client._images import to_base64_png, to_float32, to_uint8

SHAPES = st.tuples(st.integers(4, 12), st.integers(4, 12), st.just(3))
BYTES = numpy_strategies.arrays(np.uint8, SHAPES)
FLOATS = numpy_strategies.arrays(np.float32, SHAPES, elements=st.floats(0, 1, width=32))


@given(BYTES)
def test_every_holder_of_the_same_bytes_gives_the_same_array(pixels):
    chw = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    for image in (
        pixels,
        chw,
        Image.fromarray(pixels),
        torch.from_numpy(chw),
        pixels / np.float32(255),
        pixels / 255.0,
    ):
        array = to_uint8(image)
        np.testing.assert_array_equal(array, pixels)
        assert array.flags.c_contiguous
        assert array.flags.owndata
    for image in (pixels, Image.fromarray(pixels), torch.from_numpy(chw), torch.from_numpy(chw) / 255):
        floats = to_float32(image)
        assert (floats.dtype, floats.shape) == (np.float32, chw.shape)
        np.testing.assert_array_equal(floats, chw / np.float32(255))


@given(FLOATS)
def test_floats_are_rounded_and_not_truncated(values):
    chw = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
    expected = (chw * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(to_uint8(chw), expected)
    np.testing.assert_array_equal(to_uint8(chw.requires_grad_() * 1), expected)
    np.testing.assert_array_equal(to_uint8(values), expected)
    assert np.abs(to_uint8(values) / 255 - values).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_array_equal(to_float32(chw), chw.detach().numpy())


@given(BYTES)
def test_the_png_of_an_array_is_the_array(pixels):
    decoded = Image.open(io.BytesIO(base64.b64decode(to_base64_png(pixels), validate=True)))
    np.testing.assert_array_equal(np.asarray(decoded), pixels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torch_floats_of_any_precision(dtype):
    tensor = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = (tensor.float() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(to_uint8(tensor), expected)


def test_layout_is_settled_by_the_kind_where_the_shape_leaves_it_open():
    values = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    np.testing.assert_array_equal(to_uint8(values), values)
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(values)), values.transpose(1, 2, 0))
    grey = values[0]
    for image in (grey, grey[:, :, None], torch.from_numpy(grey), torch.from_numpy(grey[None]), Image.fromarray(grey)):
        np.testing.assert_array_equal(to_uint8(image), np.repeat(grey[:, :, None], 3, axis=2))


def test_the_result_is_the_callers_to_keep():
    pixels = np.zeros((4, 4, 3), np.uint8)
    kept = to_uint8(pixels)
    floats = np.zeros((3, 4, 4), np.float32)
    kept_floats = to_float32(floats)
    pixels[:] = 9
    floats[:] = 0.5
    assert kept.max() == 0
    assert kept_floats.max() == 0


def test_pil_modes():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.paste((10, 20, 30, 255), (0, 0, 2, 4))
    array = to_uint8(half)
    assert array[0, 0].tolist() == [10, 20, 30]
    assert array[0, 3].tolist() == [255, 255, 255]  # transparent is white
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 7, 8, 9])
    assert to_uint8(palette)[0, 0].tolist() == [7, 8, 9]
    sixteen = Image.fromarray(np.array([[0, 257 * 100], [257 * 100 + 200, 65535]], dtype=np.uint16))
    assert to_uint8(sixteen)[:, :, 0].tolist() == [[0, 100], [101, 255]]
    assert to_uint8(Image.new("1", (2, 2), 1)).min() == 255


def test_exif_orientation_is_applied():
    image = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    np.testing.assert_array_equal(to_uint8(Image.open(buffer)), np.rot90(np.asarray(image), k=-1))


@pytest.mark.parametrize(
    ("image", "error", "match"),
    [
        (np.full((4, 4, 3), 255.0), ValueError, r"spans \[255, 255\]"),
        (np.full((4, 4, 3), -1.0), ValueError, r"\(x \+ 1\) / 2"),
        (np.full((4, 4, 3), np.nan), ValueError, "nan"),
        (torch.full((3, 4, 4), float("inf")), ValueError, "inf"),
        (np.zeros((4, 4, 3), np.int64), ValueError, "int64"),
        (torch.zeros((3, 4, 4), dtype=torch.int32), ValueError, "int32"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"\[4, 4, 4\]"),
        (torch.zeros((4, 4, 3)), ValueError, r"\[4, 4, 3\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), ValueError, r"\[1, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "no pixels"),
        (Image.new("F", (4, 4)), ValueError, "mode F"),
        (b"\x89PNG", TypeError, "bytes"),
        ([[0, 1]], TypeError, "list"),
    ],
)
@pytest.mark.parametrize("convert", [to_uint8, to_float32])
def test_what_is_no_image_is_refused(convert, image, error, match):
    with pytest.raises(error, match=match):
        convert(image)


def test_a_hair_outside_the_range_is_clipped():
    values = np.array([[[-1e-4, 0.5, 1 + 1e-4]]], dtype=np.float32)
    assert to_uint8(values).tolist() == [[[0, 128, 255]]]
    assert to_float32(values).min() == 0
    assert to_float32(values).max() == 1
