"""CLIP-like reward models: an image tower, a text tower and a head, which the engine runs apart and caches between."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from PIL import Image as PILImage
from torch import Tensor

from models.base import ModelError, Output, RewardModel, Sample, SampleError

if TYPE_CHECKING:
    from models.fitting.fittable import Fittable


@dataclass(frozen=True, eq=False)
class TowerInput:
    """A prepared sample of a :class:`TowerReward`, on the CPU: uint8 or float pixels [3, H, W], int64 tokens [L]."""

    pixels: Tensor
    tokens: Tensor
    image_id: str
    text_id: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class HeadOutput:
    """Scores [B] and further outputs [B] of a tower's head, float32."""

    score_B: Tensor
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


class TowerReward(RewardModel):
    """CLIP-like: an image tower, a text tower and a head, so that each distinct image and prompt is encoded once.

    ``image_key`` and ``text_key`` name (tower weights, preprocessing): models whose keys are equal share features.
    Token lengths come in ``text_lengths`` buckets: a prompt always lands in the same one, whatever its neighbours.
    Prepared images may have several shapes too; only equal shapes meet in one batch. The engine calls the towers and
    the head with batch shapes of its choosing; ``run`` is the plain path.

    Where the head is a network of its own that reads both features (``joint``: cross attention, a language model) the
    engine batches and compiles it like a tower. Features may have any shape [B, ...]; those of one kind of tokens may
    be the tokens themselves.
    """

    uses_device: ClassVar[bool] = True
    joint: ClassVar[bool] = False
    image_key: str
    text_key: str
    device: torch.device

    @abstractmethod
    def prepare_image(self, image: PILImage.Image) -> Tensor:
        """The exact published preprocessing up to what may run on the device: uint8 or float [3, H, W], CPU."""

    @abstractmethod
    def prepare_text(self, prompt: str) -> tuple[Tensor, tuple[str, ...]]:
        """Token ids int64 [L] with L one of the model's length buckets, and warnings ("prompt_truncated")."""

    @abstractmethod
    def normalize(self, pixels_B3SS: Tensor) -> Tensor:
        """Prepared pixels on the device -> the image tower's input in the tower's dtype."""

    @abstractmethod
    def encode_image(self, pixels_B3SS: Tensor) -> Tensor:
        """Tower input -> image features [B, ...]."""

    @abstractmethod
    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Token ids -> text features [B, ...]."""

    @abstractmethod
    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        """Features of B samples -> scores [B]."""

    @abstractmethod
    def preprocess_tensor(self, pixels_B3HW: Tensor) -> Tensor:
        """Differentiable twin of prepare_image + normalize: float [0, 1] images of one size -> tower input."""

    def fittable(self) -> Fittable:
        """What of the model can be fitted to preferences; NotImplementedError where nothing can."""
        raise NotImplementedError

    def prepare(self, sample: Sample) -> TowerInput:
        pixels = self.prepare_image(sample.image(self.info.name))
        tokens, warnings = self.prepare_text(sample.prompt)
        return TowerInput(pixels, tokens, sample.candidate.digest, text_digest(sample.prompt), warnings)

    @torch.inference_mode()
    def run(self, batch: Sequence[TowerInput]) -> list[Output | SampleError]:
        results: list[Output | SampleError | None] = [None] * len(batch)
        for places in alike({i: (entry.pixels.shape, entry.tokens.shape) for i, entry in enumerate(batch)}):
            entries = [batch[place] for place in places]
            pixels = torch.stack([entry.pixels for entry in entries]).to(self.device)
            tokens = torch.stack([entry.tokens for entry in entries]).to(self.device)
            head = self.head(self.encode_image(self.normalize(pixels)), self.encode_text(tokens))
            for place, output in zip(places, unpack(head, [entry.warnings for entry in entries]), strict=True):
                results[place] = output
        return [result for result in results if result is not None]


def text_digest(text: str) -> str:
    """Names a prompt in few bytes: caches keep the names of many."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


Name = TypeVar("Name", bound=Hashable)


def alike(keys: Mapping[Name, Hashable]) -> list[list[Name]]:
    """The names whose keys are equal, in order of first appearance: what may meet in one batch, by its shape."""
    groups: dict[Hashable, list[Name]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def unpack(head: HeadOutput, warnings: Sequence[tuple[str, ...]]) -> list[Output | SampleError]:
    """One :class:`Output` per row; a score that is not finite becomes a :class:`ModelError`, never a number."""
    if head.score_B.shape != (len(warnings),):
        raise ValueError(f"the head gave scores of shape {tuple(head.score_B.shape)} for {len(warnings)} samples")
    scores = head.score_B.float().tolist()
    extra = {name: values.float().tolist() for name, values in head.outputs.items()}
    results: list[Output | SampleError] = []
    for i, score in enumerate(scores):
        if score != score or score in (float("inf"), float("-inf")):
            results.append(ModelError("the model gave a score that is not a finite number", code="not_finite"))
        else:
            results.append(Output(score, {name: values[i] for name, values in extra.items()}, warnings=warnings[i]))
    return results
