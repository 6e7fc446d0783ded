"""ReFL with the gradient of a real service: the same gradients, and a run from start to end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base import LoadOptions
from models.registry import load_model
from models.shapes_clip import ShapesClip
from tests.service.live import ROOT, Live, running
from tests.trainer_client.policies.tiny_pipelines import build
from trainer_client.config import ConfigError, parse_config
from trainer_client.denoising import denoising_of
from trainer_client.gradient_rewards import GradientRewards, MakeGradients, served_gradients
from trainer_client.refl import ReFLConfig, learn_rewards, train
from trainer_client.remote_reward import RemoteTotals
from trainer_client.run import Run

MODELS = ("shapes-clip", "shapes-oracle")
WEIGHT = 0.5


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("shapes"), {"models": {name: {} for name in MODELS}}) as live:
        yield live


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The embedded policy, and a tiny UNet."""
    folder = tmp_path_factory.mktemp("sd")
    build("sd").save_pretrained(folder)
    return {"flow": str(ROOT / "models/shapes/weights/policy"), "epsilon": str(folder)}


@pytest.fixture(scope="module")
def shapes_clip() -> ShapesClip:
    model = load_model("shapes-clip", LoadOptions(dtype=torch.float32))
    assert isinstance(model, ShapesClip)
    return model


def in_process(model: ShapesClip) -> MakeGradients:
    def reward(
        images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None, /
    ) -> RemoteTotals:
        tokens = torch.stack([model.prepare_text(prompt)[0] for prompt in prompts])
        features = model.encode_image(model.preprocess_tensor(images_B3HW)), model.encode_text(tokens)
        score_B = model.head(*features).score_B
        return RemoteTotals(
            WEIGHT * score_B, torch.ones(len(score_B), dtype=torch.bool), {"shapes-clip": score_B.detach()}, []
        )

    return lambda settings, names, fingerprints: GradientRewards(reward, names)


@pytest.fixture
def config_of(service: Live, sources: dict[str, str]) -> Callable[..., ReFLConfig]:
    def make(kind: str, **values: Any) -> ReFLConfig:
        sections: dict[str, Any] = {
            "prompts": "shapes:train",
            "prompts_per_step": 6,
            "train_batch_size": 4,
            "target": 30.0,
            "policy": {"source": sources[kind], "weights": "full", "device": "cpu"},
            "sampling": {"steps": 4},
            "rewards": {"services": [service.url], "models": {"shapes-clip": WEIGHT}, "patience": 60.0},
            "ema": {"decay": 0},
            "logging": {"progress": False, "tensorboard": False},
        }
        if kind == "flow":
            sections["policy"]["max_sequence_length"] = 0
        return parse_config(ReFLConfig, {**sections, **values})

    return make


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
@pytest.mark.parametrize("x0", ["one_step", "denoise"])
def test_a_step_over_http_has_the_gradients_of_the_step_in_process(
    kind: str, x0: str, config_of: Callable[..., ReFLConfig], shapes_clip: ShapesClip, tmp_path: Path
) -> None:
    """Parameter by parameter, to 1e-5 of its gradient where that is above rounding."""
    config = config_of(kind, x0=x0, differentiable_steps=2)
    found: list[list[Tensor]] = []
    for name, make in (("here", in_process(shapes_clip)), ("http", served_gradients)):
        with Run("refl", config, tmp_path / name, make_rewards=make, needs_gradient=True) as run:
            learn_rewards(run, denoising_of(run.policy, config.sampling), run.next_batch(), 0)
            found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in run.parameters])
    here, there = found
    whole = torch.cat([part.flatten() for part in here])
    assert whole.norm() > 0
    assert (torch.cat([part.flatten() for part in there]) - whole).norm() <= 1e-5 * whole.norm()
    for one, other in zip(here, there, strict=True):
        assert (other - one).norm() <= 1e-5 * one.norm() + 1e-7 * whole.norm()


def test_a_run_over_http_trains_evaluates_and_saves(config_of: Callable[..., ReFLConfig], tmp_path: Path) -> None:
    evaluation = {"prompts": "shapes:heldout", "count": 2, "seeds": 2, "heldout": ["shapes-oracle"]}
    config = config_of("flow", steps=2, evaluation=evaluation, optimizer={"lr": 1e-5})
    folder = train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]
    for row in rows[1:3]:
        assert row["reward/total"] == pytest.approx(WEIGHT * row["reward/shapes-clip"])
        assert row["loss"] == pytest.approx(1e-3 * (30 - row["reward/total"]), rel=1e-5)  # none reaches the target
        assert (row["failed_ratio"], row["below_target"], row["wire/retries"]) == (0, 1, 0)
        assert row["grad_norm"] > 0
        # float32 pixels of six images, and little else
        pixels = 6 * 3 * 32 * 32 * 4
        assert pixels < row["wire/bytes_sent"] < pixels + 20_000
    assert np.isfinite(rows[3]["eval/shapes-oracle"])
    assert (folder / "checkpoints" / "step-00000002").is_dir()


def test_a_reward_without_gradient_is_refused(config_of: Callable[..., ReFLConfig], tmp_path: Path) -> None:
    settings = config_of("flow").rewards.model_dump() | {"models": {"shapes-clip": 1.0, "shapes-oracle": 1.0}}
    with pytest.raises(ConfigError, match="shapes-oracle has no gradient"):
        train(config_of("flow", rewards=settings), tmp_path / "run")
