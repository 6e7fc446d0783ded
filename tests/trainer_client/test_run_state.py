"""Runs that are killed or stopped and go on bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer_client.policies.tiny_pipelines import build
from trainer_client._state_files import pack, unpack
from trainer_client.checkpoint import (
    CheckpointMismatch,
    Checkpoints,
    RunIdentity,
    policy_identity,
)
from trainer_client.ema import ema_update_
from trainer_client.policies import policy_for
from trainer_client.prompt_order import PromptOrder
from trainer_client.run_state import RunState, random_state, restore_random_state, rewind_log

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "resumable_run.py"
IDENTITY = RunIdentity("flow_grpo", "Linear", "c0", "b0", {})


# A run that is killed


def start(folder: Path, steps: int, save_every: int, slow: float = 0.0) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), str(steps), str(save_every), str(slow)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def kill_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> None:
    """SIGKILL once the condition holds; the process must still have been running then."""
    end = time.monotonic() + 120
    while not is_time():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < end
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -9


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_killed_at_random_steps_and_while_it_saves_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """40 steps; checkpoints, metrics and exports of the two runs are compared byte by byte."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    checkpoints = Checkpoints(killed / "checkpoints")
    reference = start(undisturbed, 40, 3)
    for target in sorted(random.sample(range(4, 24), 2)):
        before = checkpoints.latest() or 0
        kill_when(start(killed, 40, 3), partial(reached, killed, max(target, before + 1)))
    for save_every in (7, 5):
        # The second save after the start is hit, half written, so that there is something to lose.
        kill_when(start(killed, 40, save_every, slow=0.3), partial(in_second_save, killed, checkpoints.latest()))
        assert half_written(killed)
        assert checkpoints.load(own_identity(checkpoints)).step == checkpoints.latest()
    finish(start(killed, 40, 3))
    finish(reference)
    assert not half_written(killed)
    last = Path("checkpoints/step-00000040")
    expected = files(undisturbed / last)
    assert {"weights.safetensors", "ema.safetensors", "optimizer.safetensors", "ranks.safetensors"} <= expected.keys()
    assert files(killed / last) == expected
    assert (killed / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def reached(folder: Path, target: int) -> bool:
    log = folder / "metrics.jsonl"
    return log.exists() and log.read_bytes().count(b"\n") >= target


def in_second_save(folder: Path, before: int | None) -> bool:
    return Checkpoints(folder / "checkpoints").latest() != before and half_written(folder)


def own_identity(checkpoints: Checkpoints) -> RunIdentity:
    latest = checkpoints.latest()
    assert latest is not None
    return RunIdentity(**json.loads((checkpoints.path(latest) / "run.json").read_text())["identity"])


def half_written(folder: Path) -> bool:
    return any(folder.glob("checkpoints/.partial-*/half/half.txt"))


# Parts of a run


def small_run(width: int = 2, prompts: int = 3, **more: Any) -> tuple[RunState, torch.nn.Linear, torch.optim.Optimizer]:
    network = torch.nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    order = PromptOrder([str(i) for i in range(prompts)], 0)
    parts = {"weights": dict(network.named_parameters()), "optimizer": optimizer, "order": order, **more}
    return RunState(**parts), network, optimizer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 3}, "weights does not fit: weight"),
        ({"prompts": 4}, "order does not take .* size, prompts_sha256 differ"),
        ({"extra": {"step": 1}}, "differ in their parts: extra"),
        ({"optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])}, "optimizer does not take"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    small_run()[0].save(checkpoints, 1, IDENTITY)
    with pytest.raises(CheckpointMismatch, match=message):
        small_run(**other)[0].load(checkpoints, IDENTITY)


def test_weights_are_put_back_in_place_and_the_optimizer_keeps_its_hold(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    run, network, _ = small_run()
    run.save(checkpoints, 1, IDENTITY)
    again, other, optimizer = small_run()
    held = optimizer.param_groups[0]["params"][0]
    again.load(checkpoints, IDENTITY)
    assert held is other.weight
    assert torch.equal(other.weight, network.weight)
    assert other.weight.requires_grad


def policy_run(kind: str, rank: int = 4) -> tuple[Any, RunState, RunIdentity, Callable[[], None]]:
    """A policy over a tiny pipeline of the true classes, its parts, and a step of training."""
    policy = policy_for(build("sd3"))
    identity = RunIdentity("nft", **policy_identity(policy.network), configuration={})
    torch.manual_seed(time.time_ns() % 2**32)
    weights = policy.train_lora(rank, 8) if kind == "lora" else policy.train_full()
    weights.add("old")
    optimizer = torch.optim.AdamW(weights.tensors(), lr=1e-2)
    run = RunState(weights=weights.named_tensors(), old=weights.named_tensors("old"), optimizer=optimizer)
    conditioning = policy.encode_prompts(["a red circle"])

    def step() -> None:
        latents = policy.initial_latents([torch.default_generator])
        loss = policy.velocity(latents, 0.5, conditioning).sub(latents).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema_update_(weights.tensors("old"), weights.tensors(), 0.5)

    return policy, run, identity, step


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_policy_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    policy, run, identity, step = policy_run(kind)
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):
        step()
    exports = {"lora": policy.save_lora} if kind == "lora" else {}
    run.save(checkpoints, 2, identity, exports=exports)
    saved = {name: tensor.detach().clone() for name, tensor in policy.weights.named_tensors().items()}
    step()
    again, other, same_identity, other_step = policy_run(kind)
    assert same_identity == identity
    path = other.load(checkpoints, same_identity).path
    other_step()
    for name in ("default", "old"):
        expected = policy.weights.named_tensors(name)
        for key, tensor in again.weights.named_tensors(name).items():
            assert torch.equal(tensor, expected[key]), key
    assert any(not torch.equal(tensor, saved[key]) for key, tensor in policy.weights.named_tensors().items())
    if kind == "lora":
        loaded = policy_for(build("sd3")).load_lora(path / "lora").named_tensors()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in saved.items())
        with pytest.raises(CheckpointMismatch, match=r"weights does not fit: .*lora_A"):
            policy_run(kind, rank=2)[1].load(checkpoints, identity)


def test_names_that_runs_need_are_reserved() -> None:
    with pytest.raises(ValueError, match="ranks"):
        RunState(ranks={"step": 1})
    with pytest.raises(TypeError, match="order is a list"):
        RunState(order=[1, 2])  # type: ignore[arg-type]


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]] = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=30, cycle_momentum=False),
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [4, 8]),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 5), torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)],
        milestones=[5],
    ),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "function": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_torch_go_on_where_they_were(tmp_path: Path, name: str) -> None:
    def advance(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            schedule.step(*([1.0] if name == "plateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    def build() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, SCHEDULES[name](optimizer)

    optimizer, schedule = build()
    advance(optimizer, schedule, 6)
    RunState(optimizer=optimizer, schedule=schedule).save(Checkpoints(tmp_path), 6, IDENTITY)
    expected = advance(optimizer, schedule, 6)
    resumed, again = build()
    RunState(optimizer=resumed, schedule=again).load(Checkpoints(tmp_path), IDENTITY)
    assert advance(resumed, again, 6) == expected
    assert len(set(expected)) > 1


def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(2).tolist()]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_random_numbers_go_on_through_json_and_tensors(seed: int, before: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for _ in range(before):
        random.gauss(0, 1)  # leaves a second one in store
        np.random.normal()
    tree, tensors = pack(random_state())
    expected = draws()
    assert draws() != expected
    restore_random_state(unpack(json.loads(json.dumps(tree)), tensors))
    assert draws() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_numbers_of_gpus_go_on(tmp_path: Path) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    run = RunState(noise=generator)
    run.save(Checkpoints(tmp_path), 1, IDENTITY)
    expected = torch.rand(4, device="cuda"), torch.rand(4, device="cuda", generator=generator)
    run.load(Checkpoints(tmp_path), IDENTITY)
    assert torch.equal(torch.rand(4, device="cuda"), expected[0])
    assert torch.equal(torch.rand(4, device="cuda", generator=generator), expected[1])
    with pytest.raises(CheckpointMismatch, match="noise was a generator on cuda and is on cpu"):
        RunState(noise=torch.Generator()).load(Checkpoints(tmp_path), IDENTITY)


# The log beside it


def test_a_log_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    rewind_log(log, 3)
    assert not log.exists()
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    rewind_log(log, 3)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    log.write_text('{"step": 1}\nnot json\n')
    with pytest.raises(ValueError, match="Expecting"):
        rewind_log(log, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
