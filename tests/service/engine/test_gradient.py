from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from models.base import LoadOptions, Output
from models.towers import TowerInput
from service.engine.batcher import GradientResult
from service.engine.gradient import TowerGradient
from tests.service.engine import tiny


class Limited(tiny.TinyTower):
    """Runs out of memory for more than ``fits`` images; notes whether tensors of failed forwards are still alive."""

    fits = 1 << 30

    def encode_image(self, pixels_B3SS: Tensor) -> Tensor:
        held: list[weakref.ref[Tensor]] = self.__dict__.setdefault("held", [])
        self.__dict__.setdefault("alive", []).append(sum(ref() is not None for ref in held))
        activations = pixels_B3SS * 2
        if len(pixels_B3SS) > self.fits:
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("no memory for this batch")
        return super().encode_image(activations / 2)


def limited(fits: int) -> Limited:
    model = Limited.load(LoadOptions())
    assert isinstance(model, Limited)
    model.fits = fits
    return model


def inputs(model: tiny.TinyTower, count: int) -> list[TowerInput]:
    generator = torch.Generator().manual_seed(0)
    tokens, _ = model.prepare_text("a cat")
    return [TowerInput(torch.rand(3, 40, 48, generator=generator), tokens, "", "a cat") for _ in range(count)]


def numbers(results: list[object]) -> list[tuple[float, Tensor]]:
    found = []
    for result in results:
        assert isinstance(result, GradientResult)
        assert isinstance(result.output, Output)
        found.append((result.output.score, result.gradient))
    return found


def test_a_batch_that_does_not_fit_at_start_is_halved_and_the_service_starts() -> None:
    gradient = TowerGradient(limited(fits=2), 8)
    gradient.warm_up("a cat", torch.rand(3, 32, 32))
    assert gradient.micro_batch == 2


def test_one_image_that_does_not_fit_at_start_raises() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        TowerGradient(limited(fits=0), 8).warm_up("a cat", torch.rand(3, 32, 32))


def test_halving_gives_every_image_the_gradient_of_the_smaller_batch() -> None:
    small, halved = TowerGradient(limited(1 << 30), 2), TowerGradient(limited(2), 8)
    batch = inputs(small.model, 7)  # type: ignore[arg-type]
    results = numbers(halved.run(batch))  # type: ignore[arg-type]
    assert halved.micro_batch == 2
    for (score, found), (other_score, other) in zip(results, numbers(small.run(batch)), strict=True):  # type: ignore[arg-type]
        assert score == other_score
        assert torch.equal(found, other)


def test_what_a_failed_batch_held_is_freed_before_the_smaller_one() -> None:
    """A traceback keeps the frames of a forward, and they its activations: on a full device nothing fits beside."""
    model = limited(fits=2)
    TowerGradient(model, 8).run(inputs(model, 8))
    assert len(model.__dict__["held"]) == 2  # batches of eight and of four
    assert not any(model.__dict__["alive"])


def test_one_image_that_does_not_fit_raises_in_service() -> None:
    model = limited(fits=0)
    with pytest.raises(torch.OutOfMemoryError):
        TowerGradient(model, 4).run(inputs(model, 3))
