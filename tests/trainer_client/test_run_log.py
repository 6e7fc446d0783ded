"""The log of a run: what is in its files, on one rank and two, after a kill and a resume."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from tests.trainer_client.scripts import logged_run
from trainer_client.run_log import RunLog

ROOT = Path(__file__).resolve().parents[2]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet(folder: Path, **settings: Any) -> RunLog:
    return RunLog(folder, **{"total_steps": 10, "tensorboard": False, "progress": False, **settings})


def start(*arguments: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, logged_run.__file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


# Files


def test_rows_are_on_the_disk_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    with quiet(tmp_path / "run") as log:
        log.train(1, {"loss": 0.5, "wire/retries": 2}, seconds=1.5, images=32)
        log.evaluation(1, {"eval/shapes-clip": 0.25}, seconds=1.5, images=32)
        log.event(1, "guard", "diversity: fell\nby half")
        found = rows(tmp_path / "run" / "metrics.jsonl")
        (event,) = rows(tmp_path / "run" / "events.jsonl")
    assert found == [
        {"step": 1, "kind": "train", "seconds": 1.5, "images": 32, "loss": 0.5, "wire/retries": 2},
        {"step": 1, "kind": "eval", "seconds": 1.5, "images": 32, "eval/shapes-clip": 0.25},
    ]
    assert (event["step"], event["kind"], event["text"]) == (1, "guard", "diversity: fell\nby half")
    assert datetime.fromisoformat(event["time"]).utcoffset() is not None


@given(st.dictionaries(st.text(min_size=1), st.none() | st.floats() | st.integers(-9, 9)))
def test_every_line_is_strict_json_whatever_the_numbers(
    tmp_path_factory: pytest.TempPathFactory, numbers: dict[str, float | None]
) -> None:
    numbers = {name: value for name, value in numbers.items() if name not in {"step", "kind", "seconds", "images"}}
    folder = tmp_path_factory.mktemp("run")
    with quiet(folder) as log:
        log.train(1, numbers, seconds=1, images=1)
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    known = {name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()}
    assert row == {"step": 1, "kind": "train", "seconds": 1.0, "images": 1, **known}


def test_names_that_every_row_has_are_refused(tmp_path: Path) -> None:
    with quiet(tmp_path) as log, pytest.raises(ValueError, match="'images'"):
        log.train(1, {"images": 3}, seconds=1, images=1)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_nothing_is_logged_after_the_end(tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        pass
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.train(1, {}, seconds=1, images=1)


@pytest.mark.parametrize("kind", ["uint8", "float", "numpy", "wide"])
def test_samples_come_back_without_loss(tmp_path: Path, kind: str) -> None:
    shape = (2, 3, 3, 5, 3) if kind == "numpy" else (2, 3, 3, 8, 6)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    given = {"uint8": pixels, "float": pixels / 255, "numpy": pixels.numpy(), "wide": pixels.to(torch.float64) / 255}
    scores = torch.tensor([[0.5, torch.nan, 1.0], [0.0, 0.25, 0.75]], dtype=torch.float64)
    with quiet(tmp_path) as log:
        log.samples(20, ["a <b>", "ü"], [7, 8, 9], given[kind], {"x": scores, "y": [[None, 1, 2], [3, 4, 5]]})
    folder = tmp_path / "samples" / "step-00000020"
    assert json.loads((folder / "samples.json").read_text()) == {
        "step": 20,
        "prompts": ["a <b>", "ü"],
        "seeds": [7, 8, 9],
        "scores": {"x": [[0.5, None, 1.0], [0.0, 0.25, 0.75]], "y": [[None, 1, 2], [3, 4, 5]]},
    }
    for p in range(2):
        for s in range(3):
            kept = np.asarray(Image.open(folder / f"{p:03d}-{s:02d}.png"))
            np.testing.assert_array_equal(kept, pixels[p, s].permute(1, 2, 0))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-00000020"]


def test_samples_that_do_not_fit_leave_no_folder(tmp_path: Path) -> None:
    images = torch.zeros(1, 2, 3, 4, 4)
    with quiet(tmp_path) as log:
        with pytest.raises(ValueError, match=r"images are \[2, 2, 3, H, W\], not \[1, 2, 3, 4, 4\]"):
            log.samples(0, ["a", "b"], [1, 2], images, {})
        with pytest.raises(ValueError, match="scores of x are not 1 prompts x 2 seeds"):
            log.samples(0, ["a"], [1, 2], images, {"x": [[1.0]]})
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            log.samples(0, ["a"], [1, 2], images - 1, {})
    assert not (tmp_path / "samples").exists()


def test_new_samples_replace_those_of_the_same_step(tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        log.samples(0, ["a", "b"], [1], torch.zeros(2, 1, 3, 4, 4), {})
        log.samples(0, ["a"], [1], torch.ones(1, 1, 3, 4, 4), {})
    folder = tmp_path / "samples" / "step-00000000"
    assert sorted(path.name for path in folder.iterdir()) == ["000-00.png", "samples.json"]
    assert np.asarray(Image.open(folder / "000-00.png")).min() == 255


# Kill, resume, ranks


def test_a_folder_with_a_log_is_not_begun_again(tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        log.train(1, {"loss": 0.5}, seconds=1, images=1)
    with pytest.raises(FileExistsError, match="resume it, or take another folder"):
        quiet(tmp_path)
    assert len(rows(tmp_path / "metrics.jsonl")) == 1


def test_a_killed_run_goes_on_without_a_row_twice(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, 1000, 0.02)
    end = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < 6:
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    with (folder / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 99, "ki')
    with quiet(folder, resume_step=3) as log:
        log.event(3, "resume", "from step 3")
        for step in (4, 5):
            log.train(step, {"loss": step / 10, "rank": 0}, seconds=step, images=8 * step)
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [(row["step"], row["kind"]) for row in rows(folder / "events.jsonl")] == [(0, "start"), (3, "resume")]


def test_a_resumed_run_drops_the_samples_that_it_draws_again(tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        for step in (0, 10, 20):
            log.samples(step, ["a"], [1], torch.zeros(1, 1, 3, 4, 4), {})
    with quiet(tmp_path, resume_step=10):
        assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-00000000", "step-00000010"]
    with quiet(tmp_path, resume_step=-1):
        assert list((tmp_path / "samples").iterdir()) == []


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    processes = [start(tmp_path / f"run-{rank}", 3, 0, rank, 2) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    assert [row["rank"] for row in rows(tmp_path / "run-0" / "metrics.jsonl")] == [0, 0, 0]
    assert not (tmp_path / "run-1").exists()


# TensorBoard and W&B


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    named = {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    return {**named, "pictures": [(event.step, event.width) for event in found.Images("samples")]}


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with quiet(tmp_path, tensorboard=True) as log:
        log.samples(0, ["a", "b"], [1, 2, 3], torch.zeros(2, 3, 3, 4, 4), {})
        for step in range(1, 7):
            log.train(step, {"loss": 0.5 * step, "kl": math.nan}, seconds=step, images=8 * step)
    with quiet(tmp_path, tensorboard=True, resume_step=4) as log:
        for step in range(5, 8):
            log.train(step, {"loss": 4.0 * step}, seconds=step, images=8 * step)
    found = scalars(tmp_path)
    assert found["loss"] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (5, 20.0), (6, 24.0), (7, 28.0)]
    assert found["progress/images"] == [(step, 8.0 * step) for step in range(1, 8)]
    assert "kl" not in found
    assert found["pictures"] == [(0, 12)]


def hide(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    """A machine without a package: the only thing here that is not real."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == hidden else find(name, *rest))


def test_a_machine_without_tensorboard_says_so_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch, "tensorboard")
    with quiet(tmp_path, tensorboard=True) as log:
        log.train(1, {"loss": 1.0}, seconds=1, images=1)
    assert "the package tensorboard is not installed" in capsys.readouterr().err
    assert len(rows(tmp_path / "metrics.jsonl")) == 1
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_that_is_asked_for_and_missing_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "wandb")
    with pytest.raises(ValueError, match="'shapes' needs the package wandb: pip install wandb") as caught:
        quiet(tmp_path, wandb_project="shapes")
    assert "\n" not in str(caught.value)
    with quiet(tmp_path) as log:  # nothing of the refused log stands in the way
        log.train(1, {}, seconds=1, images=1)


# What is shown


def shown(folder: Path, *, terminal: bool, progress: bool = True) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=200)
    with RunLog(folder, total_steps=40, tensorboard=False, progress=progress, name="run [a]", console=console) as log:
        log.evaluation(0, {"eval/x": 0.25, "eval/x/low": 0.1}, seconds=0, images=0)
        for step in range(1, 41):
            numbers = {"reward/total": step / 100, "time/step": 2.0, "time/reward_wait": 0.5}
            log.train(step, numbers, seconds=2.0 * step, images=16 * step)
        log.event(40, "guard", "stop: [bold]diversity[/bold] fell")
    return written.getvalue()


def test_without_a_terminal_there_are_a_few_plain_lines(tmp_path: Path) -> None:
    lines = shown(tmp_path, terminal=False).splitlines()
    assert [line.split("  ")[1] for line in lines[1:-1]] == [
        *(f"step {step}/40" for step in (1, 6, 11, 16, 21, 26, 31, 36)), "step 40/40"
    ]  # fmt: skip
    assert lines[0] == "run [a]  step 0/40  eval/x 0.25"
    assert lines[2] == "run [a]  step 6/40  reward 0.06  8 images/s  reward wait 25%  0:01:08 left"
    assert lines[-1] == "run [a]  step 40/40  guard: stop: [bold]diversity[/bold] fell"


def test_on_a_terminal_there_is_a_bar_and_events_stand_above_it(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True)
    assert "━" in text
    assert "40/40" in text
    assert "reward 0.4  8 images/s  reward wait 25%" in text
    assert "guard: stop: [bold]diversity[/bold] fell" in text


def test_without_progress_only_events_are_shown(tmp_path: Path) -> None:
    assert shown(tmp_path, terminal=False, progress=False).splitlines() == [
        "run [a]  step 40/40  guard: stop: [bold]diversity[/bold] fell"
    ]
