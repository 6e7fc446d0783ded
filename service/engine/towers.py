"""Runs a :class:`models.base.TowerReward`: each distinct image and prompt once, in fixed shapes, through the caches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.base import HeadOutput, Output, SampleError, TowerInput, TowerReward, unpack
from service.engine.batcher import GradientResult
from service.engine.compile import BucketedFunction
from service.engine.features import FeatureCache


class TowerRunner:
    """Scores batches of prepared samples with the towers of ``model``; lives on one lane's thread."""

    def __init__(
        self,
        model: TowerReward,
        bucket: Callable[[str, Callable[[Tensor], Tensor], int | None], BucketedFunction],
        image_cache: FeatureCache,
        text_cache: FeatureCache,
        text_micro_batch: int,
    ) -> None:
        self.model = model
        self.images = bucket("image", lambda pixels: model.encode_image(model.normalize(pixels)), None)
        self.texts = bucket("text", model.encode_text, text_micro_batch)
        self.head_rows = power_of_two(self.images.micro_batch)
        self._image_cache, self._text_cache = image_cache, text_cache

    @property
    def shape(self) -> str:
        """What of the batch shape a score depends on (part of the fingerprint)."""
        parts = (self.images, self.texts)
        towers = "/".join(f"{part.micro_batch}{'c' if part.compiled else ''}" for part in parts)
        return f"{towers}/{self.head_rows}:{self.images.invariance}"

    @torch.inference_mode()
    def warm_up(self, canary: TowerInput) -> None:
        """Compile, and measure usable shapes: random pixels of the canary's shape, prompts of each token length."""
        generator = torch.Generator().manual_seed(0)
        rows = []
        for _ in range(self.images.micro_batch):
            noise = torch.rand(canary.pixels.shape, generator=generator)
            rows.append((noise * 255).to(torch.uint8) if canary.pixels.dtype == torch.uint8 else noise)
        self.images.warm_up(rows)
        for tokens in _prompts_of_every_length(self.model, self.texts.micro_batch):
            self.texts.warm_up(tokens)

    @torch.inference_mode()
    def score(self, batch: Sequence[TowerInput]) -> list[Output | SampleError]:
        images = self._features(
            self._image_cache,
            f"{self.model.image_key}|{self.model.dtype}",
            self.images,
            {entry.image_id: entry.pixels for entry in batch},
        )
        texts = self._texts(batch)
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

    def _texts(self, batch: Sequence[TowerInput]) -> dict[str, Tensor]:
        by_length: dict[int, dict[str, Tensor]] = {}
        for entry in batch:
            by_length.setdefault(len(entry.tokens), {})[entry.text_id] = entry.tokens
        features: dict[str, Tensor] = {}
        for distinct in by_length.values():
            features |= self._features(
                self._text_cache, f"{self.model.text_key}|{self.model.dtype}", self.texts, distinct
            )
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


class TowerGradient:
    """d(score)/d(image) along the differentiable twin of the preprocessing, in the model's own dtype (float32)."""

    def __init__(self, model: TowerReward, micro_batch: int) -> None:
        self.model = model
        self.micro_batch = power_of_two(micro_batch)

    def run(self, batch: Sequence[TowerInput]) -> list[GradientResult | SampleError]:
        """``pixels`` are float32 [3, H, W] in [0, 1] here, sizes may differ; batches are padded to one shape."""
        results: list[GradientResult | SampleError] = []
        for start in range(0, len(batch), self.micro_batch):
            results += self._chunk(batch[start : start + self.micro_batch])
        return results

    @torch.enable_grad()
    def _chunk(self, batch: Sequence[TowerInput]) -> list[GradientResult | SampleError]:
        model = self.model
        leaves = [entry.pixels.detach().to(model.device).requires_grad_() for entry in batch]
        inputs = [model.preprocess_tensor(leaf[None]) for leaf in leaves]
        with torch.no_grad():
            distinct = {entry.text_id: entry.tokens for entry in batch}
            texts = {name: model.encode_text(tokens[None].to(model.device)) for name, tokens in distinct.items()}
        filler = self.micro_batch - len(batch)
        images_B3SS = torch.cat([*inputs, *[inputs[-1].detach()] * filler])
        texts_BD = torch.cat([texts[entry.text_id] for entry in [*batch, *[batch[-1]] * filler]])
        head: HeadOutput = model.head(model.encode_image(images_B3SS), texts_BD)
        gradients = torch.autograd.grad(head.score_B[: len(batch)].sum(), leaves)
        outputs = unpack(head, [entry.warnings for entry in [*batch, *[batch[-1]] * filler]])
        results: list[GradientResult | SampleError] = []
        for output, gradient in zip(outputs, gradients, strict=False):
            if isinstance(output, SampleError):
                results.append(output)
            elif not bool(torch.isfinite(gradient).all()):
                results.append(SampleError("the gradient holds numbers that are not finite", code="not_finite"))
            else:
                results.append(GradientResult(output, gradient.detach().float().cpu()))
        return results
