"""What compose.yaml promises, and (marked `docker`) that it keeps it: build, start, score, come back, drain."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image as PILImage

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("service", "service-gpu")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


def seconds(duration: str) -> float:
    """Of a compose duration in seconds or minutes."""
    number, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "m": 60}[unit]


@pytest.mark.parametrize("name", SERVICES)
def test_the_container_has_no_rights(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].partition(":")[0]) > 0
    assert service["init"] is True
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert all(key not in service for key in ("network_mode", "pid", "ipc", "devices"))


@pytest.mark.parametrize("name", SERVICES)
def test_it_is_published_on_this_machine_alone(compose: dict[str, Any], name: str) -> None:
    (port,) = compose["services"][name]["ports"]
    assert re.fullmatch(r"127\.0\.0\.1:\$\{REWARD_PUBLISH_PORT:-8000\}:8000", port)


@pytest.mark.parametrize("name", SERVICES)
def test_only_tmp_and_two_volumes_are_writable(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    (tmp,) = service["tmpfs"]
    path, _, options = tmp.partition(":")
    assert path == "/tmp"
    assert {"noexec", "nosuid", "nodev"} <= set(options.split(","))
    assert any(option.startswith("size=") for option in options.split(","))
    writable = [volume.split(":") for volume in service["volumes"] if not volume.endswith(":ro")]
    assert {target for _, target in writable} == {"/var/lib/reward-service", "/var/cache/reward-service"}
    assert {volume for volume, _ in writable} <= compose["volumes"].keys(), "named volumes outlive the container"


@pytest.mark.parametrize("name", SERVICES)
def test_it_comes_back_and_is_given_time_to_end(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    drain = Settings.model_fields["drain"].get_default(call_default_factory=True)
    settings = yaml.safe_load((ROOT / "docker/settings.yaml").read_text())
    max_s = settings["drain"].get("max_s", drain.max_s)
    assert service["restart"] == "unless-stopped"
    # The queue empties within max_s, then open connections get WRITE_S (service/process.py).
    assert seconds(service["stop_grace_period"]) > max_s + 10 + 1


@pytest.mark.parametrize("name", SERVICES)
def test_its_health_is_its_readiness(compose: dict[str, Any], name: str) -> None:
    check = compose["services"][name]["healthcheck"]
    assert check["test"] == ["CMD", "python3", "/opt/reward-service/healthcheck.py"]
    assert (ROOT / "docker/healthcheck.py").is_file()
    assert seconds(check["timeout"]) < seconds(check["interval"])
    assert seconds(check["start_period"]) >= 300, "a first start compiles"


def test_cpu_is_the_default_and_gpu_asks_for_one_gpu(compose: dict[str, Any]) -> None:
    service, gpu = (compose["services"][name] for name in SERVICES)
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text().splitlines()
    assert (service["profiles"], gpu["profiles"]) == (["cpu"], ["gpu"])
    assert service["environment"]["REWARD_DEVICE"] == "cpu"
    assert gpu["environment"]["REWARD_DEVICE"] == "cuda"
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "deploy" not in service


def test_the_variants_differ_in_torch_and_compiler_alone(compose: dict[str, Any]) -> None:
    cpu, gpu = (compose["services"][name]["build"] for name in SERVICES)
    assert {**cpu, "args": None} == {**gpu, "args": None}
    assert (ROOT / cpu["context"] / cpu["dockerfile"]).is_file()
    differing = {key for key in cpu["args"] | gpu["args"] if cpu["args"].get(key) != gpu["args"].get(key)}
    assert differing == {"TORCH_INDEX_URL", "RUNTIME_PACKAGES"}
    assert cpu["args"]["TORCH_INDEX_URL"].endswith("/cpu}")
    assert "gcc" in gpu["args"]["RUNTIME_PACKAGES"].split()
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / "docker/Dockerfile").read_text(), flags=re.MULTILINE))
    assert cpu["args"].keys() | gpu["args"].keys() <= declared
    images = [compose["services"][name]["image"] for name in SERVICES]
    assert len(set(images)) == 2
    assert not any(image.endswith(":latest") or ":" not in image for image in images)


@pytest.mark.parametrize("path", ["docker/settings.yaml", "k8s/base/settings.yaml"])
def test_the_service_understands_the_settings(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("REWARD_")]:
        monkeypatch.delenv(name)
    default = Settings()
    monkeypatch.setenv("REWARD_CONFIG", str(ROOT / path))
    settings = Settings()
    assert settings.models.keys() == default.models.keys(), "the embedded models, as without a file"
    assert settings.drain.max_s == 60


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
def container(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """(container id, URL) of `docker compose up`; build arguments and COMPOSE_FILE come from the environment."""
    if (reason := missing_engine()) is not None:
        pytest.skip(reason)
    port = free_port()
    monkeypatch.setenv("COMPOSE_PROJECT_NAME", "reward-service-test")
    monkeypatch.setenv("REWARD_PUBLISH_PORT", str(port))
    try:
        run("docker", "compose", "up", "--build", "--detach", timeout_s=1500)
        yield run("docker", "compose", "ps", "--quiet", "service"), f"http://127.0.0.1:{port}"
    finally:
        run("docker", "compose", "down", "--volumes", "--timeout", "10", timeout_s=120)


def wait_until(container: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Wait until ``docker inspect`` of the container answers what is wanted; raises AssertionError with its log."""
    deadline = time.monotonic() + 300
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


KILL_THE_SERVICE = """
import os, pathlib, signal
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    command = path.read_bytes().split(b"\\0")
    if any(part.endswith(b"/reward-service") for part in command) and int(path.parent.name) > 1:
        os.kill(int(path.parent.name), signal.SIGKILL)
"""


@pytest.mark.docker
@pytest.mark.timeout(2400)
def test_compose_up_builds_scores_and_has_no_rights(container: tuple[str, str]) -> None:
    name, url = container
    wait_until(name, healthy)
    flat = PILImage.new("RGB", (128, 128), (200, 30, 30))
    noise = PILImage.effect_noise((128, 128), 100).convert("RGB")
    assert compressibility(url, flat) > compressibility(url, noise)

    assert run("docker", "exec", name, "id", "-u") == "10001"
    status = run("docker", "exec", name, "cat", "/proc/self/status")
    assert re.search(r"CapEff:\s+0+$", status, flags=re.MULTILINE)
    assert re.search(r"NoNewPrivs:\s+1$", status, flags=re.MULTILINE)
    for path in ("/", "/opt/venv", "/opt/reward-service", "/etc/reward-service"):
        with pytest.raises(AssertionError, match="Read-only file system"):
            run("docker", "exec", name, "touch", f"{path}/x")
    for path in ("/tmp", "/var/lib/reward-service", "/var/cache/reward-service"):
        run("docker", "exec", name, "touch", f"{path}/x")

    run("docker", "exec", name, "python3", "-c", KILL_THE_SERVICE)
    wait_until(name, lambda inspected: inspected["RestartCount"] == 1 and healthy(inspected))
    assert compressibility(url, flat) > compressibility(url, noise)
    run("docker", "compose", "stop", timeout_s=150)
    wait_until(name, lambda inspected: inspected["State"]["Status"] == "exited")
    assert json.loads(run("docker", "inspect", name))[0]["State"]["ExitCode"] == 0, "SIGTERM drains and exits 0"
