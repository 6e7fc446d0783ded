"""Reward models whose weights are published: one file and a second role, and a repository of several files.

The repositories are those of the tests' own hub. The score is the first number of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from models.base import Calibration, LoadOptions, Output, RewardInfo, RewardModel, Sample, SampleError, WeightSource
from models.registry import register
from models.weights import fit, hash_tensors, load_checkpoint, obtain

FILE = WeightSource("hf:acme/reward@v1/weights.safetensors", bytes=84)
TOWER = WeightSource("hf:acme/tower/model/tower.safetensors", bytes=84, role="tower")
FOLDER = WeightSource("hf:acme/folder", bytes=400, files=("*.safetensors", "*.json"))


def info(name: str, *sources: WeightSource) -> RewardInfo:
    return RewardInfo(
        name=name,
        description="for tests",
        kind="pointwise",
        inputs=("image",),
        range=(0.0, 10.0),
        citation="none",
        license="MIT",
        calibration=Calibration(1.0, "for tests"),
        weights="the tests' hub",
        weights_bytes=sum(source.bytes for source in sources),
        sources=sources,
    )


class _Published(RewardModel):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.value = float(tensors["value"][0])
        self.weights_hash = hash_tensors(tensors)

    @classmethod
    def load(cls, options: LoadOptions) -> _Published:
        tensors: dict[str, torch.Tensor] = {}
        for source in cls.info.sources:
            tensors |= load_checkpoint(obtain(source, options, cls.info.name))
        fit({"value": torch.zeros(3)}, tensors, cls.info.name)
        return cls(tensors)

    def prepare(self, sample: Sample) -> None:
        sample.image(self.info.name)

    def run(self, batch: Sequence[None]) -> list[Output | SampleError]:
        return [Output(self.value) for _ in batch]


@register("published-file")
class PublishedFile(_Published):
    info: ClassVar[RewardInfo] = info("published-file", FILE, TOWER)


@register("published-folder")
class PublishedFolder(_Published):
    info: ClassVar[RewardInfo] = info("published-folder", FOLDER)
