"""kill -9 under load: a supervisor starts the service again, and no call of the client is lost or wrong."""

from __future__ import annotations

import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.service.bodies import grey
from tests.service.live import Live, spawn, wait_until
from trainer_client import Item, RewardClient, TransportError

SETTINGS = {
    "models": {"slow": {"options": {"batch_s": 0.05}, "micro_batch": 8}, "hangs": {}},
    "watchdog_s": 1.0,
    "exit_grace_s": 0.2,
}


class Supervisor(threading.Thread):
    """What an orchestrator does: starts the service again whenever it ends."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.port = folder, port
        self.lives: list[Live] = []
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            live = spawn(self.folder / str(len(self.lives)), SETTINGS | {"port": self.port})
            self.lives.append(live)
            live.process.wait()

    def stop(self) -> None:
        self.stopping.set()
        for live in self.lives:
            live.kill()
        self.join(30)


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return Supervisor(tmp_path, port)


def test_no_call_is_lost_when_the_service_dies(supervisor: Supervisor) -> None:
    """Killed under load, then ended by its own watchdog; every call returns the right scores."""
    answered: list[int] = []
    supervisor.start()
    try:
        with RewardClient(f"http://127.0.0.1:{supervisor.port}", patience=200) as client, ThreadPoolExecutor(8) as pool:
            wait_until(client.ready, "the first life is ready", 120)

            def ask(i: int) -> list[float | None]:
                total = client.score(Item("a", [grey(i % 256, 16), grey((i + 7) % 256, 16)]), "slow")[0].total
                answered.append(i)
                return total

            calls = [pool.submit(ask, i) for i in range(400)]
            wait_until(lambda: len(answered) > 60, "calls are answered")
            supervisor.lives[0].process.send_signal(signal.SIGKILL)
            lost_at = len(answered)
            wait_until(lambda: len(answered) > lost_at + 60, "calls are answered in the second life", 120)
            guilty = RewardClient(f"http://127.0.0.1:{supervisor.port}", patience=0)
            with guilty, pytest.raises(TransportError):
                guilty.score(Item("hang", [grey(0)]), "hangs")
            for i, call in enumerate(calls):
                expected = [pytest.approx(i % 256 / 255), pytest.approx((i + 7) % 256 / 255)]
                assert call.result(200) == expected
        assert len(supervisor.lives) == 3
        assert [live.process.poll() for live in supervisor.lives] == [-signal.SIGKILL, 70, None]
    finally:
        supervisor.stop()
