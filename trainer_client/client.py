"""The reward client, sync and async: rewards over HTTP that are right or an error.

Both clients share everything but the waiting: a call is built (``_calls``), its attempts are planned (``_retry``), its
answer is checked (``_parse``).
"""

from __future__ import annotations

import asyncio
import itertools
import random as random_module
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self, TypedDict, TypeVar, Unpack, get_args

import httpx

from trainer_client._calls import (
    MODELS_CALL,
    READY_CALL,
    Call,
    Items,
    Models,
    Pairs,
    compare_call,
    gradient_call,
    score_call,
)
from trainer_client._retry import Answer, Attempt, Attempts, raise_for_status, transport_errors
from trainer_client._wire import Content, Wire
from trainer_client.errors import RewardError, TimedOut, TransportError
from trainer_client.results import CompareResponse, GradientResponse, ModelInfo, ScoreResponse

Result = TypeVar("Result")

READY_TIMEOUT = 5.0
"""Seconds that a service may take to say whether it is ready."""


class _Options(TypedDict, total=False):
    """The keyword arguments that both clients share; see :class:`RewardClient`."""

    api_key: str | None
    wire: Wire
    patience: float
    timeout: float
    clock: Callable[[], float]
    random: Callable[[], float]


class _BaseClient:
    """What both clients share."""

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        api_key: str | None = None,
        wire: Wire = "safetensors",
        patience: float = 300.0,
        timeout: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        if wire not in get_args(Wire):
            raise ValueError(f"wire is one of {get_args(Wire)}, not {wire!r}")
        if not (patience >= 0 and timeout > 0):
            raise ValueError(f"patience is at least 0 s and timeout positive, not {patience!r} and {timeout!r}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
            raise ValueError("an API key is printable ASCII without surrounding blanks")
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        for url in urls:
            if httpx.URL(url).scheme not in ("http", "https") or not httpx.URL(url).host:
                raise ValueError(f"a service is addressed as http://host:port or https://host, not {url!r}")
            if httpx.URL(url).userinfo:
                raise ValueError("credentials belong into api_key, not into the address, which is shown in messages")
        if not urls:
            raise ValueError("at least one service is needed")
        self._services = tuple(url.rstrip("/") for url in urls)
        self._wire: Wire = wire
        self._patience = patience
        self._timeout = timeout
        self._clock = clock
        self._random = random
        self._calls = itertools.count()
        self._headers = {"User-Agent": "reward-trainer"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._services)}, wire={self._wire!r})"

    def _attempts(self, deadline: float | None) -> Attempts:
        return Attempts(
            self._services,
            first=next(self._calls),
            deadline=deadline,
            patience=self._patience,
            timeout=self._timeout,
            clock=self._clock,
            random=self._random,
        )

    def _headers_of(self, call: Call[Any], content: Content | None) -> dict[str, str]:
        headers = {**self._headers, "Accept": f"{call.accept}, application/problem+json"}
        if call.body is not None and content is not None:
            headers |= {"Content-Type": call.body.content_type, "Content-Length": str(content.length)}
        return headers

    def _check_time(self, attempt: Attempt) -> None:
        # httpx limits each read, not the whole answer: one that trickles in would outlive the deadline
        if attempt.stop_at is not None and self._clock() > attempt.stop_at:
            raise TimedOut(f"{attempt.service}: the answer was still arriving at the deadline")


class RewardClient(_BaseClient):
    """A reward service (or several equal ones) as Python calls; thread-safe; use it as a context manager.

    ``base_url``: ``http://host:port``, or a list of them: calls take turns, and a service that fails is left for the
    next. ``api_key`` is sent as a bearer key. ``wire``: "safetensors" (pixels as they are) or "json" (base64 PNG);
    both are lossless. ``patience``: seconds for which a call is repeated while the service cannot be reached or is
    overloaded; 0 asks once. ``timeout``: seconds of silence after which an attempt has failed. ``transport``,
    ``clock``, ``sleep`` and ``random`` (in [0, 1)) replace httpx's transport, the monotonic clock and the like.

    Calls raise :class:`~trainer_client.RewardError` (its tree is drawn in ``trainer_client.errors``) and, before
    anything is sent, TypeError or ValueError for arguments that make no sense. Calls share a pool of connections.
    ``deadline``: seconds from now after which the answer is worth nothing, repetitions included; the service is told
    what is left of it, and its last word is awaited for half a second more.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        **options: Unpack[_Options],
    ) -> None:
        super().__init__(base_url, **options)
        self._sleep = sleep
        self._http = httpx.Client(transport=transport)

    def score(
        self, items: Items, models: Models, *, deadline: float | None = None, explain: bool = False
    ) -> ScoreResponse:
        """Scores of every candidate by every model and their weighted total; ``explain`` asks for ``details``."""
        return self._perform(score_call(items, models, deadline, explain, self._wire))

    def compare(
        self,
        items: Items,
        model: str,
        *,
        pairs: Pairs = "all",
        both_orders: bool = True,
        explain: bool = False,
        deadline: float | None = None,
    ) -> CompareResponse:
        """Preferences among each item's candidates; ``both_orders`` shows each pair as (i, j) and as (j, i)."""
        return self._perform(compare_call(items, model, pairs, both_orders, explain, deadline, self._wire))

    def gradient(self, items: Items, models: Models, *, deadline: float | None = None) -> GradientResponse:
        """Scores and d(total)/d(image) of images in [0, 1], sent as float32 unrounded, on either wire setting."""
        return self._perform(gradient_call(items, models, deadline))

    def models(self) -> list[ModelInfo]:
        """The reward models that the service offers."""
        return self._perform(MODELS_CALL)

    def ready(self) -> bool:
        """Whether a service answers and says that it is ready; asked once, not repeated."""
        return any(self._is_ready(service) for service in self._services)

    def _is_ready(self, service: str) -> bool:
        attempt = Attempt(service, None, httpx.Timeout(READY_TIMEOUT), None)
        try:
            raise_for_status(service, self._exchange(READY_CALL, attempt))
        except TransportError:
            return False
        return True

    def _perform(self, call: Call[Result]) -> Result:
        attempts = self._attempts(call.deadline)
        while True:
            attempt = attempts.begin()
            try:
                answer = self._exchange(call, attempt)
                raise_for_status(attempt.service, answer)
                return call.parse(answer)
            except RewardError as error:
                delay = attempts.after(error)
            self._sleep(delay)

    def _exchange(self, call: Call[Any], attempt: Attempt) -> Answer:
        content = None if call.body is None else call.body.render(attempt.deadline_ms)
        request = httpx.Request(
            call.method,
            attempt.service + call.path,
            headers=self._headers_of(call, content),
            content=None if content is None else content.chunks(),
            extensions={"timeout": attempt.timeout.as_dict()},
        )
        with transport_errors(attempt.service, content):
            response = self._http.send(request, stream=True)
            received = bytearray()
            try:
                for chunk in response.iter_bytes():
                    received += chunk
                    self._check_time(attempt)
            finally:
                response.close()
        return Answer(response.status_code, response.headers, bytes(received))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncRewardClient(_BaseClient):
    """:class:`RewardClient` for asyncio: the same arguments, calls, results and errors; use it with ``async with``.

    Images are converted in the event loop's thread before the first await, so that what is sent is what was passed.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        **options: Unpack[_Options],
    ) -> None:
        super().__init__(base_url, **options)
        self._sleep = sleep
        self._http = httpx.AsyncClient(transport=transport)

    async def score(
        self, items: Items, models: Models, *, deadline: float | None = None, explain: bool = False
    ) -> ScoreResponse:
        """See :meth:`RewardClient.score`."""
        return await self._perform(score_call(items, models, deadline, explain, self._wire))

    async def compare(
        self,
        items: Items,
        model: str,
        *,
        pairs: Pairs = "all",
        both_orders: bool = True,
        explain: bool = False,
        deadline: float | None = None,
    ) -> CompareResponse:
        """See :meth:`RewardClient.compare`."""
        return await self._perform(compare_call(items, model, pairs, both_orders, explain, deadline, self._wire))

    async def gradient(self, items: Items, models: Models, *, deadline: float | None = None) -> GradientResponse:
        """See :meth:`RewardClient.gradient`."""
        return await self._perform(gradient_call(items, models, deadline))

    async def models(self) -> list[ModelInfo]:
        """See :meth:`RewardClient.models`."""
        return await self._perform(MODELS_CALL)

    async def ready(self) -> bool:
        """See :meth:`RewardClient.ready`."""
        return any([await self._is_ready(service) for service in self._services])

    async def _is_ready(self, service: str) -> bool:
        attempt = Attempt(service, None, httpx.Timeout(READY_TIMEOUT), None)
        try:
            raise_for_status(service, await self._exchange(READY_CALL, attempt))
        except TransportError:
            return False
        return True

    async def _perform(self, call: Call[Result]) -> Result:
        attempts = self._attempts(call.deadline)
        while True:
            attempt = attempts.begin()
            try:
                answer = await self._exchange(call, attempt)
                raise_for_status(attempt.service, answer)
                return call.parse(answer)
            except RewardError as error:
                delay = attempts.after(error)
            await self._sleep(delay)

    async def _exchange(self, call: Call[Any], attempt: Attempt) -> Answer:
        content = None if call.body is None else call.body.render(attempt.deadline_ms)
        request = httpx.Request(
            call.method,
            attempt.service + call.path,
            headers=self._headers_of(call, content),
            content=None if content is None else content.async_chunks(),
            extensions={"timeout": attempt.timeout.as_dict()},
        )
        with transport_errors(attempt.service, content):
            response = await self._http.send(request, stream=True)
            received = bytearray()
            try:
                async for chunk in response.aiter_bytes():
                    received += chunk
                    self._check_time(attempt)
            finally:
                await response.aclose()
        return Answer(response.status_code, response.headers, bytes(received))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()
