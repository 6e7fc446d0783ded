"""HTTP to a judge's server: many requests at once from one thread's call, with timeouts, retries and typed errors.

Requests run on an event loop in a thread of its own, so that an attempt has a time limit as a whole: a server that
sends a byte now and then would pass every limit between two bytes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeAlias, TypeVar

import httpx

from models.base import ModelError
from service.engine.remote_answers import bad_answer
from service.remote_settings import RemoteSettings

log = logging.getLogger(__name__)

STEP_S = 0.05
"""How often a waiting caller is told that all is well."""
BACKOFF_S = 0.5
"""Before the first retry; it doubles with each."""
MAX_WAIT_S = 30.0
"""Longest wait before a retry, also where the server asks for more."""
CLOSE_S = 5.0

Body: TypeAlias = Mapping[str, Any]
Reply: TypeAlias = Mapping[str, Any] | ModelError
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Failure:
    """An attempt that failed; ``wait``: seconds that the server asks for before the next."""

    error: ModelError
    retry: bool = False
    wait: float | None = None
    status: int | None = None


class Connection:
    """Connections to one server. Thread-safe; the thread starts with the first request and ends with ``close``.

    Patience is bounded: a request takes at most ``max_retries + 1`` attempts of ``timeout_s`` and the waits between.
    """

    def __init__(self, settings: RemoteSettings, *, backoff_s: float = BACKOFF_S) -> None:
        self._settings = settings
        self._key = settings.secret()
        self._backoff_s = backoff_s
        self._lock = threading.Lock()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: httpx.AsyncClient | None = None

    def __repr__(self) -> str:
        return f"Connection({self._settings.model!r})"

    def post_all(self, path: str, bodies: Sequence[Body], on_step: Callable[[], None]) -> list[Reply]:
        """The JSON objects that the server answers, in the order of ``bodies``; an error in place of what failed.

        Requests begin in that order, at most ``concurrency`` of one call at the same time. ``on_step`` is called every
        :data:`STEP_S` seconds meanwhile, on the calling thread; what it raises ends the requests.
        """

        async def work() -> list[Reply]:
            places = asyncio.Semaphore(self._settings.concurrency)

            async def one(body: Body) -> Reply:
                async with places:
                    return await self._request("POST", path, body)

            return await asyncio.gather(*[one(body) for body in bodies])

        return self._wait(work(), on_step)

    def get(self, path: str, on_step: Callable[[], None]) -> Reply:
        """The JSON object under ``path``, or an error."""
        return self._wait(self._request("GET", path, None), on_step)

    def close(self) -> None:
        """End all requests (they fail with "remote_unavailable") and connections; idempotent."""
        with self._lock:
            self._closed = True
            loop, thread, client = self._loop, self._thread, self._client
            self._loop = self._thread = self._client = None
        if loop is None or thread is None or client is None:
            return
        asyncio.run_coroutine_threadsafe(_end(client), loop).result(CLOSE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_S)
        loop.close()

    # -- the caller's thread ------------------------------------------------------------------------------------------

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise _closed()
            if self._loop is None:
                self._client = self._new_client()
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="remote-chat", daemon=True)
                self._thread.start()
            return self._loop

    def _new_client(self) -> httpx.AsyncClient:
        settings = self._settings
        key = self._key
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key is not None else {},
            timeout=httpx.Timeout(settings.timeout_s, connect=settings.connect_timeout_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency),
            # The environment may name a proxy or another key (.netrc); only the settings decide.
            trust_env=False,
        )

    def _wait(self, work: Coroutine[Any, Any, Result], on_step: Callable[[], None]) -> Result:
        try:
            loop = self._running()
        except ModelError:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            while not concurrent.futures.wait([future], timeout=STEP_S).done:
                on_step()
        except BaseException:
            future.cancel()
            raise
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise _closed() from None

    # -- the loop's thread --------------------------------------------------------------------------------------------

    async def _request(self, method: str, path: str, body: Body | None) -> Reply:
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        for attempt in range(self._settings.max_retries + 1):
            outcome = await self._attempt(method, path, content)
            if not isinstance(outcome, _Failure):
                return outcome
            last = attempt == self._settings.max_retries
            if last or not outcome.retry:
                return outcome.error
            wait = outcome.wait
            if wait is None:
                # Jitter: what failed together is not to come back together.
                wait = self._backoff_s * 2**attempt * (0.5 + random.random() / 2)
            await asyncio.sleep(min(wait, MAX_WAIT_S))
        raise AssertionError("the last attempt returns")

    async def _attempt(self, method: str, path: str, content: bytes | None) -> Mapping[str, Any] | _Failure:
        outcome = await self._send(method, path, content)
        detail = ""
        if isinstance(outcome, httpx.Response):
            parsed = _json_object(outcome)
            if outcome.is_success and parsed is not None:
                return parsed
            detail = _detail(parsed)
            outcome = _no_answer(outcome)
        self._log(outcome, detail)
        return outcome

    async def _send(self, method: str, path: str, content: bytes | None) -> httpx.Response | _Failure:
        assert self._client is not None or self._closed
        client = self._client
        if client is None:
            return _Failure(_closed())
        headers = {"Content-Type": "application/json"} if content is not None else {}
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await client.request(method, self._settings.base_url + path, content=content, headers=headers)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            return _Failure(_unavailable("the judge's server cannot be reached"), retry=True)
        except (httpx.TimeoutException, TimeoutError):
            # What took too long once takes too long again, and the server may still be at work on it.
            seconds = f"{self._settings.timeout_s:g}"
            return _Failure(ModelError(f"the judge's server took longer than {seconds} s", code="remote_timeout"))
        except httpx.TransportError:
            return _Failure(_unavailable("the judge's server broke off the connection"), retry=True)
        except httpx.DecodingError:
            return _Failure(bad_answer("the judge's server answered in a broken content encoding"))

    def _log(self, failure: _Failure, detail: str) -> None:
        if self._key is not None:
            detail = detail.replace(self._key.get_secret_value(), "***")
        log.warning(
            "a judge's server failed",
            extra={
                "judge_model": self._settings.model,
                "code": failure.error.code,
                "status": failure.status,
                "retry": failure.retry,
                "detail": detail[:200],
            },
        )


async def _end(client: httpx.AsyncClient) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.aclose()


def _closed() -> ModelError:
    return _unavailable("the connection to the judge's server is closed")


def _unavailable(message: str) -> ModelError:
    return ModelError(message, code="remote_unavailable")


def _no_answer(response: httpx.Response) -> _Failure:
    """What a response means that is no JSON object with a status 2xx."""
    status = response.status_code
    if response.is_success:
        return _Failure(bad_answer("the judge's server answered with no JSON object"), status=status)
    if status in (401, 403):
        error = ModelError("the judge's server does not accept the key", code="remote_unauthorized")
        return _Failure(error, status=status)
    if status == 429:
        error = ModelError("the judge's server has too many requests", code="remote_overloaded")
        return _Failure(error, True, retry_after(response.headers.get("Retry-After")), status)
    if status >= 500:
        wait = retry_after(response.headers.get("Retry-After"))
        return _Failure(
            _unavailable(f"the judge's server failed with status {status}"), status in (502, 503, 504), wait, status
        )
    error = ModelError(f"the judge's server refused the request with status {status}", code="remote_refused")
    return _Failure(error, status=status)


def retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds them or a date; None where it holds neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _json_object(response: httpx.Response) -> Mapping[str, Any] | None:
    try:
        parsed = response.json()
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _detail(parsed: Mapping[str, Any] | None) -> str:
    """The server's own words on a failure, for the log: OpenAI's, SGLang's and FastAPI's places for them."""
    whole = parsed or {}
    inner = whole.get("error", whole)
    # vLLM's answer to a wrong key is {"error": "Unauthorized"}.
    message = inner.get("message", inner.get("detail")) if isinstance(inner, dict) else inner
    return message if isinstance(message, str) else ""
