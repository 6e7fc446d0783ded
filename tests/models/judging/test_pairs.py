"""Which of two a judge prefers: read from clear answers, and failed comparisons, not ties, from all others."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.judging.answers import PairAnswer, Status
from models.judging.pairs import parse_pair, parse_pair_scores, parse_think, parse_understanding_pair

FIXTURES = Path(__file__).parents[2] / "fixtures" / "rl" / "t7_unifiedreward_text"
CASES = {case["id"]: case for case in json.loads((FIXTURES / "text_parse_cases.json").read_text("utf-8"))}


@pytest.mark.parametrize(
    ("name", "preference"),
    [
        ("think_ok_1", 1), ("think_ok_2", 0), ("answer_only", 1), ("answer_spaces", 0), ("answer_than", 0),
        ("answer_contradict", 1), ("answer_preface", 1), ("answer_tie", 0.5),
        # The reference calls these ties, and takes the example inside the reasons for the answer.
        ("answer_upper_tag", 1), ("answer_lower_text", 1), ("answer_two_tags", 1),
    ],
)  # fmt: skip
def test_think_answers_of_the_fixtures(name: str, preference: float) -> None:
    found = parse_think(CASES[name]["text"])
    assert (found.preference, found.status) == (preference, "ok")


@pytest.mark.parametrize(
    ("name", "reference", "status"),
    [
        ("answer_no_tags", "tie", "unparseable"), ("answer_unclosed", "tie", "truncated"), ("empty", "tie", "empty"),
        ("answer_both", "first", "contradictory"), ("think_video", "tie", "unparseable"),
        ("point_ok_int", "tie", "unparseable"),
    ],
)  # fmt: skip
def test_what_the_reference_calls_a_tie_or_a_win_is_a_failed_comparison(
    name: str, reference: str, status: Status
) -> None:
    assert CASES[name]["results"]["pref_grpo_think"]["image"] == reference
    assert parse_think(CASES[name]["text"]).preference is None
    assert parse_think(CASES[name]["text"]).status == status


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("<answer>Image 1 is better</answer><answer>Image 2 is better</answer>", "contradictory"),
        ("<answer>Image 2 is not worse; Image 1 is better? no: Image 2 is better</answer>", "contradictory"),
        ("<answer>Not sure whether Image 1 is better</answer>", "unparseable"),
        ("<answer>Image 1 is better?</answer>", "unparseable"),
        ("<answer>Image 3 is better</answer>", "unparseable"),
        ("<answer>Image 1 or Image 2 is better</answer>", "unparseable"),
        ("<answer></answer>", "empty"),
        ("<answer>I cannot decide.</answer>", "refused"),
        ("<think>cut off before answ", "truncated"),
        ("<think>a <answer>Image 1 is better</answer> and then", "truncated"),
        ("<think>a <answer>Image 1 is better</answer>", "unparseable"),
        ("<think>a</think>", "truncated"),
        ("<think>a</think><think>b", "truncated"),
        ("I'm sorry, I can't compare these.", "refused"),
        ("<think>They show people.</think>I can't assist with that.", "refused"),
    ],
)
def test_think_answers_that_say_nothing(text: str, status: Status) -> None:
    assert parse_think(text).status == status


def test_reasons_are_kept_apart_from_the_answer() -> None:
    assert parse_think("Well. <think>\n Image 2 glows. \n</think>\n<answer>Image 2 is better</answer>") == PairAnswer(
        0.0, "ok", reasons="Image 2 glows."
    )
    # A chat template that opens the block itself leaves the text without the tag.
    assert parse_think("It glows.</think><answer>Image 1 is better</answer>").reasons == "It glows."
    assert parse_think("<think>So far", finished=False) == PairAnswer(None, "truncated")
    assert parse_think("<answer>Video 1 is better than Video 2.</answer>", noun="Video").preference == 1
    assert parse_think("<answer>Image 1 is better</answer> and fur", finished=False).preference == 1


@pytest.mark.parametrize(
    ("text", "preference"),
    [
        ("Image 1 is better.", 1), ("**Image 2 is better**", 0), ("Image 2 is better than Image 1.", 0),
        ("Both images are equally good.", 0.5), ("image1 is better!", 1),
        ("Image 2 is better in colour, image 1 in shape. Overall, the caption decides.\nImage 1 is better.", 1),
        ("After comparing, Image 2 is better than Image 1 because of colors.", 0),
        ("It is not clear whether Image 1 is better. Image 2 is better.", 0),
        ("Is Image 1 is better? Image 2 is better.", 0),
        ("They aren't equally good. Image 1 is better.", 1),
        ("Image 2 does not show the hat, so Image 1 is better.", 1),
        ("Image 1 has no flaws, and Image 1 is better", 1),
        ("Image 2 is better in color but Image 1 is better overall", 1),
        ("Image 2 is better in color. Overall, Image 1 is better because it has the hat.", 1),
        ("Overall Image Quality: Image 2 is better in color. Conclusion: Image 1 is better, by far.", 1),
    ],
)  # fmt: skip
def test_free_texts(text: str, preference: float) -> None:
    found = parse_pair(text)
    assert (found.preference, found.status) == (preference, "ok")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Image 1 is better. Image 2 is better.", "contradictory"),
        ("Image 2 is better in color but Image 1 is better in shape", "contradictory"),
        ("I don't think that Image 1 is better.", "unparseable"),
        ("Image 1 is better. Then again, Image 2 is better in every respect", "contradictory"),
        ("<answer>tie</answer> but Edited image 2 is better in realism", "contradictory"),
        ("I can't say that Image 1 is better.", "refused"),
        ("Neither Image 1 is better nor Image 2 is better.", "unparseable"),
        ("Image 12 is better.", "unparseable"),
        ("A cat.", "unparseable"),
        ("", "empty"),
    ],
)
def test_free_texts_without_a_verdict(text: str, status: Status) -> None:
    assert parse_pair(text) == PairAnswer(None, status)


def test_a_free_text_that_was_cut_off_has_no_conclusion() -> None:
    assert parse_pair("Image 1 is better", finished=False) == PairAnswer(None, "truncated")


def test_other_nouns() -> None:
    assert parse_pair(CASES["edit_cap"]["text"], noun="Edited image").preference == 1
    assert parse_pair("Image 1 is better", noun="Edited image").status == "unparseable"
    assert parse_pair("Answer 2 is better than Answer 1", noun="Answer").preference == 0
    assert parse_pair("Image 1 is better", noun="Video").status == "unparseable"


def test_understanding_takes_the_overall_judgment() -> None:
    assert parse_understanding_pair(CASES["understanding_overall"]["text"]).preference == 0
    assert parse_understanding_pair(CASES["understanding_plain"]["text"]).preference == 1
    # The reference stops at the first full stop, and then takes the first answer by default.
    bold = CASES["understanding_overall_bold"]
    assert bold["results"]["ur_understanding_image_pair_chosen"] == 1
    assert parse_understanding_pair(bold["text"]).preference == 0
    assert parse_understanding_pair("Answer 1 is better.\nOverall Judgment: hard to say.").status == "unparseable"


def shares(**axes: tuple[object, object]) -> str:
    return "\n\n".join(f"{axis.title()} Score:\n Image 1: {x}\n Image 2: {y}" for axis, (x, y) in axes.items())


def test_shares_of_two_images() -> None:
    found = parse_pair_scores(shares(alignment=(0.7, 0.3), coherence=(0.5, 0.5), style=("**0.25**", "0.75")))
    assert dict(found.dimensions) == pytest.approx({"alignment": 0.7, "coherence": 0.5, "style": 0.25})
    assert found.preference == pytest.approx(1.45 / 3)
    assert parse_pair_scores(shares(alignment=(0.67, 0.34)), ("alignment",)).preference == pytest.approx(67 / 101)


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (0.7, 0.7, "contradictory"), (0, 0, "contradictory"), (7, 3, "out_of_range"), (-0.5, 1.5, "out_of_range"),
        ("X", "Y", "unparseable"), (0.5, "", "unparseable"),
    ],
)  # fmt: skip
def test_shares_that_are_none(first: object, second: object, status: Status) -> None:
    text = shares(alignment=(first, second), coherence=(0.5, 0.5), style=(0.5, 0.5))
    assert parse_pair_scores(text).status == status


def test_shares_of_some_axes_are_not_a_verdict() -> None:
    assert parse_pair_scores(shares(alignment=(0.5, 0.5))).status == "incomplete"
    assert parse_pair_scores("Alignment Score: Image 1: 0.5").status == "incomplete"
    assert parse_pair_scores("Alignment Score (1-5): 3").status == "unparseable"
    assert parse_pair_scores("", finished=True).status == "empty"
    whole = shares(alignment=(0.5, 0.5), coherence=(0.5, 0.5), style=(0.5, 0.5))
    assert parse_pair_scores(whole, finished=False).status == "truncated"


PIECES = st.sampled_from(
    ["Image 1 is better", "Image 2 is better", "image 1", "equally good", "than Image 2", "<think>", "</think>",
     "<answer>", "</answer>", "<ANSWER>", "tie", "not ", "whether ", ".", "?", "\n", ";", "Overall Judgment",
     "Alignment Score:", "Coherence Score:", "Style Score:", "Image 1: 0.5", "Image 2: 0.5", "Image 1:", "1e9", "İ",
     "\ud800", "I'm sorry", " "]
)  # fmt: skip
TEXTS = st.text() | st.lists(PIECES, max_size=30).map("".join)


@given(TEXTS, st.booleans(), st.sampled_from(["Image", "Video", "Edited image", "Answer"]))
def test_no_text_raises(text: str, finished: bool, noun: str) -> None:
    for parse in (parse_pair, parse_think, parse_understanding_pair):
        found = parse(text, noun=noun, finished=finished)
        assert found.preference in (None, 0.0, 0.5, 1.0)
    assert finished or parse_pair(text, finished=False).preference is None
    scores = parse_pair_scores(text, finished=finished)
    assert scores.preference is None or set(scores.dimensions) == {"alignment", "coherence", "style"}


@given(TEXTS)
def test_exchanging_the_names_of_the_images_exchanges_the_verdict(text: str) -> None:
    """No order in which texts are searched favours an image, which Pref-GRPO's does."""
    swapped = text.replace("mage 1", "mage \0").replace("mage 2", "mage 1").replace("mage \0", "mage 2")
    for parse in (parse_pair, parse_think):
        there, back = parse(text), parse(swapped)
        assert there.status == back.status
        if there.preference is not None and back.preference is not None:
            assert there.preference == 1 - back.preference


@pytest.mark.parametrize(
    "piece", ["<answer>", "<think>", "Image 1 is better ", "Image ", "Alignment Score:", "Image 1:", " "]
)
def test_long_texts_take_linear_time(piece: str) -> None:
    """A quadratic step would run into the test's time limit."""
    text = "Alignment Score: Image 1:" + piece * 30_000
    parse_pair(text)
    parse_think(text)
    parse_understanding_pair(text)
    parse_pair_scores(text)
