"""A reward that takes its time and no processor: stands for a service on another machine. A plugin of the service."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from models.base import Calibration, LoadOptions, Output, RewardInfo, RewardModel, Sample
from models.registry import register


@register("sleeping")
class Sleeping(RewardModel):
    """The mean brightness in [0, 1], after ``image_s`` seconds of sleep an image."""

    info: ClassVar[RewardInfo] = RewardInfo(
        name="sleeping",
        description="mean brightness, after a sleep (for benchmarks)",
        kind="pointwise",
        inputs=("image",),
        range=(0.0, 1.0),
        citation="none",
        license="project",
        calibration=Calibration(1.0, "for benchmarks"),
        options=("image_s",),
    )

    def __init__(self, image_s: float) -> None:
        self._image_s = image_s

    @classmethod
    def load(cls, options: LoadOptions) -> Sleeping:
        return cls(float(options.options["image_s"]))

    def prepare(self, sample: Sample) -> float:
        return float(np.asarray(sample.image(self.info.name), dtype=np.float32).mean() / 255)

    def run(self, batch: Sequence[float]) -> list[Output]:
        time.sleep(self._image_s * len(batch))
        return [Output(brightness) for brightness in batch]
