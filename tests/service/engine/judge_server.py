"""A real HTTP server with the chat completions API that plays back answers and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "judge-7b"


@dataclass(frozen=True)
class Played:
    """One response. ``drop``: the connection is cut instead; ``drip_s``: a byte at a time, that many seconds apart."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    wait_s: float = 0.0
    drip_s: float = 0.0
    drop: bool = False


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    time: float


Script = Callable[[Asked], Played]


def completion(content: str | None = "", finish_reason: str = "stop", **choice: Any) -> dict[str, Any]:
    """A chat completion of vLLM's shape."""
    message = {"role": "assistant", "content": content, "refusal": None, "tool_calls": []} | choice.pop("message", {})
    return {
        "id": "chatcmpl-6f0c",
        "object": "chat.completion",
        "created": 1763860000,
        "model": MODEL,
        "choices": [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason, "stop_reason": None}
            | choice
        ],
        "usage": {"prompt_tokens": 1234, "total_tokens": 1235, "completion_tokens": 1},
    }


def with_logprobs(*listed: tuple[str, float]) -> dict[str, Any]:
    """A completion of one token whose likeliest alternatives are ``listed``, likeliest first."""
    tops = [{"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in listed]
    return completion(listed[0][0], "length", logprobs={"content": [{**tops[0], "top_logprobs": tops}]})


class JudgeServer(ThreadingHTTPServer):
    """``asked`` has the chat requests in the order of arrival; ``most_at_once`` is how many were open together."""

    daemon_threads = True

    def __init__(self, script: Script, models: Played) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.models = script, models
        self.asked: list[Asked] = []
        self.listed: list[Asked] = []
        self.open = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.listed.append(Asked(self.path, dict(self.headers), {}, time.monotonic()))
        self._play(self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = Asked(self.path, dict(self.headers), body, time.monotonic())
        with self.server.lock:
            self.server.asked.append(asked)
            self.server.open += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.open)
        played = self.server.script(asked)
        time.sleep(played.wait_s)
        with self.server.lock:
            self.server.open -= 1
        self._play(played)

    def _play(self, played: Played) -> None:
        raw = played.raw if played.raw is not None else json.dumps(played.body).encode()
        if played.drop:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(played.status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(raw))} | played.headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if not played.drip_s:
            self.wfile.write(raw)
            return
        for byte in raw:
            self.wfile.write(bytes([byte]))
            time.sleep(played.drip_s)


def model_list(**entry: Any) -> Played:
    """GET /v1/models of vLLM: ``created`` is the time of the request."""
    own = {"id": MODEL, "object": "model", "created": time.time_ns(), "owned_by": "vllm", "root": "ORG/judge-7b"}
    return Played({"object": "list", "data": [own | {"parent": None, "max_model_len": 32768} | entry]})


@contextmanager
def serving(script: Script, models: Played | None = None) -> Iterator[JudgeServer]:
    """A server on a free port until the block ends."""
    server = JudgeServer(script, models or model_list())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def in_turn(*played: Played | dict[str, Any]) -> Script:
    """Plays one after the other, the last for ever."""
    rest = list(played)
    lock = threading.Lock()

    def script(asked: Asked) -> Played:
        with lock:
            following = rest.pop(0) if len(rest) > 1 else rest[0]
        return following if isinstance(following, Played) else Played(following)

    return script
