"""A file over HTTP arrives whole or not at all, goes on where it stopped, and is fetched once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from models.base import WeightsError
from service import download
from service.download import download_file
from tests.service.hub import Hub, serving

CONTENT = os.urandom(5 << 20)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as running:
        yield running


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RETRY_S", 0.0)


def visible(folder: Path) -> list[str]:
    """Names in ``folder`` that are not hidden."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def fetch_url(url: str, target: Path) -> None:
    """Fetch and accept CONTENT alone."""

    def check(path: Path) -> None:
        if path.read_bytes() != CONTENT:
            raise WeightsError("not the expected content")

    download_file(url, target, check, Console(stderr=True, quiet=True))


@pytest.mark.usefixtures("no_wait")
def test_a_url_is_fetched_whole_through_broken_transfers_and_busy_servers(hub: Hub, tmp_path: Path) -> None:
    hub.raw["/w.pt"] = CONTENT
    hub.drops["/w.pt"], hub.busy["/w.pt"] = 1, 1
    fetch_url(f"{hub.url}/w.pt", tmp_path / "a" / "w.pt")
    assert (tmp_path / "a" / "w.pt").read_bytes() == CONTENT
    assert visible(tmp_path / "a") == ["w.pt"]
    busy, broken, again, resumed = hub.gets("/w.pt")
    assert (busy, broken, again) == ("", "", "")
    assert int(resumed.removeprefix("bytes=").removesuffix("-")) > 0


@pytest.mark.usefixtures("no_wait")
def test_a_later_call_goes_on_where_an_earlier_one_gave_up(hub: Hub, tmp_path: Path) -> None:
    hub.raw["/w.pt"] = CONTENT
    hub.busy["/w.pt"], hub.drops["/w.pt"] = 0, 100
    with pytest.raises(WeightsError, match=rf"cannot fetch {hub.url}/w\.pt: .*\(4 attempts\)"):
        fetch_url(f"{hub.url}/w.pt", tmp_path / "w.pt")
    assert visible(tmp_path) == []
    hub.drops.clear()
    before = len(hub.gets("/w.pt"))
    fetch_url(f"{hub.url}/w.pt", tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == CONTENT
    _, resumed = hub.gets("/w.pt")[before:]
    assert int(resumed.removeprefix("bytes=").removesuffix("-")) > len(CONTENT) // 2


@pytest.mark.usefixtures("no_wait")
def test_a_file_that_changed_meanwhile_is_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    hub.raw["/w.pt"] = os.urandom(len(CONTENT))
    hub.drops["/w.pt"] = 100
    with pytest.raises(WeightsError):
        fetch_url(f"{hub.url}/w.pt", tmp_path / "w.pt")
    hub.raw["/w.pt"], hub.drops = CONTENT, {}
    fetch_url(f"{hub.url}/w.pt", tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == CONTENT


@pytest.mark.usefixtures("no_wait")
def test_a_refused_file_leaves_nothing_behind(hub: Hub, tmp_path: Path) -> None:
    hub.raw["/w.pt"] = CONTENT[:-1] + b"!"
    with pytest.raises(WeightsError, match="not the expected content"):
        fetch_url(f"{hub.url}/w.pt", tmp_path / "w.pt")
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]  # the lock
    with pytest.raises(WeightsError, match=r"cannot fetch \S+/absent\.pt: HTTP 404"):
        fetch_url(f"{hub.url}/absent.pt", tmp_path / "absent.pt")
    assert visible(tmp_path) == []


@pytest.mark.usefixtures("no_wait")
def test_a_token_in_the_url_is_not_shown(hub: Hub, tmp_path: Path) -> None:
    hub.raw["/busy.pt"] = CONTENT
    hub.busy["/busy.pt"] = 100
    for name, words in (("absent.pt", "HTTP 404"), ("busy.pt", "HTTP 503")):
        with pytest.raises(WeightsError, match=rf"cannot fetch \S+/{name}: {words}") as caught:
            fetch_url(f"{hub.url}/{name}?token=SECRET", tmp_path / name)
        assert "SECRET" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"cannot write \S+/file/w\.pt"):
        fetch_url(f"{hub.url}/w.pt", tmp_path / "file" / "w.pt")


def test_two_processes_fetch_a_url_once(hub: Hub, tmp_path: Path) -> None:
    """Replicas that share a volume start together."""
    hub.raw["/w.pt"] = CONTENT
    hub.stalls.add("/w.pt")
    threads = [
        threading.Thread(target=fetch_url, args=(f"{hub.url}/w.pt", tmp_path / "w.pt"), daemon=True) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert hub.stalled.wait(30)
    hub.stalls.clear()
    hub.released.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert (tmp_path / "w.pt").read_bytes() == CONTENT
    assert sum(not ranged for ranged in hub.gets("/w.pt")) == 2  # the one that stalled, and what found its part
