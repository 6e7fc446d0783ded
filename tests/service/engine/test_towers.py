from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import registry
from models.base import Output, Sample, SampleError
from models.towers import TowerInput
from service.engine.batcher import GradientResult
from service.engine.features import ENTRY_BYTES, FeatureCache
from service.engine.gradient import TowerGradient
from service.engine.worker import TensorSample, Worker
from service.telemetry import Telemetry
from tests.service.engine import tiny

PROMPTS = ("a", "cat", "a red circle", "left of a blue square", "ünïcode 🟥", "x" * 40)


def tower(worker: Worker) -> tiny.TinyTower:
    assert isinstance(worker.model, tiny.TinyTower)
    return worker.model


def mixed(count: int, seed: int = 0) -> list[Sample]:
    chooser = random.Random(seed)
    return [tiny.sample(chooser.randrange(10_000), chooser.choice(PROMPTS)) for _ in range(count)]


# -- each distinct image and prompt once ------------------------------------------------------------------------------


def test_each_distinct_image_and_prompt_is_encoded_once_in_a_batch() -> None:
    worker = tiny.make_worker(cache_bytes=0, invariance="fast")
    model = tower(worker)
    rows: dict[str, list[Tensor]] = {"image": [], "text": []}
    model.before_image = lambda batch: rows["image"].extend(batch)
    model.before_text = lambda batch: rows["text"].extend(batch)
    images, prompts = [1, 2, 1, 2, 1, 3, 3, 1], ["a", "a", "b", "b", "a", "a", "b", "b"]
    tiny.scores(worker, [tiny.sample(i, p) for i, p in zip(images, prompts, strict=True)])
    assert len({row.numpy().tobytes() for row in rows["image"]}) == 3
    assert len(rows["image"]) == 4  # three, padded to a power of two
    assert len(rows["text"]) == 2


def test_equal_pixels_from_different_files_are_one_image() -> None:
    worker = tiny.make_worker(invariance="fast")
    model = tower(worker)
    model.image_batches.clear()
    tiny.scores(worker, [tiny.sample(1, "a"), tiny.sample(1, "b")])
    assert model.image_batches == [1]


def test_a_second_batch_finds_its_features_in_the_cache() -> None:
    worker = tiny.make_worker()
    model = tower(worker)
    first = tiny.scores(worker, mixed(6))
    model.image_batches.clear()
    model.text_batches.clear()
    assert tiny.scores(worker, mixed(6)) == first
    assert (model.image_batches, model.text_batches) == ([], [])


def test_two_models_with_equal_keys_share_features_and_no_others_do() -> None:
    telemetry = Telemetry()
    caches = (FeatureCache("image", 1 << 20, telemetry), FeatureCache("text", 1 << 20, telemetry))
    first, same = (tiny.make_worker(name, caches=caches, telemetry=telemetry) for name in ("tiny-tower", "tiny-other"))
    other = tiny.make_worker(caches=caches, telemetry=telemetry, seed=1)
    samples = mixed(5)
    for worker in (first, same, other):
        tower(worker).image_batches.clear()
        tower(worker).text_batches.clear()
    assert tiny.scores(first, samples) == tiny.scores(same, samples)
    assert tower(first).image_batches != []
    assert (tower(same).image_batches, tower(same).text_batches) == ([], [])
    alone = tiny.scores(tiny.make_worker(seed=1), samples)
    assert tiny.scores(other, samples) == alone
    assert tower(other).image_batches != []


def test_models_of_different_dtypes_do_not_share_features() -> None:
    """The same weights in bfloat16 are another function: its scores may not depend on who encoded the image first."""
    samples = mixed(5)
    alone = tiny.scores(tiny.make_worker(dtype=torch.bfloat16), samples)
    telemetry = Telemetry()
    caches = (FeatureCache("image", 1 << 20, telemetry), FeatureCache("text", 1 << 20, telemetry))
    tiny.scores(tiny.make_worker(caches=caches), samples)
    second = tiny.make_worker("tiny-other", caches=caches, dtype=torch.bfloat16)
    assert tiny.scores(second, samples) == alone


def test_cached_features_stay_within_their_bytes() -> None:
    telemetry = Telemetry()
    row = tiny.WIDTH * 4 + ENTRY_BYTES
    caches = (FeatureCache("image", 7 * row + 100, telemetry), FeatureCache("text", 2 * row, telemetry))
    worker = tiny.make_worker(caches=caches)
    for seed in range(5):
        tiny.scores(worker, mixed(8, seed))
        assert caches[0].bytes <= 7 * row + 100
        assert caches[1].bytes <= 2 * row
    assert len(caches[0]) == 7


def test_a_cached_feature_does_not_keep_its_batch_alive() -> None:
    caches = (FeatureCache("image", 1 << 20, Telemetry()), FeatureCache("text", 1 << 20, Telemetry()))
    tiny.scores(tiny.make_worker(caches=caches), mixed(8))
    for cache in caches:
        for feature in cache._entries.values():
            assert feature.untyped_storage().nbytes() == feature.numel() * feature.element_size()


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact_workers() -> dict[str, Worker]:
    patch = pytest.MonkeyPatch()
    tiny.register_all(patch)
    workers = {
        "float32": tiny.make_worker(cache_bytes=0),
        "bfloat16": tiny.make_worker(cache_bytes=0, dtype=torch.bfloat16),
        "cached": tiny.make_worker(),
    }
    patch.undo()
    return workers


@pytest.mark.parametrize("which", ["float32", "bfloat16", "cached"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), count=st.integers(1, 20), place=st.integers(0, 19))
def test_a_score_is_bit_equal_alone_among_neighbours_and_at_any_place(
    which: str, seed: int, count: int, place: int, exact_workers: dict[str, Worker]
) -> None:
    worker = exact_workers[which]
    sample = mixed(1, seed)[0]
    alone = tiny.scores(worker, [sample])[0]
    neighbours = mixed(count - 1, seed + 1)
    place = min(place, count - 1)
    assert tiny.scores(worker, [*neighbours[:place], sample, *neighbours[place:]])[place] == alone


@pytest.mark.parametrize("which", ["float32", "bfloat16"])
def test_the_order_of_a_batch_does_not_matter(which: str, exact_workers: dict[str, Worker]) -> None:
    samples = mixed(8)
    forward = tiny.scores(exact_workers[which], samples)
    assert tiny.scores(exact_workers[which], samples[::-1]) == forward[::-1]


def test_engine_scores_are_those_of_the_plain_path(exact_workers: dict[str, Worker]) -> None:
    worker, samples = exact_workers["float32"], mixed(8)
    plain = worker.model.run([worker.prepare(entry, "score") for entry in samples])
    expected = [outcome.score for outcome in plain if isinstance(outcome, Output)]
    assert tiny.scores(worker, samples) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 8  # the tower tells them apart


@pytest.mark.parametrize("micro_batch", [8, 12, 40, 48])
def test_a_head_with_a_sigmoid_is_exact_at_any_micro_batch(micro_batch: int) -> None:
    """Elementwise kernels treat the last numbers of a vector differently unless its length is a multiple of theirs."""
    worker = tiny.make_worker("sigmoid-head", micro_batch=micro_batch)
    for start in range(0, 8 * micro_batch, micro_batch):
        samples = [tiny.sample(start + i, "a") for i in range(micro_batch)]
        together = tiny.scores(worker, samples)
        assert tiny.scores(worker, samples[::-1])[::-1] == together
        assert tiny.scores(worker, samples[-1:]) == together[-1:]


def test_fast_mode_encodes_one_image_as_one_row_and_exact_mode_pads_where_it_must() -> None:
    fast = tiny.make_worker(invariance="fast", cache_bytes=0)
    tower(fast).image_batches.clear()
    tiny.scores(fast, mixed(1))
    assert tower(fast).image_batches == [1]
    exact = tiny.make_worker(cache_bytes=0)
    assert exact._towers is not None
    usable = next(iter(exact._towers.images._sizes.values()))
    tower(exact).image_batches.clear()
    tiny.scores(exact, mixed(1))
    assert tower(exact).image_batches == [usable[0]]


def test_a_truncated_prompt_says_so_and_only_there() -> None:
    worker = tiny.make_worker()
    outcomes = worker._bisect("score", [worker.prepare(tiny.sample(0, p), "score") for p in ("short", "x" * 100)])
    assert [outcome.warnings for outcome in outcomes if isinstance(outcome, Output)] == [(), ("prompt_truncated",)]


# -- gradients --------------------------------------------------------------------------------------------------------


def pixels(seed: int, height: int = 48, width: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensor_inputs(worker: Worker, sizes: Sequence[tuple[int, int]], prompts: Sequence[str]) -> list[TowerInput]:
    return [
        worker.prepare(TensorSample(prompt, pixels(i, *size)), "gradient")
        for i, (size, prompt) in enumerate(zip(sizes, prompts, strict=True))
    ]


def gradients(outcomes: Sequence[object]) -> list[GradientResult]:
    assert all(isinstance(outcome, GradientResult) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, GradientResult)]


def autograd(model: tiny.TinyTower, image: Tensor, prompt: str) -> tuple[float, Tensor]:
    leaf = image.clone().requires_grad_()
    text = model.encode_text(model.prepare_text(prompt)[0][None])
    score = model.head(model.encode_image(model.preprocess_tensor(leaf[None])), text).score_B[0]
    score.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return float(score.detach()), leaf.grad


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_autograd_in_float32_for_images_of_any_size(dtype: torch.dtype) -> None:
    worker = tiny.make_worker(dtype=dtype)
    sizes, prompts = [(48, 40), (32, 32), (33, 97), (64, 64), (48, 40)], ["a", "a", "b", "a longer prompt", "a"]
    results = gradients(worker._bisect("gradient", tensor_inputs(worker, sizes, prompts)))
    reference = tower(tiny.make_worker())
    for i, result in enumerate(results):
        score, gradient = autograd(reference, pixels(i, *sizes[i]), prompts[i])
        assert result.gradient.dtype == torch.float32
        assert result.gradient.shape == (3, *sizes[i])
        assert result.output.score == pytest.approx(score, abs=1e-5)
        assert cosine(result.gradient, gradient) >= 0.9999
        assert float(result.gradient.norm()) == pytest.approx(float(gradient.norm()), rel=1e-3)


def test_gradients_are_finite_differences_in_float64() -> None:
    model = tiny.TinyTower.load(tiny.LoadOptions(dtype=torch.float64))
    image = pixels(3, dtype=torch.float64)
    runner = TowerGradient(model, micro_batch=2)
    tokens, _ = model.prepare_text("a cat")

    def score(shifted: Tensor) -> float:
        text = model.encode_text(tokens[None])
        return float(model.head(model.encode_image(model.preprocess_tensor(shifted[None])), text).score_B[0])

    gradient = gradients(runner.run([TowerInput(image, tokens, "", "a cat")]))[0].gradient.double()
    for seed in range(5):
        direction = torch.randn(image.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        step = 1e-5
        with torch.no_grad():
            slope = (score(image.detach() + step * direction) - score(image.detach() - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_a_gradient_does_not_depend_on_its_neighbours_or_its_place() -> None:
    worker = tiny.make_worker(micro_batch=4)
    inputs = tensor_inputs(worker, [(48, 40)] * 4, ["a", "b", "c", "d"])
    together = gradients(worker._bisect("gradient", inputs))
    backwards = gradients(worker._bisect("gradient", inputs[::-1]))[::-1]
    for i, entry in enumerate(inputs):
        alone = gradients(worker._bisect("gradient", [entry]))[0]
        for other in (together[i], backwards[i]):
            assert torch.equal(other.gradient, alone.gradient)
            assert other.output.score == alone.output.score


def test_a_gradient_request_leaves_its_pixels_as_they_were() -> None:
    """The same tensor serves every model of the request."""
    worker = tiny.make_worker()
    image = pixels(1)
    before = image.clone()
    worker._bisect("gradient", [worker.prepare(TensorSample("a", image), "gradient")])
    assert torch.equal(image.detach(), before)
    assert (image.requires_grad, image.grad) == (False, None)


def test_a_gradient_that_is_not_finite_is_an_error_of_its_own_sample() -> None:
    worker = tiny.make_worker()
    inputs = tensor_inputs(worker, [(48, 40)] * 3, ["a", "b", "c"])
    inputs[1].pixels[0, 0, 0] = float("nan")
    outcomes = worker._bisect("gradient", inputs)
    assert isinstance(outcomes[1], SampleError)
    assert outcomes[1].code == "not_finite"
    gradients([outcomes[0], outcomes[2]])


def test_gradients_work_after_scores_on_the_same_model() -> None:
    """Scores run in inference mode; what they leave in the model must not break autograd."""
    worker = tiny.make_worker()
    tiny.scores(worker, mixed(3))
    gradients(worker._bisect("gradient", tensor_inputs(worker, [(32, 32)], ["a"])))
    tiny.scores(worker, mixed(3, seed=1))


# -- warm-up ----------------------------------------------------------------------------------------------------------


def test_shapes_that_were_warmed_up_before_memory_ran_out_are_warmed_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise they would be compiled, or run uncompiled, when the first request comes."""
    inside: list[bool] = []

    def compiler(function: Any, **_: Any) -> Any:  # the real one would take minutes to say the same
        def compiled(*inputs: Tensor) -> Tensor:
            inside.append(True)
            try:
                return function(*inputs)
            finally:
                inside.pop()

        return compiled

    class LongPromptsNeedMemory(tiny.TinyTower):
        def encode_text(self, tokens_BL: Tensor) -> Tensor:
            if tokens_BL.shape[1] == tiny.TEXT_LENGTHS[-1] and len(tokens_BL) > 4:
                raise torch.OutOfMemoryError("no memory for this batch")
            ran.append((*tokens_BL.shape, bool(inside)))
            return super().encode_text(tokens_BL)

    ran: list[tuple[int, int, bool]] = []
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setitem(registry._REGISTRY, "tiny-tower", LongPromptsNeedMemory)
    worker = tiny.make_worker(compile="on", cache_bytes=0)
    ran.clear()
    tiny.scores(worker, [tiny.sample(0, "a"), tiny.sample(1, "a longer prompt than that")])
    assert ran == [(4, length, True) for length in tiny.TEXT_LENGTHS]
