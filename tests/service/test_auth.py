"""Bearer keys, and starts that must fail: with one clear line and an exit code."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.bodies import JPEG_MODEL, item, noise, score_body
from tests.service.live import BASE, Live, running, spawn
from tests.service.test_bad_input import assert_problem


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text("# trainers\nfrom-the-file\n\n  padded-in-the-file  \n")
    settings = {"api_keys": ["from-the-settings"], "api_keys_file": str(folder / "keys")}
    with running(folder, settings) as live:
        yield live


BODY = score_body(JPEG_MODEL, item("a", noise(0)))


@pytest.mark.parametrize("key", ["from-the-settings", "from-the-file", "padded-in-the-file"])
def test_every_key_opens(guarded: Live, key: str) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        headers = {"authorization": f"{scheme} {key}"}
        assert guarded.post("/score", BODY, headers=headers).status_code == 200
        assert guarded.get("/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "value",
    [None, "", "Bearer", "Bearer wrong", "Bearer from-the-fil", "Bearer from-the-settingsX", "from-the-settings",
     "Basic from-the-settings", "Bearer # trainers", "Bearer from-the-settings from-the-file", "Bearer \xe4\xff",
     "Bearer " + "a" * 10_000],
)  # fmt: skip
def test_nothing_else_opens(guarded: Live, value: str | None) -> None:
    headers = {} if value is None else {"authorization": value.encode("latin-1")}
    for path in ("/score", "/compare", "/gradient"):
        response = guarded.post(path, BODY, headers=headers)
        assert_problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
        assert "from-the" not in response.text
    assert_problem(guarded.get("/models", headers=headers), 401, "unauthorized")


def test_a_stranger_is_refused_before_its_body_is_read(guarded: Live) -> None:
    with socket.create_connection(guarded.address, timeout=10) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 900000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_health_and_metrics_are_open(guarded: Live) -> None:
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert guarded.get(path).status_code == 200


def test_keys_are_not_logged(guarded: Live) -> None:
    assert "from-the" not in guarded.log


def test_readiness_fills_in_models(guarded: Live) -> None:
    answer = guarded.get("/health/ready").json()
    assert answer == {"status": "ready", "models": dict.fromkeys(BASE["models"], True)}


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model": ({"models": {"nope": {}}}, "'nope'"),
    "no weights": ({"models": {"no-weights": {}}}, "no such file"),
    "unknown plugin": ({"plugins": ["no_such_plugin"]}, "no_such_plugin"),
    "unknown setting": ({"prot": 8000}, "prot"),
    "unknown setting of a model": ({"models": {JPEG_MODEL: {"wieghts": "x"}}}, "wieghts"),
    "bad value": ({"port": 99_999}, "port"),
    "bad device": ({"device": "cuda:0"}, "cuda:0"),
    "limits that contradict": ({"queue": {"max_cost": 10}}, "images_per_request"),
    "empty key file": ({"api_keys_file": "/dev/null"}, "holds no key"),
    "missing key file": ({"api_keys_file": "/nonexistent/keys"}, "/nonexistent/keys"),
    "bad YAML": ({}, "YAML"),
    "port in use": ({}, "cannot listen"),
}


@pytest.fixture(scope="module")
def failed_starts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Live]]:
    """All of them at once: each spends most of its life on imports."""
    folder = tmp_path_factory.mktemp("starts")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        starts = {}
        for name, (settings, _) in CASES.items():
            text = "models: [a\nport: {" if name == "bad YAML" else None
            if name == "port in use":
                settings = {"port": taken.getsockname()[1]}
            starts[name] = spawn(folder / name.replace(" ", "-"), settings, yaml_text=text)
        try:
            for live in starts.values():
                live.wait(240)
            yield starts
        finally:
            for live in starts.values():
                live.kill()


@pytest.mark.parametrize("name", CASES)
def test_a_start_that_fails_says_why_in_one_line(failed_starts: dict[str, Live], name: str) -> None:
    live = failed_starts[name]
    assert live.process.returncode not in (0, None)
    assert live.process.returncode > 0  # it ended by itself, not by a signal
    assert "Traceback" not in live.log
    complaints = [line for line in live.log.splitlines() if not _is_information(line)]
    assert len(complaints) == 1, live.log
    assert CASES[name][1] in complaints[0]


def _is_information(line: str) -> bool:
    try:
        return json.loads(line)["level"] in ("INFO", "DEBUG")
    except ValueError:
        return not line.strip()


def test_environment_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    """REWARD_ variables are read with their levels; a bad one is one line too."""
    live = spawn(tmp_path, {"queue": {"max_cost": 300}}, REWARD_QUEUE__MAX_COST="10")
    try:
        assert live.wait(120) > 0
        assert "queue.max_cost (10)" in live.log
    finally:
        live.kill()
