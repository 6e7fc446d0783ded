"""A run over two processes, started as ``accelerate launch`` and torchrun start them, against one process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer_client.conftest import RewardServer
from tests.trainer_client.scripts import tiny_run

STEPS = 4


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with tiny_run.rewards(failures=True) as server:
        yield server


@pytest.fixture(scope="module")
def settings(server: RewardServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Groups of five over two ranks of 7 and 8 samples: a group lies on both; some samples fail."""
    folder = tmp_path_factory.mktemp("settings")
    return tiny_run.values(
        folder, tiny_run.save_policy(folder / "policy"), server.url, steps=STEPS, prompts_per_step=3, group_size=5,
        updates_per_step=2, beta=1.0, train_batch_size=3, sampling={"batch_size": 4}, checkpoints={"every": 2},
        optimizer={"weight_decay": 0.01},
        evaluation={"prompts": str(folder / "prompts.txt"), "count": 3, "seeds": 1, "every": 2,
                    "heldout": ["heldout"]},
    )  # fmt: skip


def ranks(arguments: list[str], logs: Path, code: int = 0, count: int = 2) -> list[str]:
    """The output of some ranks, all of which end with ``code``."""
    logs.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    processes = [
        tiny_run.launch(
            arguments, logs / f"{rank}", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        return [tiny_run.finish(process, logs / f"{rank}", code) for rank, process in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def runs(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(one process, two processes that were stopped after two steps and went on)."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = folder / "one", folder / "two"
    log = folder / "log"
    tiny_run.finish(tiny_run.launch(tiny_run.arguments(settings, one), log), log)
    ranks(tiny_run.arguments(settings | {"steps": 2}, two), folder / "logs")
    ranks(tiny_run.arguments(settings, two, "--resume"), folder / "logs")
    return one, two


def test_two_ranks_train_like_one(runs: tuple[Path, Path]) -> None:
    one, two = runs
    start = tiny_run.first_weights(one)
    for step in (2, STEPS):
        for part in ("weights", "ema"):
            expected = tiny_run.tensors(one, step, part)
            assert tiny_run.distance(tiny_run.tensors(two, step, part), expected, start) < 1e-5
    for name, state in tiny_run.tensors(one, STEPS, "optimizer").items():
        found = tiny_run.tensors(two, STEPS, "optimizer")[name]
        assert float((found - state).norm()) <= 1e-3 * float(state.norm()) + 1e-9, name


def test_two_ranks_log_like_one(runs: tuple[Path, Path]) -> None:
    for kind, count in (("train", STEPS), ("eval", 3)):
        found, expected = (tiny_run.untimed(tiny_run.rows(out, kind)) for out in reversed(runs))
        assert len(found) == len(expected) == count
        for row, other in zip(found, expected, strict=True):
            assert row.pop("kind") == other.pop("kind") == kind
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert sum(row["failed_ratio"] for row in tiny_run.rows(runs[1])) > 0
    assert [len(tiny_run.events(out, "finish")) for out in runs] == [1, 2]


def test_another_number_of_ranks_is_refused_unless_it_is_allowed(
    runs: tuple[Path, Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    arguments = tiny_run.arguments(settings | {"steps": STEPS + 1}, runs[0], "--resume")
    for said in ranks(arguments, tmp_path / "logs", code=2):
        assert "the checkpoint is of 1 ranks, and there are 2 (allow=['ranks'] takes it)" in said
        assert "Traceback" not in said
    ranks([*arguments, "--allow", "ranks"], tmp_path / "logs")
    assert [row["step"] for row in tiny_run.rows(runs[0])] == list(range(1, STEPS + 2))


def test_a_rank_without_an_image_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    arguments = tiny_run.arguments(settings | {"prompts_per_step": 1, "group_size": 2}, tmp_path / "run")
    for said in ranks(arguments, tmp_path / "logs", code=2, count=3):
        assert "reward-trainer: 2 images a step cannot be shared by 3 ranks" in said
    assert not (tmp_path / "run" / "config.json").exists()
