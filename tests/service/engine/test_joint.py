"""Rewards whose head is a network over image and text, and whose images have many shapes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch import Tensor

from models import registry
from models.base import Candidate, InputError, Output, RewardInfo, Sample
from models.preprocessing import to_uint8_tensor
from models.towers import HeadOutput, TowerInput
from service.engine.batcher import GradientResult
from service.engine.worker import TensorSample, Worker
from tests.service.engine import tiny

SHAPES = ((32, 32), (48, 24), (24, 48), (64, 16))
PROMPTS = ("a", "cat", "a red circle", "x" * 40)


class TinyJoint(tiny.TinyTower):
    """Image tokens as features, tokens as text features, and one attention block over both as the head."""

    joint: ClassVar[bool] = True
    info: ClassVar[RewardInfo] = RewardInfo(
        **{**vars(tiny.info("tiny-joint", differentiable=True)), "outputs": ("spread",)}
    )
    pair_batches: list[int]

    def prepare_image(self, image: PILImage.Image) -> Tensor:
        return to_uint8_tensor(image)

    def encode_image(self, pixels_B3HW: Tensor) -> Tensor:
        self.image_batches.append(len(pixels_B3HW))
        return self.towers.vision(self.towers.patches(pixels_B3HW).flatten(2).transpose(1, 2))

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        return tokens_BL

    def head(self, image_features: Tensor, text_features: Tensor) -> HeadOutput:
        self.pair_batches = [*getattr(self, "pair_batches", []), len(image_features)]
        sequence = torch.cat([image_features, self.towers.tokens(text_features)], dim=1)
        hidden = self.towers.text(sequence)
        score = self.towers.mlp(torch.cat([hidden[:, 0], hidden[:, -1]], dim=-1)).squeeze(-1)
        return HeadOutput(
            score if score.dtype == torch.float64 else score.float(), {"spread": hidden.float().std((1, 2))}
        )

    def preprocess_tensor(self, pixels_B3HW: Tensor) -> Tensor:
        return self.normalize(F.interpolate(pixels_B3HW, scale_factor=1.0))


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    registry._REGISTRY["tiny-joint"] = TinyJoint
    yield
    del registry._REGISTRY["tiny-joint"]


@pytest.fixture(scope="module")
def worker(registered: None) -> Worker:
    return tiny.make_worker("tiny-joint", cache_bytes=0)


def model_of(worker: Worker) -> TinyJoint:
    assert isinstance(worker.model, TinyJoint)
    return worker.model


def mixed(count: int, seed: int) -> list[Sample]:
    chooser = random.Random(seed)
    return [
        Sample(chooser.choice(PROMPTS), Candidate(image=tiny.picture(chooser.randrange(999), *chooser.choice(SHAPES))))
        for _ in range(count)
    ]


def outputs(worker: Worker, samples: list[Sample]) -> list[Output]:
    found = worker._bisect("score", [worker.prepare(entry, "score") for entry in samples])
    assert all(isinstance(outcome, Output) for outcome in found), found
    return [outcome for outcome in found if isinstance(outcome, Output)]


def test_samples_of_many_shapes_get_the_scores_of_the_plain_path_in_their_order(worker: Worker) -> None:
    samples = mixed(20, seed=0)
    plain = [model_of(worker).run([worker.prepare(entry, "score")])[0] for entry in samples]
    for output, expected in zip(outputs(worker, samples), plain, strict=True):
        assert isinstance(expected, Output)
        assert output.score == pytest.approx(expected.score, abs=1e-5)
        assert output.outputs == pytest.approx(dict(expected.outputs), abs=1e-5)
        assert set(output.outputs) == {"spread"}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), count=st.integers(1, 12), place=st.integers(0, 11))
def test_a_score_is_bit_equal_alone_and_among_neighbours(seed: int, count: int, place: int, worker: Worker) -> None:
    sample = mixed(1, seed)[0]
    neighbours = mixed(count - 1, seed + 1)
    place = min(place, count - 1)
    together = outputs(worker, [*neighbours[:place], sample, *neighbours[place:]])[place]
    assert together == outputs(worker, [sample])[0]


def test_a_pair_that_is_asked_twice_runs_once_and_one_sample_is_not_padded() -> None:
    worker = tiny.make_worker("tiny-joint", cache_bytes=0, invariance="fast")
    model = model_of(worker)
    sample = model.canary()
    model.pair_batches = []
    first, second = outputs(worker, [sample, sample])
    assert first == second
    assert model.pair_batches == [1]


def test_shapes_are_part_of_the_fingerprint(worker: Worker) -> None:
    other = tiny.make_worker("tiny-joint", micro_batch=4)
    assert worker.fingerprint() != other.fingerprint()
    assert worker.shape.count("/") == 3  # image, text and head, and the rows of the head


def test_gradients_of_many_shapes_are_those_of_autograd_alone(worker: Worker) -> None:
    model = model_of(worker)
    inputs = [
        worker.prepare(
            TensorSample(prompt, torch.rand(3, *shape, generator=torch.Generator().manual_seed(i))), "gradient"
        )
        for i, (shape, prompt) in enumerate(zip(SHAPES * 2, PROMPTS * 2, strict=True))
    ]
    results = worker._bisect("gradient", inputs)
    for entry, result in zip(inputs, results, strict=True):
        assert isinstance(entry, TowerInput)
        assert isinstance(result, GradientResult)
        leaf = entry.pixels.clone().requires_grad_()
        features = model.encode_image(model.preprocess_tensor(leaf[None]))
        score = model.head(features, entry.tokens[None]).score_B[0]
        (gradient,) = torch.autograd.grad(score, leaf)
        assert torch.allclose(result.gradient, gradient, atol=1e-6, rtol=1e-4)
        assert result.gradient.shape == entry.pixels.shape
        assert float(gradient.abs().max()) > 1e-6


def test_an_input_error_of_the_twin_is_told_as_such_and_spares_the_neighbours(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some images cannot be scored; a client retries a model error, and not this one."""

    def refusing(pixels_B3HW: Tensor) -> Tensor:
        if pixels_B3HW.shape[-1] > 100:
            raise InputError("too long", code="aspect_ratio")
        return TinyJoint.preprocess_tensor(model_of(worker), pixels_B3HW)

    assert worker._gradient is not None
    monkeypatch.setattr(worker._gradient.model, "preprocess_tensor", refusing)
    images = [torch.rand(3, 32, 32), torch.rand(3, 16, 128), torch.rand(3, 48, 24)]
    inputs = [worker.prepare(TensorSample("a", image), "gradient") for image in images]
    first, refused, last = worker._bisect("gradient", inputs)
    assert isinstance(first, GradientResult)
    assert isinstance(last, GradientResult)
    assert isinstance(refused, InputError)
    assert refused.code == "aspect_ratio"


def test_names_of_prompts_in_caches_are_short(worker: Worker) -> None:
    entry = worker.prepare(Sample("long " * 3000, Candidate(image=tiny.picture(0))), "score")
    assert isinstance(entry, TowerInput)
    assert len(entry.text_id) == 32
    assert entry.text_id != worker.prepare(Sample("long " * 3001, Candidate(image=tiny.picture(0))), "score").text_id
