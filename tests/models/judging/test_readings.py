"""Votes over written answers, probabilities of scored ones, and means over criteria."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.base import ModelError
from models.judge import Answer, AnswerError, WordScores
from models.judging.flex import parse_flex
from models.judging.pairs import parse_pair_scores, parse_think
from models.judging.readings import Verdict, combine, flex_reader, pair_reader, vote, weigh

FIRST, SECOND = "<think>a</think><answer>Image 1 is better</answer>", "<answer>Image 2 is better</answer>"
READ = pair_reader(parse_think)


def answers(*texts: str) -> list[Answer]:
    return [Answer(text, True) for text in texts]


def test_the_mean_is_over_the_answers_that_can_be_read() -> None:
    verdict = vote(answers(FIRST, FIRST, SECOND, "garbage"), READ)
    assert isinstance(verdict, Verdict)
    assert verdict.value == pytest.approx(2 / 3)
    assert verdict.details == {
        "texts": [FIRST, FIRST, SECOND, "garbage"],
        "statuses": ["ok", "ok", "ok", "unparseable"],
        "reasons": ["a", "a", None, None],
    }


@pytest.mark.parametrize(
    ("texts", "readable"),
    [((FIRST, ""), True), ((FIRST, "", ""), False), ((FIRST, FIRST, "", ""), True), (("",), False), ((), False)],
)
def test_fewer_than_half_readable_answers_are_none(texts: tuple[str, ...], readable: bool) -> None:
    assert isinstance(vote(answers(*texts), READ), Verdict) == readable


def test_the_error_has_the_commonest_status_and_all_texts() -> None:
    texts = (FIRST, "", "", "I cannot compare these images.", "")
    error = vote(answers(*texts), READ)
    assert isinstance(error, AnswerError)
    assert (error.status, error.code, error.texts) == ("empty", "answer_empty", texts)
    assert error.message == "4 of 5 answers of the judge have no verdict: 3 empty, 1 refused"
    (single,) = [vote([Answer("<think>It", False)], READ)]
    assert isinstance(single, AnswerError)
    assert single.code == "answer_truncated"


def test_outputs_are_means_too() -> None:
    form = "{0} Score: Image 1: {1} Image 2: {2}\n"
    texts = [
        "".join(form.format(axis, share, 1 - share) for axis in ("Alignment", "Coherence", "Style"))
        for share in (0.75, 0.25)
    ]
    verdict = vote(answers(*texts), pair_reader(parse_pair_scores))
    assert isinstance(verdict, Verdict)
    assert verdict.outputs == pytest.approx({"alignment": 0.5, "coherence": 0.5, "style": 0.5})


def test_categories_are_outputs_by_their_place_where_they_name_a_winner() -> None:
    text = (
        '{"categories": [{"name": "Meaning", "cat_winner": "Image 1"}, {"name": "Q", "cat_winner": "Image 1/2"}, '
        '{"name": "Art", "cat_winner": "Image 2"}], "reason": "because", "winner": "Image 1"}'
    )
    verdict = vote(answers(text), flex_reader(parse_flex))
    assert isinstance(verdict, Verdict)
    assert (verdict.value, verdict.outputs) == (1.0, {"semantic_alignment": 1.0, "aesthetics": 0.0})
    assert verdict.details["reasons"] == ["because"]
    assert verdict.details["categories"][0][1] == {"name": "Q", "preference": None}


@given(st.floats(-2000, 0), st.floats(-2000, 0))
def test_two_log_probabilities_become_shares_that_sum_to_one(first: float, second: float) -> None:
    one, other = weigh(WordScores((first, second))), weigh(WordScores((second, first)))
    assert isinstance(one, Verdict)
    assert isinstance(other, Verdict)
    assert one.value + other.value == pytest.approx(1.0, abs=1e-15)
    assert (one.value > 0.5) <= (first > second)
    assert 0 <= one.outputs["mass"] <= 1
    assert ("low_answer_mass" in one.warnings) == (one.outputs["mass"] < 0.5)


def test_shares_of_tiny_probabilities_are_exact() -> None:
    verdict = weigh(WordScores((-5000.0, -5000.0 - math.log(3))))
    assert isinstance(verdict, Verdict)
    assert verdict.value == pytest.approx(0.75, abs=1e-12)
    assert verdict.outputs["mass"] == 0


@pytest.mark.parametrize(
    ("scores", "status"),
    [((-math.inf, -math.inf), "unparseable"), ((math.nan, -1.0), "out_of_range"), ((0.5, -1.0), "out_of_range")],
)
def test_what_is_no_pair_of_probabilities_is_an_error(scores: tuple[float, float], status: str) -> None:
    error = weigh(WordScores(scores))
    assert isinstance(error, AnswerError)
    assert error.status == status


def test_a_word_that_a_server_did_not_list_counts_as_nothing() -> None:
    verdict = weigh(WordScores((-math.inf, math.log(0.9))))
    assert isinstance(verdict, Verdict)
    assert (verdict.value, verdict.outputs["mass"]) == (0.0, pytest.approx(0.9))


def test_criteria_are_averaged_and_one_that_failed_fails_them_all() -> None:
    good = weigh(WordScores((math.log(0.6), math.log(0.2))))
    poor = weigh(WordScores((math.log(0.1), math.log(0.3))))
    verdict = combine([good, poor], ("structure", "aesthetic"))
    assert isinstance(verdict, Verdict)
    assert verdict.value == pytest.approx(0.5)
    assert verdict.outputs == pytest.approx({"structure": 0.75, "aesthetic": 0.25, "mass": 0.4})
    assert verdict.warnings == ("low_answer_mass",)
    error = ModelError("no")
    assert combine([good, error], ("structure", "aesthetic")) is error
