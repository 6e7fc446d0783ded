"""What compose.yaml promises; test_engine.py sees whether a real engine keeps it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("service", "service-gpu")
TRAINERS = ("trainer", "trainer-gpu")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


def seconds(duration: str) -> float:
    """Of a compose duration in seconds or minutes."""
    number, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "m": 60}[unit]


@pytest.mark.parametrize("name", SERVICES + TRAINERS)
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


@pytest.mark.parametrize("name", SERVICES + TRAINERS)
def test_only_tmp_and_two_volumes_are_writable(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    (tmp,) = service["tmpfs"]
    path, _, options = tmp.partition(":")
    assert path == "/tmp"
    assert {"noexec", "nosuid", "nodev"} <= set(options.split(","))
    assert any(option.startswith("size=") for option in options.split(","))
    named = [volume for volume in service["volumes"] if isinstance(volume, str)]
    assert all(volume["read_only"] for volume in service["volumes"] if not isinstance(volume, str))
    writable = [volume.split(":") for volume in named if not volume.endswith(":ro")]
    places = {"/runs", "/var/cache/reward-trainer"}
    if name in SERVICES:
        places = {"/var/lib/reward-service", "/var/cache/reward-service"}
    assert {target for _, target in writable} == places
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


@pytest.mark.parametrize("names", [SERVICES, TRAINERS])
def test_cpu_is_the_default_and_gpu_asks_for_one_gpu(compose: dict[str, Any], names: tuple[str, str]) -> None:
    cpu, gpu = (compose["services"][name] for name in names)
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text().splitlines()
    assert (cpu["profiles"], gpu["profiles"]) == (["cpu"], ["gpu"])
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    (chosen,) = device.pop("device_ids")
    assert device == {"driver": "nvidia", "capabilities": ["gpu"]}
    assert re.fullmatch(r"\$\{(REWARD|TRAINER)_GPU:-0\}", chosen), "they share the first, or take two"
    assert "deploy" not in cpu


def test_the_service_is_told_its_device(compose: dict[str, Any]) -> None:
    devices = [compose["services"][name]["environment"]["REWARD_DEVICE"] for name in SERVICES]
    assert devices == ["cpu", "cuda"]


@pytest.mark.parametrize(
    ("names", "differ"), [(SERVICES, {"TORCH_INDEX_URL", "RUNTIME_PACKAGES"}), (TRAINERS, {"TORCH_INDEX_URL"})]
)
def test_the_variants_differ_in_torch_and_compiler_alone(
    compose: dict[str, Any], names: tuple[str, str], differ: set[str]
) -> None:
    cpu, gpu = (compose["services"][name]["build"] for name in names)
    assert {**cpu, "args": None} == {**gpu, "args": None}
    dockerfile = ROOT / cpu["context"] / cpu["dockerfile"]
    assert {key for key in cpu["args"] | gpu["args"] if cpu["args"].get(key) != gpu["args"].get(key)} == differ
    assert cpu["args"]["TORCH_INDEX_URL"].endswith("/cpu}")
    declared = set(re.findall(r"^ARG (\w+)", dockerfile.read_text(), flags=re.MULTILINE))
    assert cpu["args"].keys() | gpu["args"].keys() <= declared


def test_triton_of_the_gpu_image_has_a_compiler(compose: dict[str, Any]) -> None:
    assert "gcc" in compose["services"]["service-gpu"]["build"]["args"]["RUNTIME_PACKAGES"].split()


def test_each_image_has_its_own_fixed_tag(compose: dict[str, Any]) -> None:
    images = [compose["services"][name]["image"] for name in SERVICES + TRAINERS]
    assert len(set(images)) == 4
    assert not any(image.endswith(":latest") or ":" not in image for image in images)


@pytest.mark.parametrize(("name", "service"), [("trainer", "service"), ("trainer-gpu", "service-gpu")])
def test_the_trainer_waits_for_the_service_of_its_variant(compose: dict[str, Any], name: str, service: str) -> None:
    trainer = compose["services"][name]
    assert trainer["depends_on"] == {service: {"condition": "service_healthy"}}
    assert trainer["profiles"] == compose["services"][service]["profiles"]
    assert "ports" not in trainer
    assert trainer["restart"].startswith("on-failure:"), "a finished run stays finished, a wrong one is given up"


@pytest.mark.parametrize("name", TRAINERS)
def test_a_restarted_trainer_goes_on(compose: dict[str, Any], name: str) -> None:
    trainer = compose["services"][name]
    command = trainer["command"]
    assert command[0] == "train"
    assert "--resume" in command
    assert command[command.index("--out") + 1] == "${TRAINER_OUT:-/runs/demo}"
    assert "runs:/runs" in trainer["volumes"]
    run = command[command.index("--config") + 1]
    (file,) = [volume for volume in trainer["volumes"] if isinstance(volume, dict)]
    assert (file["target"], file["source"]) == (run, "${TRAINER_RUN:-./docker/demo_run.toml}")
    assert file["bind"] == {"create_host_path": False}, "a missing file must not become an empty folder"


@pytest.mark.parametrize("path", ["docker/settings.yaml", "k8s/base/settings.yaml"])
def test_the_service_understands_the_settings(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("REWARD_")]:
        monkeypatch.delenv(name)
    default = Settings()
    monkeypatch.setenv("REWARD_CONFIG", str(ROOT / path))
    settings = Settings()
    assert settings.models.keys() == default.models.keys(), "the embedded models, as without a file"
    assert settings.drain.max_s == 60
