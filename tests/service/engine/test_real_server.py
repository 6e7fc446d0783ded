"""A judge behind a real server against the same judge here; ``docs/remote_judges.md`` says how to start one.

It serves the folder ``models/shapes/weights/judge``. ``REWARD_REAL_CHAT_SERVER`` is its address with /v1,
``REWARD_REAL_CHAT_MODEL`` the name under which it serves the folder (default: shapes-judge).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from models.base import Candidate, LoadOptions, ModelError
from models.judge import Answer, Comparison, Generation, Preference, Turn, WordScores
from models.judging.chat_judge import YES_NO
from models.shapes.judge_evaluation import draw_pairs, held_out_pairs
from models.shapes_judge import ShapesJudge
from service.engine.remote import RemoteChat
from service.remote_settings import RemoteSettings

SERVER = os.environ.get("REWARD_REAL_CHAT_SERVER", "")
MODEL = os.environ.get("REWARD_REAL_CHAT_MODEL", "shapes-judge")
PAIRS = 12
PRECISION = 1e-3
"""Of a probability: servers compute with other kernels. It holds where the server runs with ``--dtype float32``."""
GREEDY = Generation(max_tokens=240)

pytestmark = pytest.mark.skipif(not SERVER, reason="REWARD_REAL_CHAT_SERVER names no server that serves shapes-judge")


@pytest.fixture
def chat() -> Iterator[RemoteChat]:
    remote = RemoteChat(RemoteSettings(base_url=SERVER, model=MODEL, concurrency=4))
    yield remote
    remote.close()


@pytest.fixture(scope="module")
def comparisons() -> list[Comparison]:
    pairs = held_out_pairs(PAIRS)
    return [
        Comparison(pair.prompt.text, Candidate(image=first), Candidate(image=second))
        for pair, (first, second) in zip(pairs, draw_pairs(pairs), strict=True)
    ]


def answers(comparisons: list[Comparison], mode: str, chat: RemoteChat | None = None) -> list[Preference]:
    judge = ShapesJudge.load(LoadOptions(chat=chat, options={"mode": mode}))
    outcomes = judge.compare([judge.prepare_comparison(comparison) for comparison in comparisons])
    given = [outcome for outcome in outcomes if isinstance(outcome, Preference)]
    assert len(given) == len(comparisons), outcomes
    return given


def question(comparison: Comparison, text: str) -> Turn:
    return Turn((comparison.first, comparison.second, text))


def thinking(comparison: Comparison) -> Turn:
    text = f"Which of the following images is better? Text Caption: [{comparison.prompt}]"
    return question(comparison, text)


def written(chat: RemoteChat, turn: Turn, how: Generation = GREEDY) -> list[str]:
    [outcome] = chat.generate([chat.prepare(turn)], how)
    assert isinstance(outcome, list), outcome
    return [answer.text for answer in outcome]


def test_probabilities_are_those_of_the_judge_here(chat: RemoteChat, comparisons: list[Comparison]) -> None:
    here, there = answers(comparisons, "yes_no"), answers(comparisons, "yes_no", chat)
    assert [one.probability for one in there] == pytest.approx([one.probability for one in here], abs=PRECISION)
    assert [one.outputs["mass"] for one in there] == pytest.approx([one.outputs["mass"] for one in here], abs=PRECISION)


def test_greedy_words_are_those_of_the_judge_here(chat: RemoteChat, comparisons: list[Comparison]) -> None:
    here, there = answers(comparisons, "think"), answers(comparisons, "think", chat)
    assert [one.details["texts"] for one in there] == [one.details["texts"] for one in here]
    assert [one.probability for one in there] == [one.probability for one in here]


def test_an_answer_that_was_cut_off_is_not_finished(chat: RemoteChat, comparisons: list[Comparison]) -> None:
    [outcome] = chat.generate([chat.prepare(thinking(comparisons[0]))], Generation(max_tokens=10))
    [whole] = written(chat, thinking(comparisons[0]))
    assert isinstance(outcome, list)
    [cut] = outcome
    assert not cut.finished
    assert len(cut.text) > len("<think>")
    assert whole.startswith(cut.text)


def test_an_answer_is_continued_where_it_was_broken_off(chat: RemoteChat, comparisons: list[Comparison]) -> None:
    turn = thinking(comparisons[0])
    [whole] = written(chat, turn)
    begun = whole[: whole.index("</think>")]
    [rest] = written(chat, replace(turn, reply=begun))
    assert begun + rest == whole


def test_the_text_at_which_an_answer_stops_is_kept(chat: RemoteChat, comparisons: list[Comparison]) -> None:
    turn = thinking(comparisons[0])
    [whole] = written(chat, turn)
    [stopped] = chat.generate([chat.prepare(turn)], replace(GREEDY, stop=("</think>",)))
    assert stopped == [Answer(whole[: whole.index("</think>")] + "</think>", True)]


def test_samples_differ_and_come_again_with_their_seed(chat: RemoteChat, comparisons: list[Comparison]) -> None:
    how = Generation(max_tokens=60, temperature=1.5, samples=3, seed=5)
    first = written(chat, thinking(comparisons[0]), how)
    assert len(set(first)) > 1
    assert written(chat, thinking(comparisons[0]), how) == first
    assert written(chat, thinking(comparisons[0]), replace(how, seed=6)) != first


def test_what_the_server_refuses_fails_alone(chat: RemoteChat, comparisons: list[Comparison]) -> None:
    asked = question(comparisons[0], "Is image 2 better than image 1? Answer yes or no.")
    too_long = question(comparisons[0], "circle " * 3000)
    first, refused, last = chat.score([chat.prepare(turn) for turn in (asked, too_long, asked)], YES_NO)
    assert isinstance(first, WordScores)
    assert isinstance(last, WordScores)
    assert first.log_probs == pytest.approx(last.log_probs, abs=PRECISION)
    assert isinstance(refused, ModelError)
    assert refused.code == "remote_refused"


def test_a_name_that_the_server_does_not_serve(comparisons: list[Comparison]) -> None:
    other = RemoteChat(RemoteSettings(base_url=SERVER, model=f"no-{MODEL}"))
    try:
        [refused] = other.score([other.prepare(thinking(comparisons[0]))], YES_NO)
    finally:
        other.close()
    assert isinstance(refused, ModelError)
    assert refused.code == "remote_refused"
