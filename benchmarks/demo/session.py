"""The demo's service process and its client, with every call on record."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import psutil

from benchmarks.demo.document import Call
from benchmarks.server import Server, serve
from trainer_client import (
    CompareResponse,
    GradientResponse,
    Item,
    ModelInfo,
    RewardClient,
    RewardError,
    ScoreResponse,
)

STOP_TIMEOUT_S = 70.0
CALL_DEADLINE_S = 120.0
Response = TypeVar("Response", ScoreResponse, CompareResponse, GradientResponse)


class DidNotStopCleanly(RuntimeError):
    """The service was told to stop and did not exit with 0."""


@contextmanager
def service(settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A service on a free local port as a process of its own, with the default models or as REWARD_* ``settings`` say.

    Raises :class:`benchmarks.server.ServerFailed` when it does not get ready and :class:`DidNotStopCleanly` when
    SIGTERM does not end it with exit code 0. It is ended whatever happens inside.
    """
    with serve(settings or {}) as server:
        yield server
        server.process.terminate()
        try:
            code = server.process.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired as error:
            raise DidNotStopCleanly(f"the service still ran {STOP_TIMEOUT_S:.0f} s after SIGTERM") from error
        if code != 0:
            raise DidNotStopCleanly(f"the service ended with exit code {code} after SIGTERM, not with 0")


class Session:
    """A :class:`RewardClient` that times its calls; ``calls`` lists them in order, ``patience`` is the client's."""

    def __init__(self, url: str, patience: float = 5.0) -> None:
        self.url = url
        self.calls: list[Call] = []
        self._client = RewardClient(url, patience=patience)

    def models(self) -> dict[str, ModelInfo]:
        """What the service offers and has loaded, by name."""
        return {model.name: model for model in self._client.models() if model.ready}

    def score(self, what: str, items: list[Item], models: list[str], *, explain: bool = False) -> ScoreResponse:
        """POST /score with weight 1 for every model."""
        started = time.perf_counter()
        answer = self._client.score(items, dict.fromkeys(models, 1.0), deadline=CALL_DEADLINE_S, explain=explain)
        return self._record(what, "/score", items, answer, started)

    def compare(self, what: str, item: Item, model: str) -> CompareResponse:
        """POST /compare of all pairs."""
        started = time.perf_counter()
        answer = self._client.compare(item, model, deadline=CALL_DEADLINE_S)
        return self._record(what, "/compare", [item], answer, started)

    def gradient(self, what: str, item: Item, model: str) -> GradientResponse:
        """POST /gradient."""
        started = time.perf_counter()
        answer = self._client.gradient(item, {model: 1.0}, deadline=CALL_DEADLINE_S)
        return self._record(what, "/gradient", [item], answer, started)

    def rejection(self, item: Item, model: str) -> RewardError | None:
        """The exception that a score request meets, or None where it is answered."""
        try:
            self._client.score(item, {model: 1.0}, deadline=CALL_DEADLINE_S)
        except RewardError as error:
            return error
        return None

    def _record(self, what: str, route: str, items: list[Item], answer: Response, started: float) -> Response:
        wall_ms = 1000 * (time.perf_counter() - started)
        images = sum(len(item) for item in items)
        self.calls.append(Call(what, route, tuple(answer.models), images, wall_ms, answer.timing_ms))
        return answer

    def close(self) -> None:
        self._client.close()
