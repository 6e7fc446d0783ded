"""The flow of a call over one or several services: planned, sent, repeated, put together. No I/O here.

A flow is a generator that yields what it wants done (:class:`Exchange`, :class:`Sleep`, :class:`Together`) and is sent
the outcome, so that the sync and the async client share every decision.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from trainer_client._calls import MODELS_CALL, Call, Question
from trainer_client._retry import Attempt, Attempts, Budget, raise_for_status
from trainer_client.errors import ModelNotOffered, Overloaded, RequestRejected, RewardError, TransportError
from trainer_client.results import ModelInfo
from trainer_client.routing import Part, Routes

MODELS_TIMEOUT = 10.0
"""Seconds that a service may take to say which models it has."""
_MOVED = ("unknown_model", "model_not_loaded")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Exchange:
    """Send one attempt of a call; the outcome is its Answer."""

    call: Call[Any]
    attempt: Attempt


@dataclass(frozen=True)
class Sleep:
    """Wait; after a failure, before the next attempt."""

    seconds: float


@dataclass(frozen=True, eq=False)
class Together:
    """Run flows at the same time; the outcome is the list of theirs. The first failure is the whole's."""

    flows: Sequence[Flow[Any]]
    budget: Budget


Effect: TypeAlias = Exchange | Sleep | Together
Flow: TypeAlias = Generator[Effect, Any, T]


def ask(question: Question[T], routes: Routes, budget: Budget) -> Flow[T]:
    """The flow of a whole question: its models go to their services, the answers are put together.

    Raises RewardError; ModelNotOffered for models that none of several services has.
    """
    pending = list(question.models)
    refusals: set[str] = set()
    answers: list[T] = []
    while pending:
        parts = yield from _plan(routes, budget, pending)
        flows = [_ask_part(question, part, routes, budget, refusals) for part in parts]
        outcomes: list[list[T]] = [(yield from flows[0])] if len(flows) == 1 else (yield Together(flows, budget))
        for part, outcome in zip(parts, outcomes, strict=True):
            if outcome:
                answers += outcome
                pending = [model for model in pending if model not in part.models]
    return answers[0] if len(answers) == 1 else question.merge(answers)


def ask_models(routes: Routes, budget: Budget) -> Flow[list[ModelInfo]]:
    """The models of all services, each once; of a single service, all that it knows, loaded or not."""
    if not routes.several:
        return (yield from _attempt(MODELS_CALL, routes.attempts(routes.urls, budget), routes))
    yield from _settle(routes, budget, routes.urls, lambda: bool(routes.rows()))
    return routes.rows()


def _ask_part(question: Question[T], part: Part, routes: Routes, budget: Budget, refusals: set[str]) -> Flow[list[T]]:
    """The answer about a part's models; [] when a service turned out not to have them (told once per service)."""

    def check(url: str, answer: T) -> None:
        for model, identity in question.identities(answer).items():
            routes.check(question.job, model, identity.fingerprint, url)

    attempts = routes.attempts(part.services, budget)
    try:
        answer: T = yield from _attempt(question.call(part.models), attempts, routes, check)
        return [answer]
    except RequestRejected as error:
        url = error.service
        if not routes.several or error.code not in _MOVED or url in refusals:
            raise
        refusals.add(url)
        routes.refused(url)
        return []


def _attempt(
    call: Call[T], attempts: Attempts, routes: Routes, check: Callable[[str, T], None] = lambda url, answer: None
) -> Flow[T]:
    while True:
        attempt = attempts.begin()
        try:
            with routes.using(attempt.service):
                answer = yield Exchange(call, attempt)
            raise_for_status(attempt.service, answer)
            result = call.parse(answer)
            check(attempt.service, result)
            return result
        except RewardError as error:
            routes.failed(attempt.service, error)
            delay = attempts.after(error)
        yield Sleep(delay)


def _plan(routes: Routes, budget: Budget, models: Sequence[str]) -> Flow[list[Part]]:
    if not routes.several:
        return [Part(tuple(models), routes.urls)]
    due = routes.due()
    yield from _learn(routes, budget, due)
    rest = [url for url in routes.urls if url not in due]
    if routes.missing(models):
        yield from _settle(routes, budget, rest, lambda: not routes.missing(models))
        if missing := routes.missing(models):
            raise ModelNotOffered(missing, routes.urls)
    elif routes.orphaned(models):
        yield from _learn(routes, budget, rest)
    return routes.plan(models)


def _settle(routes: Routes, budget: Budget, services: Sequence[str], found: Callable[[], bool]) -> Flow[None]:
    """Ask ``services``, then all of them again and again, until ``found`` or until nothing new can come."""
    for failures in itertools.count():
        yield from _learn(routes, budget, services)
        absence = routes.absence()
        if found() or absence is None:
            return
        budget.failed(absence)
        next_at = budget.clock() + budget.backoff(failures)
        yield Sleep(budget.wait(next_at, absence, "the services"))
        services = routes.urls


def _learn(routes: Routes, budget: Budget, services: Sequence[str]) -> Flow[None]:
    if services:
        yield Together([_learn_one(routes, budget, url) for url in services], budget)


def _learn_one(routes: Routes, budget: Budget, url: str) -> Flow[None]:
    """Ask one service for its models; one that cannot say is taken for lost."""
    attempt = budget.attempt(url, MODELS_TIMEOUT)
    try:
        answer = yield Exchange(MODELS_CALL, attempt)
        raise_for_status(url, answer)
        routes.learn(url, MODELS_CALL.parse(answer))
    except (TransportError, Overloaded) as error:
        routes.failed(url, error)
