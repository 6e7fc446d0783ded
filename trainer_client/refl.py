"""ReFL (Xu et al. 2023, arXiv 2304.05977): the gradient of a differentiable reward, through a late denoising step.

A rollout denoises without gradient down to a random late step; that step's prediction of the clean image is decoded,
and a reward model says how good it is and where it could be better. The reward model is a service's: its gradient by
the pixels arrives over HTTP and goes on through decoder and network here. While it is on its way, the next images are
sampled. By configuration: denoising on to the clean image with the last steps differentiable (as DRaFT does, Clark et
al. 2023, arXiv 2309.17400) instead of the published code's one-step prediction; the loss of pre-training mixed in; a
penalty on leaving the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trainer_client import distributed
from trainer_client.config import RunConfig, Section
from trainer_client.denoising import Denoising, denoising_of
from trainer_client.distributed import derived_seed
from trainer_client.gradient_rewards import GradientRewards, MakeGradients, scores_of, served_gradients
from trainer_client.losses import refl_loss
from trainer_client.policies import Conditioning
from trainer_client.pretraining import Captioned, load_captioned, read_image, shuffled
from trainer_client.remote_reward import RemoteTotals
from trainer_client.rewards import RewardBatch, joined
from trainer_client.run import Run
from trainer_client.run_batch import Batch, Means, gathered
from trainer_client.run_scoring import RunFailed


class PretrainingSection(Section):
    """The loss that the policy was pre-trained with, on images of the user: it holds the policy where it was."""

    images: str | None = Field(
        None,
        description="JSON lines of image paths with prompts, or a folder of images with captions; None: no such loss",
    )
    mix: Literal["sum", "alternate"] = Field(
        "sum", description="added to the reward's loss, or an optimizer step of its own before each of the reward's"
    )
    weight: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1, description="images of one optimizer step, over all devices")


class ReFLConfig(RunConfig):
    """ReFL; ``grad_scale``, ``target`` and the range of late steps are those of the published code.

    ``train_batch_size`` images are sampled, decoded, scored and differentiated at once.
    """

    grad_scale: float = Field(1e-3, gt=0, description="weight of the reward's loss")
    target: float = Field(2.0, description="total from which an image is good enough, in units of the weighted sum")
    x0: Literal["one_step", "denoise"] = Field(
        "one_step", description="predict the clean image at a random late step, or denoise on to it"
    )
    step_range: tuple[int, int] | None = Field(
        None, description="first and last of the denoising steps, from 0, that one_step chooses from; the last quarter"
    )
    differentiable_steps: int = Field(1, ge=1, description="last steps that 'denoise' differentiates through")
    beta: float = Field(0.0, ge=0, description="weight of the squared distance of predictions from the reference's")
    pretraining: PretrainingSection = PretrainingSection()

    @property
    def late_steps(self) -> tuple[int, int]:
        """First and last step that ``one_step`` chooses from; 30 to 39 of 40 by default, as published."""
        return self.step_range or (self.sampling.steps * 3 // 4, self.sampling.steps - 1)

    @model_validator(mode="after")
    def _steps_exist(self) -> ReFLConfig:
        steps, (first, last) = self.sampling.steps, self.late_steps
        if not 0 <= first <= last < steps:
            raise ValueError(f"step_range is {first} to {last}, and the denoising steps are 0 to {steps - 1}")
        if self.differentiable_steps > steps:
            raise ValueError(f"differentiable_steps is {self.differentiable_steps} of {steps} denoising steps")
        return self


@dataclass(frozen=True)
class Asked:
    """Images whose reward is on its way: their rows in the batch, and ``penalty_B``, each one's squared distance from
    the reference, with its graph."""

    rows: list[int]
    totals: Future[RemoteTotals]
    penalty_B: Tensor


@dataclass(frozen=True)
class Learnt:
    """Images whose gradient is added: their rewards and penalties [b], without graphs."""

    rewards: RewardBatch
    penalty_B: Tensor


def train(
    config: ReFLConfig,
    out: str | Path,
    *,
    make_rewards: MakeGradients = served_gradients,
    resume: bool = False,
    allow: Sequence[str] = (),
) -> Path:
    """Run ReFL; returns the run's folder. Raises as :class:`trainer_client.run.Run` does.

    ``make_rewards`` may take gradients from a function of this process instead of the services.
    """
    images = [] if config.pretraining.images is None else load_captioned(config.pretraining.images)
    with Run(
        "refl", config, out, make_rewards=make_rewards, needs_gradient=True, kl_weight=config.beta,
        resume=resume, allow=allow,
    ) as run:  # fmt: skip
        denoising, mix = denoising_of(run.policy, config.sampling), config.pretraining.mix if images else None
        for _ in run.steps():
            batch, learnt = run.next_batch(), []
            for chunk in range(config.updates_per_step):
                if mix == "alternate":
                    learn_pretraining(run, denoising, images, chunk)
                    run.update()
                found, any_known = learn_rewards(run, denoising, batch, chunk)
                if mix == "sum":
                    learn_pretraining(run, denoising, images, chunk)
                if any_known or mix == "sum":
                    run.update()
                learnt += found
            report(run, learnt)
    return Path(out)


def learn_rewards(run: Run[ReFLConfig], denoising: Denoising, batch: Batch, chunk: int) -> tuple[list[Learnt], bool]:
    """Add the gradient of the mean loss over those images of a chunk that have a reward; whether any rank has one.

    Images are worked in pieces, and the next piece is sampled while the rewards of the one before are on their way.
    """
    members = distributed.count_ok(batch.chunk_B == chunk)
    steps = differentiated(run.config, run.generator("late step", chunk))
    learnt: list[Learnt] = []
    with raised_on_every_rank():
        asked: Asked | None = None
        for rows in batch.pieces(run.config.train_batch_size, chunk):
            conditioning = run.conditioning([batch.prompts[row] for row in rows])
            x = sample(run, denoising, batch, rows, range(steps.start), conditioning)
            if asked is not None:
                learnt.append(learn(run, asked, members))
            asked = ask(run, denoising, batch, rows, steps, conditioning, x)
        if asked is not None:
            learnt.append(learn(run, asked, members))
    ok_B = torch.cat([torch.zeros(0, dtype=torch.bool), *(total_of(run, part.rewards)[1] for part in learnt)])
    known = distributed.count_ok(ok_B)
    if 0 < known < members:
        # How many fail is known only now, and the gradient is the mean over those that did not.
        for parameter in run.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(members / known)
    return learnt, known > 0


@contextmanager
def raised_on_every_rank() -> Iterator[None]:
    """What is raised within it on one rank is raised on all: one alone would leave the others waiting."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    distributed.raise_together(error)


def differentiated(config: ReFLConfig, generator: torch.Generator) -> range:
    """The denoising steps that have a gradient: a random late one, or the last ones."""
    if config.x0 == "denoise":
        return range(config.sampling.steps - config.differentiable_steps, config.sampling.steps)
    first, last = config.late_steps
    index = int(torch.randint(first, last + 1, (), generator=generator))
    return range(index, index + 1)


@torch.no_grad()
def sample(
    run: Run[ReFLConfig], denoising: Denoising, batch: Batch, rows: list[int], steps: range, told: Conditioning
) -> Tensor:
    """Latents [b, C, h, w] of some rows after the first ``steps``."""
    with run.stage("sample"):
        generators = [batch.generators[row] for row in rows]
        noise = run.policy.initial_latents(generators, run.config.sampling.height, run.config.sampling.width)
        return denoising.carry(noise, steps, told, generators)


def ask(
    run: Run[ReFLConfig],
    denoising: Denoising,
    batch: Batch,
    rows: list[int],
    steps: range,
    told: Conditioning,
    x: Tensor,
) -> Asked:
    """Go on from ``x`` with gradient, decode, and ask for the rewards."""
    generators = [batch.generators[row] for row in rows]
    penalties_SB: list[Tensor] = []
    with run.stage("train"):
        for index in steps:
            prediction = denoising.predict(x, index, told)
            if run.kl_weight > 0:
                with torch.no_grad(), run.policy.reference():
                    reference = denoising.predict(x, index, told)
                penalties_SB.append((prediction - reference).square().flatten(1).mean(1))
            if run.config.x0 == "one_step":
                x = denoising.clean(x, prediction, index)
            else:
                x = denoising.following(x, prediction, index, generators)
    with run.stage("decode"):
        images = run.policy.decode(x)
    assert isinstance(run.rewards, GradientRewards)  # make_rewards has made it
    totals = run.rewards.ask(images, [batch.prompts[row] for row in rows])
    penalty_B = torch.stack(penalties_SB).mean(0) if penalties_SB else x.new_zeros(len(rows))
    return Asked(rows, totals, penalty_B)


def learn(run: Run[ReFLConfig], asked: Asked, members: int) -> Learnt:
    """Wait for the rewards, and add the gradient; the loss is a mean over ``members`` images of all ranks."""
    config = run.config
    with run.stage("reward_wait"):
        totals = asked.totals.result()
    with run.stage("train"):
        share = int(totals.ok.sum()) * distributed.world_size() / members
        loss = share * refl_loss(totals.total, grad_scale=config.grad_scale, target=config.target, ok_B=totals.ok)
        penalty = distributed.masked_loss(asked.penalty_B, totals.ok, count=members)
        torch.autograd.backward(loss + run.kl_weight * penalty)
    return Learnt(scores_of(totals, list(config.reward_weights)), asked.penalty_B.detach().cpu())


def learn_pretraining(run: Run[ReFLConfig], denoising: Denoising, images: Sequence[Captioned], chunk: int) -> None:
    """Add the gradient of the pre-training loss on the next of the user's images."""
    settings, seed = run.config.pretraining, run.config.seed
    first = (run.step * run.config.updates_per_step + chunk) * settings.batch_size
    own = distributed.own_share(settings.batch_size)
    numbers = range(first + own.start, first + own.stop)
    chosen = list(zip(numbers, shuffled(len(images), seed, numbers), strict=True))
    means = Means("pretraining_loss")
    with run.stage("pretraining"), raised_on_every_rank():
        for start in range(0, len(chosen), run.config.train_batch_size):
            piece = chosen[start : start + run.config.train_batch_size]
            loss_B = pretraining_losses(run, denoising, [images[i] for _, i in piece], [number for number, _ in piece])
            share = settings.weight * distributed.world_size() / settings.batch_size
            torch.autograd.backward(loss_B.sum() * share)
            means.add({"pretraining_loss": loss_B.detach().mean()}, len(piece))
    run.report(**means.over_ranks())


def pretraining_losses(
    run: Run[ReFLConfig], denoising: Denoising, images: Sequence[Captioned], numbers: Sequence[int]
) -> Tensor:
    """Losses [b] of some images; noise and its level follow from the seed and an image's number in the run."""
    height, width = run.config.sampling.height, run.config.sampling.width
    shape = run.policy.latent_shape(height, width)
    size = [side * run.policy.vae_scale for side in shape[1:]]
    with torch.no_grad():
        pixels = torch.stack([read_image(image.path, size[0], size[1]) for image in images])
        x0 = run.policy.encode(pixels.to(run.device))
    generators = [
        torch.Generator().manual_seed(derived_seed(run.config.seed, "pretraining", number)) for number in numbers
    ]
    place_B = torch.stack([torch.randint(denoising.levels, (), generator=generator) for generator in generators])
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(run.device)
    told = run.conditioning([image.prompt for image in images])
    return denoising.pretraining_loss(x0, noise, place_B.to(run.device), told)


def total_of(run: Run[ReFLConfig], rewards: RewardBatch) -> tuple[Tensor, Tensor]:
    """(total, ok) [B]."""
    return rewards.total(run.config.reward_weights)


def report(run: Run[ReFLConfig], learnt: Sequence[Learnt]) -> None:
    """Log the rewards of a step, over all ranks. Raises RunFailed where not one image has one."""
    config, names = run.config, list(run.config.reward_weights)
    nothing = RewardBatch(
        {name: torch.zeros(0, dtype=torch.float64) for name in names},
        {name: torch.zeros(0, dtype=torch.bool) for name in names},
    )
    own = joined([nothing, *(part.rewards for part in learnt)])
    everywhere = gathered(own)
    total_N, ok_N = total_of(run, everywhere)
    penalty_N = distributed.gather_rows(torch.cat([torch.zeros(0), *(part.penalty_B for part in learnt)]))
    reasons = distributed.gather_json(list(own.failures[:1]))
    if not bool(ok_N.any()):
        reason = next((each[0] for each in reasons if each), "none was given")
        raise RunFailed(f"step {run.step}: not one image has a reward; the first reason: {reason}")
    if own.failures:
        run.log.event(run.step, "warning", f"{len(own.failures)} scores failed; the first: {own.failures[0]}")
    known_N = total_N[ok_N]
    numbers = {
        "reward/total": known_N.mean(),
        "failed_ratio": (~ok_N).double().mean(),
        "loss": refl_loss(known_N, grad_scale=config.grad_scale, target=config.target),
        "below_target": (known_N < config.target).double().mean(),
    }
    for name, scores_N in everywhere.scores.items():
        scores_N = scores_N[everywhere.ok[name]]
        numbers |= {f"reward/{name}": scores_N.mean(), f"reward_std/{name}": scores_N.std(correction=0)}
    if run.kl_weight > 0:
        numbers["kl"] = penalty_N[ok_N].double().mean()
    run.report(**numbers)
