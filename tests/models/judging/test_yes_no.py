"""Yes or no, from words and from the probabilities of the first token."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.judging.answers import Status, YesNoAnswer
from models.judging.yes_no import parse_yes_no, yes_probability

FIXTURES = Path(__file__).parents[2] / "fixtures" / "rl" / "t7_unifiedreward_text"


@pytest.mark.parametrize(
    ("text", "probability"),
    [
        ("Yes, it is sharper.", 1),
        ("no", 0),
        ("**No**. Because yes-men ...", 0),
        (' "YES"', 1),
        ("Yes\nNo artefacts.", 1),
    ],
)
def test_the_verdict_comes_first(text: str, probability: float) -> None:
    assert parse_yes_no(text) == YesNoAnswer(probability, "ok")
    assert parse_yes_no(text + " and", finished=False).status == "ok"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Image 2 is better: yes", "unparseable"), ("Yes/no", "contradictory"), ("yes and no", "contradictory"),
        ("Yesterday", "unparseable"), ("", "empty"), ("I can't help with that", "refused"), ("None", "unparseable"),
    ],
)  # fmt: skip
def test_texts_that_do_not_open_with_a_verdict(text: str, status: Status) -> None:
    assert parse_yes_no(text) == YesNoAnswer(None, status)


def test_the_verdict_comes_last() -> None:
    assert parse_yes_no("No flaw is visible.\nYes, image 2 is sharp.\nAnswer: no\n", "last").probability == 0
    assert parse_yes_no("It is sharp. So yes.", "last").probability == 1
    assert parse_yes_no("Yes or no? Hard to say.", "last").status == "contradictory"
    assert parse_yes_no("Yes.\nIt is sharp.", "last").status == "unparseable"
    assert parse_yes_no("It is sharp. So yes", "last", finished=False).status == "truncated"
    assert parse_yes_no("", "last").status == "empty"


def test_probabilities_of_the_fixtures() -> None:
    cases = json.loads((FIXTURES / "flow_factory_yes_prob.json").read_text("utf-8"))
    for case in cases[:3] + cases[4:]:
        assert yes_probability(case["top_logprobs"]).probability == pytest.approx(case["canonicalized"])
    # The reference's 0 would be a clear no.
    assert cases[3]["canonicalized"] == 0.0
    assert yes_probability(cases[3]["top_logprobs"]) == YesNoAnswer(None, "unparseable", 0.0)


def test_the_mass_tells_how_much_the_judge_had_something_else_to_say() -> None:
    found = yes_probability([("The", math.log(0.9)), (" yes", math.log(0.06)), ("No", math.log(0.02))])
    assert found.probability == pytest.approx(0.75)
    assert found.mass == pytest.approx(0.08)


@pytest.mark.parametrize("log_prob", [math.nan, 0.5, math.inf])
def test_what_is_no_log_probability(log_prob: float) -> None:
    assert yes_probability([("yes", log_prob), ("no", -1.0)]).status == "out_of_range"


def test_probabilities_of_zero_are_no_verdict() -> None:
    assert yes_probability([("yes", -math.inf), ("no", -math.inf)]).status == "unparseable"
    assert yes_probability([]).status == "unparseable"


TOKENS = st.lists(st.tuples(st.sampled_from(["yes", " Yes", "YES", "no", "No ", "NO", "maybe"]), st.floats(-700, 0)))


@given(TOKENS)
def test_exchanging_the_words_exchanges_the_probability(tokens: list[tuple[str, float]]) -> None:
    other = {"yes": "no", "no": "yes", "maybe": "maybe"}
    there, back = yes_probability(tokens), yes_probability([(other[t.strip().lower()], p) for t, p in tokens])
    assert there.status == back.status
    if there.probability is not None and back.probability is not None:
        assert there.probability == pytest.approx(1 - back.probability, abs=1e-12)


@given(
    st.text() | st.lists(st.sampled_from(["yes", "no", " ", "\n", ".", "/", "and", "**"])).map("".join), st.booleans()
)
def test_no_text_raises(text: str, finished: bool) -> None:
    assert parse_yes_no(text, "first", finished=finished).probability in (None, 0.0, 1.0)
    assert parse_yes_no(text, "last", finished=finished).probability in (None, 0.0, 1.0)
