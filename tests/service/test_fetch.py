"""``reward-service fetch`` against a real server: what arrives is verified, what fails is named, nothing is half."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import os
import pty
import re
import socket
import ssl
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import Result
from safetensors.torch import save
from torch import tensor
from typer.testing import CliRunner

from models import registry
from service import cli, download
from service.app import create_app
from service.settings import Settings, SettingsProblem, load_settings
from tests.service.hub import Hub, point_library_at, serving
from tests.service.live import PLUGINS, environment, spawn, wait_until

REWARD = save({"value": tensor([7.0, 0.0, 0.0])})
TOWER = save({"other": tensor([1.0, 2.0, 3.0])})
CONFIG = b'{"name": "reward"}'
FILE_PATH = Path("acme") / "reward@v1" / "weights.safetensors"
TOWER_PATH = Path("acme") / "tower" / "model" / "tower.safetensors"
FOLDER_PATH = Path("acme") / "folder"


@pytest.fixture
def hub() -> Iterator[Hub]:
    repos = {
        "acme/reward": {"weights.safetensors": REWARD},
        "acme/tower": {"model/tower.safetensors": TOWER},
        "acme/folder": {"model.safetensors": REWARD, "config.json": CONFIG, "README.md": b"words"},
    }
    with serving(Hub(repos)) as running:
        yield running


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fetch]:
    """The command in this process: with the plugin's models, the tests' hub and an empty cache."""
    point_library_at(hub.url, tmp_path / "home", monkeypatch)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.syspath_prepend(PLUGINS)
    monkeypatch.delitem(sys.modules, "published", raising=False)
    importlib.import_module("published")
    yield Fetch(tmp_path, monkeypatch)
    del sys.modules["published"]


class Fetch:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.weights = folder, folder / "weights"
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str, **models: dict[str, Any]) -> Result:
        """``fetch`` with these arguments and, if any, settings of models; its weights lie in ``self.weights``."""
        config = self.folder / "service.yaml"
        settings = {"models": {name.replace("_", "-"): value for name, value in models.items()}} if models else {}
        config.write_text(yaml.safe_dump({"weights_dir": str(self.weights), **settings}))
        self._monkeypatch.setenv("REWARD_CONFIG", str(config))
        return CliRunner().invoke(cli.app, ["fetch", *arguments])


def files(folder: Path) -> list[str]:
    """Everything below ``folder`` under a name that is not hidden."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def start(hub: Hub, folder: Path, *arguments: str, **env: str) -> tuple[subprocess.Popen[str], int]:
    """The command as a user runs it: a process with the hub's address in the environment, and its terminal."""
    (folder / "service.yaml").write_text(yaml.safe_dump({"plugins": ["published"]}))
    command = [sys.executable, "-m", "service.cli", "fetch", "--config", "service.yaml", *arguments]
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), **env}
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 120))
    process = subprocess.Popen(
        command, cwd=folder, env=environment(**settings), text=True, stdout=subprocess.PIPE, stderr=stderr
    )
    os.close(stderr)
    return process, terminal


def run(hub: Hub, folder: Path, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Exit code, stdout, and what the terminal shows."""
    process, terminal = start(hub, folder, *arguments, **env)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end, when the process has closed it
        while piece := os.read(terminal, 65536):
            shown += piece
    os.close(terminal)
    stdout, _ = process.communicate(timeout=120)
    assert b"Traceback" not in shown
    return process.returncode, stdout, shown.decode()


def test_a_user_fetches_models_and_then_has_them(hub: Hub, tmp_path: Path) -> None:
    """Also without a setting: into the hub library's cache, where the models find them offline."""
    names = ("published-file", "published-folder", "jpeg-compressibility")
    code, stdout, terminal = run(hub, tmp_path, *names)
    assert code == 0, terminal
    assert stdout.count(": fetched, verified by size and ") == 3
    assert "jpeg-compressibility: nothing to fetch: it needs no weights, or they ship with a package" in stdout
    cache = tmp_path / "home" / "hub"
    paths = [Path(line.split(" at ", 1)[1]) for line in stdout.splitlines() if line.startswith("  at ")]
    assert all(path.exists() and path.is_relative_to(cache) for path in paths)
    assert re.search(r"weights\.safetensors: 100%\|█+\| *84\.0/84\.0 ", terminal)
    assert f"published-file weights: fetching 1 file, {len(REWARD)} bytes, of hf:acme/reward@v1/" in stdout
    code, stdout, _ = run(hub, tmp_path, *names, HF_HUB_OFFLINE="1")
    assert code == 0
    assert stdout.count("present, NOT VERIFIED (cannot fetch ") == 3


def test_files_lie_plainly_in_the_weights_folder(fetch: Fetch, hub: Hub) -> None:
    result = fetch("published-file", "published-folder")
    assert result.exit_code == 0, result.output
    assert (fetch.weights / FILE_PATH).read_bytes() == REWARD
    assert (fetch.weights / TOWER_PATH).read_bytes() == TOWER
    assert files(fetch.weights / FOLDER_PATH) == ["config.json", "model.safetensors"]
    assert "published-file weights: fetched, verified by size and sha256\n" in result.stdout
    assert f"  from hf:acme/reward@v1/weights.safetensors\n  at {fetch.weights / FILE_PATH}\n" in result.stdout
    assert "published-file tower: fetched, verified by size and sha256\n" in result.stdout
    assert "published-folder weights: fetched, verified by size and git sha1; size and sha256\n" in result.stdout


def test_what_is_present_is_verified_and_not_fetched_again(fetch: Fetch, hub: Hub) -> None:
    assert fetch("published-file", "published-folder").exit_code == 0
    gets = len(hub.gets("safetensors") + hub.gets("config.json"))
    result = fetch("published-file", "published-folder")
    assert result.exit_code == 0
    assert result.stdout.count(": present, verified by size and ") == 3
    assert len(hub.gets("safetensors") + hub.gets("config.json")) == gets == 4


def test_only_what_is_missing_of_a_repository_is_fetched(fetch: Fetch, hub: Hub) -> None:
    by_hand = fetch.weights / FOLDER_PATH / "config.json"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(CONFIG)
    assert fetch("published-folder").exit_code == 0
    assert (len(hub.gets("/config.json")), len(hub.gets("/model.safetensors"))) == (0, 1)


@pytest.mark.parametrize("in_cache", [True, False])
def test_bytes_that_do_not_match_are_removed(in_cache: bool, fetch: Fetch, hub: Hub) -> None:
    good = REWARD[:-1] + b"!"
    hub.stated["weights.safetensors"] = good
    if in_cache:
        fetch.weights = fetch.folder / "elsewhere"
        result = CliRunner().invoke(cli.app, ["fetch", "published-file"])
    else:
        result = fetch("published-file")
    assert result.exit_code == 1
    assert "weights.safetensors was removed: it does not match what the hub states: sha256 " in result.stderr
    for content in (REWARD, good):
        assert hashlib.sha256(content).hexdigest() in result.stderr
    folder = fetch.folder / "home" if in_cache else fetch.weights
    left = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert REWARD not in [path.read_bytes() for path in left]
    assert files(fetch.weights) == []


def test_a_file_of_the_users_own_that_does_not_match_is_left_and_named(fetch: Fetch) -> None:
    path = fetch.weights / FILE_PATH
    path.parent.mkdir(parents=True)
    path.write_bytes(REWARD[:-9])
    result = fetch("published-file")
    assert result.exit_code == 1
    assert (
        f"{path} does not match what the hub states: {len(REWARD) - 9} bytes, expected {len(REWARD)}" in result.stderr
    )
    assert "left as it is: remove it to fetch it again" in result.stderr
    assert path.read_bytes() == REWARD[:-9]


def test_the_sha256_of_the_settings_must_match(fetch: Fetch) -> None:
    expected = hashlib.sha256(REWARD).hexdigest()
    result = fetch("published-file", published_file={"sha256": expected})
    assert result.exit_code == 0
    assert "weights: fetched, verified by size and sha256; the settings' sha256" in result.stdout
    other = "0" * 64
    result = fetch("published-file", published_file={"sha256": other})
    assert result.exit_code == 1
    assert f"does not match the settings: the file {fetch.weights / FILE_PATH} is not the expected one" in result.stderr
    assert (fetch.weights / FILE_PATH).is_file()
    (fetch.weights / FILE_PATH).unlink()
    result = fetch("published-file", published_file={"sha256": other})
    assert result.exit_code == 1
    assert f"expected {other}" in result.stderr
    assert not (fetch.weights / FILE_PATH).exists()


@pytest.mark.parametrize("value", ["abc", "0" * 63, "md5:" + "0" * 64, "g" * 64])
def test_a_hash_that_is_none_is_told_at_once(value: str) -> None:
    with pytest.raises(SettingsProblem, match=r"models\.ocr\.sha256"):
        load_settings(models={"ocr": {"sha256": value}})


def test_each_model_that_fails_is_named_and_the_others_are_fetched(fetch: Fetch, hub: Hub) -> None:
    hub.gated.add("acme/reward")
    result = fetch("published-file", "published-folder")
    assert result.exit_code == 1
    assert (
        "published-file: cannot fetch the file weights.safetensors of the hub repository acme/reward at"
        in result.stderr
    )
    assert "access is gated" in result.stderr
    assert "models.published-file.weights" in result.stderr
    assert files(fetch.weights) == ["acme/folder/config.json", "acme/folder/model.safetensors"]
    del hub.repos["acme/tower"]
    hub.gated.clear()
    result = fetch("published-file")
    assert result.exit_code == 1
    assert "no such repository" in result.stderr
    assert "models.published-file.options.tower" in result.stderr


def test_the_sources_of_the_settings_are_used(fetch: Fetch, hub: Hub) -> None:
    hub.repos["me/mine"] = {"sub/mine.safetensors": REWARD}
    local = fetch.folder / "tower.safetensors"
    local.write_bytes(TOWER)
    settings = {"weights": "hf:me/mine/sub/mine.safetensors", "options": {"tower": str(local)}}
    result = fetch("published-file", published_file=settings)
    assert result.exit_code == 0
    assert files(fetch.weights) == ["me/mine/sub/mine.safetensors"]
    assert f"published-file tower: present, a path of this machine\n  from {local}" in result.stdout
    local.unlink()
    result = fetch("published-file", published_file=settings)
    assert result.exit_code == 1
    assert f"models.published-file.options.tower: no weights at {local}" in result.stderr


def test_wrong_usage_is_told_and_nothing_is_fetched(fetch: Fetch, hub: Hub) -> None:
    assert fetch().exit_code == 2
    result = fetch("published-file", "nothing")
    assert result.exit_code == 2
    assert "unknown reward model nothing; known: " in result.stderr
    assert fetch("published-file", published_file={"weight": "x"}).exit_code == 2
    assert fetch("published-file", published_file={"options": {"tower": 3}}).exit_code == 2
    assert fetch("--config", str(fetch.folder / "absent.yaml"), "published-file").exit_code == 2
    assert fetch("published-file", published_file={"weights": ""}).exit_code == 2
    (fetch.folder / "plugins.yaml").write_text("plugins: [no_such_module]\n")
    result = fetch("--config", str(fetch.folder / "plugins.yaml"), "published-file")
    assert result.exit_code == 2
    assert "settings: plugins: No module named 'no_such_module'" in result.stderr
    assert not hub.gets("tower.safetensors")


def test_a_hub_that_cannot_be_reached_is_told(fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    point_library_at(f"http://127.0.0.1:{port}", tmp_path / "home", monkeypatch)
    result = fetch("published-file")
    assert result.exit_code == 1
    assert "the hub cannot be reached or the transfer failed (ConnectError" in result.stderr


def test_a_broken_transfer_goes_on_where_it_stopped(fetch: Fetch, hub: Hub) -> None:
    large = REWARD + bytes(32 << 20)  # the hub library writes pieces of 10 MB
    hub.repos["acme/reward"]["weights.safetensors"] = large
    hub.drops["weights.safetensors"] = 1
    result = fetch("published-file")
    assert result.exit_code == 0, result.output
    assert (fetch.weights / FILE_PATH).read_bytes() == large
    first, second = hub.gets("weights.safetensors")
    assert first == ""
    assert second.startswith("bytes=")
    assert second != "bytes=0-"


def test_a_killed_fetch_leaves_no_half_file_under_the_name(hub: Hub, tmp_path: Path) -> None:
    hub.repos["acme/reward"]["weights.safetensors"] = REWARD + bytes(32 << 20)
    hub.stalls.add("weights.safetensors")
    arguments = ("published-file", "--weights-dir", "weights")
    process, terminal = start(hub, tmp_path, *arguments)
    assert hub.stalled.wait(120)
    wait_until(lambda: any((tmp_path / "weights").rglob("*.incomplete")), "the transfer has begun")
    process.kill()
    process.communicate(timeout=30)
    os.close(terminal)
    assert files(tmp_path / "weights") == []
    hub.stalls.clear()
    code, _, terminal_text = run(hub, tmp_path, *arguments)
    assert code == 0, terminal_text
    assert (tmp_path / "weights" / FILE_PATH).stat().st_size == len(REWARD) + (32 << 20)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 with its key, made by openssl."""
    folder = tmp_path_factory.mktemp("tls")
    path = folder / "server.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    extra = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key.pem"), "-out", str(path)]
    try:
        subprocess.run([*command.split(), *extra], check=True, capture_output=True, cwd=folder)
    except FileNotFoundError:
        pytest.skip("openssl, which makes the certificate of the test, is not installed")
    path.write_bytes(path.read_bytes() + (folder / "key.pem").read_bytes())
    return path


def test_https_sources_are_fetched_verified_and_pinned(
    fetch: Fetch, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    content = hashlib.sha256(REWARD).hexdigest()
    with serving(Hub(raw={"/files/w+1.safetensors": REWARD}), context) as site:
        settings = {"weights": f"{site.url}/files/w%2B1.safetensors?raw=true"}
        (fetch.weights / TOWER_PATH).parent.mkdir(parents=True)
        (fetch.weights / TOWER_PATH).write_bytes(TOWER)
        place = fetch.weights / "127.0.0.1" / "files" / "w+1.safetensors"
        monkeypatch.setattr(download, "RETRY_S", 0.0)
        result = fetch("published-file", published_file=settings)
        assert result.exit_code == 1
        assert "CERTIFICATE_VERIFY_FAILED" in result.stderr
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        result = fetch("published-file", published_file=settings | {"sha256": "1" * 64})
        assert result.exit_code == 1
        assert f"is not the expected file: sha256 {content}, expected {'1' * 64}" in result.stderr
        assert not place.exists()
        result = fetch("published-file", published_file=settings)
        assert result.exit_code == 0, result.output
        assert f"weights: fetched, NOT VERIFIED; its sha256 is {content}" in result.stdout
        assert place.read_bytes() == REWARD
        result = fetch("published-file", published_file=settings | {"sha256": content})
        assert "weights: present, verified by sha256" in result.stdout


def catalog(settings: Settings) -> dict[str, dict[str, Any]]:
    """The rows of GET /models by name, from the real app; nothing is loaded for it."""

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(settings, on_fatal=lambda reason: None))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.get("/models")

    response = asyncio.run(get())
    assert response.status_code == 200
    return {row["name"]: row for row in response.json()["models"]}


def test_the_catalog_tells_what_is_present(fetch: Fetch) -> None:
    mine = {"weights": "https://example.org/w.pt?token=secret", "options": {"tower": str(fetch.folder / "tower.pt")}}
    plain, own = (
        Settings(weights_dir=fetch.weights, models={"published-file": model})  # type: ignore[dict-item]
        for model in ({}, mine)
    )
    rows = catalog(plain)
    sources = [
        {"role": "weights", "source": "hf:acme/reward@v1/weights.safetensors", "bytes": 84, "present": False},
        {"role": "tower", "source": "hf:acme/tower/model/tower.safetensors", "bytes": 84, "present": False},
    ]
    assert rows["published-file"]["sources"] == sources
    assert not rows["published-file"]["weights_present"]
    assert not rows["published-folder"]["weights_present"]
    for name in ("ocr", "shapes-clip", "jpeg-compressibility"):
        assert (rows[name]["sources"], rows[name]["weights_present"]) == ([], True)
    assert cli._weights(rows["published-file"]) == "missing, 168 bytes"
    unknown = [source | {"bytes": 0} for source in sources]
    assert cli._weights(rows["published-file"] | {"sources": unknown, "weights_bytes": 5_000_000}) == "missing, 5.0 MB"
    partly = [unknown[0], sources[1] | {"present": True}]
    assert cli._weights(rows["published-file"] | {"sources": partly}) == "missing"
    assert cli._weights(rows["ocr"]) == "here"
    assert cli._weights(rows["jpeg-compressibility"]) == ""

    assert fetch("published-file").exit_code == 0
    rows = catalog(plain)
    assert rows["published-file"]["sources"] == [source | {"present": True} for source in sources]
    assert rows["published-file"]["weights_present"]
    (fetch.folder / "tower.pt").write_bytes(b"")
    assert catalog(own)["published-file"]["sources"] == [
        {"role": "weights", "source": "https://example.org/w.pt", "bytes": 0, "present": False},
        {"role": "tower", "source": str(fetch.folder / "tower.pt"), "bytes": 0, "present": True},
    ]


def test_a_service_whose_weights_are_missing_ends_with_one_clear_line(tmp_path: Path) -> None:
    settings = {"models": {"published-file": {}}, "plugins": ["published"], "weights_dir": str(tmp_path / "weights")}
    live = spawn(tmp_path / "service", settings, HF_HUB_OFFLINE="1")
    try:
        assert live.wait(120) == 1
    finally:
        live.kill()
    (line,) = [line for line in live.log_lines() if line["level"] == "CRITICAL"]
    for words in ("acme/reward", "weights.safetensors", "revision v1", "models.published-file.weights", str(FILE_PATH)):
        assert words in line["message"]
    assert "Traceback" not in live.log
