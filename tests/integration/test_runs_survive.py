"""Training runs that lose what they need on the way: their process, their service, its answers, its weights."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.integration.test_client_survives import Supervisor
from tests.service.live import wait_until
from tests.trainer_client.conftest import Handler, Play, Received, RewardServer
from tests.trainer_client.scripts import tiny_run
from trainer_client.cli import app
from trainer_client.flow_grpo import train

STEPS = 8


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def server() -> Iterator[RewardServer]:
    with tiny_run.rewards() as server:
        yield server


@pytest.fixture
def failing_server() -> Iterator[RewardServer]:
    with tiny_run.rewards(failures=True) as server:
        yield server


def steps_done(out: Path) -> int:
    """Training rows that are whole."""
    if not (out / "metrics.jsonl").exists():
        return 0
    return sum('"kind": "train"' in line for line in (out / "metrics.jsonl").read_text().split("\n")[:-1])


def assert_same_run(found: Path, expected: Path, step: int) -> None:
    """Weights, averages, optimizer and counters to the bit, and every number of the log but times."""
    for part in ("weights", "ema", "optimizer"):
        one, other = (tiny_run.checkpoint(out, step) / f"{part}.safetensors" for out in (found, expected))
        assert one.read_bytes() == other.read_bytes(), part
    assert tiny_run.state(found, step) == tiny_run.state(expected, step)
    for kind in ("train", "eval"):
        assert tiny_run.untimed(tiny_run.rows(found, kind)) == tiny_run.untimed(tiny_run.rows(expected, kind))
    samples = [sorted(path.relative_to(out) for path in out.glob("samples/*/*")) for out in (found, expected)]
    assert samples[0] == samples[1]
    for name in samples[0]:
        assert (found / name).read_bytes() == (expected / name).read_bytes()


# -- kill -9 of the run -----------------------------------------------------------------------------------------------


def kill_at(process: BaseProcess, out: Path, step: int, delay: float) -> None:
    """SIGKILL some time after a step."""
    wait_until(lambda: steps_done(out) >= step, f"step {step} is done", 120)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was over before it was killed"


def kill_in_a_checkpoint(process: BaseProcess, out: Path) -> None:
    """SIGKILL while a checkpoint is half written."""
    assert process.pid is not None
    end = time.monotonic() + 120
    while time.monotonic() < end and process.is_alive():
        if list((out / "checkpoints").glob(".partial-*")):
            os.kill(process.pid, signal.SIGSTOP)
            if partial := list((out / "checkpoints").glob(".partial-*")):
                process.kill()
                process.join()
                assert partial[0].is_dir()
                return
            os.kill(process.pid, signal.SIGCONT)
    pytest.fail("no checkpoint was caught half written")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_killed_run_ends_like_an_undisturbed_one(
    kind: str, policy: Path, failing_server: RewardServer, tmp_path: Path
) -> None:
    settings = tiny_run.values(
        tmp_path, policy, failing_server.url, steps=STEPS, updates_per_step=2, beta=0.1, window="random", window_size=2,
        policy={"weights": kind, "lora_rank": 2}, checkpoints={"every": 2}, ema={"every": 3},
        optimizer={"lr": 1e-3, "eps": 1e-8, "warmup_steps": 3},
        evaluation={"prompts": str(tmp_path / "prompts.txt"), "count": 2, "seeds": 2, "every": 3,
                    "heldout": ["heldout"]},
    )  # fmt: skip
    expected, out, log = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "log"
    tiny_run.finish(tiny_run.launch(tiny_run.arguments(settings, expected), log), log)

    chance = random.Random(f"moments {kind}")
    resumed = tiny_run.arguments(settings, out, "--resume")
    for first in (0, 2, 4):
        kill_at(tiny_run.launch(resumed, log), out, first + chance.randrange(2), chance.uniform(0, 0.3))
    kill_in_a_checkpoint(tiny_run.launch([*resumed, "--set", "checkpoints.every=1"], log), out)
    assert "finish" in tiny_run.finish(tiny_run.launch(resumed, log), log)
    assert_same_run(out, expected, STEPS)
    assert len(tiny_run.events(out, "finish")) == 1
    assert len(tiny_run.rows(out)) == STEPS


# -- kill -9 of the service -------------------------------------------------------------------------------------------


@pytest.mark.slow  # three lives of a real service, each of which imports torch
def test_a_run_outlives_its_service(policy: Path, tmp_path: Path) -> None:
    """A real service, killed twice while the run goes on; a supervisor starts it again at the same port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    supervisor = Supervisor(tmp_path, port)
    supervisor.start()
    try:
        settings = tiny_run.values(tmp_path, policy, f"http://127.0.0.1:{port}", steps=STEPS)
        settings["rewards"] |= {"models": {"slow": 1.0}, "patience": 240, "start_patience": 240}
        out, log = tmp_path / "run", tmp_path / "log"
        process = tiny_run.launch(tiny_run.arguments(settings, out), log)
        for life, step in enumerate((2, 4)):
            wait_until(lambda step=step: steps_done(out) >= step, f"step {step} is done", 240)  # type: ignore[misc]
            supervisor.lives[life].process.kill()
        tiny_run.finish(process, log)
        expected = tmp_path / "undisturbed"
        tiny_run.finish(tiny_run.launch(tiny_run.arguments(settings, expected), log), log)
        assert [live.process.poll() for live in supervisor.lives] == [-signal.SIGKILL, -signal.SIGKILL, None]
    finally:
        supervisor.stop()
    assert_same_run(out, expected, STEPS)
    assert sum(row["wire/retries"] for row in tiny_run.rows(out)) >= 2


# -- a service that refuses -------------------------------------------------------------------------------------------


def every_third(server: RewardServer, fault: Play) -> Play:
    """Every third request for scores meets the fault."""
    healthy, asked = server.default, [0]

    def play(handler: Handler, received: Received) -> None:
        asked[0] += received.path == "/score"
        (fault if received.path == "/score" and asked[0] % 3 == 1 else healthy)(handler, received)

    return play


def test_refusals_are_waited_out(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, policy, server.url, steps=3, sampling={"batch_size": 4})
    expected = train(config, tmp_path / "undisturbed")
    server.default = every_third(server, server.problem(429, "overloaded", Retry_After="0"))
    out = train(config, tmp_path / "run")
    assert_same_run(out, expected, 3)
    assert sum(row["wire/retries"] for row in tiny_run.rows(out)) >= 2
    assert sum(row["wire/retries"] for row in tiny_run.rows(expected)) == 0


def after(server: RewardServer, requests: int, fault: Play) -> Play:
    """Healthy for so many requests for scores, and then the fault."""
    healthy, asked = server.default, [0]

    def play(handler: Handler, received: Received) -> None:
        asked[0] += received.path == "/score"
        (fault if asked[0] > requests else healthy)(handler, received)

    return play


def run_command(settings: dict[str, Any], out: Path, *more: str) -> Result:
    return CliRunner(env={"COLUMNS": "1000"}).invoke(app, tiny_run.arguments(settings, out, *more))


def said(result: Result, code: int = 2) -> str:
    """The one line of a run that stopped with 2, or with 1 after it had begun."""
    assert result.exit_code == code, result.output
    [line] = [line for line in result.stderr.splitlines() if line.startswith("reward-trainer: ")]
    assert "Traceback" not in result.stderr
    return line


def test_patience_ends_and_the_run_goes_on_later(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    settings = tiny_run.values(tmp_path, policy, server.url, steps=4, checkpoints={"every": 1})
    expected, out = tmp_path / "undisturbed", tmp_path / "run"
    assert run_command(settings, expected).exit_code == 0
    settings["rewards"]["patience"] = 0.2
    healthy = server.default
    server.default = after(server, 2, server.problem(503, "draining"))
    line = said(run_command(settings, out), code=1)
    assert "503 draining: why draining" in line
    assert line.endswith(f"the trace is in {out / 'failures.txt'}")
    assert "ServiceUnavailable" in (out / "failures.txt").read_text()
    assert tiny_run.events(out, "failure")[0].startswith("ServiceUnavailable: ")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    server.default = healthy
    assert "holds a run already: go on with --resume" in said(run_command(settings, out))
    assert run_command(settings, out, "--resume").exit_code == 0
    assert_same_run(out, expected, 4)


def test_another_fingerprint_stops_a_run(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    settings = tiny_run.values(tmp_path, policy, server.url, steps=4, checkpoints={"every": 1})
    out, healthy = tmp_path / "run", server.default
    assert server.offered is not None

    def changed(handler: Handler, received: Received) -> None:
        server.offered = {**tiny_run.FINGERPRINTS, "mean": "sha256:other"}
        healthy(handler, received)

    server.default = after(server, 2, changed)
    line = said(run_command(settings, out), code=1)
    assert "'mean' has fingerprint sha256:other, not sha256:feed as before" in line
    server.default = healthy
    line = said(run_command(settings, out, "--resume"))
    assert "fingerprints.mean was 'sha256:feed' and is 'sha256:other'" in line
    assert len(tiny_run.rows(out)) == 2
    settings["rewards"]["allow_fingerprint_change"] = True
    assert run_command(settings, out, "--resume").exit_code == 0
    assert len(tiny_run.rows(out)) == 4


def test_an_allowed_change_does_not_stop_a_run(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    settings = tiny_run.values(tmp_path, policy, server.url, steps=3)
    settings["rewards"]["allow_fingerprint_change"] = True
    healthy = server.default

    def changed(handler: Handler, received: Received) -> None:
        server.offered = {**tiny_run.FINGERPRINTS, "mean": "sha256:other"}
        healthy(handler, received)

    server.default = after(server, 1, changed)
    assert run_command(settings, tmp_path / "run").exit_code == 0
    assert len(tiny_run.rows(tmp_path / "run")) == 3
