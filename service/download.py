"""One file over HTTP: resumable, checked before it gets its name, and safe beside another process that fetches it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from models.base import WeightsError
from models.sources import shown

ATTEMPTS = 4
RETRY_S = 1.0
CHUNK_BYTES = 1 << 20
TIMEOUT = httpx.Timeout(30, connect=10)
BUSY = {408, 429, 500, 502, 503, 504}


class _TryAgain(Exception):
    """The transfer failed in a way that may pass; what arrived is kept."""


def download_file(url: str, target: Path, check: Callable[[Path], None], console: Console) -> None:
    """Fetch ``url`` to ``target`` with a progress bar on ``console``; does nothing where ``target`` is there.

    What arrives is kept beside ``target`` under a hidden name until all of it is there and ``check`` has accepted it;
    an interrupted transfer goes on where it stopped, in the next call too, if the server vouches by a strong ETag that
    the file is still the same. Raises :class:`WeightsError` when the file cannot be had, and what ``check`` raises; the
    refused file is removed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file():
                part = _transfer(url, target, console)
                _accept(part, check)
                os.replace(part, target)
    except OSError as exc:
        raise WeightsError(f"cannot write {target}: {exc.strerror or exc}") from exc


def _accept(part: Path, check: Callable[[Path], None]) -> None:
    try:
        check(part)
    except WeightsError:
        part.unlink()
        raise


def _transfer(url: str, target: Path, console: Console) -> Path:
    """The complete file under its hidden name, after as many attempts as it takes or ATTEMPTS."""
    headers = {"Accept-Encoding": "identity"}  # sizes and ranges are those of the file itself
    with httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=True) as client, _bar(console) as bar:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _attempt(client, url, target, bar)
            except (_TryAgain, httpx.TransportError) as exc:
                if attempt == ATTEMPTS:
                    reason = str(exc) or type(exc).__name__
                    raise WeightsError(f"cannot fetch {shown(url)}: {reason} ({ATTEMPTS} attempts)") from exc
                time.sleep(RETRY_S * attempt)
            except httpx.HTTPError as exc:
                raise WeightsError(f"cannot fetch {shown(url)}: {exc}") from exc
    raise AssertionError("the last attempt returns or raises")


def _attempt(client: httpx.Client, url: str, target: Path, bar: Progress) -> Path:
    with client.stream("GET", url) as response:
        _refuse(url, response)
        etag = response.headers.get("etag", "")
        part = target.with_name(f".{target.name}.{hashlib.sha256(etag.encode()).hexdigest()[:16]}.part")
        resumable = etag.startswith('"') and part.is_file()
        have = part.stat().st_size if resumable else 0
        total = _total(response)
        if total is not None and have == total:
            return part
        if not have:
            return _write(response, part, 0, total, bar)
    with client.stream("GET", url, headers={"Range": f"bytes={have}-", "If-Range": etag}) as response:
        _refuse(url, response)
        goes_on = response.status_code == 206 and response.headers.get("content-range", "").startswith(f"bytes {have}-")
        return _write(response, part, have if goes_on else 0, total, bar)


def _write(response: httpx.Response, part: Path, have: int, total: int | None, bar: Progress) -> Path:
    """Append to the first ``have`` bytes of ``part`` (0: start anew); raises _TryAgain when bytes are missing."""
    task = bar.add_task(part.name.removeprefix(".").rsplit(".", 2)[0], total=total, completed=have)
    with part.open("ab" if have else "wb") as file:
        for chunk in response.iter_raw(CHUNK_BYTES):
            file.write(chunk)
            bar.advance(task, len(chunk))
    size = part.stat().st_size
    if total is not None and size != total:
        raise _TryAgain(f"{size} bytes arrived, expected {total}")
    return part


def _total(response: httpx.Response) -> int | None:
    length = response.headers.get("content-length", "")
    return int(length) if length.isdecimal() else None


def _refuse(url: str, response: httpx.Response) -> None:
    status = response.status_code
    if status in BUSY:
        raise _TryAgain(f"HTTP {status}")
    if status in (401, 403):
        raise WeightsError(f"cannot fetch {shown(url)}: access is refused (HTTP {status}); place the file by hand")
    if not response.is_success:
        raise WeightsError(f"cannot fetch {shown(url)}: HTTP {status}")
    if url.startswith("https:") and response.url.scheme != "https":
        raise WeightsError(
            f"cannot fetch {shown(url)}: it redirects to a plain http URL, which anyone on the way can change"
        )
    if response.headers.get("content-type", "").startswith("text/html"):
        raise WeightsError(f"cannot fetch {shown(url)}: it is a web page and not a file")


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
