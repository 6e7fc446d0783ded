"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): policy optimisation on the forward process.

An old policy, a moving average of the trained one, draws groups of images by any solver of the ODE; only the clean
latents are kept. Each is noised again to the levels of the sampling schedule. There the trained policy's prediction is
pulled to the sample, and its mirror image in the old policy's prediction too, by shares that follow from the
advantage: no likelihood, no trajectory, no guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer_client import distributed
from trainer_client.config import ConfigError, EmaSection, GroupConfig
from trainer_client.ema import ema_update_, old_policy_decay
from trainer_client.losses import mean_squared_difference
from trainer_client.nft_losses import AdvantageMode, forward_noising, nft_loss, nft_probability
from trainer_client.policies import Conditioning
from trainer_client.policies.flow_pipeline import FlowPolicy
from trainer_client.rewards import served
from trainer_client.run import MakeRewards, Run
from trainer_client.run_batch import Advantages, Batch, Means, parts
from trainer_client.run_setup import flow_policy
from trainer_client.solvers import Solver, solve

OLD = "old"
"""The name of the weights that draw the images."""


class NFTEmaSection(EmaSection):
    """Averaged weights, which evaluation and users take; followed more closely than in Flow-GRPO."""

    every: int = Field(1, ge=1, description="optimizer steps between updates")


class NFTConfig(GroupConfig):
    """Values of the paper's runs for GenEval, PickScore and HPSv2.1 with Stable Diffusion 3.5 (OCR: beta 0.1 and two
    updates a step, several rewards: beta 0.1 and 25 sampling steps)."""

    solver: Solver = Field("dpm2", description="how images are drawn for training")
    beta: float = Field(
        1.0, gt=0, description="of the implicit policies v_old +- beta (v - v_old): a smaller one steps farther"
    )
    schedule: Literal[0, 1, 2] = Field(
        1,
        description="decay of the old policy by optimizer step i: 0: it is the last policy; 1: min(0.001 i, 0.5); "
        "2: 0 until i = 75, then min(0.0075 (i - 75), 0.999)",
    )
    advantages: AdvantageMode = Field("all", description="what of the clipped advantage is used")
    advantage_clip: float = Field(5.0, gt=0)
    kl_beta: float = Field(1e-4, ge=0, description="weight of the squared distance to the reference's velocity")
    timestep_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the sampling timesteps that an image trains, drawn for each by itself"
    )
    ema: NFTEmaSection = NFTEmaSection()


@dataclass(frozen=True)
class Piece:
    """Samples of one chunk that were drawn together: their rows in the batch, and clean latents x0 [b, C, h, w]."""

    rows: list[int]
    conditioning: Conditioning
    x0: Tensor


def train(
    config: NFTConfig,
    out: str | Path,
    *,
    make_rewards: MakeRewards = served,
    resume: bool = False,
    allow: Sequence[str] = (),
) -> Path:
    """Run DiffusionNFT; returns the run's folder. Raises as :class:`trainer_client.run.Run` does, and ConfigError for
    a policy that is no rectified flow and for guidance that would need a second, negative pass."""
    with Run(
        "nft",
        config,
        out,
        copies=(OLD,),
        make_rewards=make_rewards,
        kl_weight=config.kl_beta,
        resume=resume,
        allow=allow,
    ) as run:
        policy = unguided_flow(run)
        sigmas = policy.sigmas(config.sampling.steps, config.sampling.height, config.sampling.width)
        for _ in run.steps():
            batch = run.next_batch()
            pieces: list[Piece] = []
            for chunk in range(config.updates_per_step):
                for rows in batch.pieces(config.sampling.batch_size, chunk, config.sampling.smallest_batch):
                    conditioning = run.conditioning([batch.prompts[row] for row in rows])
                    with run.stage("sample"):
                        x0 = rollout(policy, conditioning, batch, rows, sigmas, config)
                    with run.stage("decode"), torch.no_grad():
                        run.submit(policy.decode(x0), batch, rows)
                    pieces.append(Piece(rows, conditioning, x0))
            advantages = run.advantages(batch)
            with run.stage("train"):
                learn(run, policy, batch, pieces, advantages, sigmas)
                follow(run, policy)
    return Path(out)


def unguided_flow(run: Run[NFTConfig]) -> FlowPolicy:
    """The run's policy; raises ConfigError for one that is no rectified flow, and for classifier-free guidance."""
    policy, scale = flow_policy(run.algorithm, run.policy), run.config.sampling.guidance_scale
    if policy.needs_negative(scale):
        raise ConfigError(
            f"sampling.guidance_scale is {scale:g}: nft trains {policy.family} without guidance, set it to 1"
        )
    return policy


@torch.no_grad()
def rollout(
    policy: FlowPolicy,
    conditioning: Conditioning,
    batch: Batch,
    rows: Sequence[int],
    sigmas: Tensor,
    config: NFTConfig,
) -> Tensor:
    """Clean latents [b, C, h, w] of some rows, drawn by the old policy."""
    sampling = config.sampling
    noise = policy.initial_latents([batch.generators[row] for row in rows], sampling.height, sampling.width)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditioning, sampling.guidance_scale)

    with policy.use(OLD):
        return solve(velocity, noise, sigmas, config.solver)


def choose_levels(generators: Sequence[torch.Generator], sigmas: Tensor, fraction: float) -> Tensor:
    """The sigmas [T, b] that b samples train at, each in an order of its own: sampling ones or a part, never 0.

    Samples that all took one part would leave the other levels out of the whole step.
    """
    count = max(1, round(fraction * (len(sigmas) - 1)))
    orders = [torch.randperm(len(sigmas) - 1, generator=generator)[:count] for generator in generators]
    return sigmas[torch.stack(orders, 1)]


def learn(
    run: Run[NFTConfig],
    policy: FlowPolicy,
    batch: Batch,
    pieces: Sequence[Piece],
    advantages: Advantages,
    sigmas: Tensor,
) -> None:
    """One optimizer step for each chunk of the batch: the mean over its samples and their noise levels."""
    config, means = run.config, Means("loss", "positive_error", "negative_error", "old_deviation", "kl")
    limit = config.advantage_clip
    probability_B = nft_probability(advantages.advantage_B, clip=(-limit, limit), mode=config.advantages)
    for chunk in range(config.updates_per_step):
        count = distributed.count_ok(advantages.ok_B & (batch.chunk_B == chunk))
        for piece in pieces:
            if int(batch.chunk_B[piece.rows[0]]) != chunk:
                continue
            rows = torch.tensor(piece.rows)
            for places in parts(advantages.ok_B[rows].nonzero().flatten(), config.train_batch_size):
                generators = [batch.generators[row] for row in rows[places].tolist()]
                told, x0 = piece.conditioning[places], piece.x0[places.to(run.device)]
                chosen_B = probability_B[rows[places]].to(run.device)
                levels = choose_levels(generators, sigmas, config.timestep_fraction)
                share = len(places) * distributed.world_size() / (max(count, 1) * len(levels))
                for sigma_B in levels.to(x0):
                    noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators])
                    x_t = forward_noising(x0, noise.to(x0), sigma_B)
                    loss, numbers = level_loss(run, policy, told, x0, x_t, sigma_B, chosen_B)
                    torch.autograd.backward(loss * share)
                    means.add(numbers, len(places))
        run.update()
    run.report(**means.over_ranks())


def level_loss(
    run: Run[NFTConfig],
    policy: FlowPolicy,
    conditioning: Conditioning,
    x0: Tensor,
    x_t: Tensor,
    sigma_B: Tensor,
    probability_B: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of b samples noised to ``sigma_B``, their mean, and what it is watched by."""
    config = run.config

    def velocity() -> Tensor:
        return policy.velocity(x_t, sigma_B, conditioning, config.sampling.guidance_scale)

    with torch.no_grad(), policy.use(OLD):
        old = velocity()
    reference: Tensor | None = None
    if run.kl_weight > 0:
        with torch.no_grad(), policy.reference():
            reference = velocity()
    trained = velocity()
    found = nft_loss(x0, x_t, sigma_B, trained, old, probability_B, beta=config.beta, scale=config.advantage_clip)
    numbers = {
        "loss": found.loss,
        "positive_error": found.positive_B.mean(),
        "negative_error": found.negative_B.mean(),
        "old_deviation": mean_squared_difference(trained, old),
    }
    if reference is None:
        return found.loss, {name: number.detach() for name, number in numbers.items()}
    numbers["kl"] = mean_squared_difference(trained, reference)
    total = found.loss + run.kl_weight * numbers["kl"]
    return total, {name: number.detach() for name, number in numbers.items()}


def follow(run: Run[NFTConfig], policy: FlowPolicy) -> None:
    """Move the old policy to the trained one, as far as the schedule says after so many optimizer steps."""
    decay = old_policy_decay(int(run.counters["updates"]), run.config.schedule)
    ema_update_(policy.weights.tensors(OLD), policy.weights.tensors(), decay)
    run.report(old_decay=decay)
