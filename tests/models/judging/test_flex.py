"""UnifiedReward-Flex's JSON: verdicts of categories and overall, and failures for everything that names no winner."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.judging.answers import Category, FlexAnswer, Status
from models.judging.flex import parse_flex, winner
from models.judging.json_text import find_object, is_cut_off

FIXTURES = Path(__file__).parents[2] / "fixtures" / "rl" / "t7_unifiedreward_text"
CASES = {case["id"]: case for case in json.loads((FIXTURES / "text_parse_cases.json").read_text("utf-8"))}


def test_a_whole_answer() -> None:
    found = parse_flex(CASES["flex_ok"]["text"])
    assert (found.preference, found.status, found.reasons) == (1.0, "ok", "ok")
    assert found.categories == (
        Category("A. Semantic Alignment & Accuracy", 1.0),
        Category("B. Image Quality & Realism", 0.0),
        Category("C. Aesthetics & Artistry", None),  # "Image 1/2": the reference takes it for image 1
    )
    fenced = parse_flex(CASES["flex_fenced"]["text"])
    assert fenced == FlexAnswer(0.0, "ok", (Category("A", 0.0),))


def test_only_the_first_three_categories_are_read() -> None:
    document = {"categories": [{"name": n, "cat_winner": "Image 1"} for n in ("a", " ", "b", "c")], "winner": "Image 2"}
    assert parse_flex(json.dumps(document)).categories == (
        Category("a", 1.0), Category("category", 1.0), Category("b", 1.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (CASES["flex_truncated"]["text"], "truncated"), (CASES["flex_template_echo"]["text"], "unparseable"),
        # The reference raises on these.
        (CASES["flex_list"]["text"], "unparseable"), ('"Image 1"', "unparseable"), ("null", "unparseable"),
        ('{"categories": null}', "incomplete"), ('{"winner": 1}', "unparseable"), ('{"winner": null}', "unparseable"),
        ("I cannot compare these.", "refused"), ("", "empty"), ('{"winner": "Image 1"', "truncated"),
        ('{"winner": Infinity}', "unparseable"), ('{"a":' * 5000, "truncated"),
    ],
)  # fmt: skip
def test_what_the_reference_calls_a_tie_is_a_failed_comparison(text: str, status: Status) -> None:
    found = parse_flex(text)
    assert (found.preference, found.status) == (None, status)


def test_categories_of_any_form_do_not_raise() -> None:
    for listed in (None, "x", {}, [None], ["x"], [{"name": 3, "cat_winner": []}], [[]]):
        found = parse_flex(json.dumps({"categories": listed, "winner": "Image 1"}))
        assert found.preference == 1
        assert all(category == Category("category", None) for category in found.categories)


@pytest.mark.parametrize(
    ("said", "preference"),
    [
        ("Image 1", 1.0), ("image2", 0.0), ("Video 2", 0.0), ("Image 2 (slightly)", 0.0), ("Tie", 0.5),
        ("Equally good", 0.5), ("Image 1/2", None), ("Image 1/Image 2", None), ("Image 1 beats Image 2", None),
        ("Image 1 or 2", None), ("not Image 1", None), ("Neither", None), ("", None), ("Image 11", None), (1, None),
        ({"winner": "Image 1"}, None),
    ],
)  # fmt: skip
def test_winners(said: object, preference: float | None) -> None:
    assert winner(said) == preference


def test_objects_inside_texts() -> None:
    assert find_object('Here: {"a": {"b": 1}} done') == {"a": {"b": 1}}
    assert find_object(json.dumps('{"a": 1}')) == {"a": 1}
    assert find_object('{"a": 1} {"b": 2}') is None
    assert find_object("}{") is None
    assert is_cut_off('{"a": "}"')
    assert is_cut_off('{"a": "\\"}')
    assert not is_cut_off('{"a": "{"}')
    assert not is_cut_off("no object")


PIECES = st.sampled_from(
    ['{"categories":', '"winner":', '"cat_winner":', '"name":', '"Image 1"', '"Image 2"', "Image 1/2", "[", "]", "{",
     "}", ",", '"', "\\", "null", "1" * 5000, "1e999", "NaN", "```json", "\n", "\ud800"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["Image 1", "Image 2", "Tie"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["categories", "winner", "cat_winner", "name", "reason"]), inner, max_size=5)
    ),
    max_leaves=12,
)


@given(st.text() | st.lists(PIECES, max_size=20).map("".join) | JSON.map(json.dumps), st.booleans())
def test_no_text_raises(text: str, finished: bool) -> None:
    found = parse_flex(text, finished=finished)
    assert found.preference in (None, 0.0, 0.5, 1.0)
    assert len(found.categories) <= 3
