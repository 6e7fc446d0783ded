"""A real ``reward-service serve`` process for tests: start it, ask it, read its metrics and log, end it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).parent / "plugins"
START_S = 120.0
"""Importing torch takes most of it on a busy machine."""

BASE: dict[str, Any] = {
    "models": {"jpeg-compressibility": {}, "jpeg-incompressibility": {}},
    "plugins": ["faulty"],
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "decode_threads": 2,
    "port": 0,
}


def environment(**extra: str) -> dict[str, str]:
    """The caller's environment without its REWARD_ variables, with the test models on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REWARD_")}
    return kept | {"PYTHONPATH": f"{ROOT}{os.pathsep}{PLUGINS}", "OMP_NUM_THREADS": "1", **extra}


def command(folder: Path, settings: dict[str, Any], yaml_text: str | None = None) -> list[str]:
    """The command line of a service with BASE and ``settings``, whose YAML is written into ``folder``."""
    config = folder / "service.yaml"
    config.write_text(yaml.safe_dump(BASE | settings) if yaml_text is None else yaml_text)
    return [sys.executable, "-m", "service.cli", "serve", "--config", str(config)]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Poll ``condition`` until it is true; AssertionError naming ``what`` after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"after {seconds:g} s still not: {what}"
        time.sleep(0.02)


def read_answer(connection: socket.socket) -> bytes:
    """One HTTP answer from a bare socket: to the end of its body, or until the service closes."""
    answer = b""
    while chunk := connection.recv(65536):
        answer += chunk
        start, separator, rest = answer.partition(b"\r\n\r\n")
        lengths = [line for line in start.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if separator and lengths and len(rest) >= int(lengths[0].partition(b":")[2]):
            break
    return answer


@dataclass
class Live:
    """A running service."""

    process: subprocess.Popen[bytes]
    folder: Path
    url: str = ""
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    @property
    def log(self) -> str:
        return (self.folder / "stderr").read_text()

    def log_lines(self) -> list[dict[str, Any]]:
        """The structured log."""
        return [json.loads(line) for line in self.log.splitlines()]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 where there are none."""
        text = self.client.get(f"{self.url}/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """POST ``body`` as JSON, or what ``options`` say."""
        if body is not None:
            options["json"] = body
        return self.client.post(self.url + path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(self.url + path, **options)

    def ready(self) -> bool:
        try:
            return self.get("/health/ready", timeout=15).status_code == 200
        except httpx.TransportError:
            return False

    def assert_empty_queue(self) -> None:
        """Nothing admitted is unfinished, nothing waits, no request's bytes are held."""
        for name in ("reward_queue_depth", "reward_queue_cost", "reward_inflight_bytes"):
            wait_until(lambda name=name: self.metric(name) == 0, f"{name} is 0")  # type: ignore[misc]

    def assert_healthy(self) -> None:
        """It answers, it is ready, and it holds no work."""
        assert self.process.poll() is None, f"the service has ended:\n{self.log[-2000:]}"
        assert self.get("/health/live").status_code == 200
        assert self.get("/health/ready").status_code == 200
        self.assert_empty_queue()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 30.0) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)


def spawn(folder: Path, settings: dict[str, Any], *, yaml_text: str | None = None, **env: str) -> Live:
    """Start a service without waiting for it; ``yaml_text`` replaces the whole settings file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command(folder, settings, yaml_text), cwd=folder, env=environment(**env), stdout=stdout, stderr=stderr
        )
    return Live(process, folder)


def wait_for_address(live: Live) -> None:
    """Read the port that the service has bound from what it prints."""

    def told() -> bool:
        assert live.process.poll() is None, f"the service ended at once:\n{live.log[-2000:]}"
        found = re.search(r"http://[\d.]+:\d+", (live.folder / "stdout").read_text())
        live.url = found.group() if found else ""
        return found is not None

    wait_until(told, "the service says where it listens", START_S)


@contextlib.contextmanager
def running(folder: Path, settings: dict[str, Any] | None = None, **env: str) -> Iterator[Live]:
    """A service that is ready; killed in the end if it still runs."""
    live = spawn(folder, settings or {}, **env)
    try:
        wait_for_address(live)

        def ready() -> bool:
            assert live.process.poll() is None, f"the service ended at once:\n{live.log[-2000:]}"
            return live.ready()

        wait_until(ready, "the service is ready", START_S)
        yield live
    finally:
        live.kill()
