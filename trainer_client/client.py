"""The reward client, sync and async: rewards over HTTP that are right or an error.

Both clients share everything but the waiting: a question is built (``_calls``), goes to the services that can answer it
(``_flow``, ``routing``) in attempts (``_retry``), and its answers are checked (``_parse``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Self, TypeVar, Unpack

import httpx

from trainer_client._base import BaseClient, Options
from trainer_client._calls import (
    READY_CALL,
    Call,
    Items,
    Models,
    Pairs,
    Question,
    compare_question,
    gradient_question,
    score_question,
)
from trainer_client._flow import Effect, Exchange, Flow, Sleep, ask, ask_models
from trainer_client._retry import Answer, Attempt, raise_for_status, transport_errors
from trainer_client.errors import TransportError
from trainer_client.results import CompareResponse, GradientResponse, ModelInfo, ScoreResponse

Result = TypeVar("Result")

READY_TIMEOUT = 5.0
"""Seconds that a service may take to say whether it is ready."""
_PARALLEL = 64
"""Requests to different services that one sync client has on their way at the same time; all its calls together."""


class RewardClient(BaseClient):
    """One or several reward services as Python calls; thread-safe; use it as a context manager.

    ``base_url``: ``http://host:port``, or a list of them. Several are asked for their models: each model of a call goes
    to a service that has it, the services of one call work at the same time, replicas share the load, and one that
    fails is left for another until it is back (it is asked at least once a minute). ``api_key`` is sent as a bearer
    key. ``wire``: "safetensors" (pixels as they are) or "json" (base64 PNG); both are lossless. ``patience``: seconds
    for which a call is repeated while a service cannot be reached or is overloaded; 0 asks once. ``timeout``: seconds
    of silence after which an attempt has failed. ``fingerprints`` (those of :attr:`fingerprints` in an earlier run) are
    insisted on, other models' are remembered at first use; where one changes, or replicas differ, calls raise
    :class:`~trainer_client.FingerprintChanged` unless ``allow_fingerprint_change``. ``transport``, ``clock``, ``sleep``
    and ``random`` (in [0, 1)) replace httpx's transport, the monotonic clock and the like.

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
        **options: Unpack[Options],
    ) -> None:
        super().__init__(base_url, **options)
        self._sleep = sleep
        self._http = httpx.Client(transport=transport)
        self._pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="reward-client")

    def score(
        self, items: Items, models: Models, *, deadline: float | None = None, explain: bool = False
    ) -> ScoreResponse:
        """Scores of every candidate by every model and their weighted total; ``explain`` asks for ``details``."""
        return self._run(self._ask(lambda: score_question(items, models, deadline, explain, self._wire)))

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
        return self._run(
            self._ask(lambda: compare_question(items, model, pairs, both_orders, explain, deadline, self._wire))
        )

    def gradient(
        self, items: Items, models: Models, *, both_orders: bool = True, deadline: float | None = None
    ) -> GradientResponse:
        """Scores and d(total)/d(image) of images in [0, 1], sent as float32 unrounded, on either wire setting.

        ``both_orders``: a judge sees each image before its reference and after it, at twice the cost; else before it.
        """
        return self._run(self._ask(lambda: gradient_question(items, models, deadline, both_orders)))

    def models(self) -> list[ModelInfo]:
        """The reward models that the service knows, loaded or not; of several services: those loaded, each once."""
        return self._run(ask_models(self._routes, self._budget(None)))

    def ready(self) -> bool:
        """Whether a service answers and says that it is ready; asked once, not repeated."""
        return any(self._is_ready(service) for service in self._routes.urls)

    def _is_ready(self, service: str) -> bool:
        attempt = Attempt(service, None, httpx.Timeout(READY_TIMEOUT), None)
        try:
            raise_for_status(service, self._exchange(READY_CALL, attempt))
        except TransportError:
            return False
        return True

    def _run(self, flow: Flow[Result]) -> Result:
        with self._meter.working():
            return self._drive(flow)

    def _drive(self, flow: Generator[Effect, Any, Result]) -> Result:
        step, outcome = flow.send, None
        while True:
            try:
                effect = step(outcome)
            except StopIteration as finished:
                result: Result = finished.value
                return result
            try:
                step, outcome = flow.send, self._perform(effect)
            except Exception as error:
                step, outcome = flow.throw, error

    def _perform(self, effect: Effect) -> Any:
        if isinstance(effect, Exchange):
            return self._exchange(effect.call, effect.attempt)
        if isinstance(effect, Sleep):
            self._meter.add(retries=1)
            return self._sleep(effect.seconds)
        if len(effect.flows) == 1:
            return [self._drive(effect.flows[0])]
        running = [self._pool.submit(self._run, flow) for flow in effect.flows]
        wait(running, return_when=FIRST_EXCEPTION)
        failed = [future.exception() for future in running if future.done() and future.exception() is not None]
        if failed and failed[0] is not None:
            effect.budget.abandon()  # a request that is on its way cannot be called back from here, only not repeated
            raise failed[0]
        return [future.result() for future in running]

    def _exchange(self, call: Call[Any], attempt: Attempt) -> Answer:
        content = None if call.body is None else call.body.render(attempt.deadline_ms)
        request = self._request(call, attempt, content, None if content is None else content.chunks())
        received = bytearray()
        try:
            with transport_errors(attempt.service, content):
                response = self._http.send(request, stream=True)
                try:
                    for chunk in response.iter_bytes():
                        received += chunk
                        self._check_time(attempt)
                finally:
                    response.close()
        finally:
            self._count(content, received)
        return Answer(response.status_code, response.headers, bytes(received))

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncRewardClient(BaseClient):
    """:class:`RewardClient` for asyncio: the same arguments, calls, results and errors; use it with ``async with``.

    Images are converted in the event loop's thread before the first await, so that what is sent is what was passed.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(base_url, **options)
        self._sleep = sleep
        self._http = httpx.AsyncClient(transport=transport)

    async def score(
        self, items: Items, models: Models, *, deadline: float | None = None, explain: bool = False
    ) -> ScoreResponse:
        """See :meth:`RewardClient.score`."""
        return await self._run(self._ask(lambda: score_question(items, models, deadline, explain, self._wire)))

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
        return await self._run(
            self._ask(lambda: compare_question(items, model, pairs, both_orders, explain, deadline, self._wire))
        )

    async def gradient(
        self, items: Items, models: Models, *, both_orders: bool = True, deadline: float | None = None
    ) -> GradientResponse:
        """See :meth:`RewardClient.gradient`."""
        return await self._run(self._ask(lambda: gradient_question(items, models, deadline, both_orders)))

    async def models(self) -> list[ModelInfo]:
        """See :meth:`RewardClient.models`."""
        return await self._run(ask_models(self._routes, self._budget(None)))

    async def ready(self) -> bool:
        """See :meth:`RewardClient.ready`."""
        return any([await self._is_ready(service) for service in self._routes.urls])

    async def _is_ready(self, service: str) -> bool:
        attempt = Attempt(service, None, httpx.Timeout(READY_TIMEOUT), None)
        try:
            raise_for_status(service, await self._exchange(READY_CALL, attempt))
        except TransportError:
            return False
        return True

    async def answer(self, question: Question[Result]) -> Result:
        """Ask a question that was built before, perhaps by another thread."""
        return await self._run(ask(question, self._routes, self._budget(question.deadline)))

    async def _run(self, flow: Flow[Result]) -> Result:
        step, outcome = flow.send, None
        try:
            while True:
                try:
                    with self._meter.working():
                        effect = step(outcome)
                except StopIteration as finished:
                    result: Result = finished.value
                    return result
                try:
                    step, outcome = flow.send, await self._perform(effect)
                except Exception as error:
                    step, outcome = flow.throw, error
        finally:
            flow.close()  # after a cancellation: what the flow has counted must be uncounted now

    async def _perform(self, effect: Effect) -> Any:
        if isinstance(effect, Exchange):
            return await self._exchange(effect.call, effect.attempt)
        if isinstance(effect, Sleep):
            self._meter.add(retries=1)
            return await self._sleep(effect.seconds)
        running = [asyncio.create_task(self._run(flow)) for flow in effect.flows]
        try:
            return await asyncio.gather(*running)
        except BaseException:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            raise

    async def _exchange(self, call: Call[Any], attempt: Attempt) -> Answer:
        content = None if call.body is None else call.body.render(attempt.deadline_ms)
        request = self._request(call, attempt, content, None if content is None else content.async_chunks())
        received = bytearray()
        try:
            with transport_errors(attempt.service, content):
                response = await self._http.send(request, stream=True)
                try:
                    async for chunk in response.aiter_bytes():
                        received += chunk
                        self._check_time(attempt)
                finally:
                    await response.aclose()
        finally:
            self._count(content, received)
        return Answer(response.status_code, response.headers, bytes(received))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()
