"""What a fit is asked for: the configuration, and the error for what cannot be fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

What: TypeAlias = Literal["head", "lora", "all"]
Loss: TypeAlias = Literal["bt", "kl", "uncertainty"]


class FitProblem(ValueError):
    """What was asked for cannot be fitted; the message is one line for the person who asked."""


@dataclass(frozen=True)
class FitConfig:
    """``learning_rate`` rises over ``warm_up`` of the steps and falls to zero as a cosine.

    A step is on ``batch`` x ``accumulate`` pairs, of which ``batch`` are in memory at once. ``held_out`` is a share of
    the prompts. ``patience`` epochs without a better accuracy end the fit. Raises FitProblem for values out of range.
    """

    train: What = "head"
    loss: Loss = "bt"
    epochs: int = 5
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warm_up: float = 0.05
    max_grad_norm: float = 1.0
    held_out: float = 0.2
    patience: int = 3
    lora_rank: int = 8
    lora_alpha: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.epochs, self.batch, self.accumulate, self.patience, self.lora_rank, self.lora_alpha)
        if min(counts) < 1 or not self.learning_rate > 0 or not 0 < self.held_out < 1 or not 0 <= self.warm_up < 1:
            raise FitProblem("counts are at least 1, the learning rate is positive, shares are between 0 and 1")
