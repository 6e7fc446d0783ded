"""Answers of an OpenAI-compatible server -> what judges read. Pure functions.

The shapes are those of ``POST /v1/chat/completions`` (OpenAI, vLLM, SGLang); unknown fields are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from models.base import ModelError
from models.judge import Answer, AnswerError, WordScores
from models.judging.answers import no_verdict

TOP_LOGPROBS = 20
"""Most that OpenAI's API lists, and vLLM without ``--max-logprobs``."""
MOST_NEGATIVE = -9999.0
"""vLLM writes it for -inf, which JSON does not have."""


class _Listed(BaseModel):
    token: str
    logprob: float


class _Token(_Listed):
    top_logprobs: list[_Listed] | None = None


class _LogProbs(BaseModel):
    content: list[_Token] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None
    stop_reason: Any = None
    matched_stop: Any = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1, max_length=1)


def bad_answer(message: str) -> ModelError:
    """An answer of the server that is not of the API's shape."""
    return ModelError(message, code="remote_bad_answer")


def _only_choice(answer: Mapping[str, Any]) -> _Choice:
    try:
        return _Completion.model_validate(answer).choices[0]
    except ValidationError as error:
        # The error's text holds the answer's.
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise bad_answer(f"the judge's server answered with something that is no chat completion ({where})") from None


def word_scores(answer: Mapping[str, Any], words: Sequence[str]) -> WordScores:
    """Log-probabilities of ``words`` as the answer's first token; spellings by case and blanks are summed.

    A word beyond the listed tokens is -inf. Raises :class:`ModelError` "remote_no_logprobs" for a server that lists
    none and "remote_bad_answer" for another shape, :class:`AnswerError` "refused" for an answer that is withheld, and
    "out_of_range" for what is no log-probability.
    """
    choice = _only_choice(answer)
    _raise_withheld(choice)
    tokens = choice.logprobs.content if choice.logprobs is not None else None
    if not tokens or not tokens[0].top_logprobs:
        raise ModelError(
            "the judge's server lists no log-probabilities of the answer's first token; a scored judge needs them",
            code="remote_no_logprobs",
        )
    found: dict[str, list[float]] = {word.strip().lower(): [] for word in words}
    for listed in tokens[0].top_logprobs:
        spelling = listed.token.strip().lower()
        if spelling not in found:
            continue
        if not listed.logprob <= 1e-6:
            raise AnswerError("out_of_range", "the judge's server gave a log-probability that is none")
        found[spelling].append(listed.logprob if listed.logprob > MOST_NEGATIVE else -math.inf)
    return WordScores(tuple(_log_sum(found[word.strip().lower()]) for word in words))


def _log_sum(log_probs: Sequence[float]) -> float:
    largest = max(log_probs, default=-math.inf)
    if largest == -math.inf:
        return -math.inf
    return min(0.0, largest + math.log(math.fsum(math.exp(value - largest) for value in log_probs)))


def _raise_withheld(choice: _Choice) -> None:
    message = choice.message
    if choice.finish_reason == "content_filter":
        raise AnswerError("refused", "the judge's server filtered the answer", _texts(message.content))
    if message.refusal:
        raise AnswerError("refused", "the judge refused to answer", _texts(message.refusal))


def _texts(text: str | None) -> tuple[str, ...]:
    return (text,) if text else ()


def written_answer(answer: Mapping[str, Any], stop: Sequence[str], *, begun: str = "") -> Answer:
    """The answer in words. ``finished`` is False for all that did not end by itself or at one of ``stop``.

    A refusal that reads as one (``models.judging.answers``) is an answer like others, which a vote can pass over;
    another refusal or filtered answer raises :class:`AnswerError` "refused". Raises :class:`ModelError`
    "remote_bad_answer" for another shape. What the API leaves out is put back: the text that stopped the answer where
    the server names it (``stop_reason`` of vLLM, ``matched_stop`` of SGLang), and thoughts that it took out (vLLM and
    SGLang with a reasoning parser, ``transformers serve`` always). ``begun``: the part of the answer that was given.
    """
    choice = _only_choice(answer)
    refusal = choice.message.refusal
    if refusal and choice.finish_reason != "content_filter" and no_verdict(refusal) == "refused":
        return Answer(refusal, True)
    _raise_withheld(choice)
    text = _whole_text(choice.message, begun)
    for matched in (choice.stop_reason, choice.matched_stop):
        if isinstance(matched, str) and matched in stop and not text.endswith(matched):
            text += matched
    return Answer(text, choice.finish_reason == "stop")


def _whole_text(message: _Message, begun: str) -> str:
    """The answer with its thoughts in front, with line breaks as in the chat templates of Qwen's thinking models.

    Servers strip the blanks around thoughts, or not; thoughts that no answer follows are taken for not yet closed.
    """
    content = message.content or ""
    thoughts = message.reasoning or message.reasoning_content
    if not thoughts:
        return content
    text = thoughts if "<think>" in begun else "<think>\n" + thoughts.lstrip("\n")
    return text.rstrip("\n") + "\n</think>\n" + content.lstrip() if content.strip() else text
