"""What the Dockerfile promises: small context, layers in the order of change, no root, nothing written at run time."""

from __future__ import annotations

import fnmatch
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, with comments dropped and continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines()]


def stages(dockerfile: str) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage name -> (what it is built from, its instructions)."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    current: list[tuple[str, str]] = []
    for name, arguments in instructions(dockerfile):
        if name == "FROM":
            parent, _, stage = arguments.partition(" AS ")
            current = []
            found[stage] = (parent, current)
        else:
            current.append((name, arguments))
    return found


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text()


def lineage(dockerfile: str, stage: str) -> list[str]:
    """The stage and the stages below it, down to the base image."""
    found = [stage]
    while (parent := stages(dockerfile)[found[-1]][0]) in stages(dockerfile):
        found.append(parent)
    return found


def test_the_final_stage_runs_as_a_numbered_user(dockerfile: str) -> None:
    *_, last = stages(dockerfile)
    assert last == "service"
    users = [arguments for name, arguments in stages(dockerfile)[last][1] if name == "USER"]
    assert len(users) == 1
    user, _, group = users[0].partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_a_code_change_reinstalls_no_dependency(dockerfile: str) -> None:
    below = lineage(dockerfile, "service")[1:]
    assert below == ["dependencies", "torch", "base"]
    copied = {
        stage: [a for n, a in stages(dockerfile)[stage][1] if n in ("COPY", "ADD")] for stage in ["service", *below]
    }
    assert copied["base"] == []
    assert copied["torch"] == ["docker/pip_install.sh /opt/build/"]
    assert copied["dependencies"] == ["docker/list_requirements.py pyproject.toml /opt/build/"]
    code = " ".join(arguments for name, arguments in stages(dockerfile)["wheel"][1] if name == "COPY")
    assert {"./models", "./service"} <= set(code.split())
    assert any("from=wheel" in arguments for name, arguments in stages(dockerfile)["service"][1] if name == "RUN")


def test_base_image_indexes_and_packages_are_arguments(dockerfile: str) -> None:
    arguments = {a.partition("=")[0]: a.partition("=")[2] for name, a in instructions(dockerfile) if name == "ARG"}
    assert {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "TORCH_REQUIREMENTS"} <= arguments.keys()
    assert arguments["BASE_IMAGE"].startswith("python:3.")
    assert not arguments["BASE_IMAGE"].endswith(":latest")
    assert arguments["TORCH_INDEX_URL"].endswith("/cpu"), "the default image must not carry CUDA"
    assert arguments["RUNTIME_PACKAGES"] == '""'
    assert stages(dockerfile)["base"][0] == "${BASE_IMAGE}"
    assert "${TORCH_INDEX_URL:+--index-url" in dockerfile, "an empty TORCH_INDEX_URL must leave pip its own index"


def test_secrets_reach_pip_through_mounts_alone(dockerfile: str) -> None:
    installs = [a for name, a in instructions(dockerfile) if name == "RUN" and "pip_install.sh" in a]
    assert len(installs) == 3
    for run in installs:
        assert "--mount=type=secret,id=pip_conf,target=/etc/pip.conf" in run
        assert "--mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle" in run
    assert not re.search(r"(?i)(password|token|_key)=", dockerfile)


def test_everything_written_lies_in_a_volume_or_tmp(dockerfile: str) -> None:
    environment = dict(
        pair.split("=", 1)
        for name, arguments in stages(dockerfile)["service"][1]
        if name == "ENV"
        for pair in arguments.split()
    )
    caches = {"HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"}
    for name in caches | {"REWARD_WEIGHTS_DIR", "REWARD_CACHE_DIR"}:
        assert environment[name].startswith(("/var/lib/reward-service", "/var/cache/reward-service")), name
    assert environment["REWARD_HOST"] == "0.0.0.0"
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"


def test_nothing_reports_usage(dockerfile: str) -> None:
    (environment,) = [arguments for name, arguments in stages(dockerfile)["service"][1] if name == "ENV"]
    assert {"ORT_DISABLE_TELEMETRY=1", "HF_HUB_DISABLE_TELEMETRY=1"} <= set(environment.split())


def test_the_service_is_asked_whether_it_is_ready_and_told_to_end_by_sigterm(dockerfile: str) -> None:
    final = dict(stages(dockerfile)["service"][1])
    assert final["HEALTHCHECK"].endswith('CMD ["python3", "/opt/reward-service/healthcheck.py"]')
    assert final["STOPSIGNAL"] == "SIGTERM"
    assert final["ENTRYPOINT"] == '["reward-service"]', "the exec form, or a shell swallows SIGTERM"
    assert final["CMD"] == '["serve"]'


def context_files() -> Iterator[str]:
    """The files of the checkout that .dockerignore lets into the build context: the last matching pattern decides."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert patterns[0] == "*", "an allow-list"
    allowed = [pattern[1:].split("/")[0] for pattern in patterns if pattern.startswith("!")]
    roots = [path for path in ROOT.iterdir() if any(fnmatch.fnmatch(path.name, pattern) for pattern in allowed)]
    for path in (file for root in roots for file in [root, *root.rglob("*")] if file.is_file()):
        name = path.relative_to(ROOT).as_posix()
        kept = True
        for pattern in patterns:
            wanted = pattern.removeprefix("!")
            if wanted.startswith("**/"):
                matched = any(fnmatch.fnmatch(part, wanted[3:]) for part in name.split("/"))
            else:
                parents = ["/".join(name.split("/")[: i + 1]) for i in range(name.count("/") + 1)]
                matched = any(fnmatch.fnmatch(parent, wanted) for parent in parents)
            if matched:
                kept = pattern.startswith("!")
        if kept:
            yield name


def test_the_context_is_small_and_holds_what_is_copied(dockerfile: str) -> None:
    files = set(context_files())
    assert {name.split("/")[0] for name in files} <= {
        "models",
        "service",
        "docker",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    assert not any("__pycache__" in name for name in files)
    assert sum((ROOT / name).stat().st_size for name in files) < 32 << 20
    for stage, (_, body) in stages(dockerfile).items():
        for name, arguments in body:
            for source in arguments.split()[:-1] if name == "COPY" else []:
                wanted = source.removeprefix("./")
                assert any(file == wanted or file.startswith(wanted + "/") for file in files), (
                    f"{stage} copies {source}"
                )


def test_requirements_are_those_of_the_project(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\nname = "x"\ndependencies = ["torch>=2.9", "uvicorn[standard]"]\n')
    command = [sys.executable, str(DOCKER / "list_requirements.py"), str(pyproject)]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout == "torch>=2.9\nuvicorn[standard]\n"
    )
    pyproject.write_text('[project]\nname = "x"\n')
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode != 0


class Health(http.server.BaseHTTPRequestHandler):
    """Answers /health/ready with the server's status and anything else with 404."""

    def do_GET(self) -> None:
        self.send_response(getattr(self.server, "status", 500) if self.path == "/health/ready" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def health() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def healthcheck(port: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"REWARD_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, "-I", str(DOCKER / "healthcheck.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (500, 1), (204, 1)])
def test_the_health_check_wants_200(health: http.server.HTTPServer, status: int, code: int) -> None:
    health.status = status  # type: ignore[attr-defined]
    done = healthcheck(health.server_port)
    assert done.returncode == code, done.stderr
    assert (done.stderr == "") == (code == 0)
    assert code == 0 or str(status) in done.stderr


def test_the_health_check_fails_where_nothing_listens(health: http.server.HTTPServer) -> None:
    port = health.server_port
    health.server_close()
    done = healthcheck(port)
    assert done.returncode == 1
    assert "no answer" in done.stderr
