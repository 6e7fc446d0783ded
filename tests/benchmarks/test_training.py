"""The training benchmarks: their configurations are the trainer's, and their arithmetic is right."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from benchmarks.training.plans import PLANS, Plan, merged
from benchmarks.training.reward_wait import TakingTurns, brightness, configuration
from benchmarks.training.rl import Outcome, as_toml, change, row_of, run_once
from benchmarks.training.sleeping import Sleeping
from models.base import Candidate, LoadOptions, Sample
from trainer_client.cli import chosen
from trainer_client.config import load_config
from trainer_client.items import Item
from trainer_client.prompts import Prompt
from trainer_client.reward_queue import LocalScores
from trainer_client.rewards import PointwiseRewards


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_every_plan_is_a_run_of_as_many_images(plan: Plan, tmp_path: Path) -> None:
    values = plan.configuration("http://127.0.0.1:1", 18, seed=2)
    file = tmp_path / "run.toml"
    file.write_text("\n".join(as_toml(values)), encoding="utf-8")
    assert tomllib.loads(file.read_text(encoding="utf-8")) == values
    config = load_config(chosen(plan.algorithm)[1], file)
    assert (config.images_per_step, config.seed, config.steps) == (192, 2, 18)
    assert plan.reward in {*config.rewards.models, *config.judges}
    assert set(config.evaluation.heldout) == set(plan.heldout)


def test_settings_of_a_plan_win_value_by_value() -> None:
    assert merged({"a": 1, "s": {"x": 1, "y": 2}}, {"s": {"y": 3}, "b": 4}) == {"a": 1, "s": {"x": 1, "y": 3}, "b": 4}


def outcome(before: float, after: float) -> Outcome:
    scores = {"shapes-oracle": np.full((5, 2), before)}
    changed = {"shapes-oracle": np.full((5, 2), after) + np.array([[0.1, -0.1]] * 5)}
    return Outcome(Path(), scores, changed, 60.0, 3456)


def test_seeds_are_further_noises_of_the_same_prompts() -> None:
    found = change([outcome(0.5, 0.6), outcome(0.5, 0.8)], "shapes-oracle")
    assert (found.mean, found.prompts, found.samples) == (pytest.approx(0.2), 5, 20)
    judged = row_of(PLANS[4], [outcome(0.5, 0.6), outcome(0.5, 0.8)])
    assert judged[2:6] == ["50.0", "+20.0 [+20.0, +20.0]", "+10.0, +30.0", ""]


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RuntimeError, match="other settings"):
        run_once(PLANS[0], "http://127.0.0.1:1", 3, 0, tmp_path / "run")


def test_the_sleeping_reward_is_the_free_one() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    reward = Sleeping.load(LoadOptions(torch.device("cpu"), options={"image_s": 0.0}))
    prepared = reward.prepare(Sample("a star", Candidate(image=PILImage.fromarray(pixels))))
    [found] = reward.run([prepared])
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    assert found.score == pytest.approx(brightness(Item("a star", image[None]))[0], rel=1e-6)


def test_steps_take_turns() -> None:
    sources = [
        PointwiseRewards(LocalScores(lambda item, k=k: [k] * len(item), "sleeping"), ["sleeping"]) for k in (1, 2)
    ]
    turns = TakingTurns(*sources)
    try:
        found = []
        for _ in range(4):
            turns.submit(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [Prompt("a star")] * 2, [0, 0])
            found.append(turns.collect().scores["sleeping"].tolist())
    finally:
        turns.close()
    assert found == [[1, 1], [2, 2], [1, 1], [2, 2]]
    assert configuration("http://127.0.0.1:1", 3, 16, 4).images_per_step == 192
