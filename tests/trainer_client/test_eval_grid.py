"""The sheet of pictures: every picture is where it should be, small ones with their pixels as they are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from trainer_client.eval_grid import GridRow, draw_grid, fitted, shorten, spread, wrap

FONT = ImageFont.load_default(11)


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def holds(sheet: Image.Image, part: Image.Image) -> bool:
    """Whether ``part`` is somewhere in ``sheet``, bit by bit."""
    whole, piece = np.asarray(sheet), np.asarray(part)
    height, width = piece.shape[:2]
    corners = (whole[: -height + 1, : -width + 1] == piece[0, 0]).all(axis=2)
    found = zip(*np.nonzero(corners), strict=True)
    return any(np.array_equal(whole[y : y + height, x : x + width], piece) for y, x in found)


def test_every_picture_of_every_policy_is_on_the_sheet() -> None:
    rows = [
        GridRow(f"prompt {p}", [[picture(100 * p + 10 * k + s) for s in range(3)] for k in range(2)], [["1"] * 3] * 2)
        for p in range(4)
    ]
    sheet = draw_grid(rows, ["before", "after"], cell=64)
    for row in rows:
        for seeds in row.pictures:
            assert all(holds(sheet, fitted(each, 64)) for each in seeds)
    assert not holds(sheet, fitted(picture(9999), 64))


def test_small_pictures_are_enlarged_by_nearest_neighbour_and_large_ones_made_smaller() -> None:
    small = fitted(picture(1), 128)
    np.testing.assert_array_equal(np.asarray(small)[::4, ::4], np.asarray(picture(1)))
    assert fitted(picture(2, 512, 256), 128).size == (128, 64)
    assert fitted(Image.new("L", (8, 16)), 128).mode == "RGB"


def test_texts_and_titles_are_drawn() -> None:
    def ink(text: str, caption: str, title: str) -> int:
        sheet = draw_grid([GridRow(text, [[Image.new("RGB", (32, 32), "white")]], [[caption]])], [title])
        return int((np.asarray(sheet.convert("L")) < 150).sum())

    empty = ink("", "", "")
    assert ink("a red circle", "", "") > empty
    assert ink("", "score 0.5", "") > empty
    assert ink("", "", "policy") > empty


def test_a_grid_needs_rows_of_one_shape() -> None:
    one = GridRow("a", [[picture(0)]], [["x"]])
    two = GridRow("b", [[picture(0)] * 2], [["x"] * 2])
    for rows in ([], [one, two], [GridRow("a", [[picture(0)]], [[]])]):
        with pytest.raises(ValueError, match="same number of pictures and captions"):
            draw_grid(rows, ["policy"])
    with pytest.raises(ValueError, match="2 titles for 1 policies"):
        draw_grid([one], ["policy", "against"])


@given(st.lists(st.text("abcdefgh ij", max_size=30), max_size=40).map(" ".join), st.integers(40, 400))
def test_a_wrapped_text_fits_and_loses_nothing_but_its_end(text: str, width: int) -> None:
    lines = wrap(text, width, FONT)
    assert 1 <= len(lines) <= 3
    assert all(FONT.getlength(line) <= width for line in lines)
    if not any(line.endswith("...") for line in lines):
        assert " ".join(lines).split() == text.split()


def test_a_long_text_ends_in_three_dots() -> None:
    assert shorten("abc", 200, FONT) == "abc"
    short = shorten("a long prompt " * 20, 100, FONT)
    assert short.endswith("...")
    assert FONT.getlength(short) <= 100 < FONT.getlength(short.removesuffix("...") + "prompt...")


@given(st.integers(1, 500), st.integers(1, 40))
def test_rows_are_spread_evenly(count: int, most: int) -> None:
    chosen = spread(count, most)
    assert len(chosen) == min(count, most)
    assert chosen[0] == 0
    assert chosen[-1] < count
    gaps = {later - earlier for earlier, later in pairwise(chosen)}
    assert all(gap >= 1 for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1
