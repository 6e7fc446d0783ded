"""JPEG rewards count the bytes that Pillow writes at quality 95; what JPEG cannot store is a typed error."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.base import Candidate, InputError, Sample, UnsupportedInput
from models.jpeg import JpegCompressibility, JpegIncompressibility, jpeg_kilobytes


def noise(width: int, height: int, amplitude: int = 255, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, amplitude + 1, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def score(model: JpegCompressibility | JpegIncompressibility, image: Image.Image) -> float:
    result = model.run([model.prepare(Sample("", Candidate(image=image)))])[0]
    assert not isinstance(result, Exception)
    assert result.outputs["kilobytes"] == jpeg_kilobytes(image)
    return result.score


@given(st.integers(1, 80), st.integers(1, 80))
def test_size_is_that_of_the_file(width: int, height: int) -> None:
    image = noise(width, height)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    assert score(JpegIncompressibility(), image) == len(file.getvalue()) / 1000
    assert score(JpegCompressibility(), image) == -len(file.getvalue()) / 1000 / 500


def test_detail_raises_one_reward_and_lowers_the_other() -> None:
    sizes = [score(JpegIncompressibility(), noise(64, 64, amplitude)) for amplitude in (0, 40, 255)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[2]
    rewards = [score(JpegCompressibility(), noise(64, 64, amplitude)) for amplitude in (0, 40, 255)]
    assert rewards[0] > rewards[1] > rewards[2]


def test_grey_is_stored_as_grey_and_palettes_as_colours() -> None:
    grey = noise(64, 64).convert("L")
    assert jpeg_kilobytes(grey) < jpeg_kilobytes(grey.convert("RGB"))
    palette = noise(64, 64).convert("P")
    assert jpeg_kilobytes(palette) == jpeg_kilobytes(palette.convert("RGB"))


def test_transparency_is_refused() -> None:
    transparent_palette = noise(8, 8).convert("P")
    transparent_palette.info["transparency"] = 0
    for image in (noise(8, 8).convert("RGBA"), noise(8, 8).convert("LA"), transparent_palette):
        with pytest.raises(InputError) as error:
            jpeg_kilobytes(image)
        assert error.value.code == "alpha_not_supported"


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_other_than_8_bit_is_refused(mode: str) -> None:
    with pytest.raises(InputError) as error:
        jpeg_kilobytes(Image.new(mode, (8, 8)))
    assert error.value.code == "mode_not_supported"


def test_only_images_are_scored() -> None:
    with pytest.raises(UnsupportedInput, match="jpeg-compressibility scores images; this candidate is a text"):
        JpegCompressibility().prepare(Sample("", Candidate(text="hello")))


def test_a_comment_of_the_source_file_does_not_count() -> None:
    plain = Image.linear_gradient("L").convert("RGB")
    commented = plain.copy()
    commented.info["comment"] = b"x" * 5000
    assert jpeg_kilobytes(commented) == jpeg_kilobytes(plain)
