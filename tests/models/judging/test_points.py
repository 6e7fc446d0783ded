"""Scores from judges' texts: read where they are given, and a failure where they are not, never a number."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.judging.answers import PointAnswer, Status, no_verdict
from models.judging.points import (
    VIDEO_AXES,
    parse_axis_scores,
    parse_final_score,
    parse_rubric,
    parse_score_list,
    parse_score_tag,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "rl" / "t7_unifiedreward_text"
CASES = {case["id"]: case for case in json.loads((FIXTURES / "text_parse_cases.json").read_text("utf-8"))}


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("point_ok_int", 4), ("point_ok_dec", 3.5), ("point_no_space", 5), ("point_newline", 2), ("point_bold", 4),
        ("point_fraction", 4), ("point_trailing_dot", 4),
        # flow_grpo gives 0 for markup and case; a score that was revised is the later one, as in UnifiedReward's.
        ("point_bold_inner", 4), ("point_lower", 4), ("point_score_first", 3), ("point_twice", 4),
    ],
)  # fmt: skip
def test_final_scores_of_the_fixtures(name: str, score: float) -> None:
    assert parse_final_score(CASES[name]["text"]) == PointAnswer(score, "ok")


@pytest.mark.parametrize(
    ("name", "reference", "status"),
    [
        ("point_zero", 0.0, "out_of_range"), ("point_ten", 1.0, "out_of_range"), ("point_over", 0.0, "out_of_range"),
        ("point_57", 5.7, "out_of_range"), ("point_range", 3.0, "unparseable"), ("point_word", 0.0, "unparseable"),
        ("point_missing", 0.0, "unparseable"), ("empty", 0.0, "empty"),
    ],
)  # fmt: skip
def test_what_the_reference_scores_and_we_do_not(name: str, reference: float, status: Status) -> None:
    assert CASES[name]["results"]["flow_grpo_final_score"]["score"] == reference
    assert parse_final_score(CASES[name]["text"]) == PointAnswer(None, status)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Final Score: 4/10", "out_of_range"), ("Final Score: 4 out of 10", "out_of_range"),
        ("Final Score: 4 to 5", "unparseable"), ("Final Score: 4th", "unparseable"),
        ("Final Score: 4,5", "unparseable"), ("Final Score: -1", "out_of_range"),
        ("Final Score: " + "9" * 5000, "out_of_range"), ("Final Score: ٣", "unparseable"),
        ("I'm sorry, but I can't help with that.", "refused"), ("I cannot judge this image.", "refused"),
        ("Sorry, no.", "refused"), ("I can see a cat.", "unparseable"), (" \n", "empty"),
        ("Final Score: 4\nNo. Final Score: none", "unparseable"),
    ],
)  # fmt: skip
def test_no_number_for_what_is_none(text: str, status: Status) -> None:
    assert parse_final_score(text).status == status


def test_a_refusal_with_a_score_is_a_score() -> None:
    assert parse_final_score("I'm sorry to say that it is blurred. Final Score: 2").score == 2


def test_other_scales() -> None:
    assert parse_final_score("Final Score: 87/100", low=0, high=100).score == 87
    assert parse_final_score("Final Score: 87", low=0, high=10).status == "out_of_range"


@pytest.mark.parametrize("text", ["Final Score: 1", "Final Score: 4\nThe", "", "Overall,"])
def test_a_text_that_was_cut_off_has_no_score(text: str) -> None:
    assert parse_final_score(text, finished=False) == PointAnswer(None, "truncated")


@pytest.mark.parametrize("name", ["acs_ok", "acs_order", "acs_dup", "acs_overall_prefix"])
def test_axes_of_the_fixtures(name: str) -> None:
    wanted = {axis.lower(): v for axis, v in CASES[name]["results"]["pref_grpo_acs_single"]["matched_keys"].items()}
    found = parse_axis_scores(CASES[name]["text"])
    assert dict(found.outputs) == wanted
    assert found.score == pytest.approx(sum(wanted.values()) / 3)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        # The reference fills these with the batch's mean, or with 0.
        ("acs_missing_style", "incomplete"), ("acs_out_of_range", "out_of_range"), ("acs_negative", "out_of_range"),
        ("point_ok_int", "unparseable"), ("empty", "empty"),
    ],
)  # fmt: skip
def test_axes_that_are_not_all_there_give_no_score(name: str, status: Status) -> None:
    assert parse_axis_scores(CASES[name]["text"]) == PointAnswer(None, status)


def test_axes_with_other_markup_which_the_reference_misses() -> None:
    assert dict(parse_axis_scores(CASES["acs_bold"]["text"]).outputs) == {"alignment": 3, "coherence": 4, "style": 2}
    assert dict(parse_axis_scores(CASES["acs_no_paren"]["text"]).outputs) == {
        "alignment": 4, "coherence": 4, "style": 3,
    }  # fmt: skip


def test_axes_of_videos() -> None:
    text = "Alignment Score (1-5): 4\nPhysics Score (1-5): 2\nStyle Score (1-5): 3"
    assert parse_axis_scores(text, VIDEO_AXES).score == 3
    assert parse_axis_scores(text).status == "incomplete"


def test_score_tags_and_lists() -> None:
    assert parse_score_tag(CASES["qwenvl_ok"]["text"]).score == 4
    assert parse_score_tag(CASES["qwenvl_dec"]["text"]).score == 4.5  # the reference gives 0
    assert parse_score_tag("<Score>6</Score>").status == "out_of_range"
    names = ("naturalness", "artifacts")
    for name, wanted in [("pointwise_ok", (20, 17)), ("pointwise_strings", (12, 8.5)), ("pointwise_fenced", (25, 25))]:
        found = parse_score_list(CASES[name]["text"], names)
        assert tuple(found.outputs[n] for n in names) == wanted
        assert found.score == sum(wanted) / 2


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('{"score": [12]}', "incomplete"), ("{}", "incomplete"), ('{"score": [1, 2, 3]}', "unparseable"),
        ('{"score": "12"}', "unparseable"), ('{"score": [12, true]}', "unparseable"),
        ('{"score": [12, null]}', "unparseable"), ('{"score": [12, "4/5"]}', "unparseable"),
        ('{"score": [12, 26]}', "out_of_range"), ('{"score": [12, 1e999]}', "out_of_range"),
        ('{"score": [12, NaN]}', "unparseable"), ('{"score": [12,', "truncated"), ("[12, 13]", "unparseable"),
        ('{"score": [1' + "0" * 400 + ", 1]}", "out_of_range"), ("[" * 20000, "unparseable"), ("", "empty"),
        (CASES["pointwise_trailing_comma"]["text"], "unparseable"),
    ],
)  # fmt: skip
def test_lists_that_hold_no_two_scores(text: str, status: Status) -> None:
    assert parse_score_list(text, ("a", "b")) == PointAnswer(None, status)


RUBRIC = {"faithfulness": "Text Faithfulness", "quality": "Physical and Visual Quality", "rendering": "Text Rendering"}


def test_rubrics_leave_out_what_does_not_apply() -> None:
    cases = json.loads((FIXTURES / "flow_factory_rational_rewards.json").read_text("utf-8"))
    found = parse_rubric(cases[0]["text"], RUBRIC)
    assert dict(found.outputs) == {"faithfulness": 3.5, "quality": 2.75}
    assert (found.score - 1) / 3 == pytest.approx(cases[0]["reward_all"])
    # The reference clamps 5 and 0.5 into the scale, and scores a text without any score as 0.
    assert parse_rubric(cases[1]["text"], RUBRIC).status == "out_of_range"
    assert parse_rubric(cases[3]["text"], RUBRIC).status == "unparseable"
    assert parse_rubric(cases[4]["text"], RUBRIC).status == "incomplete"
    assert parse_rubric("Text Rendering: Score: N/A", {"rendering": "Text Rendering"}).status == "incomplete"
    assert parse_rubric(cases[0]["text"], RUBRIC, finished=False).status == "truncated"


def test_an_answer_has_a_number_exactly_when_it_is_ok() -> None:
    for score, status in [(None, "ok"), (1.0, "empty"), (float("nan"), "ok"), (float("inf"), "ok")]:
        with pytest.raises(ValueError, match=r"answer|finite|not in"):
            PointAnswer(score, status)


PIECES = st.sampled_from(
    ["Final Score:", "final score", "Alignment Score (1-5):", "Style Score", "Coherence Score:", "<Score>", "</Score>",
     "{", "}", '"score"', ":", "[", "]", ",", '"', "\\", "NaN", "1", "5", "5.7", ".5", "-", "/", "out of", "to",
     "9" * 400, "e", "N/A", "Text Faithfulness", "Score:", " ", "\n", "**", "`", "(", ")", "İ", "٣", "\ud800", "\x00"]
)  # fmt: skip
TEXTS = st.text() | st.lists(PIECES, max_size=25).map("".join)


@given(TEXTS, st.booleans())
def test_no_text_raises_and_no_garbage_is_a_number(text: str, finished: bool) -> None:
    found = [
        parse_final_score(text, finished=finished),
        parse_score_tag(text, finished=finished),
        parse_axis_scores(text, finished=finished),
        parse_rubric(text, RUBRIC, finished=finished),
    ]
    for answer in found:
        if answer.score is not None:
            assert 1 <= answer.score <= 5
            assert finished
    listed = parse_score_list(text, ("a", "b"), finished=finished)
    assert listed.score is None or 0 <= listed.score <= 25
    assert no_verdict(text, finished=finished) in ("empty", "refused", "unparseable", "truncated")


@given(
    st.integers(10, 50).map(lambda n: n / 10), st.sampled_from(["{}", "**{}**", "[{}]", "{}/5", "{}.", " {}\n", "({})"])
)
def test_every_score_of_the_scale_is_read_in_any_dress(score: float, dress: str) -> None:
    assert parse_final_score("Good.\nFinal Score: " + dress.format(score)).score == score


@pytest.mark.parametrize(
    "piece", ["Alignment Score ", "Alignment Score (1-5)", "Final Score:", "{", '{"', " ", "*", "9"]
)
def test_long_texts_take_linear_time(piece: str) -> None:
    """A quadratic step would run into the test's time limit."""
    text = "Final Score:" + piece * 100_000
    parse_final_score(text)
    parse_axis_scores(text)
    parse_score_list(text, ("a", "b"))
    parse_rubric(text, RUBRIC)
