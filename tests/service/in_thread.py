"""A real server on a real port, in a thread of this process: for tests that need no process of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from service.app import create_app
from service.settings import Settings

START_S = 60.0


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """The address of a service with ``settings``, from when it is ready until the context ends."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(settings, on_fatal=lambda reason: None), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    end = time.monotonic() + START_S
    while not server.started:
        assert time.monotonic() < end
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
