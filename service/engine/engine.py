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
from typing import Literal

import torch

import models.catalog  # noqa: F401  (registers the reward models)
from models.base import ModelError, SampleError
from models.registry import get_model, list_models
from service.engine.batcher import Batcher, Job, Outcome, Ticket
from service.engine.compile import use_compile_cache
from service.engine.features import FeatureCache
from service.engine.lane import Lane
from service.engine.plan import resolve_device, worker_options
from service.engine.request import Maker, PendingRequest, SampleResult, Timing, bare, timing
from service.engine.worker import Worker, healthy
from service.errors import DeadlineExceeded, InvalidRequest, Unavailable, UnknownModel
from service.settings import Settings
from service.telemetry import Telemetry

log = logging.getLogger(__name__)

State = Literal["starting", "serving", "draining", "failed"]
CANARY_TIMEOUT_S = 10.0


class Engine:
    """Loads the models of the settings and scores samples with them."""

    def __init__(self, settings: Settings, telemetry: Telemetry, on_fatal: Callable[[str], None]) -> None:
        self.settings = settings
        self.state: State = "starting"
        self.workers: dict[str, Worker] = {}
        self._telemetry = telemetry
        self._on_fatal = on_fatal
        self._lanes: list[Lane] = []
        self._requests: set[PendingRequest] = set()
        self._canaries: dict[str, asyncio.Task[bool]] = {}
        self.on_closing: Callable[[], None] = lambda: None
        """Called on the event loop when no more work is taken."""
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
        if device.type == "cuda":
            # Convolutions would otherwise round float32 to ten bits of mantissa, which matrix products do not.
            torch.backends.cudnn.allow_tf32 = False
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        for plugin in self.settings.plugins:
            importlib.import_module(plugin)
        self._build(device)
        for lane in self._lanes:
            lane.start()
        try:
            await self._lanes_started()
        except BaseException:
            await self.stop()
            raise
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        if self.state == "starting":
            self.state = "serving"
        log.info(self.state, extra={"models": sorted(self.workers), "device": str(device)})

    async def _lanes_started(self) -> None:
        """Wait for every lane; raises the first startup error as soon as there is one, whatever still loads."""
        waiting = list(self._lanes)
        while waiting:
            for lane in self._lanes:
                if lane.startup_error is not None:
                    raise lane.startup_error
            waiting = [lane for lane in waiting if not lane.started_ok.is_set()]
            await asyncio.sleep(0.05)

    def _build(self, device: torch.device) -> None:
        shared = Lane("device", self.fail)
        caches = (
            FeatureCache("image", self.settings.caches.image_features_bytes, self._telemetry),
            FeatureCache("text", self.settings.caches.text_features_bytes, self._telemetry),
        )
        prefixes = FeatureCache("prefix", self.settings.caches.prefix_bytes, self._telemetry)
        for name, model_settings in self.settings.models.items():
            try:
                uses_device = get_model(name).uses_device
            except KeyError as error:
                raise ValueError(f"settings.models names an {error.args[0]}") from error
            options = worker_options(name, model_settings, self.settings, device)
            if options.load.chat is not None:
                uses_device = options.load.chat.uses_device
            lane = shared if uses_device else Lane(name, self.fail)
            batcher = Batcher(
                name,
                max_cost=self.settings.queue.max_cost,
                max_delay_s=self.settings.queue.max_delay_ms / 1000,
                wakeup=lane.wakeup,
                telemetry=self._telemetry,
            )
            worker = Worker(options, batcher, caches, self._telemetry, prefixes)
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
            self.on_closing()
            log.info("draining", extra={"requests": len(self._requests)})

    def abandon(self) -> None:
        """Answer everything that still waits with 503: the drain has taken too long."""
        for request in list(self._requests):
            request.fail(self._unavailable())

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
        for worker in self.workers.values():
            worker.close()

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
            if job == "gradient" and not worker.differentiable:
                possible = worker.model.info.differentiable
                remedy = f"the setting models.{worker.name}.gradients turns them on" if possible else "it has none"
                raise InvalidRequest(f"{worker.name} gives no gradients here: {remedy}", code="not_differentiable")
            worker.batcher.check(count, job)
        return workers

    def check_open(self) -> None:
        """Raise Unavailable or Overloaded when no request could be admitted, before anyone reads its body."""
        if self.state != "serving":
            raise self._unavailable()
        batchers = [worker.batcher for worker in self.workers.values()]
        if batchers and not any(batcher.fits(1) for batcher in batchers):
            batchers[0].check(1, "score")

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
        if not models or not makers:
            raise ValueError("a submission has at least one model and one sample")
        workers = self.require(models, len(makers), job)  # no await from here to admit(): all or nothing
        request = PendingRequest(makers, len(makers) * len(workers), asyncio.get_running_loop())
        rows = [[self._admit(worker, request, i, job, deadline) for worker in workers] for i in range(len(makers))]
        self._register(request)
        reason: Literal["deadline", "disconnect"] = "disconnect"
        try:
            for i, row in enumerate(rows):
                self._pool.submit(self._prepare, request, i, workers, row)
            await asyncio.wait_for(asyncio.shield(request.done), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            reason = "deadline"
        finally:
            for row in rows:
                for worker, ticket in zip(workers, row, strict=True):
                    worker.batcher.drop(ticket, reason)
            self._unregister(request)
        return self._collect(request, models), timing([ticket for row in rows for ticket in row])

    def _register(self, request: PendingRequest) -> None:
        self._requests.add(request)
        self._idle.clear()
        if self.state == "failed":  # it failed, on another thread, after this request was let in
            request.fail(self._unavailable())

    def _unregister(self, request: PendingRequest) -> None:
        request.makers = None
        request.done.cancel()
        self._requests.discard(request)
        if not self._requests:
            self._idle.set()

    def _admit(self, worker: Worker, request: PendingRequest, index: int, job: Job, deadline: float) -> Ticket:
        def settle(ticket: Ticket, outcome: Outcome) -> None:
            self._observe(worker.name, ticket, outcome)
            request.settle(index, worker.name, outcome)

        ticket = Ticket(job, settle, deadline)
        worker.batcher.admit(ticket)
        return ticket

    def _prepare(
        self, request: PendingRequest, index: int, workers: Sequence[Worker], tickets: Sequence[Ticket]
    ) -> None:
        """On a pool thread: decode one sample and prepare it for each model."""
        makers = request.makers
        if makers is None or all(ticket.state != "admitted" for ticket in tickets):
            return
        try:
            made = makers[index]()
        except Exception as error:
            if isinstance(error, SampleError):
                unreadable = bare(error)
            else:
                log.exception("decode failed")
                unreadable = ModelError("the service failed to decode this candidate", code="decode_failed")
            request.results[index].unreadable = unreadable
            for worker, ticket in zip(workers, tickets, strict=True):
                worker.batcher.reject(ticket, unreadable)
            return
        request.results[index].warnings = made.warnings
        for worker, ticket in zip(workers, tickets, strict=True):
            if ticket.state != "admitted":
                continue
            try:
                payload = worker.prepare(made.sample, ticket.job)
                worker.batcher.ready(ticket, payload, weight=worker.weight(payload))
            except SampleError as error:
                worker.batcher.reject(ticket, bare(error))

    def _observe(self, model: str, ticket: Ticket, outcome: Outcome) -> None:
        stage = self._telemetry.stage
        if ticket.ready_at:
            stage.labels(model, "decode").observe(ticket.ready_at - ticket.admitted_at)
        if ticket.started_at:
            stage.labels(model, "queue").observe(ticket.started_at - ticket.ready_at)
            stage.labels(model, "forward").observe(ticket.finished_at - ticket.started_at)
        if isinstance(outcome, SampleError):
            self._telemetry.sample_errors.labels(model, outcome.code).inc()

    def _collect(self, request: PendingRequest, models: Sequence[str]) -> list[SampleResult]:
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
        if self._is_fresh(worker):
            return True
        running = self._canaries.get(worker.name)
        if running is None or running.done():  # however many ask at once, one canary runs
            running = self._canaries[worker.name] = asyncio.create_task(self._run_canary(worker))
        return await asyncio.shield(running)

    def _is_fresh(self, worker: Worker) -> bool:
        return time.monotonic() - worker.last_success <= self.settings.ready_max_age_s

    async def _run_canary(self, worker: Worker) -> bool:
        request = PendingRequest([], 1, asyncio.get_running_loop())
        request.results.append(SampleResult())
        self._register(request)
        ticket = self._admit(worker, request, 0, worker.canary_job, time.monotonic() + CANARY_TIMEOUT_S)
        try:
            payload = await asyncio.to_thread(worker.canary_payload)
            worker.batcher.ready(ticket, payload, weight=worker.weight(payload), front=True)
            await asyncio.wait_for(asyncio.shield(request.done), CANARY_TIMEOUT_S)
        except TimeoutError:  # a judge that writes its answer may take longer, and has written some of it
            return self._is_fresh(worker)
        except (SampleError, Unavailable):
            return False
        finally:
            worker.batcher.drop(ticket, "deadline")
            self._unregister(request)
        outcome = request.snapshot()[0].outcomes[worker.name]
        return not isinstance(outcome, SampleError) or healthy(outcome)
