"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): GRPO on the steps of a flow sampler that are drawn from an SDE.

A rollout draws groups of images; some of its denoising steps are Gaussian transitions, the others follow the ODE. The
log-probability of each drawn step under the policy that is trained, over that under the policy that drew it, is PPO's
ratio; the advantage compares an image's reward with its group's. Variants by configuration: a random window of drawn
steps within the first half (Flow-GRPO-Fast), a sliding one (MixGRPO), DanceGRPO's and CPS' transitions, GRPO-Guard's
ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trainer_client import distributed
from trainer_client.config import GroupConfig
from trainer_client.losses import clipped_policy_loss, guard_log_ratio, kl_on_means, policy_log_ratio
from trainer_client.policies import Conditioning
from trainer_client.policies.flow_pipeline import FlowPolicy
from trainer_client.rewards import served
from trainer_client.run import MakeRewards, Run
from trainer_client.run_batch import Advantages, Batch, Means, parts
from trainer_client.run_setup import flow_policy
from trainer_client.sampling import Transition, draw, log_prob, ode_transition, transition
from trainer_client.windows import flow_grpo_fast_window, mix_grpo_window, random_steps


class FlowGRPOConfig(GroupConfig):
    """Values of the paper for Stable Diffusion 3.5 where they do not depend on the machine."""

    dynamics: Literal["flow-sde", "dance-sde", "cps"] = Field("flow-sde", description="how steps are drawn")
    noise_level: float = Field(0.7, gt=0, description="of the drawn steps")
    window: Literal["all", "random", "fast", "mix"] = Field(
        "all",
        description="which steps are drawn and trained: all but the last, random ones, consecutive ones within the "
        "first half, or a window that slides as training goes on",
    )
    window_size: int = Field(3, ge=1, description="steps of the window")
    window_every: int = Field(1, ge=1, description="rollouts after which the sliding window moves")
    shared_noise: bool = Field(
        False,
        description="a group starts from one noise, so that its rewards differ by its drawn steps alone (DanceGRPO)",
    )
    clip: float = Field(1e-4, gt=0, description="the ratio is clipped to 1 - clip ... 1 + clip")
    clip_high: float | None = Field(None, gt=0, description="another upper clip range")
    ratio: Literal["ppo", "guard"] = Field(
        "ppo", description="'guard': GRPO-Guard's ratio, without its weight 1 / |dt|"
    )
    beta: float = Field(0.0, ge=0, description="weight of the KL to the reference (0.01 to 0.04 in the paper)")
    kl: Literal["diffusion", "std"] = Field("diffusion", description="KL by g^2 as in the code, or by g^2 |dt|")
    advantage_clip: float = Field(5.0, gt=0)
    drop_zero_advantages: bool = Field(
        True,
        description="leave out samples that teach nothing when there is no KL term; in half precision the remaining "
        "ones are computed in other batches than they were drawn in",
    )

    @model_validator(mode="after")
    def _window_fits(self) -> FlowGRPOConfig:
        room = {"all": 1, "random": self.sampling.steps - 1, "fast": self.sampling.steps // 2}
        most = room.get(self.window, self.sampling.steps - 1)
        if self.sampling.steps < 2 or (self.window != "all" and self.window_size > most):
            raise ValueError(
                f"no window of {self.window_size} drawn steps ({self.window}) in {self.sampling.steps} denoising steps"
            )
        return self


@dataclass(frozen=True)
class Drawn:
    """One drawn step of b samples: from latents ``x`` [b, C, h, w] to ``x_next``; ``log_prob_B`` and ``mean`` are the
    sampling policy's, the mean kept for GRPO-Guard's ratio only."""

    index: int
    x: Tensor
    x_next: Tensor
    log_prob_B: Tensor
    mean: Tensor | None

    def select(self, rows: Tensor) -> Drawn:
        """Some of the samples."""
        mean = None if self.mean is None else self.mean[rows]
        return Drawn(self.index, self.x[rows], self.x_next[rows], self.log_prob_B[rows], mean)


@dataclass(frozen=True)
class Piece:
    """Samples of one chunk that were drawn together: their rows in the batch, and their drawn steps."""

    rows: list[int]
    conditioning: Conditioning
    steps: list[Drawn]


def train(
    config: FlowGRPOConfig,
    out: str | Path,
    *,
    make_rewards: MakeRewards = served,
    resume: bool = False,
    allow: Sequence[str] = (),
) -> Path:
    """Run Flow-GRPO; returns the run's folder. Raises as :class:`trainer_client.run.Run` does."""
    with Run(
        "flow_grpo", config, out, make_rewards=make_rewards, kl_weight=config.beta, resume=resume, allow=allow
    ) as run:
        optimise(run)
    return Path(out)


def optimise(run: Run[FlowGRPOConfig]) -> None:
    """All steps of a run that are still to do: rollout, rewards, updates. Raises ConfigError for a policy that is no
    rectified flow."""
    config, policy = run.config, flow_policy(run.algorithm, run.policy)
    sigmas = policy.sigmas(config.sampling.steps, config.sampling.height, config.sampling.width)
    for step in run.steps():
        batch, window = run.next_batch(), choose_window(config, step, run.generator("window"))
        pieces: list[Piece] = []
        for chunk in range(config.updates_per_step):
            for rows in batch.pieces(config.sampling.batch_size, chunk, config.sampling.smallest_batch):
                conditioning = run.conditioning([batch.prompts[row] for row in rows])
                with run.stage("sample"):
                    latents, drawn = rollout(policy, conditioning, batch, rows, sigmas, window, config)
                with run.stage("decode"), torch.no_grad():
                    run.submit(policy.decode(latents), batch, rows)
                pieces.append(Piece(rows, conditioning, drawn))
        advantages = run.advantages(batch)
        with run.stage("train"):
            learn(run, policy, batch, pieces, advantages, sigmas)


def choose_window(config: FlowGRPOConfig, step: int, generator: torch.Generator) -> list[int]:
    """The denoising steps of this rollout that are drawn and trained, ascending."""
    steps = config.sampling.steps
    if config.window == "fast":
        return flow_grpo_fast_window(steps, config.window_size, generator)
    if config.window == "mix":
        return mix_grpo_window(step, steps, config.window_size, every=config.window_every)
    return sorted(random_steps(steps, None if config.window == "all" else config.window_size, generator))


@torch.no_grad()
def rollout(
    policy: FlowPolicy,
    conditioning: Conditioning,
    batch: Batch,
    rows: Sequence[int],
    sigmas: Tensor,
    window: Sequence[int],
    config: FlowGRPOConfig,
) -> tuple[Tensor, list[Drawn]]:
    """Clean latents [b, C, h, w] of some rows, and the steps of the window."""
    generators, sampling = [batch.generators[row] for row in rows], config.sampling
    starts = [batch.group_generator(row) for row in rows] if config.shared_noise else generators
    x = policy.initial_latents(starts, sampling.height, sampling.width)
    drawn: list[Drawn] = []
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = policy.velocity(x, sigma, conditioning, sampling.guidance_scale)
        if index not in window:
            x = ode_transition(x, velocity, sigma, sigma_next).mean
            continue
        step = transition(config.dynamics, x, velocity, sigma, sigma_next, config.noise_level)
        noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators])
        x_next = draw(step, noise.to(x.device))
        kept = step.mean if config.ratio == "guard" else None
        drawn.append(Drawn(index, x, x_next, log_prob(step, x_next), kept))
        x = x_next
    return x, drawn


def learn(
    run: Run[FlowGRPOConfig],
    policy: FlowPolicy,
    batch: Batch,
    pieces: Sequence[Piece],
    advantages: Advantages,
    sigmas: Tensor,
) -> None:
    """One optimizer step for each chunk of the batch: the mean over its samples and their drawn steps."""
    config, means = run.config, Means("loss", "ratio_mean", "approx_kl", "clip_fraction", "kl")
    for chunk in range(config.updates_per_step):
        members = batch.chunk_B == chunk
        count = distributed.count_ok(advantages.ok_B & members)
        for piece in pieces:
            if int(batch.chunk_B[piece.rows[0]]) != chunk:
                continue
            rows = torch.tensor(piece.rows)
            worth = advantages.ok_B[rows]
            if config.drop_zero_advantages and run.kl_weight == 0:
                worth &= advantages.advantage_B[rows] != 0
            for places in parts(worth.nonzero().flatten(), config.train_batch_size):
                advantage_B = advantages.advantage_B[rows[places]].float().to(run.device)
                told = piece.conditioning[places]
                for drawn in piece.steps:
                    share = len(places) * distributed.world_size() / (max(count, 1) * len(piece.steps))
                    chosen = drawn.select(places.to(run.device))
                    loss, numbers = step_loss(run, policy, told, chosen, advantage_B, sigmas)
                    torch.autograd.backward(loss * share)
                    means.add(numbers, len(places))
        run.update()
    run.report(**means.over_ranks())


def step_loss(
    run: Run[FlowGRPOConfig],
    policy: FlowPolicy,
    conditioning: Conditioning,
    drawn: Drawn,
    advantage_B: Tensor,
    sigmas: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one drawn step of b samples, their mean, and what it is watched by."""
    config = run.config
    sigma, sigma_next = sigmas[drawn.index], sigmas[drawn.index + 1]

    def step_of(velocity: Tensor) -> Transition:
        return transition(config.dynamics, drawn.x, velocity, sigma, sigma_next, config.noise_level)

    guidance = config.sampling.guidance_scale
    step = step_of(policy.velocity(drawn.x, sigma, conditioning, guidance))
    log_prob_B = log_prob(step, drawn.x_next)
    if drawn.mean is None:
        ratio_B = policy_log_ratio(log_prob_B, drawn.log_prob_B)
    else:
        ratio_B = guard_log_ratio(log_prob_B, drawn.log_prob_B, step.mean, drawn.mean, step.std)
    limit = config.advantage_clip
    clipped = clipped_policy_loss(
        ratio_B, advantage_B, config.clip, config.clip_high or config.clip, advantage_clip=(-limit, limit)
    )
    numbers = {
        "loss": clipped.loss,
        "ratio_mean": ratio_B.exp().mean(),
        "approx_kl": clipped.approx_kl,
        "clip_fraction": clipped.clip_fraction,
    }
    if run.kl_weight == 0:
        return clipped.loss, {name: number.detach() for name, number in numbers.items()}
    with torch.no_grad(), policy.reference():
        reference = step_of(policy.velocity(drawn.x, sigma, conditioning, guidance))
    kl = kl_on_means(step.mean, reference.mean, step.diffusion if config.kl == "diffusion" else step.std)
    numbers["kl"] = kl
    return clipped.loss + run.kl_weight * kl, {name: number.detach() for name, number in numbers.items()}
