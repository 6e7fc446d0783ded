"""Steps down a loss: what fits to preferences have in common, whatever their batches, their loss and their model.

``reward-service fit``, all stages of shapes-clip and shapes-judge (``models/shapes/train_clip.py``, ``train_judge.py``)
and the flawed reward of the reward-hacking benchmark take the steps of :class:`Descent`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")
Schedule: TypeAlias = Callable[[int], float]
"""Number of steps taken -> factor of the learning rates, in [0, 1]."""


class Descent:
    """Optimizers that step together: one schedule, one clipped gradient."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: Sequence[nn.Parameter],
        schedule: Schedule,
        max_grad_norm: float = 1.0,
    ) -> None:
        """The optimizers' learning rates are those of factor 1; ``parameters`` are clipped to one norm together."""
        self.optimizers = list(optimizers)
        self.parameters = list(parameters)
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.done = 0
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def step(self, losses: Iterable[Tensor]) -> float:
        """One step on the sum of ``losses``, scalars; returns that sum before the step.

        A generator has each loss released before it makes the next one: gradients of a large batch add up in the
        memory of its largest part.
        """
        factor = self.schedule(self.done)
        for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for loss in losses:
            torch.autograd.backward(loss)
            total += loss.item()
            # Otherwise the name would hold its graph while the next one is made.
            del loss
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.done += 1
        return total


def descend(descent: Descent, batches: Iterable[Batch], losses: Callable[[Batch], Iterable[Tensor]]) -> Iterator[float]:
    """One step a batch on the sum of its ``losses``; yields that sum after every step."""
    for batch in batches:
        yield descent.step(losses(batch))


def trapezoid(step: int, steps: int, warm_up: int, fall: float = 0.4) -> float:
    """Linear rise over ``warm_up`` steps, constant, and a linear fall to zero over the last share ``fall``."""
    return min(1.0, (step + 1) / warm_up, (steps - step) / (fall * steps))


def cosine(step: int, steps: int, warm_up: float) -> float:
    """Linear rise over the share ``warm_up`` of the steps, under a cosine that falls to zero."""
    rise = max(1.0, warm_up * steps)
    return min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * step / steps)))


def muon_and_adamw(
    model: nn.Module,
    inner: Callable[[str], bool],
    *,
    muon_learning_rate: float,
    learning_rate: float,
    weight_decay: float,
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices whose names are ``inner``, AdamW for everything else; what is frozen is in neither.

    Muon (Jordan et al. 2024) makes the update of a matrix orthogonal: for those inside transformers, not for embeddings
    and heads.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (matrices if inner(name) and parameter.ndim == 2 else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98)),
    ]
