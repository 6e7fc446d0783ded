"""What every registered reward model promises, asked of all of them: nobody lists models by hand.

Samples are made for a model from its canary: its image and variants of it, photographs, its prompt and prompts that the
embedded models understand. A model need not accept all of them, but it must score some.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import models.catalog  # noqa: F401
from models.base import Candidate, Output, Reward, RewardModel, Sample, SampleError, TowerReward, UnsupportedInput
from models.registry import get_info, list_models, load_model, register

IMAGES = Path(__file__).parents[1] / "fixtures" / "pointwise" / "images"
PROMPTS = (
    'a sign that says "STOP"',
    "a photo of a red circle",
    "a red circle",
    "a blue square left of a green triangle",
    "three yellow stars",
)
NAMES = list_models(hidden=True)
BATCH = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model_of(name: str) -> RewardModel:
    return load_model(name)


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> RewardModel:
    return model_of(request.param)


def images(model: RewardModel) -> list[Image.Image]:
    """The canary's image, what is left when it is spoiled in several ways, and photographs."""
    image = model.canary().image(model.info.name)
    spoiled = [
        ImageOps.invert(image),
        Image.new("RGB", image.size, "white"),
        image.crop((0, 0, image.width // 2, image.height)),
    ]
    return [image, *spoiled, *(Image.open(IMAGES / f"{name}.png") for name in ("landscape", "portrait", "tiny"))]


def accepted(model: RewardModel, samples: list[Sample]) -> list[Sample]:
    def is_accepted(sample: Sample) -> bool:
        try:
            model.prepare(sample)
        except SampleError:
            return False
        return True

    return [sample for sample in samples if is_accepted(sample)]


@cache
def by_image(name: str) -> tuple[Sample, ...]:
    """The canary's prompt with different images."""
    model = model_of(name)
    canary = model.canary()
    samples = [
        Sample(canary.prompt, Candidate(image=image), canary.context, canary.metadata) for image in images(model)
    ]
    return tuple(accepted(model, samples))


@cache
def by_prompt(name: str) -> tuple[Sample, ...]:
    """The canary's image with different prompts."""
    model = model_of(name)
    canary = model.canary()
    prompts = (canary.prompt, *(prompt for prompt in PROMPTS if prompt != canary.prompt))
    return tuple(accepted(model, [Sample(prompt, canary.candidate, canary.context) for prompt in prompts]))


def run(model: RewardModel, samples: list[Sample] | tuple[Sample, ...]) -> list[Output]:
    results = model.run([model.prepare(sample) for sample in samples])
    assert len(results) == len(samples)
    outputs = [result for result in results if isinstance(result, Output)]
    assert len(outputs) == len(samples), results
    return outputs


def scores(model: RewardModel, samples: list[Sample] | tuple[Sample, ...]) -> list[float]:
    return [output.score for output in run(model, samples)]


def test_some_models_are_registered_and_names_are_unique() -> None:
    assert {"bench-clip", "jpeg-compressibility", "jpeg-incompressibility", "ocr"} <= set(NAMES)
    assert "bench-clip" not in list_models()
    with pytest.raises(ValueError, match="registered twice"):
        register("ocr")(type(model_of("ocr")))


def test_info_is_complete(model: RewardModel) -> None:
    info = model.info
    assert isinstance(model, Reward)
    assert get_info(info.name) is info
    assert info.name == info.name.lower().replace("_", "-")
    assert info.kind in ("pointwise", "pairwise")
    assert info.inputs
    assert info.range[0] < info.range[1]
    assert info.calibration.temperature > 0
    for text in (info.description, info.citation, info.license, info.calibration.source, model.preprocessing):
        assert text.strip() == text != ""
    assert bool(info.weights) == bool(model.weights_hash) == (info.weights_bytes > 0)
    assert not model.weights_hash or model.weights_hash.startswith("sha256:")
    assert model.max_batch is None or model.max_batch >= 1
    assert isinstance(model.dtype, torch.dtype)
    assert not info.differentiable or isinstance(model, TowerReward)


def test_canary_is_scored_with_a_finite_number_and_the_outputs_named(model: RewardModel) -> None:
    (output,) = run(model, [model.canary()])
    assert isinstance(output.score, float)
    assert abs(output.score) < float("inf")
    assert set(output.outputs) == set(model.info.outputs)


def test_scores_are_repeatable_even_by_a_second_instance(model: RewardModel) -> None:
    samples = by_image(model.info.name)[:BATCH]
    first = scores(model, samples)
    assert scores(model, samples) == first
    assert scores(load_model(model.info.name), samples) == first


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(BATCH)))
def test_order_of_the_batch_is_the_order_of_the_scores(model: RewardModel, order: list[int]) -> None:
    samples = (*by_image(model.info.name), *by_prompt(model.info.name))[:BATCH]
    assert len(samples) == BATCH
    straight = scores(model, samples)
    assert scores(model, [samples[i] for i in order]) == [straight[i] for i in order]


def test_neighbours_do_not_change_a_score(model: RewardModel) -> None:
    """At the same batch size, which is what the engine's exact mode fixes."""
    samples = by_image(model.info.name)
    target, neighbours = samples[0], samples[1:]
    mixed = scores(model, [target, *neighbours[: BATCH - 1]])[0]
    copies = scores(model, [target] * BATCH)
    assert set(copies) == {mixed}
    assert scores(model, [*neighbours[-BATCH + 1 :], target])[-1] == mixed


def test_another_image_has_another_score(model: RewardModel) -> None:
    if "image" not in model.info.inputs:
        pytest.skip(f"{model.info.name} does not look at images")
    samples = by_image(model.info.name)
    found = scores(model, samples)
    assert len(samples) > 3
    assert max(found) - min(found) > 1e-3 * (model.info.range[1] - model.info.range[0])


def test_the_prompt_matters_exactly_where_the_model_says_so(model: RewardModel) -> None:
    found = scores(model, by_prompt(model.info.name))
    assert len(found) > 1
    if "prompt" in model.info.inputs:
        assert max(found) - min(found) > 1e-3 * (model.info.range[1] - model.info.range[0])
    else:
        assert len(set(found)) == 1


def test_what_is_not_an_image_is_a_typed_error(model: RewardModel) -> None:
    canary = model.canary()
    if "text" not in model.info.inputs:
        with pytest.raises(UnsupportedInput, match=model.info.name):
            model.prepare(Sample(canary.prompt, Candidate(text="an answer"), canary.context, canary.metadata))
