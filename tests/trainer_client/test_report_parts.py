"""The pieces that reports are made of."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer_client._report_parts import SHOWN, data_address, number
from trainer_client._report_pictures import evenly
from trainer_client._report_summary import settings_rows


@pytest.mark.parametrize(("size", "shown", "kind"), [(32, 160, "PNG"), (100, 100, "PNG"), (1024, 320, "JPEG")])
def test_small_pictures_are_enlarged_and_large_ones_shrunk(size: int, shown: int, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    if size == 100:
        noise[:] = 7
    found = Image.open(io.BytesIO(base64.b64decode(data_address(Image.fromarray(noise)).split(",")[1])))
    assert (found.size, found.format) == ((shown, shown), kind)


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.5, "0.500"), (-0.04, "−0.040"), (12.345, "12.3"), (12345.6, "12,346"), (0.00012, "1.20e−04"), (0, "0"),
     (-0.0, "0"), (math.nan, "–"), (None, "–"), (2.5e7, "2.50e+07")],
)  # fmt: skip
def test_numbers_are_told_with_three_digits(value: float | None, told: str) -> None:
    assert number(value) == told


@given(st.lists(st.integers(), unique=True, max_size=40), st.integers(1, 12))
def test_what_is_shown_is_spread_over_all(values: list[int], most: int) -> None:
    found = evenly(values, most)
    assert len(found) == min(len(values), most)
    places = [values.index(value) for value in found]
    assert places == sorted(set(places))
    if len(values) > 1 and most > 1:
        assert (found[0], found[-1]) == (values[0], values[-1])


def test_settings_are_flattened() -> None:
    value = {"a": {"b": 1, "c": {}}, "d": ["x", 2], "e": None, "f": False}
    assert settings_rows(value) == [("a.b", "1"), ("a.c", "{}"), ("d", "x, 2"), ("e", ""), ("f", "False")]


def test_pictures_fit_their_cards() -> None:
    assert SHOWN % 32 == 0  # the embedded policy's 32 x 32 pictures come out with square pixels of one size
