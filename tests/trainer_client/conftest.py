"""A small reward service on a real port: it reads requests with the safetensors library and can play faults.

Its one reward is the mean of an image's bytes over 255, so that a score says whether the pixels arrived; of two images
the one of higher mean is preferred; the gradient of the mean is the same everywhere.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

FINGERPRINT = "sha256:feed"


@dataclass
class Received:
    """A request as the service understood it; ``images`` by place, in the order of the JSON."""

    path: str
    headers: dict[str, str]
    peer: tuple[str, int]
    request: dict[str, Any] | None = None
    images: dict[str, np.ndarray] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: RewardServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(Received(self.path, dict(self.headers), self.client_address))

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:  # the client hung up: another part of its call has failed
            self.close_connection = True
            return
        received = Received(self.path, dict(self.headers), self.client_address)
        if self.headers["Content-Type"] == "application/vnd.safetensors":
            tensors = safetensors.numpy.load(body)
            (size,) = struct.unpack("<Q", body[:8])
            assert size % 8 == 0, "the tensors must lie aligned, for readers that map them"
            received.request = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["request"])
            fetch: Callable[[str], np.ndarray] = tensors.__getitem__
        else:
            received.request = json.loads(body)

            def fetch(text: str) -> np.ndarray:
                image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
                assert image.format == "PNG"
                return np.asarray(image)

        for i, item in enumerate(received.request["items"]):
            for place, value in images_of(item):
                received.images[f"item{i}.{place}"] = fetch(value)
        self._serve(received)

    def _serve(self, received: Received) -> None:
        self.server.received.append(received)
        play = self.server.plays.popleft() if self.server.plays else self.server.default
        play(self, received)

    def answer(self, body: Any, status: int = 200, content_type: str = "application/json", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)


Play = Callable[[Handler, Received], None]


class RewardServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.received: list[Received] = []
        self.plays: deque[Play] = deque()
        self.default: Play = lambda handler, received: answer_well(handler, received, lambda answer: answer)
        self.released = threading.Event()
        self.offered: dict[str, str] | None = None
        self.factor = 1.0
        self.connections: list[socket.socket] = []
        self.faults: list[BaseException | None] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def hang_up(self) -> None:
        """End what is still connected, as the end of a process would."""
        for connection in self.connections:
            with contextlib.suppress(OSError):  # it was closed already
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        fault = sys.exc_info()[1]
        if not isinstance(fault, ConnectionError):  # clients may leave; anything else is a fault of this server
            self.faults.append(fault)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, path: str = "/score") -> list[Received]:
        """What arrived at ``path``."""
        return [received for received in self.received if received.path == path]

    def play(self, *plays: Play) -> None:
        """Answer the next requests like this; those after them, well."""
        self.plays.extend(plays)

    def problem(self, status: int, code: str, **headers: str) -> Play:
        document = {"type": "about:blank", "title": "T", "status": status, "detail": f"why {code}", "code": code}
        return lambda handler, received: handler.answer(document, status, "application/problem+json", **headers)

    def plain(self, status: int, **headers: str) -> Play:
        return lambda handler, received: handler.answer(b"<html>proxy</html>", status, "text/html", **headers)

    def raw(self, body: bytes) -> Play:
        return lambda handler, received: handler.answer(body)

    def changed(self, change: Callable[[dict[str, Any]], Any]) -> Play:
        """A good answer, changed in place (or replaced) by ``change``."""

        def edit(answer: dict[str, Any]) -> dict[str, Any]:
            replaced = change(answer)
            return answer if replaced is None else replaced

        return lambda handler, received: answer_well(handler, received, edit)

    def reset(self) -> Play:
        """Half an answer, and then a connection reset."""

        def reset(handler: Handler, received: Received) -> None:
            handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"results": ')
            handler.wfile.flush()
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True

        return reset

    def silence(self) -> Play:
        """No answer until the test is over."""

        def wait(handler: Handler, received: Received) -> None:
            self.released.wait(60)
            handler.close_connection = True

        return wait


def images_of(item: dict[str, Any]) -> list[tuple[str, str]]:
    """Every image of an encoded item: where, and what stands for it."""
    found = [(f"image{k}", value) for k, value in enumerate(item.get("images", []))]
    for name in ("candidates", "context", "reference"):
        parts = item.get(name, [])
        for k, part in enumerate(parts if isinstance(parts, list) else [parts]):
            where = f"candidate{k}" if name == "candidates" else name
            found += [(f"{where}.{key}", part[key]) for key in ("image", "mask") if key in part]
            found += [(f"{where}.frame{n}", value) for n, value in enumerate(part.get("frames", []))]
    return found


def candidate_means(received: Received, i: int) -> list[float]:
    """The reward of item i's candidates; a text's is its length, a video's that of its first frame."""
    assert received.request is not None
    item = received.request["items"][i]
    if "images" in item:
        names = [f"item{i}.image{k}" for k in range(len(item["images"]))]
        scale = 255 if received.path != "/gradient" else 1
        return [float(received.images[name].mean()) / scale for name in names]
    means = []
    for k, candidate in enumerate(item["candidates"]):
        if "text" in candidate:
            means.append(float(len(candidate["text"])))
        else:
            part = "image" if "image" in candidate else "frame0"
            means.append(float(received.images[f"item{i}.candidate{k}.{part}"].mean()) / 255)
    return means


def answer_well(handler: Handler, received: Received, edit: Callable[[dict[str, Any]], Any]) -> None:
    """What a service says that has the models ``offered``, or (None) any model, of which it tells of one."""
    server = handler.server
    if received.request is not None and server.offered is not None:
        asked = received.request.get("models", [received.request.get("model")])
        if any(name not in server.offered for name in asked):
            server.problem(404, "model_not_loaded")(handler, received)
            return
    if received.path == "/models":
        rows = [
            {
                "name": name, "kind": "pointwise", "inputs": ["image"], "differentiable": True, "range": [0, 1],
                "license": "Apache-2.0", "fingerprint": fingerprint, "ready": True, "verified": True,
            }
            for name, fingerprint in (server.offered or {"mean": FINGERPRINT}).items()
        ]  # fmt: skip
        handler.answer(edit({"models": rows}))
    elif received.path == "/health/ready":
        handler.answer({"status": "ready"})
    elif received.path == "/compare":
        handler.answer(edit(compare(received, server)))
    elif received.path == "/score":
        handler.answer(edit(score(received, server)))
    else:
        answer = {"response": edit(score(received, server)), "tensors": gradients(received, server)}
        metadata = {"response": json.dumps(answer["response"])}
        body = safetensors.numpy.save(answer["tensors"], metadata)
        handler.answer(body, content_type="application/vnd.safetensors")


def score(received: Received, server: RewardServer) -> dict[str, Any]:
    assert received.request is not None
    models = received.request["models"]
    results = []
    for i in range(len(received.request["items"])):
        means = [server.factor * mean for mean in candidate_means(received, i)]
        results.append(
            {
                "scores": {name: list(means) for name in models},
                "total": [sum(models.values()) * mean for mean in means],
                "outputs": {},
                "errors": [[] for _ in means],
                "warnings": [[] for _ in means],
            }
        )
    identities = {name: {"fingerprint": fingerprint(server, name), "dtype": "float32"} for name in models}
    return {"results": results, "models": identities, "timing_ms": {"decode": 1.0, "queue": 2.0, "forward": 3.0}}


def fingerprint(server: RewardServer, name: str) -> str:
    return (server.offered or {}).get(name, FINGERPRINT)


def gradients(received: Received, server: RewardServer) -> dict[str, np.ndarray]:
    assert received.request is not None
    weight = server.factor * sum(received.request["models"].values())
    return {name: np.full(image.shape, weight / image.size, np.float32) for name, image in received.images.items()}


def compare(received: Received, server: RewardServer) -> dict[str, Any]:
    assert received.request is not None
    results = []
    for i, item in enumerate(received.request["items"]):
        means = candidate_means(received, i)
        count = len(means)
        every = [[a, b] for a in range(count) for b in range(a + 1, count)]
        pairs = every if isinstance(item["pairs"], str) else item["pairs"]
        table: list[list[float | None]] = [[None] * count for _ in means]
        for a, b in pairs:
            table[a][b] = 1 / (1 + math.exp(means[b] - means[a]))
            table[b][a] = 1 - table[a][b]
        both = received.request["both_orders"]
        comparisons = [
            {"i": a, "j": b, "probability": table[a][b], "orders": [table[a][b], table[a][b] if both else None],
             "text": ["because", "because"] if received.request["explain"] else None, "parse": "ok", "error": None}
            for a, b in pairs
        ]  # fmt: skip
        results.append(
            {
                "probabilities": table,
                "win_rate": [mean(row) for row in table],
                "strength": means,
                "strength_stderr": [0.1] * count,
                "ranking": sorted(range(count), key=lambda k: -means[k]),
                "comparisons": comparisons,
                "errors": [[] for _ in means],
                "warnings": [[] for _ in means],
            }
        )
    name = received.request["model"]
    model = {"name": name, "fingerprint": fingerprint(server, name), "dtype": "float32"}
    return {"results": results, "model": model, "timing_ms": {"forward": 3.0}}


def mean(row: Sequence[float | None]) -> float | None:
    known = [value for value in row if value is not None]
    return sum(known) / len(known) if known else None


class FakeTime:
    """A clock that only moves when somebody sleeps; ``slept`` are the waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def async_sleep(self, seconds: float) -> None:
        self.sleep(seconds)


@contextlib.contextmanager
def serving(offered: dict[str, str] | None = None, *, factor: float = 1.0, port: int = 0) -> Iterator[RewardServer]:
    """A running server; ``factor`` is what its scores are multiplied by."""
    with RewardServer(port) as server:
        server.offered, server.factor = offered, factor
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            server.hang_up()
            thread.join()
    assert server.faults == []


@pytest.fixture
def server() -> Iterator[RewardServer]:
    with serving() as server:
        yield server


@pytest.fixture
def fake_time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def images() -> list[np.ndarray]:
    """Three images of different sizes and rising means."""
    generator = np.random.default_rng(0)
    sizes = [(7, 5), (16, 16), (9, 32)]
    return [generator.integers(60 * k, 60 * k + 80, (h, w, 3), dtype=np.uint8) for k, (h, w) in enumerate(sizes)]
