"""The report: whole, alone in one file, true to its texts and pictures."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from benchmarks.demo.document import Call, Column, Document, Fact, Figure, Row, Section, Table, call_table, decimals
from benchmarks.demo.report import data_address, render

VOID = frozenset({"meta", "img"})
STAGES_MS = {"decode": 1.0, "queue": 2.0, "forward": 3.0}


class Page(HTMLParser):
    """Reads a page; fails on tags that are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.cells: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if "td" in self.open:
            self.cells[-1] += data


def noise(width: int, height: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def document(*sections: Section) -> Document:
    return Document("the demo", "a lead", sections, {"machine": "two cores"})


def table_of(*rows: Row, numeric: bool = False) -> Table:
    return Table("a table", tuple(Column(f"c{i}", numeric) for i in range(len(rows[0].cells))), rows)


def picture_at(address: str) -> PILImage.Image:
    return PILImage.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_the_page_is_balanced_and_needs_nothing_from_elsewhere() -> None:
    section = Section(
        "pictures",
        "lead",
        (table_of(Row(("x", "1"), noise(30, 20)), Row(("y", "2"))),),
        (Figure(noise(64, 64), "noise"),),
        (Fact("0.9", "accuracy"),),
    )
    text = render(document(section), [Call("six", "/score", ("ocr",), 6, 12.5, STAGES_MS)])
    page = Page(text)
    assert len(page.addresses) == page.tags.count("img") == 2
    assert all(address.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text
    for expected in ("the demo", "a lead", "noise", "accuracy", "two cores", "HTTP calls", "12.5"):
        assert expected in page.words


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40))
def test_whatever_a_text_holds_is_shown_and_never_markup(text: str) -> None:
    section = Section(
        text, text, (Table(text, (Column(text),), (Row((text,)),), text),), (), (Fact(text, text),), (text,)
    )
    plain = Section("t", "t", (Table("t", (Column("t"),), (Row(("t",)),), "t"),), (), (Fact("t", "t"),), ("t",))
    page = Page(render(document(section), []))
    assert page.tags == Page(render(document(plain), [])).tags
    assert page.cells == [text]


def test_a_small_picture_is_embedded_pixel_by_pixel() -> None:
    image = noise(31, 17)
    shown = picture_at(data_address(image))
    assert shown.format == "PNG"
    assert np.array_equal(np.asarray(shown), np.asarray(image))


def test_a_large_picture_is_shrunk_in_proportion_and_not_changed_itself() -> None:
    image = noise(900, 450)
    address = data_address(image, longest=224)
    assert picture_at(address).size == (224, 112)
    assert address.startswith("data:image/jpeg")
    assert image.size == (900, 450)


def test_negative_numbers_get_a_minus_sign_and_words_keep_their_hyphens() -> None:
    columns = (Column("score", numeric=True), Column("name"))
    rows = (Row(("-0.5", "-0.5 as text")), Row(("–", "x")))
    page = Page(render(document(Section("s", "", (Table("t", columns, rows),))), []))
    assert page.cells == ["−0.5", "-0.5 as text", "–", "x"]


def test_failures_are_counted_at_the_top_and_named_in_their_section() -> None:
    good, bad = Section("good", ""), Section("bad", "", failures=("the first thing", "the second thing"))
    words = Page(render(document(good, bad), [])).words
    assert "2 of the checks failed" in words
    assert "the second thing" in words
    assert "every check passed" not in words
    assert "every check passed" in Page(render(document(good), [])).words
    assert document(good, bad).failures == ["bad: the first thing", "bad: the second thing"]


def test_a_row_that_does_not_fit_its_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="3 cells under 2 columns"):
        Table("t", (Column("a"), Column("b")), (Row(("1", "2", "3")),))


@given(st.floats(-1e9, 1e9), st.integers(0, 6))
def test_decimals_round_and_never_show_a_negative_zero(value: float, digits: int) -> None:
    shown = decimals(value, digits)
    assert float(shown) == pytest.approx(value, abs=0.5001 * 10**-digits + 4e-16 * abs(value))
    assert float(shown) != 0 or not shown.startswith("-")
    assert len(shown.partition(".")[2]) == digits


def test_a_missing_number_is_not_shown_as_a_number() -> None:
    assert not any(character.isdigit() for character in decimals(None, 3))


def test_calls_of_one_purpose_share_a_row_with_their_means() -> None:
    calls = [
        Call("captions", "/score", ("a", "b"), 42, 100.0, {"decode": 10.0, "queue": 0.0, "forward": 4.0}),
        Call("signs", "/score", ("ocr",), 6, 900.0, STAGES_MS),
        Call("captions", "/score", ("a", "b"), 21, 300.0, {"decode": 20.0, "queue": 1.0, "forward": 5.0}),
        Call("captions", "/compare", ("a",), 6, 7.0, STAGES_MS),
    ]
    assert [row.cells for row in call_table(calls).rows] == [
        ("captions (× 2)", "/score", "a, b", "63", "15.0", "0.5", "4.5", "200.0"),
        ("signs", "/score", "ocr", "6", "1.0", "2.0", "3.0", "900.0"),
        ("captions", "/compare", "a", "6", "1.0", "2.0", "3.0", "7.0"),
    ]
