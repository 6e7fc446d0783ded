"""A real server process to measure: `reward-service serve` on a free port, with its memory and CPU time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 240.0
_LISTENING = re.compile(r"http://[0-9.]+:[0-9]+")


class ServerFailed(RuntimeError):
    """The server did not become ready; the message ends with its log."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: psutil.Process

    def rss(self) -> int:
        """Resident bytes now."""
        return int(self.process.memory_info().rss)

    def cpu_s(self) -> float:
        """CPU seconds used so far, by user and kernel."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def serve(settings: Mapping[str, str]) -> Iterator[Server]:
    """Run ``reward-service serve`` with REWARD_* ``settings`` until the context ends; yields once it is ready.

    The caller's own REWARD_* variables do not reach it. Raises ServerFailed with the log when it does not get ready.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("REWARD_")}
    path = os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])])
    environment = inherited | {"PYTHONPATH": path, "REWARD_PORT": "0"} | dict(settings)
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "service.cli", "serve"]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield Server(_wait_until_ready(process, log), psutil.Process(process.pid))
        finally:
            process.terminate()
            try:
                process.wait(70)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        found = _LISTENING.search(_text(log))
        if found is not None and _is_ready(found.group()):
            return found.group()
    raise ServerFailed(f"the server is not ready (exit code {process.poll()}):\n{_text(log)[-4000:]}")


def _text(log: IO[bytes]) -> str:
    # pread: the child shares the file offset, and writes where it stands
    return os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=30) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class PeakMemory:
    """Samples the resident memory of a server while the context lasts; ``peak`` is the largest seen, in bytes."""

    def __init__(self, server: Server, interval_s: float = 0.05) -> None:
        self.peak = server.rss()
        self._server = server
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.peak = max(self.peak, self._server.rss())
