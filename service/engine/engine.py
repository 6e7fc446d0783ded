"""Owns the loaded models and their workers; :meth:`Engine.submit` is the only door.

States: ``starting`` -> ``serving`` -> ``draining``, and from any of them ``failed``. The process is crash-only: a lane
that hangs past its watchdog or a device that is poisoned makes the engine ``failed`` at once, everything that waits is
answered 503, and ``on_fatal`` ends the process for the orchestrator to restart.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch

import models.catalog  # noqa: F401  (registers the reward models)
from models.base import LoadOptions, ModelError, Sample, SampleError, TowerReward
from models.registry import get_model, list_models
from service.engine.batcher import Batcher, Job, Outcome, Ticket
from service.engine.compile import use_compile_cache
from service.engine.features import FeatureCache
from service.engine.worker import Lane, TensorSample, Worker, WorkerOptions
from service.errors import DeadlineExceeded, InvalidRequest, Overloaded, ServiceError, Unavailable, UnknownModel
from service.settings import ModelSettings, Settings
from service.telemetry import Telemetry

log = logging.getLogger(__name__)

State = Literal["starting", "serving", "draining", "failed"]
CANARY_TIMEOUT_S = 10.0


@dataclass(frozen=True, eq=False)
class Made:
    """What a maker gives: a decoded sample and what the caller should know about its image."""

    sample: Sample | TensorSample
    warnings: tuple[str, ...] = ()


Maker = Callable[[], Made]
"""Decodes one sample on a pool thread; raises SampleError when its input cannot be read."""


@dataclass(eq=False)
class SampleResult:
    """All that is known of one sample when its request ends."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    unreadable: SampleError | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    """The longest that any sample of the request spent in each stage, in milliseconds."""

    decode: float
    queue: float
    forward: float


class _Request:
    """The response channel of one submission: collects outcomes from any thread, wakes its coroutine once."""

    def __init__(self, count: int, expected: int, loop: asyncio.AbstractEventLoop) -> None:
        self.results = [SampleResult() for _ in range(count)]
        self.done: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._left = expected
        self._lock = threading.Lock()

    def settle(self, index: int, model: str, outcome: Outcome) -> None:
        with self._lock:
            self.results[index].outcomes[model] = outcome
            self._left -= 1
            finished = self._left == 0
        if finished:
            self._loop.call_soon_threadsafe(self._finish, None)

    def snapshot(self) -> list[SampleResult]:
        """The results so far; a forward that is still running cannot change them any more."""
        with self._lock:
            return [SampleResult(dict(r.outcomes), r.unreadable, r.warnings) for r in self.results]

    def fail(self, error: ServiceError) -> None:
        self._loop.call_soon_threadsafe(self._finish, error)

    def _finish(self, error: ServiceError | None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)


class Engine:
    """Loads the models of the settings and scores samples with them."""

    def __init__(self, settings: Settings, telemetry: Telemetry, on_fatal: Callable[[str], None]) -> None:
        self.settings = settings
        self.state: State = "starting"
        self.workers: dict[str, Worker] = {}
        self._telemetry = telemetry
        self._on_fatal = on_fatal
        self._lanes: list[Lane] = []
        self._requests: set[_Request] = set()
        threads = settings.decode_threads or min(8, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._idle = asyncio.Event()
        self._idle.set()
        self._stop_watching = threading.Event()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load and warm every model of the settings; raises what the first failing model raised."""
        device = resolve_device(self.settings.device)
        use_compile_cache(self.settings.cache_dir)
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        for plugin in self.settings.plugins:
            importlib.import_module(plugin)
        self._build(device)
        for lane in self._lanes:
            lane.start()
        for lane in self._lanes:
            await asyncio.to_thread(lane.started_ok.wait)
            if lane.startup_error is not None:
                raise lane.startup_error
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self.state = "serving"
        log.info("serving", extra={"models": sorted(self.workers), "device": str(device)})

    def _build(self, device: torch.device) -> None:
        shared = Lane("device", self.fail)
        caches = (
            FeatureCache("image", self.settings.caches.image_features_bytes, self._telemetry),
            FeatureCache("text", self.settings.caches.text_features_bytes, self._telemetry),
        )
        for name, model_settings in self.settings.models.items():
            try:
                uses_device = get_model(name).uses_device
            except KeyError as error:
                raise ValueError(f"settings.models names an {error.args[0]}") from error
            lane = shared if uses_device else Lane(name, self.fail)
            batcher = Batcher(
                name,
                max_cost=self.settings.queue.max_cost,
                max_delay_s=self.settings.queue.max_delay_ms / 1000,
                wakeup=lane.wakeup,
                telemetry=self._telemetry,
            )
            options = worker_options(name, model_settings, self.settings, device)
            worker = Worker(options, batcher, caches, self._telemetry)
            lane.workers.append(worker)
            self.workers[name] = worker
            if lane not in self._lanes:
                self._lanes.append(lane)

    def fail(self, reason: str) -> None:
        """Something that no retry can mend: not ready from now on, and the process ends. Any thread."""
        if self.state == "failed":
            return
        self.state = "failed"
        log.critical("the process ends: %s", reason, extra={"reason": reason})
        for request in list(self._requests):
            request.fail(self._unavailable())
        self._on_fatal(reason)

    def _watch(self) -> None:
        while not self._stop_watching.wait(0.1):
            now = time.monotonic()
            for lane in self._lanes:
                worker = lane.overdue(now)
                if worker is not None:
                    self.fail(f"a forward of {worker.name} hangs: over {worker.options.watchdog_s:g} s")
                    return

    def drain(self) -> None:
        """Refuse new work; what was admitted is still answered."""
        if self.state in ("starting", "serving"):
            self.state = "draining"
            log.info("draining", extra={"requests": len(self._requests)})

    async def idle(self) -> None:
        """Wait until no request is in the engine."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Stop the threads; work still queued is not run."""
        self._stop_watching.set()
        for lane in self._lanes:
            lane.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for lane in self._lanes:
            if lane.is_alive():
                await asyncio.to_thread(lane.join, 5.0)

    # -- the door -----------------------------------------------------------------------------------------------------

    def worker(self, name: str) -> Worker:
        """The worker of a loaded model; raises UnknownModel."""
        worker = self.workers.get(name)
        if worker is None:
            known = name in list_models(hidden=True)
            raise UnknownModel(
                f"{name!r} is not loaded; this service has {', '.join(sorted(self.workers))}"
                if known
                else "no such reward model; GET /models lists them",
                code="model_not_loaded" if known else "unknown_model",
            )
        return worker

    def require(self, models: Sequence[str], count: int, job: Job) -> list[Worker]:
        """Workers that can take ``count`` samples each now; raises UnknownModel, Unavailable or Overloaded."""
        workers = [self.worker(name) for name in models]
        if self.state != "serving":
            raise self._unavailable()
        for worker in workers:
            if job == "gradient" and not worker.model.info.differentiable:
                raise InvalidRequest(f"{worker.name} is not differentiable", code="not_differentiable")
            worker.batcher.check(count, job)
        return workers

    def check_open(self) -> None:
        """Raise Unavailable or Overloaded when no request could be admitted, before anyone reads its body."""
        if self.state != "serving":
            raise self._unavailable()
        refusals: list[Overloaded] = []
        for worker in self.workers.values():
            try:
                worker.batcher.check(1, "score")
            except Overloaded as refusal:
                refusals.append(refusal)
            else:
                return
        if refusals:
            raise min(refusals, key=lambda refusal: refusal.retry_after_s or 0)

    def _unavailable(self) -> Unavailable:
        wait = {"starting": 5, "serving": 1, "draining": 1, "failed": 5}[self.state]
        return Unavailable(f"the service is {self.state}", code=self.state, retry_after_s=wait)

    async def submit(
        self, models: Sequence[str], makers: Sequence[Maker], *, job: Job, deadline: float
    ) -> tuple[list[SampleResult], Timing]:
        """Score every sample with every model; all are admitted or none.

        ``deadline`` is in ``time.monotonic()`` seconds. At the deadline, samples that are not finished have a
        SampleError with the code ``deadline``; when none is finished, DeadlineExceeded is raised. When the caller is
        cancelled (its client left), work that has not begun is dropped.
        """
        workers = self.require(models, len(makers), job)  # no await from here to admit(): all or nothing
        request = _Request(len(makers), len(makers) * len(workers), asyncio.get_running_loop())
        rows = [[self._admit(worker, request, i, job, deadline) for worker in workers] for i in range(len(makers))]
        self._requests.add(request)
        self._idle.clear()
        reason: Literal["deadline", "disconnect"] = "disconnect"
        try:
            for i, maker in enumerate(makers):
                self._pool.submit(self._prepare, request, i, maker, workers, rows[i])
            await asyncio.wait_for(asyncio.shield(request.done), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            reason = "deadline"
        finally:
            for row in rows:
                for worker, ticket in zip(workers, row, strict=True):
                    worker.batcher.drop(ticket, reason)
            request.done.cancel()
            self._requests.discard(request)
            if not self._requests:
                self._idle.set()
        return self._collect(request, models), timing([ticket for row in rows for ticket in row])

    def _admit(self, worker: Worker, request: _Request, index: int, job: Job, deadline: float) -> Ticket:
        def settle(ticket: Ticket, outcome: Outcome) -> None:
            self._observe(worker.name, ticket, outcome)
            request.settle(index, worker.name, outcome)

        ticket = Ticket(job, settle, deadline)
        worker.batcher.admit(ticket)
        return ticket

    def _prepare(
        self, request: _Request, index: int, maker: Maker, workers: Sequence[Worker], tickets: Sequence[Ticket]
    ) -> None:
        """On a pool thread: decode one sample and prepare it for each model."""
        if all(ticket.state != "admitted" for ticket in tickets):
            return
        try:
            made = maker()
        except Exception as error:
            unreadable = error
            if not isinstance(error, SampleError):
                log.exception("decode failed")
                unreadable = ModelError("the service failed to decode this candidate", code="decode_failed")
            request.results[index].unreadable = unreadable  # type: ignore[assignment]
            for worker, ticket in zip(workers, tickets, strict=True):
                worker.batcher.reject(ticket, unreadable)  # type: ignore[arg-type]
            return
        request.results[index].warnings = made.warnings
        for worker, ticket in zip(workers, tickets, strict=True):
            if ticket.state != "admitted":
                continue
            try:
                worker.batcher.ready(ticket, worker.prepare(made.sample, ticket.job))
            except SampleError as error:
                worker.batcher.reject(ticket, error)

    def _observe(self, model: str, ticket: Ticket, outcome: Outcome) -> None:
        stage = self._telemetry.stage
        if ticket.ready_at:
            stage.labels(model, "decode").observe(ticket.ready_at - ticket.admitted_at)
        if ticket.started_at:
            stage.labels(model, "queue").observe(ticket.started_at - ticket.ready_at)
            stage.labels(model, "forward").observe(ticket.finished_at - ticket.started_at)
        if isinstance(outcome, SampleError):
            self._telemetry.sample_errors.labels(model, outcome.code).inc()

    def _collect(self, request: _Request, models: Sequence[str]) -> list[SampleResult]:
        results = request.snapshot()
        if not any(result.outcomes for result in results):
            raise DeadlineExceeded("no sample was finished at the deadline; the work has been dropped")
        late = ModelError("not finished at the deadline", code="deadline")
        for result in results:
            for model in models:
                if model not in result.outcomes:
                    result.outcomes[model] = late
                    self._telemetry.sample_errors.labels(model, "deadline").inc()
        return results

    # -- readiness ----------------------------------------------------------------------------------------------------

    async def check_ready(self) -> dict[str, bool]:
        """Whether each model answers: a success of the last seconds proves it, else its canary runs now.

        Raises Unavailable when the engine is not serving at all.
        """
        if self.state != "serving":
            self._telemetry.ready.set(0)
            raise self._unavailable()
        names = list(self.workers)
        answers = await asyncio.gather(*(self._answers(self.workers[name]) for name in names))
        self._telemetry.ready.set(int(all(answers) and self.state == "serving"))
        if self.state != "serving":
            raise self._unavailable()
        return dict(zip(names, answers, strict=True))

    async def _answers(self, worker: Worker) -> bool:
        if time.monotonic() - worker.last_success <= self.settings.ready_max_age_s:
            return True
        request = _Request(1, 1, asyncio.get_running_loop())
        ticket = self._admit(worker, request, 0, "score", time.monotonic() + CANARY_TIMEOUT_S)
        try:
            payload = await asyncio.to_thread(worker.prepare, worker.model.canary(), "score")
            worker.batcher.ready(ticket, payload, front=True)
            await asyncio.wait_for(asyncio.shield(request.done), CANARY_TIMEOUT_S)
        except (TimeoutError, SampleError):
            return False
        finally:
            worker.batcher.drop(ticket, "deadline")
            request.done.cancel()
        return not isinstance(request.results[0].outcomes[worker.name], SampleError)


def timing(tickets: Sequence[Ticket]) -> Timing:
    """The slowest ticket of each stage, in milliseconds."""
    decode = max((t.ready_at - t.admitted_at for t in tickets if t.ready_at), default=0.0)
    started = [t for t in tickets if t.started_at]
    queue = max((t.started_at - t.ready_at for t in started), default=0.0)
    forward = max((t.finished_at - t.started_at for t in started if t.finished_at), default=0.0)
    return Timing(*(round(seconds * 1000, 3) for seconds in (decode, queue, forward)))


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device or the CPU; a CUDA device that is asked for and missing raises ValueError."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"settings.device is {name!r} but torch sees no CUDA device")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on CUDA and on CPUs with AMX, else float32 (AVX512-BF16 alone was measured slower here)."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def worker_options(name: str, model: ModelSettings, settings: Settings, device: torch.device) -> WorkerOptions:
    """Settings of one model over settings of all, with ``auto`` resolved for the device."""
    dtype = model.dtype if model.dtype != "auto" else settings.dtype
    compile = model.compile if model.compile != "auto" else settings.compile
    if compile == "auto":
        compile = "on" if device.type == "cuda" else "off"
    model_class = get_model(name)
    default = 32 if device.type == "cuda" else 8
    if not issubclass(model_class, TowerReward):
        default = min(default, model_class.max_batch or default)
    return WorkerOptions(
        name=name,
        load=LoadOptions(device, resolve_dtype(dtype, device), model.weights, model.options),
        micro_batch=model.micro_batch or settings.micro_batch or default,
        invariance=settings.invariance,
        compile=compile,
        watchdog_s=model.watchdog_s or settings.watchdog_s,
    )
