"""The thread that models run on.

Models that compute on the torch device share one lane, oldest batch first: CUDA graphs belong to a thread, and two
forwards at once on one device only slow each other. A model that computes on the CPU by itself has a lane of its own.
Judges give way: between two tokens of a long answer and between two batches of a tournament, what is due of the lane's
other models runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import torch

from service.engine.batcher import Ticket
from service.engine.worker import DevicePoisoned, Worker

log = logging.getLogger(__name__)


class Lane(threading.Thread):
    """A thread that runs the batches of its workers, oldest first. ``on_fatal`` is told what no retry can mend."""

    def __init__(self, name: str, on_fatal: Callable[[str], None]) -> None:
        super().__init__(name=f"lane-{name}", daemon=True)
        self.wakeup = threading.Condition()
        self.workers: list[Worker] = []
        self.busy: tuple[Worker, float] | None = None
        self.started_ok = threading.Event()
        self.startup_error: BaseException | None = None
        self._on_fatal = on_fatal
        self._stopping = False
        self._last: Worker | None = None

    def run(self) -> None:
        try:
            for worker in self.workers:
                worker.load()
        except BaseException as error:
            self.startup_error = error
            self.started_ok.set()
            return
        self.started_ok.set()
        try:
            while (work := self._next()) is not None:
                worker, batch = work
                self.busy = (worker, time.monotonic())
                worker.process(batch, self._alive, partial(self._breathe, worker))
                self.busy = None
                del work, worker, batch  # an idle lane keeps no image alive
        except BaseException as error:
            log.critical("lane died", exc_info=error, extra={"lane": self.name})
            self._on_fatal(
                str(error) if isinstance(error, DevicePoisoned) else f"{self.name} died: {type(error).__name__}"
            )

    def _alive(self) -> None:
        """A forward begins: the watchdog counts from here (a bisected batch is many forwards)."""
        if self.busy is not None:
            self.busy = (self.busy[0], time.monotonic())

    def _breathe(self, writing: Worker) -> None:
        """Between two tokens of a long answer: run a batch that is due of the other workers, if there is one.

        One, so that the answer goes on whatever arrives. What runs here is not itself interrupted.
        """
        work = self._due(writing)
        if work is None:
            return
        worker, batch = work
        self.busy = (worker, time.monotonic())
        try:
            with torch.inference_mode(False):  # tokens are written in that mode, in which nothing has a gradient
                worker.process(batch, self._alive)
        finally:
            self.busy = (writing, time.monotonic())

    def _due(self, writing: Worker) -> tuple[Worker, list[Ticket]] | None:
        """A batch that is due now of a worker other than ``writing`` which does not write long answers itself."""
        with self.wakeup:
            now = time.monotonic()
            others = [worker for worker in self.workers if worker is not writing and worker.loaded]
            due = [w for w in others if not w.writes and w.batcher.due_in(now, w.full) == 0.0]
            for worker in sorted(due, key=lambda worker: worker.batcher.oldest() or 0.0):
                batch = worker.batcher.take(worker.full)
                if batch:
                    return worker, batch
        return None

    def _next(self) -> tuple[Worker, list[Ticket]] | None:
        """The next batch, waiting for one; None when the lane stops."""
        with self.wakeup:
            while not self._stopping:
                now = time.monotonic()
                due = [(worker.batcher.due_in(now, worker.full), worker) for worker in self.workers]
                now_due = [worker for seconds, worker in due if seconds == 0.0]
                if now_due:
                    worker = min(now_due, key=self._rank)
                    batch = worker.batcher.take(worker.full)
                    if batch:
                        self._last = worker
                        return worker, batch
                    continue
                self.wakeup.wait(min((seconds for seconds, _ in due if seconds is not None), default=None))
        return None

    def _rank(self, worker: Worker) -> tuple[bool, float]:
        """Oldest first, but a tournament's hundreds of comparisons, all of one age, let others in between."""
        return worker is self._last and worker.judges, worker.batcher.oldest() or 0.0

    def stop(self) -> None:
        with self.wakeup:
            self._stopping = True
            self.wakeup.notify_all()

    def overdue(self, now: float) -> Worker | None:
        """The worker whose forward has run for longer than its watchdog allows."""
        busy = self.busy
        if busy is not None and now - busy[1] > busy[0].options.watchdog_s:
            return busy[0]
        return None
