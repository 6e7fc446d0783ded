"""A reward with a gradient that lives on another machine: ``torch.autograd`` across ``POST /gradient``.

The reward of ReFL (Xu et al. 2023, arXiv 2304.05977) and of every method that differentiates through the reward. The
service sends d(total)/d(image) with the totals, so backward needs no second request, and the service keeps no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer_client._calls import Models
from trainer_client.client import RewardClient
from trainer_client.errors import SampleFailure, SamplesFailed
from trainer_client.items import Item
from trainer_client.results import GradientResponse


class RemoteTotals(NamedTuple):
    """Rewards of a batch.

    ``total`` float32 [B] on the images' device, differentiable by the images: the weighted sum of the models' scores.
    ``ok`` bool [B]: where there is one. A failed sample's ``total`` is a placeholder of 0 with gradient 0, no reward:
    leave it out by ``total[ok]`` or :meth:`mean`. ``scores`` float32 [B] per model, without gradient, NaN where a model
    failed. ``failures`` are (index in the batch, why).
    """

    total: Tensor
    ok: Tensor
    scores: dict[str, Tensor]
    failures: list[tuple[int, SampleFailure]]

    def mean(self) -> Tensor:
        """The mean total of the samples that have one, a scalar; raises SamplesFailed if none has."""
        if not bool(self.ok.any()):
            raise SamplesFailed([(f"image {index}", failure) for index, failure in self.failures])
        return self.total[self.ok].mean()


class _ServedGradient(torch.autograd.Function):
    """Totals that were served, tied to their images by the gradients that were served with them."""

    @staticmethod
    def forward(ctx: Any, images_B3HW: Tensor, total_B: Tensor, gradients_B3HW: Tensor) -> Tensor:
        ctx.save_for_backward(gradients_B3HW)
        ctx.images_dtype = images_B3HW.dtype
        return total_B.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None]:
        (gradients_B3HW,) = ctx.saved_tensors
        return (gradients_B3HW * grad_B.view(-1, 1, 1, 1)).to(ctx.images_dtype), None, None


class RemoteReward:
    """``models`` (a name, names or weights by name) of the services of ``client`` as a differentiable function.

    Models of several services are summed. The same object serves any number of threads and steps; ``samples`` and
    ``failed`` count the images so far and those without a reward. ``deadline`` (seconds) bounds each call.
    """

    def __init__(self, client: RewardClient, models: Models, *, deadline: float | None = None) -> None:
        self._client = client
        self._models = models
        self._deadline = deadline
        self.samples = 0
        self.failed = 0

    def __call__(
        self,
        images_B3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> RemoteTotals:
        """Rewards of ``images_B3HW`` [B, 3, H, W], floats in [0, 1] on any device, for one prompt (and metadata) each.

        Differentiable once. Values up to 0.001 outside of [0, 1] count as clipped; clamp what may lie further out.
        Raises ValueError for lengths, shapes or ranges that don't fit, RewardError when there is no answer.
        """
        count = len(images_B3HW)
        if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3 or not images_B3HW.is_floating_point():
            raise ValueError(f"images are floats [B, 3, H, W], not {images_B3HW.dtype} {list(images_B3HW.shape)}")
        if len(prompts) != count or (metadata is not None and len(metadata) != count):
            given = "no" if metadata is None else str(len(metadata))
            raise ValueError(f"{count} images come with {len(prompts)} prompts and {given} metadata")
        # one copy from the device for the whole batch, not one an image
        pixels = images_B3HW.detach().float().cpu()
        items = [
            Item(prompt, pixels[k : k + 1], metadata=metadata[k] if metadata is not None else {})
            for k, prompt in enumerate(prompts)
        ]
        response = self._client.gradient(items, self._models, deadline=self._deadline)
        return self._attach(images_B3HW, response)

    def _attach(self, images_B3HW: Tensor, response: GradientResponse) -> RemoteTotals:
        device = images_B3HW.device
        values, valid = response.as_array()
        ok = torch.from_numpy(valid)
        total = torch.where(ok, torch.from_numpy(values), 0.0).float()
        gradients_B3HW = torch.zeros(images_B3HW.shape)
        for k, item in enumerate(response):
            if item.gradients[0] is not None:
                gradients_B3HW[k] = torch.from_numpy(item.gradients[0])
        self.samples += len(response)
        self.failed += int((~ok).sum())
        attached: Tensor = _ServedGradient.apply(images_B3HW, total.to(device), gradients_B3HW.to(device))
        return RemoteTotals(
            attached,
            ok.to(device),
            {name: torch.from_numpy(response.as_array(name).values).float().to(device) for name in response.models},
            [(k, failure) for k, item in enumerate(response) for failure in item.errors[0]],
        )
