from __future__ import annotations

import weakref

import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

from models.base import Candidate, LoadOptions, Output
from models.judge import Comparison, Preference
from models.reward_dance import RewardDance
from models.towers import TowerInput
from service.engine.batcher import GradientResult
from service.engine.gradient import JudgeGradient, TowerGradient
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


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> RewardDance:
    """A random network."""
    return RewardDance.load(RewardDance.random_checkpoint(tmp_path_factory.mktemp("judge")))


def shown(pixels: Tensor) -> Candidate:
    levels = (pixels * 255).round().to(torch.uint8)
    return Candidate(image=PILImage.fromarray(levels.permute(1, 2, 0).numpy()))


def preferred(judge: RewardDance, pixels: Tensor, reference: Candidate, *, both_orders: bool = True) -> GradientResult:
    prepared = JudgeGradient.prepare("a cat", pixels, reference, None, both_orders)
    (result,) = JudgeGradient(judge).run([prepared])
    assert isinstance(result, GradientResult)
    return result


def test_both_orders_of_a_judge_are_the_mean_of_what_it_says_in_each(judge: RewardDance) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, other = ((torch.rand(3, 56, 84, generator=generator) * 255).round() / 255 for _ in range(2))
    candidate, reference = shown(pixels), shown(other)
    said = []
    for first, second in ((candidate, reference), (reference, candidate)):
        (answer,) = judge.compare([judge.prepare_comparison(Comparison("a cat", first, second))])
        assert isinstance(answer, Preference)
        said.append(answer.probability)
    assert abs(said[0] + said[1] - 1) > 0.01, "this network has no position bias that could cancel"
    whole = preferred(judge, pixels, reference)
    one = preferred(judge, pixels, reference, both_orders=False)
    assert one.output.score == pytest.approx(said[0], abs=1e-5)
    assert whole.output.score == pytest.approx((said[0] + 1 - said[1]) / 2, abs=1e-5)
    _, against = judge.gradient(Comparison("a cat", reference, reference), pixels, "second")
    torch.testing.assert_close(whole.gradient, (one.gradient - against) / 2)
    step = 1e-2 * whole.gradient / whole.gradient.norm()
    up, down = (preferred(judge, pixels + sign * step, reference).output.score for sign in (1, -1))
    assert up - down == pytest.approx(2e-2 * float(whole.gradient.norm()), rel=0.1)


@pytest.mark.parametrize("both_orders", [True, False])
def test_the_watchdog_hears_of_every_order(judge: RewardDance, both_orders: bool) -> None:
    heard: list[int] = []
    pixels = torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(2))
    entry = JudgeGradient.prepare("a cat", pixels, shown(pixels), None, both_orders)
    JudgeGradient(judge, lambda: heard.append(1)).run([entry, entry])
    assert len(heard) == (4 if both_orders else 2)


def test_swapping_image_and_reference_turns_the_preference_around(judge: RewardDance) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels, other = ((torch.rand(3, 56, 56, generator=generator) * 255).round() / 255 for _ in range(2))
    forwards, backwards = preferred(judge, pixels, shown(other)), preferred(judge, other, shown(pixels))
    assert forwards.output.score + backwards.output.score == pytest.approx(1, abs=1e-5)
