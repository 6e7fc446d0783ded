"""A real HTTP server that speaks as much of the hub's protocol as a download needs, and misbehaves on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")


@dataclass
class Hub:
    """Repositories by name, each a mapping of file names to contents; ``raw`` are plain files at any path.

    ``stated`` overrides the content that sizes and hashes are stated of; ``drops`` says how often a file's transfer
    breaks off after half of what was asked for; ``large`` files are stated by sha256, as the hub does with LFS files.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    stated: dict[str, bytes] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)
    stalls: set[str] = field(default_factory=set)
    busy: dict[str, int] = field(default_factory=dict)
    large: tuple[str, ...] = (".safetensors", ".pt", ".bin")
    revisions: tuple[str, ...] = ("main", "v1", COMMIT)
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range) of every request."""
    url: str = ""
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def gets(self, name: str) -> list[str]:
        """The Range headers of the GET requests whose path ends in ``name``."""
        return [ranged for method, path, ranged in self.seen if method == "GET" and path.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append((self.command, path, self.headers.get("Range", "")))
        if path in self.hub.raw:
            self._raw(path)
        elif found := _RESOLVE.fullmatch(path):
            self._resolve(*found.groups())
        elif found := _API.fullmatch(path):
            self._api(*found.groups())
        else:
            self._fail(404, "")

    def _raw(self, path: str) -> None:
        if self.hub.busy.get(path, 0) > 0:
            self.hub.busy[path] -= 1
            self._fail(503, "")
            return
        content = self.hub.raw[path]
        self._send(path, content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def _allowed(self, repo: str, revision: str) -> bool:
        if repo in self.hub.gated:
            self._fail(401, "GatedRepo")
        elif repo not in self.hub.repos:
            self._fail(401, "RepoNotFound")
        elif revision not in self.hub.revisions:
            self._fail(404, "RevisionNotFound")
        else:
            return True
        return False

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if not self._allowed(repo, revision):
            return
        if name not in self.hub.repos[repo]:
            self._fail(404, "EntryNotFound")
            return
        content = self.hub.repos[repo][name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self._hash(name, content)}"'}
        if name.endswith(self.hub.large):
            stated = self.hub.stated.get(name, content)
            headers |= {"X-Linked-ETag": f'"{self._hash(name, content)}"', "X-Linked-Size": str(len(stated))}
        self._send(name, content, headers)

    def _api(self, repo: str, kind: str | None, revision: str | None) -> None:
        if not self._allowed(repo, revision or "main"):
            return
        entries = [self._entry(name, content) for name, content in self.hub.repos[repo].items()]
        answer: object = entries if kind == "tree" else {"id": repo, "sha": COMMIT, "siblings": []}
        self._send("", json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _entry(self, name: str, content: bytes) -> dict[str, object]:
        stated = self.hub.stated.get(name, content)
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(stated), "oid": _git_sha1(stated)}
        if name.endswith(self.hub.large):
            entry["lfs"] = {"oid": hashlib.sha256(stated).hexdigest(), "size": len(stated), "pointerSize": 134}
        return entry

    def _hash(self, name: str, content: bytes) -> str:
        stated = self.hub.stated.get(name, content)
        return hashlib.sha256(stated).hexdigest() if name.endswith(self.hub.large) else _git_sha1(stated)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found.group(1))
        fresh = self.headers.get("If-Range") in (None, headers.get("ETag"))
        start = start if fresh else 0
        self.send_response(206 if start else 200)
        for header, value in headers.items():
            self.send_header(header, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = content[start:]
        if name in self.hub.stalls:
            self.wfile.write(body[: len(body) // 2])
            self.hub.stalled.set()
            self.hub.released.wait(60)
        elif self.hub.drops.get(name, 0) > 0:
            self.hub.drops[name] -= 1
            self.wfile.write(body[: len(body) // 2])
        else:
            self.wfile.write(body)
            return
        self.wfile.flush()
        self.close_connection = True


def point_library_at(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME do before the hub library is imported, done after it; the cache is empty."""
    monkeypatch.setattr(constants, "HF_HOME", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serving(hub: Hub, tls: ssl.SSLContext | None = None) -> Iterator[Hub]:
    """Serve ``hub`` on a free port of this machine while the block runs; its ``url`` says where."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that is killed breaks its connection; that is what such a test is about."""

    server = Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join(10)
        server.server_close()
