"""The offline limit: the most images per second that one process gets out of the same model object without HTTP.

It does what the service must do (decode, preprocess, tokenize, both towers, head) with everything that offline work
makes easier: all images are known beforehand, batches have their best sizes, prompts are sorted by length and each
distinct one is encoded once. Three ways to use the cores are measured and the best one is the limit:

    in turn       all cores decode a batch, then all cores run its forward
    overlapped    a pool decodes the next batch during the forward of this one
    lanes         one single-threaded forward per core, each decoding for itself
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

from benchmarks import samples
from models.towers import TowerReward

T = TypeVar("T")
Strategy = Literal["in turn", "overlapped", "lanes"]
STRATEGIES: tuple[Strategy, ...] = ("in turn", "overlapped", "lanes")
BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Encoded:
    """One offline sample: an image as it travels, and its prompt."""

    data: bytes
    prompt: str


@dataclass
class OfflineLimit:
    """Measures the limit of ``model``; ``image_batch`` and ``text_batch`` are found by :meth:`calibrate`."""

    model: TowerReward
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    image_batch: int = 8
    text_batch: int = 8
    seconds_per_row: dict[str, dict[int, float]] = field(default_factory=dict)

    @torch.inference_mode()
    def calibrate(self) -> None:
        """Find the batch sizes at which one row of each tower costs least."""
        side = input_side(self.model)
        pixels = torch.rand(max(BATCHES), 3, side, side).to(self.model.dtype)
        tokens = torch.stack([self.model.prepare_text("a red cat on a table")[0]] * max(BATCHES))
        images = {b: seconds(self.model.encode_image, pixels[:b]) / b for b in BATCHES}
        texts = {b: seconds(self.model.encode_text, tokens[:b]) / b for b in BATCHES}
        self.image_batch = min(images, key=images.__getitem__)
        self.text_batch = min(texts, key=texts.__getitem__)
        self.seconds_per_row = {"image": images, "text": texts}

    def images_per_s(self, work: Sequence[Encoded], wire: samples.Wire, strategy: Strategy) -> float:
        """Images per second over ``work``, from encoded bytes to scores."""
        threads = torch.get_num_threads()
        run = {"in turn": self._in_turn, "overlapped": self._overlapped, "lanes": self._lanes}[strategy]
        started = time.perf_counter()
        try:
            scores = run(work, wire)
        finally:
            torch.set_num_threads(threads)
        elapsed = time.perf_counter() - started
        if len(scores) != len(work) or not bool(torch.isfinite(scores).all()):
            raise RuntimeError(f"the offline run scored {len(scores)} of {len(work)} images, or not all are finite")
        return len(work) / elapsed

    def prepare(self, sample: Encoded, wire: samples.Wire) -> Tensor:
        """Decode and preprocess one image: uint8 [3, S, S]."""
        if wire == "safetensors":
            array: NDArray[np.uint8] = np.frombuffer(sample.data, np.uint8).reshape(samples.SIDE, samples.SIDE, 3)
            return self.model.prepare_image(PILImage.fromarray(array))
        with PILImage.open(io.BytesIO(sample.data)) as image:
            return self.model.prepare_image(image.convert("RGB"))

    @torch.inference_mode()
    def _in_turn(self, work: Sequence[Encoded], wire: samples.Wire) -> Tensor:
        with ThreadPoolExecutor(self.cores) as pool:
            features = [
                self._images(list(pool.map(lambda sample: self.prepare(sample, wire), chunk)))
                for chunk in chunks(work, self.image_batch)
            ]
        return self._scores(torch.cat(features), work)

    @torch.inference_mode()
    def _overlapped(self, work: Sequence[Encoded], wire: samples.Wire) -> Tensor:
        with ThreadPoolExecutor(self.cores) as pool:
            prepared = [pool.submit(self.prepare, sample, wire) for sample in work]
            features = [self._images([f.result() for f in chunk]) for chunk in chunks(prepared, self.image_batch)]
        return self._scores(torch.cat(features), work)

    def _lanes(self, work: Sequence[Encoded], wire: samples.Wire) -> Tensor:
        # by prompt: a lane encodes a prompt for all of its images
        share = -(-len(work) // self.cores)
        torch.set_num_threads(1)
        with ThreadPoolExecutor(self.cores) as pool:
            parts = pool.map(lambda part: self._lane(part, wire), chunks(work, share))
            return torch.cat(list(parts))

    @torch.inference_mode()
    def _lane(self, work: Sequence[Encoded], wire: samples.Wire) -> Tensor:
        torch.set_num_threads(1)  # the number belongs to the thread
        features = [
            self._images([self.prepare(sample, wire) for sample in chunk]) for chunk in chunks(work, self.image_batch)
        ]
        return self._scores(torch.cat(features), work)

    def _images(self, pixels: Sequence[Tensor]) -> Tensor:
        return self.model.encode_image(self.model.normalize(torch.stack(list(pixels)).to(self.model.device)))

    def _scores(self, image_features: Tensor, work: Sequence[Encoded]) -> Tensor:
        distinct = {sample.prompt: self.model.prepare_text(sample.prompt)[0] for sample in work}
        by_length: dict[int, list[str]] = {}
        for prompt, tokens in distinct.items():
            by_length.setdefault(len(tokens), []).append(prompt)
        features: dict[str, Tensor] = {}
        for prompts in by_length.values():
            for chunk in chunks(prompts, self.text_batch):
                rows = self.model.encode_text(torch.stack([distinct[prompt] for prompt in chunk]))
                features |= dict(zip(chunk, rows, strict=True))
        return self.model.head(image_features, torch.stack([features[sample.prompt] for sample in work])).score_B


def input_side(model: TowerReward) -> int:
    """The side S of the model's input."""
    return int(model.prepare_image(PILImage.new("RGB", (64, 64))).shape[-1])


def chunks(values: Sequence[T], size: int) -> list[Sequence[T]]:
    """Slices of at most ``size``."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def seconds(function: Callable[[Tensor], Tensor], rows: Tensor, repeats: int = 3) -> float:
    """The best time of ``repeats`` calls after one that warms up."""
    function(rows)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function(rows)
        times.append(time.perf_counter() - started)
    return min(times)


def work(
    images: Sequence[NDArray[np.uint8]], wire: samples.Wire, group: int, count: int, first_caption: int
) -> list[Encoded]:
    """``count`` offline samples like those that ``samples.load`` sends: ``group`` images to a caption."""
    encoded = [samples.encode(pixels, wire) for pixels in images]
    return [Encoded(encoded[i % len(encoded)], samples.caption(first_caption + i // group)) for i in range(count)]
