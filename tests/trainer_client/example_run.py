"""A run's folder as training leaves it: written through the real log and the real guard, with seeded random numbers.

The numbers are made up, and no claim about any policy. ``hacked``: the held-out reward falls in the second half.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from trainer_client.eval_statistics import mean_interval
from trainer_client.guard import Guard, GuardConfig, Verdict
from trainer_client.guard_metrics import TrainingMetrics
from trainer_client.run_log import RunLog

TRAINED, HELDOUT = "shapes-clip", "shapes-oracle"
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 200, 40),
    "purple": (140, 60, 180),
}
PROMPTS = [
    f"a {first} square and a {second} circle" for first in COLOURS for second in COLOURS if first != second
]  # fmt: skip
SEEDS = [101, 102, 103, 104]
IMAGES = 64


def write_run(
    folder: Path, *, steps: int = 120, until: int | None = None, hacked: bool = False, seed: int = 0, side: int = 32
) -> Path:
    """``until``: the last step that is done; before ``steps``, the run looks like one that was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    configuration = {
        "prompts": "shapes:train",
        "steps": steps,
        "seed": seed,
        "policy": {"source": "models/shapes/weights/policy", "lora_targets": []},
        "rewards": {"models": {TRAINED: 1.0}, "services": ["http://service:8000"]},
        "evaluation": {"heldout": [HELDOUT], "every": 10},
    }
    config = {
        "algorithm": "flow-grpo",
        "configuration": configuration,
        "versions": {"torch": torch.__version__},
        "policy": {"class": "FlowPolicy"},
        "rewards": {TRAINED: "sha256:beef", HELDOUT: "sha256:cafe"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    _train(folder, steps, steps if until is None else until, hacked, seed, side)
    return folder


def _train(folder: Path, steps: int, until: int, hacked: bool, seed: int, side: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    guard = Guard(GuardConfig(reward=TRAINED, heldout=(HELDOUT,)))
    with RunLog(folder, total_steps=steps, tensorboard=False, progress=False) as log:
        log.event(0, "start", f"flow-grpo, {steps} steps in all")
        for step in range(until + 1):
            done, seconds = step / steps, 2.6 * step
            numbers: dict[str, float] = {}
            if step:
                numbers, watched = _step(generator, done, hacked)
                verdict = _said(log, step, guard.observe(step, watched))
                log.train(step, numbers | verdict.metrics(), seconds=seconds, images=IMAGES * step)
            if step % 10 == 0:
                scores = _scores(generator, done, hacked)
                verdict = _said(log, step, guard.evaluate(step, scores))
                log.evaluation(step, _means(scores) | verdict.metrics(), seconds=seconds, images=IMAGES * step)
                log.samples(step, PROMPTS, SEEDS, _pictures(generator, done, side), scores)
            if step and step % 50 == 0:
                log.event(step, "checkpoint", f"saved step {step}")
        if until == steps:
            log.event(steps, "finish", f"{IMAGES * steps} images in {2.6 * steps:.0f} s of training")


def _said(log: RunLog, step: int, verdict: Verdict) -> Verdict:
    if verdict.action in ("warn", "raise_kl", "stop"):
        log.event(step, "guard", str(verdict))
    return verdict


def _step(generator: torch.Generator, done: float, hacked: bool) -> tuple[dict[str, float], TrainingMetrics]:
    noise = torch.randn(12, generator=generator).tolist()
    spread = 0.2 * (1 - 0.5 * done) + 0.01 * noise[0]
    diversity = 0.21 - (0.14 if hacked else 0.03) * done + 0.004 * noise[1]
    reward = 0.25 + 0.5 * (1 - math.exp(-3 * done)) + 0.04 * noise[2]
    watched = TrainingMetrics(reward, spread, max(0.05 + 0.1 * done + 0.03 * noise[3], 0), 0.0, diversity)
    seconds = {"sample": 0.9, "decode": 0.1, "reward_wait": 0.06, "train": 1.4}
    timed = {f"time/{name}": part * (1 + 0.05 * abs(noise[4])) for name, part in seconds.items()}
    return {
        "loss": 0.01 * noise[5],
        "reward/total": reward,
        f"reward/{TRAINED}": reward,
        f"reward_std/{TRAINED}": spread * 1.2,
        "group_std": spread,
        "zero_std_ratio": watched.zero_std_ratio,
        "failed_ratio": 0.0 if noise[6] < 2 else 1 / IMAGES,
        "diversity": diversity,
        "advantage_abs": 0.8 + 0.02 * noise[7],
        "ratio_mean": 1 + 1e-4 * noise[8],
        "approx_kl": 1e-5 * (1 + 0.2 * abs(noise[9])),
        "clip_fraction": 0.1 * abs(noise[10]) / 3,
        "kl": 2e-4 * done + 1e-6 * abs(noise[11]),
        "grad_norm": 0.6 + 0.1 * abs(noise[5]),
        "lr": 3e-4,
        "kl_weight": 0.01,
        "wire/retries": 0.0,
        "wire/cpu_seconds": 0.02,
        "wire/bytes_sent": 196_608.0,
        **timed,
        "time/step": sum(timed.values()) + 0.08,
    }, watched


def _scores(generator: torch.Generator, done: float, hacked: bool) -> dict[str, Tensor]:
    shape = (len(PROMPTS), len(SEEDS))
    rise = 0.5 * (1 - math.exp(-3 * done))
    fall = max(done - 0.4, 0) if hacked else 0.0
    noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return {
        TRAINED: 0.25 + rise + 0.1 * noise[0],
        HELDOUT: (0.3 + 0.6 * rise - 1.2 * fall + 0.15 * noise[1]).clamp(0, 1),
    }


def _means(scores: dict[str, Tensor]) -> dict[str, float]:
    found = {"eval/failed_ratio": 0.0, "eval/diversity": 0.2, "time/evaluate": 1.7}
    for name, scores_PS in {**scores, "total": scores[TRAINED]}.items():
        interval = mean_interval(scores_PS)
        found |= {f"eval/{name}": interval.mean, f"eval/{name}/low": interval.low, f"eval/{name}/high": interval.high}
    return found


def _pictures(generator: torch.Generator, done: float, side: int) -> Tensor:
    """A square and a circle that come out of noise as the run goes on."""
    grid = torch.linspace(0, 1, side)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    square = ((x - 0.28).abs() < 0.16) & ((y - 0.5).abs() < 0.16)
    circle = (x - 0.72).square() + (y - 0.5).square() < 0.16**2
    drawn = []
    for prompt in PROMPTS:
        words = prompt.split()
        image = torch.full((3, side, side), 0.92)
        for where, colour in ((square, words[1]), (circle, words[5])):
            image[:, where] = torch.tensor(COLOURS[colour])[:, None] / 255
        drawn.append(image)
    clean = torch.stack(drawn)[:, None].expand(-1, len(SEEDS), -1, -1, -1)
    noise = torch.rand(clean.shape, generator=generator)
    return (clean * (0.3 + 0.7 * done) + noise * 0.7 * (1 - done)).clamp(0, 1)
