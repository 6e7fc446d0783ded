"""Scores with a :class:`models.towers.TowerReward`: distinct images and prompts once, in fixed shapes, with caches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.base import Output, SampleError
from models.towers import HeadOutput, TowerInput, TowerReward, alike, unpack
from service.engine.compile import BucketedFunction, shapes_of
from service.engine.features import FeatureCache


class TowerRunner:
    """Scores batches of prepared samples with the towers of ``model``; lives on one lane's thread."""

    def __init__(
        self,
        model: TowerReward,
        bucket: Callable[[str, Callable[..., Tensor], int | None], BucketedFunction],
        image_cache: FeatureCache,
        text_cache: FeatureCache,
        text_micro_batch: int,
    ) -> None:
        self.model = model
        self.images = bucket("image", lambda pixels: model.encode_image(model.normalize(pixels)), None)
        self.texts = bucket("text", model.encode_text, text_micro_batch)
        self.joint = bucket("head", self._joint_head, None) if model.joint else None
        self.head_rows = power_of_two(self.images.micro_batch)
        self._image_cache, self._text_cache = image_cache, text_cache

    @property
    def shape(self) -> str:
        """What of the batch shape a score depends on (part of the fingerprint)."""
        towers = "/".join(f"{part.micro_batch}{'c' if part.compiled else ''}" for part in self._parts)
        return f"{towers}/{self.head_rows}:{self.images.invariance}"

    @property
    def _parts(self) -> list[BucketedFunction]:
        return [part for part in (self.images, self.texts, self.joint) if part is not None]

    @torch.inference_mode()
    def warm_up(self, canary: TowerInput) -> None:
        """Compile, and measure usable shapes: random pixels of the canary's shape, prompts of each token length."""
        while True:
            before = [part.micro_batch for part in self._parts]
            self._warm_up_parts(canary)
            if [part.micro_batch for part in self._parts] == before:
                return  # otherwise memory ran out, and shapes that had come before are of the old batch size

    def _warm_up_parts(self, canary: TowerInput) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = []
        for _ in range(self.images.micro_batch):
            noise = torch.rand(canary.pixels.shape, generator=generator)
            pixels.append((noise * 255).to(torch.uint8) if canary.pixels.dtype == torch.uint8 else noise)
        self.images.warm_up(pixels)
        for tokens in _prompts_of_every_length(self.model, self.texts.micro_batch):
            self.texts.warm_up(tokens)
            if self.joint is not None:
                self.joint.warm_up(list(zip(self.images(pixels), self.texts(tokens), strict=False)))

    @torch.inference_mode()
    def score(self, batch: Sequence[TowerInput]) -> list[Output | SampleError]:
        images = self._encode(
            self._image_cache,
            f"{self.model.image_key}|{self.model.dtype}",
            self.images,
            {entry.image_id: entry.pixels for entry in batch},
        )
        texts = self._encode(
            self._text_cache,
            f"{self.model.text_key}|{self.model.dtype}",
            self.texts,
            {entry.text_id: entry.tokens for entry in batch},
        )
        if self.joint is not None:
            return self._score_jointly(self.joint, batch, images, texts)
        results: list[Output | SampleError] = []
        for start in range(0, len(batch), self.head_rows):
            chunk = batch[start : start + self.head_rows]
            padded = [*chunk, *[chunk[-1]] * (self.head_rows - len(chunk))]
            head = self.model.head(
                torch.stack([images[entry.image_id] for entry in padded]),
                torch.stack([texts[entry.text_id] for entry in padded]),
            )
            results += unpack(head, [entry.warnings for entry in padded])[: len(chunk)]
        return results

    def _joint_head(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Score and further outputs side by side [B, 1 + outputs], float32."""
        head = self.model.head(image_features, text_features)
        columns = [head.score_B, *(head.outputs[name] for name in self.model.info.outputs)]
        return torch.stack([column.float() for column in columns], dim=1)

    def _score_jointly(
        self,
        joint: BucketedFunction,
        batch: Sequence[TowerInput],
        images: dict[str, Tensor],
        texts: dict[str, Tensor],
    ) -> list[Output | SampleError]:
        """Each distinct (image, prompt) once through the head, those of equal shapes together."""
        pairs = {(entry.image_id, entry.text_id): (images[entry.image_id], texts[entry.text_id]) for entry in batch}
        rows_by_pair = {
            pair: row
            for same in alike({pair: shapes_of(row) for pair, row in pairs.items()})
            for pair, row in zip(same, joint([pairs[pair] for pair in same]), strict=True)
        }
        rows = torch.stack([rows_by_pair[entry.image_id, entry.text_id] for entry in batch])
        outputs = {name: rows[:, 1 + i] for i, name in enumerate(self.model.info.outputs)}
        return unpack(HeadOutput(rows[:, 0], outputs), [entry.warnings for entry in batch])

    def _encode(
        self, cache: FeatureCache, tower: str, encode: BucketedFunction, distinct: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Features by id of prepared images or prompts of any shapes."""
        features: dict[str, Tensor] = {}
        for same in alike({name: shapes_of(row) for name, row in distinct.items()}):
            features |= self._features(cache, tower, encode, {name: distinct[name] for name in same})
        return features

    @staticmethod
    def _features(
        cache: FeatureCache, tower: str, encode: BucketedFunction, distinct: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Features by id, from the cache or computed now; what their bits depend on is part of the cache's key."""
        features: dict[str, Tensor] = {}
        key = (tower, encode.micro_batch, encode.invariance, encode.compiled)
        for name in distinct:
            feature = cache.get((*key, name))
            if feature is not None:
                features[name] = feature
        missing = [name for name in distinct if name not in features]
        if missing:
            computed = encode([distinct[name] for name in missing])
            if encode.micro_batch != key[1]:  # it ran out of memory: the features that were cached are of the old shape
                return TowerRunner._features(cache, tower, encode, distinct)
            for name, feature in zip(missing, computed, strict=True):
                features[name] = feature.clone()  # a row of a batch would keep the whole batch alive
                cache.put((*key, name), features[name])
        return features


def _prompts_of_every_length(model: TowerReward, count: int) -> list[list[Tensor]]:
    """For each token length that the model's buckets can give: ``count`` different prompts of it."""
    chooser = random.Random(0)
    by_length: dict[int, list[Tensor]] = {}
    for words in (1, 4, 8, 12, 20, 28, 40, 60, 80):
        for _ in range(count):
            prompt = " ".join(chooser.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(words))
            tokens, _ = model.prepare_text(prompt)
            by_length.setdefault(len(tokens), []).append(tokens)
    return [rows[-count:] for rows in by_length.values()]


def power_of_two(rows: int) -> int:
    """``rows`` or the next power of two: the tail of other lengths runs in other kernels, and so by place."""
    return 1 << (rows - 1).bit_length()
