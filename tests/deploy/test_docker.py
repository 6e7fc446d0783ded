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

from tests.deploy.dockerfiles import DOCKER, FILES, ROOT, copied, environment, instructions, lineage, stages


@pytest.fixture(params=FILES)
def image(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(name, Dockerfile) of each image."""
    return request.param, (DOCKER / FILES[request.param]).read_text()


@pytest.fixture(scope="module")
def dockerfile() -> str:
    """The service's."""
    return (DOCKER / FILES["service"]).read_text()


@pytest.fixture(scope="module")
def trainer() -> str:
    """The trainer's Dockerfile."""
    return (DOCKER / FILES["trainer"]).read_text()


def test_the_final_stage_runs_as_a_numbered_user(image: tuple[str, str]) -> None:
    name, dockerfile = image
    *_, last = stages(dockerfile)
    assert last == name
    users = [arguments for name, arguments in stages(dockerfile)[last][1] if name == "USER"]
    assert len(users) == 1
    user, _, group = users[0].partition(":")
    assert int(user) > 0
    assert int(group) > 0


@pytest.mark.parametrize(
    ("name", "pyproject", "code"),
    [
        ("service", "pyproject.toml", {"./models", "./service"}),
        ("trainer", "trainer_client/pyproject.toml", {"trainer_client"}),
    ],
)
def test_a_code_change_reinstalls_no_dependency(name: str, pyproject: str, code: set[str]) -> None:
    dockerfile = (DOCKER / FILES[name]).read_text()
    below = lineage(dockerfile, name)[1:]
    assert below == ["dependencies", "torch", "base"]
    assert copied(dockerfile, "base") == []
    assert copied(dockerfile, "torch") == ["docker/pip_install.sh /opt/build/"]
    assert copied(dockerfile, "dependencies") == [f"docker/list_requirements.py {pyproject} /opt/build/"]
    assert code <= set(" ".join(copied(dockerfile, "wheel")).split())
    assert any("from=wheel" in arguments for kind, arguments in stages(dockerfile)[name][1] if kind == "RUN")


def test_base_image_indexes_and_packages_are_arguments(image: tuple[str, str]) -> None:
    name, dockerfile = image
    arguments = {a.partition("=")[0]: a.partition("=")[2] for kind, a in instructions(dockerfile) if kind == "ARG"}
    assert {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "TORCH_REQUIREMENTS"} <= arguments.keys()
    assert arguments["BASE_IMAGE"].startswith("python:3.")
    assert not arguments["BASE_IMAGE"].endswith(":latest")
    assert arguments["TORCH_INDEX_URL"].endswith("/cpu"), "the default image must not carry CUDA"
    assert arguments.get("RUNTIME_PACKAGES") == {"service": '""', "trainer": None}[name]
    assert stages(dockerfile)["base"][0] == "${BASE_IMAGE}"
    assert "${TORCH_INDEX_URL:+--index-url" in dockerfile, "an empty TORCH_INDEX_URL must leave pip its own index"


def test_both_images_stand_on_the_same_base(dockerfile: str, trainer: str) -> None:
    bases = [
        [a for kind, a in instructions(text) if kind == "ARG" and "BASE_IMAGE" in a] for text in (dockerfile, trainer)
    ]
    assert bases[0] == bases[1]


def test_secrets_reach_pip_through_mounts_alone(image: tuple[str, str]) -> None:
    _, dockerfile = image
    installs = [a for name, a in instructions(dockerfile) if name == "RUN" and "pip_install.sh" in a]
    assert len(installs) == 3
    for run in installs:
        assert "--mount=type=secret,id=pip_conf,target=/etc/pip.conf" in run
        assert "--mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle" in run
    assert not re.search(r"(?i)(password|token|_key)=", dockerfile)


def test_everything_written_lies_in_a_volume_or_tmp(image: tuple[str, str]) -> None:
    name, dockerfile = image
    volumes = {
        "service": ("/var/lib/reward-service", "/var/cache/reward-service"),
        "trainer": ("/runs", "/var/cache/reward-trainer"),
    }[name]
    written = {"HOME", "XDG_CACHE_HOME", "HF_HOME", "CUDA_CACHE_PATH"}
    written |= {"TRITON_CACHE_DIR", "REWARD_WEIGHTS_DIR", "REWARD_CACHE_DIR"} if name == "service" else set()
    variables = environment(dockerfile, name)
    for variable in written:
        assert variables[variable].startswith(volumes), variable
    assert variables["PYTHONDONTWRITEBYTECODE"] == "1"
    (made,) = [a for kind, a in stages(dockerfile)[name][1] if kind == "RUN" and "install -d" in a]
    assert set(made.split("install -d -o 10001 -g 10001 ")[1].split()) == set(volumes)


def test_the_service_is_reached_from_outside_its_container(dockerfile: str) -> None:
    assert environment(dockerfile, "service")["REWARD_HOST"] == "0.0.0.0"


def test_nothing_reports_usage(dockerfile: str, trainer: str) -> None:
    assert environment(dockerfile, "service")["ORT_DISABLE_TELEMETRY"] == "1"
    assert environment(dockerfile, "service")["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environment(trainer, "trainer")["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_the_service_is_asked_whether_it_is_ready_and_told_to_end_by_sigterm(dockerfile: str) -> None:
    final = dict(stages(dockerfile)["service"][1])
    assert final["HEALTHCHECK"].endswith('CMD ["python3", "/opt/reward-service/healthcheck.py"]')
    assert final["STOPSIGNAL"] == "SIGTERM"
    assert final["ENTRYPOINT"] == '["reward-service"]', "the exec form, or a shell swallows SIGTERM"
    assert final["CMD"] == '["serve"]'


def test_the_trainer_ends_as_by_an_interrupt_and_carries_the_embedded_policy(trainer: str) -> None:
    final = dict(stages(trainer)["trainer"][1])
    assert final["STOPSIGNAL"] == "SIGINT"
    assert final["ENTRYPOINT"] == '["reward-trainer"]', "the exec form, or a shell swallows the signal"
    assert copied(trainer, "trainer") == ["models/shapes/weights/policy /opt/policies/shapes"]
    assert (ROOT / "models/shapes/weights/policy/model_index.json").is_file()


def test_the_trainer_image_has_nothing_of_the_service(trainer: str) -> None:
    sources = [arguments for stage in stages(trainer) for arguments in copied(trainer, stage)]
    assert not any("service" in source.split() or "pyproject.toml" in source.split() for source in sources)
    (requirements,) = [a for kind, a in stages(trainer)["dependencies"][1] if kind == "RUN"]
    assert "list_requirements.py /opt/build/pyproject.toml train >" in requirements
    arguments = [a for kind, a in instructions(trainer) if kind == "ARG"]
    assert 'TORCH_REQUIREMENTS="torch"' in arguments, "torchvision is the service's"


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


def test_the_context_is_small() -> None:
    files = set(context_files())
    assert {name.split("/")[0] for name in files} <= {
        "models",
        "service",
        "trainer_client",
        "docker",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    assert not any("__pycache__" in name or ".egg-info" in name for name in files)
    assert sum((ROOT / name).stat().st_size for name in files) < 32 << 20


def test_the_context_holds_what_is_copied(image: tuple[str, str]) -> None:
    _, dockerfile = image
    files = set(context_files())
    for stage in stages(dockerfile):
        for arguments in copied(dockerfile, stage):
            for source in arguments.split()[:-1]:
                wanted = source.removeprefix("./")
                found = any(file == wanted or file.startswith(wanted + "/") for file in files)
                assert found, f"{stage} copies {source}"


def test_requirements_are_those_of_the_project(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(
        '[project]\nname = "x"\ndependencies = ["torch>=2.9", "uvicorn[standard]"]\n'
        '[project.optional-dependencies]\ntrain = ["peft"]\nother = ["scipy"]\n'
    )
    command = [sys.executable, str(DOCKER / "list_requirements.py"), str(pyproject)]
    own = "torch>=2.9\nuvicorn[standard]\n"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == own
    assert subprocess.run([*command, "train"], capture_output=True, text=True, check=True).stdout == own + "peft\n"
    assert subprocess.run([*command, "missing"], capture_output=True, text=True, check=False).returncode != 0
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
