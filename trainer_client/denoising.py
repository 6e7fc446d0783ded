"""The denoising steps of a policy, the same to the eye for flows and for networks that predict noise or v.

For algorithms that differentiate through steps (ReFL) and for the loss of pre-training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer_client.config import ConfigError, SamplingSection
from trainer_client.policies import Conditioning, DDPMPolicy, FlowPolicy, Policy
from trainer_client.sampling import ode_transition, predict_x0


class Denoising(ABC):
    """Steps 0 ... ``steps`` - 1 of a sampler, from pure noise to clean latents, float32 [B, C, h, w].

    Everything is differentiable by the policy's weights and by the latents. Training knows finer noise levels, which
    ``place_B`` int64 [B] counts from 0 to ``levels`` - 1.
    """

    steps: int
    levels: int

    @abstractmethod
    def predict(self, x: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        """What the network says of the latents before step ``index``, with the run's guidance."""

    @abstractmethod
    def clean(self, x: Tensor, prediction: Tensor, index: int) -> Tensor:
        """One-step estimate of the clean latents."""

    @abstractmethod
    def following(self, x: Tensor, prediction: Tensor, index: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents after step ``index``; what noise the sampler draws for a sample comes from its generator."""

    @abstractmethod
    def pretraining(
        self, x0: Tensor, noise: Tensor, place_B: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """(prediction without classifier-free guidance, what it should be) at training levels of clean latents."""

    def pretraining_loss(self, x0: Tensor, noise: Tensor, place_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Mean squared error of the prediction [B], the loss that such networks are pre-trained with."""
        prediction, target = self.pretraining(x0, noise, place_B, conditioning)
        return (prediction - target).square().flatten(1).mean(1)

    def carry(
        self, x: Tensor, indices: range, conditioning: Conditioning, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Latents after the steps ``indices``."""
        for index in indices:
            x = self.following(x, self.predict(x, index, conditioning), index, generators)
        return x


class FlowDenoising(Denoising):
    """Euler's steps of the ODE; levels are those of the scheduler's training, shifted as its steps are."""

    def __init__(self, policy: FlowPolicy, sampling: SamplingSection) -> None:
        self._policy, self._guidance = policy, sampling.guidance_scale
        self.steps, self.levels = sampling.steps, int(policy.pipeline.scheduler.config.num_train_timesteps)
        self._sigmas = policy.sigmas(self.steps, sampling.height, sampling.width)
        self._training_sigmas = policy.sigmas(self.levels, sampling.height, sampling.width)[:-1]

    def predict(self, x: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        return self._policy.velocity(x, self._sigmas[index], conditioning, self._guidance)

    def clean(self, x: Tensor, prediction: Tensor, index: int) -> Tensor:
        return predict_x0(x, prediction, self._sigmas[index])

    def following(self, x: Tensor, prediction: Tensor, index: int, generators: Sequence[torch.Generator]) -> Tensor:
        return ode_transition(x, prediction, self._sigmas[index], self._sigmas[index + 1]).mean

    def pretraining(
        self, x0: Tensor, noise: Tensor, place_B: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        sigma_B = self._training_sigmas[place_B.cpu()].to(x0.device)
        sigma_B111 = sigma_B.view(-1, 1, 1, 1)
        x = (1 - sigma_B111) * x0 + sigma_B111 * noise
        guidance = self._guidance if self._policy.guidance_is_input else 1.0
        return self._policy.velocity(x, sigma_B, conditioning, guidance), noise - x0


class DDPMDenoising(Denoising):
    """Steps of the pipeline's DDIM or DDPM scheduler; levels are its training timesteps."""

    def __init__(self, policy: DDPMPolicy, sampling: SamplingSection) -> None:
        self._policy, self._guidance = policy, sampling.guidance_scale
        self._scheduler = policy.scheduler(sampling.steps)
        self.steps, self.levels = sampling.steps, int(self._scheduler.config.num_train_timesteps)

    def predict(self, x: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        return self._policy.prediction(x, self._scheduler.timesteps[index], conditioning, self._guidance)

    def clean(self, x: Tensor, prediction: Tensor, index: int) -> Tensor:
        return self._policy.predict_x0(x, prediction, self._scheduler.timesteps[index])

    def following(self, x: Tensor, prediction: Tensor, index: int, generators: Sequence[torch.Generator]) -> Tensor:
        timestep = self._scheduler.timesteps[index]
        stepped: Tensor = self._scheduler.step(prediction, timestep, x, generator=list(generators)).prev_sample
        return stepped

    def pretraining(
        self, x0: Tensor, noise: Tensor, place_B: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        x = self._policy.add_noise(x0, noise, place_B)
        return self._policy.prediction(x, place_B, conditioning), self._policy.target(x0, noise, place_B)


def denoising_of(policy: Policy, sampling: SamplingSection) -> Denoising:
    """The denoising steps of a run's policy. Raises ConfigError for a policy of neither kind."""
    if isinstance(policy, FlowPolicy):
        return FlowDenoising(policy, sampling)
    if isinstance(policy, DDPMPolicy):
        return DDPMDenoising(policy, sampling)
    raise ConfigError(f"{policy.family} is neither a rectified flow nor a network that predicts noise")
