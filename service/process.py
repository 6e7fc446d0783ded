"""The life of the process: ends on a fatal error, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.engine.engine import Engine
from service.settings import Settings

log = logging.getLogger(__name__)

WRITE_S = 10  # after the drain every answer is ready; clients have this long to read theirs
EXIT_FATAL = 70  # EX_SOFTWARE: the orchestrator restarts us


def exit_soon(grace_s: float) -> Callable[[str], None]:
    """An ``on_fatal`` that ends the process after ``grace_s``, in which waiting requests are answered 503.

    The end is os._exit: a hung forward cannot be joined, and a poisoned device cannot be released.
    """

    def on_fatal(reason: str) -> None:
        def end() -> None:
            time.sleep(grace_s)
            logging.shutdown()
            sys.stderr.flush()
            os._exit(EXIT_FATAL)

        threading.Thread(target=end, name="exit", daemon=True).start()

    return on_fatal


class Server(uvicorn.Server):
    """uvicorn that drains on SIGTERM before it closes its socket: admitted work is answered, new work gets 503."""

    def __init__(self, config: uvicorn.Config, engine: Engine, settings: Settings) -> None:
        super().__init__(config)
        self._engine = engine
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self.drained = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models, then listen. A failure is one clear line; its traceback is there at log level DEBUG."""
        self._loop = asyncio.get_running_loop()
        try:
            await self._engine.start()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.critical("cannot start: %s", reason, exc_info=log.isEnabledFor(logging.DEBUG))
            self.should_exit = True
            return
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler: the first signal drains, a second one stops at once."""
        if self._loop is None or self._engine.state == "starting":
            log.info("stopped while loading: nothing was admitted")
            os._exit(0)  # a thread that loads weights cannot be interrupted
        if self._drain is not None:
            self.should_exit = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        drain = self._settings.drain
        started = time.monotonic()
        self._engine.drain()
        try:
            await asyncio.wait_for(self._engine.idle(), drain.max_s)
        except TimeoutError:
            self.drained = False
            self._engine.abandon()
            await asyncio.sleep(0.1)  # the loop writes the answers
            log.error("drain timed out; admitted work is lost", extra={"max_s": drain.max_s})
        await asyncio.sleep(max(0.0, drain.min_s - (time.monotonic() - started)))
        log.info("drained", extra={"seconds": round(time.monotonic() - started, 2)})
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, before minutes are spent on loading models; port 0 takes a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def serve(app: FastAPI, settings: Settings, bound: socket.socket) -> int:
    """Run until a signal; returns the exit code: 0 after a clean drain, 1 when startup failed or work was lost."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=WRITE_S,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = Server(config, app.state.service.engine, settings)
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # until uvicorn installs its handler, SIGTERM just ends a loading process
    server.run(sockets=[bound])
    if not server.started:
        return 1
    return 0 if server.drained else 1
