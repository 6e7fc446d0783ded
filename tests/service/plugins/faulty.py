"""Reward models that fail on demand, loaded into a real service through ``settings.plugins``.

Their score is the image's mean brightness in [0, 1], so that a score that went to the wrong sample shows. What they do
wrong is asked for in the prompt; without it they are healthy, as their canary must be.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from models.base import (
    Calibration,
    Kind,
    LoadOptions,
    Output,
    RewardInfo,
    RewardModel,
    Sample,
    SampleError,
    WeightsError,
)
from models.registry import register
from models.towers import HeadOutput, TowerReward
from tests.service.bodies import INNER_TEXT


def info(name: str, *, kind: Kind = "pointwise", differentiable: bool = False) -> RewardInfo:
    return RewardInfo(
        name=name,
        description="for tests",
        kind=kind,
        inputs=("prompt", "image"),
        range=(0.0, 1.0),
        citation="none",
        license="MIT",
        calibration=Calibration(1.0, "for tests"),
        differentiable=differentiable,
        options=("batch_s", "prepare_s", "load_s"),
    )


@dataclass(frozen=True)
class Prepared:
    prompt: str
    brightness: float


class Brightness(RewardModel):
    """Mean of the image's bytes over 255."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options

    @classmethod
    def load(cls, options: LoadOptions) -> Brightness:
        return cls(options.options)

    def prepare(self, sample: Sample) -> Prepared:
        return Prepared(sample.prompt, float(np.asarray(sample.image(self.info.name)).mean() / 255))

    def run(self, batch: Sequence[Prepared]) -> Sequence[Output | SampleError]:
        return [Output(entry.brightness) for entry in batch]


@register("raises-on-red")
class RaisesOnRed(Brightness):
    """Raises for the whole batch when one prompt says "red"; ``batch_s`` keeps the lane busy, so that batches fill."""

    info: ClassVar[RewardInfo] = info("raises-on-red")

    def run(self, batch: Sequence[Prepared]) -> Sequence[Output | SampleError]:
        time.sleep(float(self.options.get("batch_s", 0)))
        if any("red" in entry.prompt for entry in batch):
            raise RuntimeError(INNER_TEXT)
        return super().run(batch)


@register("slow")
class Slow(Brightness):
    """Sleeps ``batch_s`` a batch, two seconds longer when a prompt says "longer"."""

    info: ClassVar[RewardInfo] = info("slow")

    def run(self, batch: Sequence[Prepared]) -> Sequence[Output | SampleError]:
        longer = 2.0 if any("longer" in entry.prompt for entry in batch) else 0.0
        time.sleep(float(self.options["batch_s"]) + longer)
        return super().run(batch)


@register("slow-to-prepare")
class SlowToPrepare(Brightness):
    """Sleeps ``prepare_s`` in the decode pool for prompts that say "slow"."""

    info: ClassVar[RewardInfo] = info("slow-to-prepare")

    def prepare(self, sample: Sample) -> Prepared:
        if "slow" in sample.prompt:
            time.sleep(float(self.options["prepare_s"]))
        return super().prepare(sample)


@register("hangs")
class Hangs(Brightness):
    """Never returns from a batch with a prompt that says "hang"."""

    info: ClassVar[RewardInfo] = info("hangs")

    def run(self, batch: Sequence[Prepared]) -> Sequence[Output | SampleError]:
        if any("hang" in entry.prompt for entry in batch):
            threading.Event().wait()
        return super().run(batch)


@register("poisons")
class Poisons(Brightness):
    """Fails as a CUDA kernel does when it has destroyed its context."""

    info: ClassVar[RewardInfo] = info("poisons")

    def run(self, batch: Sequence[Prepared]) -> Sequence[Output | SampleError]:
        if any("poison" in entry.prompt for entry in batch):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().run(batch)


@register("oom-over-4")
class OomOver4(Brightness):
    """Runs out of memory with more than four samples."""

    info: ClassVar[RewardInfo] = info("oom-over-4")
    uses_device: ClassVar[bool] = True
    armed = True

    def run(self, batch: Sequence[Prepared]) -> Sequence[Output | SampleError]:
        self.armed = self.armed or any("arm" in entry.prompt for entry in batch)
        if self.armed and len(batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. " + INNER_TEXT)
        return super().run(batch)


@register("oom-later")
class OomLater(OomOver4):
    """As oom-over-4, once a prompt has said "arm"."""

    info: ClassVar[RewardInfo] = info("oom-later")
    armed = False


@register("wrong-length")
class WrongLength(Brightness):
    """Forgets one output when a prompt says "short", and invents one when a prompt says "long"."""

    info: ClassVar[RewardInfo] = info("wrong-length")

    def run(self, batch: Sequence[Prepared]) -> Sequence[Output | SampleError]:
        outputs = list(super().run(batch))
        if any("short" in entry.prompt for entry in batch):
            return outputs[1:]
        return [*outputs, outputs[0]] if any("long" in entry.prompt for entry in batch) else outputs


@register("wrong-type")
class WrongType(Brightness):
    """Returns things that are no outputs."""

    info: ClassVar[RewardInfo] = info("wrong-type")

    def run(self, batch: Sequence[Prepared]) -> Sequence[Output | SampleError]:
        strange: dict[str, Any] = {
            "none": None,
            "float": 0.5,
            "text score": Output("0.5"),  # type: ignore[arg-type]
            "object in details": Output(0.5, details={"inner": object()}),
        }
        return [strange.get(entry.prompt, Output(entry.brightness)) for entry in batch]


@register("not-finite")
class NotFinite(Brightness):
    """Scores that are not numbers."""

    info: ClassVar[RewardInfo] = info("not-finite")

    def run(self, batch: Sequence[Prepared]) -> Sequence[Output | SampleError]:
        strange = {
            "nan": Output(math.nan),
            "inf": Output(math.inf),
            "-inf": Output(-math.inf),
            "nan beside": Output(0.5, {"uncertainty": math.nan}),
        }
        return [strange.get(entry.prompt, Output(entry.brightness)) for entry in batch]


@register("prepare-raises")
class PrepareRaises(Brightness):
    """Fails in the decode pool."""

    info: ClassVar[RewardInfo] = info("prepare-raises")

    def prepare(self, sample: Sample) -> Prepared:
        if "unprepared" in sample.prompt:
            raise ValueError(INNER_TEXT)
        return super().prepare(sample)


@register("loads-slowly")
class LoadsSlowly(Brightness):
    """Takes ``load_s`` to load."""

    info: ClassVar[RewardInfo] = info("loads-slowly")

    @classmethod
    def load(cls, options: LoadOptions) -> LoadsSlowly:
        time.sleep(float(options.options["load_s"]))
        return cls(options.options)


@register("no-weights")
class NoWeights(Brightness):
    """Cannot find its weights."""

    info: ClassVar[RewardInfo] = info("no-weights")

    @classmethod
    def load(cls, options: LoadOptions) -> NoWeights:
        raise WeightsError("no-weights: there is no such file; set models.no-weights.weights")


SIDE, WIDTH, TOKENS = 16, 24, 64


@register("tiny-tower")
class TinyTower(TowerReward):
    """Two random linear towers and a cosine: small, differentiable, sensitive to image and prompt."""

    info: ClassVar[RewardInfo] = info("tiny-tower", differentiable=True)

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.image_weights = torch.randn(WIDTH, 3 * SIDE * SIDE, generator=generator).to(device, dtype)
        self.text_weights = torch.randn(256, WIDTH, generator=generator).to(device, dtype)
        self.dtype, self.device = dtype, device
        self.weights_hash = "sha256:seed-0"
        self.image_key = self.text_key = "tiny-tower"

    @classmethod
    def load(cls, options: LoadOptions) -> TinyTower:
        return cls(options.dtype, options.device)

    def prepare_image(self, image: PILImage.Image) -> Tensor:
        resized = image.resize((SIDE, SIDE), PILImage.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    def prepare_text(self, prompt: str) -> tuple[Tensor, tuple[str, ...]]:
        data = prompt.encode()
        padded = list(data[:TOKENS]) + [0] * (TOKENS - len(data))
        return torch.tensor(padded, dtype=torch.int64), ("prompt_truncated",) if len(data) > TOKENS else ()

    def normalize(self, pixels_B3SS: Tensor) -> Tensor:
        return pixels_B3SS.to(self.dtype) / 127.5 - 1

    def encode_image(self, pixels_B3SS: Tensor) -> Tensor:
        return torch.tanh(pixels_B3SS.flatten(1) @ self.image_weights.T / SIDE)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        return self.text_weights[tokens_BL].mean(1)

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        return HeadOutput(F.cosine_similarity(image_features_BD.float(), text_features_BD.float(), dim=-1))

    def preprocess_tensor(self, pixels_B3HW: Tensor) -> Tensor:
        resized = F.interpolate(pixels_B3HW, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        return (resized * 2 - 1).to(self.dtype)
