"""Answers as real servers gave them, played back; where each was recorded stands beside it."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from models.base import ModelError
from models.judge import Answer, Generation, Turn
from models.judging.pairs import parse_think
from service.engine.remote_answers import written_answer
from tests.service.engine.judge_server import Played, completion, in_turn
from tests.service.engine.test_remote import asking, generate, score

THOUGHTS = "Image 1: top left star. no circle. 1/10\nImage 2: top left circle. 10/10"
VERDICT = "<answer>Image 2 is better</answer>"
WHOLE = f"<think>\n{THOUGHTS}\n</think>\n{VERDICT}"


def of_transformers(content: str, thoughts: str, finish_reason: str = "stop") -> dict[str, Any]:
    """``transformers serve`` 5.23 for a Qwen model: it strips the thoughts and the answer."""
    message = {"content": content, "role": "assistant", "reasoning_content": thoughts}
    return {
        "id": "b65d2a5b",
        "choices": [{"finish_reason": finish_reason, "index": 0, "message": message}],
        "created": 1795414479,
        "model": "FOLDER@main",
        "object": "chat.completion",
        "usage": {"completion_tokens": 64, "prompt_tokens": 60, "total_tokens": 124},
    }


def of_vllm(content: str | None, thoughts: str | None, finish_reason: str = "stop", **choice: Any) -> dict[str, Any]:
    """vLLM 0.32, which leaves the blanks around both where a reasoning parser takes them apart."""
    return completion(content, finish_reason, message={"reasoning": thoughts}, **choice)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (of_transformers(VERDICT, THOUGHTS), Answer(WHOLE, True)),
        (of_transformers("", "Image 1: top", "length"), Answer("<think>\nImage 1: top", False)),
        (of_vllm(WHOLE, None), Answer(WHOLE, True)),
        (of_vllm("\n" + VERDICT, f"\n{THOUGHTS}\n"), Answer(WHOLE, True)),
        (of_vllm(None, "\nImage 1: top", "length"), Answer("<think>\nImage 1: top", False)),
        (of_vllm(None, THOUGHTS + "\n", stop_reason="</think>"), Answer(f"<think>\n{THOUGHTS}\n</think>", True)),
    ],
)
def test_thoughts_that_a_server_takes_out_are_put_back(answer: dict[str, Any], expected: Answer) -> None:
    with asking(in_turn(answer)) as (chat, _):
        assert generate(chat, how=Generation(64, stop=("</think>",))) == [[expected]]
    if expected.text == WHOLE:
        read = parse_think(written_answer(answer, ()).text)
        assert (read.preference, read.reasons) == (0.0, THOUGHTS)


def test_thoughts_are_not_opened_twice() -> None:
    with asking(in_turn(of_vllm(VERDICT, THOUGHTS))) as (chat, _):
        [outcome] = generate(chat, Turn(("q",), reply="<think>\n"))
    assert outcome == [Answer(WHOLE.removeprefix("<think>\n"), True)]


@pytest.mark.parametrize(
    ("body", "status", "expected", "words"),
    [
        # vLLM 0.32
        ({"error": "Unauthorized"}, 401, "remote_unauthorized", "Unauthorized"),
        (
            {"error": {"message": "The model `other` does not exist. Valid aliases: shapes-judge.", "code": 404}},
            404,
            "remote_refused",
            "The model `other` does not exist. Valid aliases: shapes-judge.",
        ),
        (
            {"error": {"message": "At most 2 image(s) may be provided in one prompt.", "param": "image", "code": 400}},
            400,
            "remote_refused",
            "At most 2 image(s) may be provided in one prompt.",
        ),
        # transformers serve 5.23
        (
            {"detail": "Server is pinned to 'FOLDER'; requested 'other'."},
            400,
            "remote_refused",
            "Server is pinned to 'FOLDER'; requested 'other'.",
        ),
        (
            {"detail": "Unexpected fields in the request: {'continue_final_message'}"},
            422,
            "remote_refused",
            "Unexpected fields in the request: {'continue_final_message'}",
        ),
    ],
)
def test_the_log_has_the_servers_words(
    body: dict[str, Any], status: int, expected: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with asking(in_turn(Played(body, status))) as (chat, _):
        [error] = score(chat)
    assert isinstance(error, ModelError)
    assert error.code == expected
    [record] = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert (vars(record)["detail"], vars(record)["status"]) == (words, status)
