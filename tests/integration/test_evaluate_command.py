"""``reward-trainer evaluate`` with the embedded policy and a real service: the scores are those of the pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from models.shapes.oracle import examine
from models.shapes.policy import DIRECTORY
from models.shapes.prompts import TASKS, parse
from tests.service.live import Live, running
from trainer_client.checkpoint import Checkpoints, RunIdentity
from trainer_client.evaluate import evaluate_command
from trainer_client.evaluation import image_name
from trainer_client.policies import from_pretrained
from trainer_client.prompts import load_prompts
from trainer_client.run_state import RunState

REWARDS = ("--rewards", "shapes-oracle", "--rewards", "shapes-clip", "--rewards", "jpeg-compressibility")
SMALL = ("--seeds", "2", "--steps", "8", "--max-sequence-length", "0")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    models = {"shapes-oracle": {}, "shapes-clip": {}, "jpeg-compressibility": {}}
    with running(tmp_path_factory.mktemp("service"), {"models": models}) as live:
        yield live


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two held-out prompts of each task, in GenEval's form, and one that the oracle does not understand."""
    held_out = load_prompts("shapes:heldout")
    rows = [dict(p.metadata) for task in TASKS for p in [p for p in held_out if p.tag == task][:2]]
    path = tmp_path / "prompts.jsonl"
    odd = {"prompt": "a photograph of happiness", "tag": "odd"}
    path.write_text("\n".join(json.dumps(row) for row in [*rows, odd]))
    return path


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command("evaluate")(evaluate_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def training_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoint of a tiny LoRA that spoils the images; its average is the start."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    policy = from_pretrained(DIRECTORY, max_sequence_length=0)
    weights = policy.train_lora(rank=2, alpha=4)
    weights.add("ema")
    with torch.no_grad():
        for tensor in weights.tensors():
            tensor.add_(0.2 * torch.randn(tensor.shape))
    state = RunState(weights=weights.named_tensors(), ema=weights.named_tensors("ema"))
    identity = RunIdentity("flow-grpo", "network", "c0", "b0", {})
    state.save(Checkpoints(folder / "checkpoints"), 7, identity, exports={"lora": policy.save_lora})
    return folder


def test_a_spoilt_policy_loses_by_the_rewards_of_a_real_service(
    service: Live, prompts: Path, training_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(
        DIRECTORY, "--lora", training_run, "--against", DIRECTORY, "--prompts", prompts, *REWARDS, *SMALL,
        "--services", service.url, "--out", out, "--judge", "shapes-clip",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads((out / "evaluation.json").read_text())
    asked = [json.loads(line) for line in prompts.read_text().splitlines()]
    for label in ("policy", "against"):
        for p, row in enumerate(asked):
            for s, score in enumerate(document["scores"][label]["shapes-oracle"][p]):
                read = parse(row["prompt"])
                with Image.open(out / "images" / label / image_name(p, s)) as image:
                    assert score == (None if read is None else examine(read, image)[0].exact)
        assert document["results"][label]["shapes-oracle"]["failed"] == 2
        assert document["results"][label]["shapes-oracle"]["prompts"] == 12
        assert document["results"][label]["jpeg-compressibility"]["failed"] == 0
        [(reason, times)] = document["failures"][label].items()
        assert (reason.split(": ")[:2], times) == (["shapes-oracle", "prompt_not_understood"], 2)
    clip = document["comparison"]["shapes-clip"]
    assert clip["difference"]["high"] < 0
    assert clip["p_value"] < 0.01
    assert document["judge"]["win_rate"]["mean"] < 0.5
    ours, theirs = (np.array(document["scores"][label]["shapes-clip"]) for label in ("policy", "against"))
    preferred = np.array(document["judge"]["probabilities"]) > 0.5
    assert np.array_equal(preferred, ours > theirs)  # a pointwise model prefers what it scores higher
    assert set(document["comparison"]["shapes-oracle"]["tags"]) == {*TASKS, "odd"}
    for part in ("policy minus against", "shapes-oracle", "color_attr", "win rate"):
        assert part in result.stdout
    assert "policy: 2 x shapes-oracle: prompt_not_understood" in result.stderr


def test_averaged_weights_are_found_in_a_run(service: Live, prompts: Path, training_run: Path, tmp_path: Path) -> None:
    """The average of this run is the start itself: with --ema, policy and reference draw the same pictures."""
    out = tmp_path / "out"
    result = run(
        DIRECTORY, "--lora", training_run, "--ema", "--against", DIRECTORY, "--prompts", prompts, "--count", "3",
        "--rewards", "shapes-clip", *SMALL, "--services", service.url, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    compared = json.loads((out / "evaluation.json").read_text())["comparison"]["shapes-clip"]
    assert (compared["difference"]["mean"], compared["tied"], compared["difference"]["samples"]) == (0.0, 1.0, 6)


def test_a_model_that_is_not_served_is_told_at_once(service: Live, prompts: Path, tmp_path: Path) -> None:
    asked = ("--prompts", prompts, "--rewards", "no-such-reward")
    result = run(DIRECTORY, *asked, "--services", service.url, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == f"reward-trainer: 'no-such-reward': offered by none of {service.url}\n"
