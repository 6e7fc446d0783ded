"""What compose.yaml keeps of its promises on a real engine: build, start, score, train, come back, go on, drain.

Build arguments and COMPOSE_FILE come from the environment, for machines with their own base image and package index.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image as PILImage

ROOT = Path(__file__).resolve().parents[2]


def missing_engine() -> str | None:
    """Why nothing can be built here, or None."""
    docker = shutil.which("docker")
    if docker is None:
        return "docker is not installed"
    for command, reason in ((["info"], "no Docker engine answers"), (["compose", "version"], "docker has no compose")):
        if subprocess.run([docker, *command], capture_output=True, timeout=60, check=False).returncode != 0:
            return reason
    return None


def run(*command: str, timeout_s: float = 60) -> str:
    """Run in the checkout; its output, or an AssertionError with what it said."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout.strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a composed service will answer; all that was composed is removed afterwards."""
    if (reason := missing_engine()) is not None:
        pytest.skip(reason)
    port = free_port()
    monkeypatch.setenv("COMPOSE_PROJECT_NAME", "reward-service-test")
    monkeypatch.setenv("REWARD_PUBLISH_PORT", str(port))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        run("docker", "compose", "down", "--volumes", "--timeout", "10", timeout_s=120)


def up(*services: str) -> None:
    run("docker", "compose", "up", "--build", "--detach", *services, timeout_s=1500)


def container_of(service: str) -> str:
    """The id of a service's container, running or not."""
    return run("docker", "compose", "ps", "--all", "--quiet", service)


def check_rights(container: str, closed: tuple[str, ...], writable: tuple[str, ...]) -> None:
    """A user without capabilities, who can write to ``writable`` alone."""
    assert run("docker", "exec", container, "id", "-u") == "10001"
    status = run("docker", "exec", container, "cat", "/proc/self/status")
    assert re.search(r"CapEff:\s+0+$", status, flags=re.MULTILINE)
    assert re.search(r"NoNewPrivs:\s+1$", status, flags=re.MULTILINE)
    for path in closed:
        with pytest.raises(AssertionError, match="Read-only file system"):
            run("docker", "exec", container, "touch", f"{path}/x")
    for path in writable:
        run("docker", "exec", container, "touch", f"{path}/x")


def wait_until(container: str, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 300) -> None:
    """Wait until ``docker inspect`` of the container answers what is wanted; raises AssertionError with its log."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        inspected: dict[str, Any] = json.loads(run("docker", "inspect", container))[0]
        if wanted(inspected):
            return
        time.sleep(0.5)
    raise AssertionError(f"{inspected['State']}\n{run('docker', 'logs', '--tail', '20', container)}")


def healthy(inspected: dict[str, Any]) -> bool:
    return bool(inspected["State"]["Health"]["Status"] == "healthy")


def compressibility(url: str, image: PILImage.Image) -> float:
    """The image's jpeg-compressibility, asked over HTTP."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    item = {"prompt": "a photo", "images": [base64.b64encode(buffer.getvalue()).decode()]}
    answer = httpx.post(f"{url}/score", json={"models": {"jpeg-compressibility": 1.0}, "items": [item]}, timeout=60)
    assert answer.status_code == 200, answer.text
    (score,) = answer.json()["results"][0]["scores"]["jpeg-compressibility"]
    return float(score)


KILL = """
import os, pathlib, signal, sys
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    command = path.read_bytes().split(b"\\0")
    if any(part.endswith(b"/" + sys.argv[1].encode()) for part in command) and int(path.parent.name) > 1:
        os.kill(int(path.parent.name), signal.SIGKILL)
"""


def kill(container: str, command: str) -> None:
    """kill -9 of a command in a container, as running out of memory does."""
    run("docker", "exec", container, "python3", "-c", KILL, command)


@pytest.mark.docker
@pytest.mark.timeout(2400)
def test_compose_up_service_builds_scores_and_has_no_rights(url: str) -> None:
    up("service")
    assert run("docker", "compose", "ps", "--all", "--services") == "service", "the service alone"
    name = container_of("service")
    wait_until(name, healthy)
    flat = PILImage.new("RGB", (128, 128), (200, 30, 30))
    noise = PILImage.effect_noise((128, 128), 100).convert("RGB")
    assert compressibility(url, flat) > compressibility(url, noise)

    check_rights(
        name,
        closed=("/", "/opt/venv", "/opt/reward-service", "/etc/reward-service"),
        writable=("/tmp", "/var/lib/reward-service", "/var/cache/reward-service"),
    )
    kill(name, "reward-service")
    wait_until(name, lambda inspected: inspected["RestartCount"] == 1 and healthy(inspected))
    assert compressibility(url, flat) > compressibility(url, noise)
    run("docker", "compose", "stop", timeout_s=150)
    wait_until(name, exited)
    assert exit_code(name) == 0, "SIGTERM drains and exits 0"


def exited(inspected: dict[str, Any]) -> bool:
    return bool(inspected["State"]["Status"] == "exited")


def exit_code(container: str) -> int:
    code: int = json.loads(run("docker", "inspect", container))[0]["State"]["ExitCode"]
    return code


STEPS = 20


@pytest.fixture
def short_run(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo run with fewer and smaller steps."""
    text = (ROOT / "docker/demo_run.toml").read_text()
    for section, key, value in (
        ("", "steps", STEPS),
        ("", "prompts_per_step", 4),
        ("", "group_size", 8),
        ("evaluation", "count", 4),
        ("checkpoints", "every", 2),
    ):
        start = text.index(f"[{section}]") if section else 0
        changed, found = re.subn(rf"(?m)^{key} = \d+$", f"{key} = {value}", text[start:], count=1)
        assert found, f"{section}.{key} is not in the demo run"
        text = text[:start] + changed
    tomllib.loads(text)
    path = tmp_path / "run.toml"
    path.write_text(text)
    monkeypatch.setenv("TRAINER_RUN", str(path))


def packages(container: str) -> set[str]:
    """The distributions that a container's Python has, by normalised name."""
    listed = json.loads(run("docker", "exec", container, "pip", "list", "--format", "json"))
    return {re.sub(r"[-_.]+", "-", each["name"]).lower() for each in listed}


def required(pyproject: str, *extras: str) -> set[str]:
    """The distributions that a pyproject.toml asks for by name."""
    project = tomllib.loads((ROOT / pyproject).read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower() for line in lines}


def has_checkpoint(container: str) -> bool:
    command = ["docker", "exec", container, "sh", "-c", "ls -d /runs/demo/checkpoints/step-*"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


NEEDED_BY_DIFFUSERS = {"huggingface-hub", "tokenizers"}


@pytest.mark.docker
@pytest.mark.timeout(2400)
@pytest.mark.usefixtures("short_run")
def test_compose_up_trains_and_a_killed_trainer_goes_on(tmp_path: Path) -> None:
    up()
    name, service = container_of("trainer"), container_of("service")
    assert healthy(json.loads(run("docker", "inspect", service))[0]), "the trainer started when the service was ready"
    check_rights(
        name,
        closed=("/", "/opt/venv", "/opt/policies/shapes", "/etc/reward-trainer"),
        writable=("/tmp", "/runs", "/var/cache/reward-trainer"),
    )
    only_the_service = required("pyproject.toml") - required("trainer_client/pyproject.toml", "train")
    assert {"fastapi", "onnxruntime", "torchvision"} <= only_the_service
    assert packages(name) & (only_the_service - NEEDED_BY_DIFFUSERS | {"reward-service"}) == set()
    assert "reward-trainer" in packages(name)

    wait_until(name, lambda _: has_checkpoint(name))
    kill(name, "reward-trainer")
    wait_until(name, lambda inspected: inspected["RestartCount"] == 1 and exited(inspected), timeout_s=900)
    assert exit_code(name) == 0, run("docker", "logs", "--tail", "20", name)

    run("docker", "compose", "cp", "trainer:/runs/demo", str(tmp_path))
    out = tmp_path / "demo"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in trained] == [*range(1, STEPS + 1)], "no step is lost, none is told twice"
    assert all(row["failed_ratio"] == 0 for row in trained)
    kinds = [json.loads(line)["kind"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert kinds.index("start") < kinds.index("resume") < kinds.index("finish")
    assert (out / "report.html").stat().st_size > 0
    assert run("docker", "compose", "ps", "--services", "--status", "running") == "service", "it serves on"
