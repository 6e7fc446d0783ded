"""What every registered reward model promises, asked of all of them: nobody lists models by hand.

Models whose weights are published files are loaded from random ones of the published structure, tiny and of the true
classes. Samples are made for a model from its canary: its image and variants of it, photographs, its prompt and prompts
that the embedded models understand. A model need not accept all of them, but it must score some.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

import models.catalog  # noqa: F401
from models.base import (
    Candidate,
    LoadOptions,
    ModelError,
    Output,
    Reward,
    RewardModel,
    Sample,
    SampleError,
    UnsupportedInput,
    WeightsError,
)
from models.judge import Judge
from models.registry import get_info, get_model, list_models, load_model, register
from models.towers import TowerInput, TowerReward

IMAGES = Path(__file__).parents[1] / "fixtures" / "pointwise" / "images"
PROMPTS = (
    'a sign that says "STOP"',
    "a photo of a red circle",
    "a red circle",
    "a blue square left of a green triangle",
    "three yellow stars",
)
NAMES = [
    name
    for name in list_models(hidden=True)
    if get_model(name).__module__.startswith("models.") and not issubclass(get_model(name), Judge)
]
"""Not the plugins that other tests' imports may have registered in this process, and not the judges, of which
test_judge_contract.py asks what they promise."""
BATCH = 4
TINY_BYTES = 64 * 2**20
SENSITIVITY = 0.02
"""Least share of the spread over images and prompts that either of them alone must show."""


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model, the options that load it, and the folder of its checkpoint (empty where it needs none)."""

    model: RewardModel
    options: LoadOptions
    folder: Path


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    options = get_model(name).random_checkpoint(folder, "tiny") if get_info(name).sources else LoadOptions()
    return Loaded(load_model(name, options), options, folder)


@pytest.fixture
def model(loaded: Loaded) -> RewardModel:
    return loaded.model


@pytest.fixture
def tower(loaded: Loaded) -> TowerReward:
    if not isinstance(loaded.model, TowerReward):
        pytest.skip(f"{loaded.model.info.name} is no tower")
    return loaded.model


def images(model: RewardModel) -> list[Image.Image]:
    """The canary's image, what is left when it is spoiled in several ways, and photographs."""
    image = model.canary().image(model.info.name)
    spoiled = [
        ImageOps.invert(image),
        Image.new("RGB", image.size, "white"),
        ImageOps.mirror(ImageOps.posterize(image, 2)),
        ImageOps.flip(ImageOps.solarize(image)),
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
def by_image(model: RewardModel) -> tuple[Sample, ...]:
    """The canary's prompt with different images."""
    canary = model.canary()
    samples = [
        Sample(canary.prompt, Candidate(image=image), canary.context, canary.metadata) for image in images(model)
    ]
    return tuple(accepted(model, samples))


def alike(model: RewardModel) -> tuple[Sample, ...]:
    """The canary's prompt with different images that meet in one batch: prepared, they have one shape."""
    samples = by_image(model)
    shapes = [shape(model.prepare(sample)) for sample in samples]
    return tuple(sample for sample, own in zip(samples, shapes, strict=True) if own == shapes[0])


def shape(prepared: object) -> object:
    return (prepared.pixels.shape, prepared.tokens.shape) if isinstance(prepared, TowerInput) else None


@cache
def by_prompt(model: RewardModel) -> tuple[Sample, ...]:
    """The canary's image with different prompts; metadata might say what a prompt would, and stay out of it."""
    canary = model.canary()
    metadata = {} if "prompt" in model.info.inputs else canary.metadata
    prompts = (canary.prompt, *(prompt for prompt in PROMPTS if prompt != canary.prompt))
    return tuple(accepted(model, [Sample(prompt, canary.candidate, canary.context, metadata) for prompt in prompts]))


def with_prompt(sample: Sample, prompt: str) -> Sample:
    return replace(sample, prompt=prompt)


def with_image(sample: Sample, image: Image.Image) -> Sample:
    return replace(sample, candidate=Candidate(image=image))


def outcome(model: RewardModel, sample: Sample) -> Output | SampleError:
    """A score or a typed error; anything else that is raised fails the test."""
    try:
        (result,) = model.run([model.prepare(sample)])
    except SampleError as error:
        return error
    return result


def is_sound(result: Output | SampleError) -> bool:
    """An error says what it is; a score is finite."""
    if isinstance(result, SampleError):
        return bool(result.message and result.code)
    return abs(result.score) < float("inf")


def run(model: RewardModel, samples: list[Sample] | tuple[Sample, ...]) -> list[Output]:
    results = model.run([model.prepare(sample) for sample in samples])
    assert len(results) == len(samples)
    outputs = [result for result in results if isinstance(result, Output)]
    assert len(outputs) == len(samples), results
    return outputs


def scores(model: RewardModel, samples: list[Sample] | tuple[Sample, ...]) -> list[float]:
    return [output.score for output in run(model, samples)]


def spread(values: list[float]) -> float:
    return max(values) - min(values)


def least_spread(model: RewardModel) -> float:
    """What counts as another score.

    Published scales mean something for trained weights alone. Random ones are measured by their own spread over images
    and prompts, which in turn must be far above float32's rounding (6e-8 of a score).
    """
    if not model.info.sources:
        return 1e-3 * (model.info.range[1] - model.info.range[0])
    found = scores(model, (*by_image(model), *by_prompt(model)))
    assert spread(found) > 1e-4 * max(abs(score) for score in found)
    return SENSITIVITY * spread(found)


def test_some_models_are_registered_and_names_are_unique() -> None:
    assert {"bench-clip", "jpeg-compressibility", "jpeg-incompressibility", "ocr"} <= set(NAMES)
    assert "bench-clip" not in list_models()
    with pytest.raises(ValueError, match="registered twice"):
        register("ocr")(get_model("ocr"))


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
    assert bool(info.weights) == bool(model.weights_hash)
    assert (info.weights_bytes > 0) <= bool(info.weights)
    assert info.weights_bytes > 0 or info.sources or not info.weights
    assert not model.weights_hash or model.weights_hash.startswith("sha256:")
    assert model.max_batch is None or model.max_batch >= 1
    assert isinstance(model.dtype, torch.dtype)
    assert not info.differentiable or isinstance(model, TowerReward)


def test_every_source_has_a_role_of_its_own_and_a_place_to_fetch_it_from(model: RewardModel) -> None:
    sources = model.info.sources
    assert len({source.role for source in sources}) == len(sources)
    assert not sources or sources[0].role == "weights"
    assert all(source.source.startswith(("hf:", "https://")) and source.bytes >= 0 for source in sources)


def test_a_tiny_checkpoint_stays_in_its_folder_and_is_the_same_every_time(loaded: Loaded, tmp_path: Path) -> None:
    info = loaded.model.info
    if not info.sources:
        pytest.skip(f"the weights of {info.name}, if any, ship with a package")
    for source in info.sources:
        place = Path(loaded.options.source(source))
        assert place.is_relative_to(loaded.folder)
        assert place.exists()
    size = sum(file.stat().st_size for file in loaded.folder.rglob("*") if file.is_file())
    assert 0 < size < TINY_BYTES
    again = load_model(info.name, get_model(info.name).random_checkpoint(tmp_path, "tiny"))
    assert again.weights_hash == loaded.model.weights_hash


def test_missing_weights_name_their_source_and_their_setting(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file at a time is missing; the others are those of the tiny checkpoint."""
    if not loaded.model.info.sources:
        pytest.skip(f"the weights of {loaded.model.info.name}, if any, ship with a package")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name = loaded.model.info.name
    for source in loaded.model.info.sources:
        options = replace(loaded.options, weights_dir=tmp_path)
        if source.role == "weights":
            options = replace(options, weights=None)
            setting = f"models.{name}.weights"
        else:
            options = replace(options, options={k: v for k, v in options.options.items() if k != source.role})
            setting = f"models.{name}.options.{source.role}"
        with pytest.raises(WeightsError) as caught:
            load_model(name, options)
        message = str(caught.value)
        assert setting in message
        where = source.source.removeprefix("hf:").split("/")
        assert source.source in message or "/".join(where[:2]) in message
        assert all(part in message for part in where[2:])


def test_an_option_that_the_model_does_not_have_is_refused(loaded: Loaded) -> None:
    """A typo would otherwise score with the defaults, under another fingerprint."""
    name = loaded.model.info.name
    options = {**loaded.options.options, "no_such_option": 1}
    with pytest.raises(ValueError, match=f"{name} has no option 'no_such_option'"):
        load_model(name, replace(loaded.options, options=options))


def test_canary_is_scored_with_a_finite_number_and_the_outputs_named(model: RewardModel) -> None:
    (output,) = run(model, [model.canary()])
    assert isinstance(output.score, float)
    assert abs(output.score) < float("inf")
    assert set(output.outputs) == set(model.info.outputs)


def test_scores_are_repeatable_even_by_a_second_instance(loaded: Loaded) -> None:
    samples = by_image(loaded.model)[:BATCH]
    first = scores(loaded.model, samples)
    assert scores(loaded.model, samples) == first
    assert scores(load_model(loaded.model.info.name, loaded.options), samples) == first


@settings(max_examples=3, deadline=None)
@given(order=st.permutations(range(BATCH)))
def test_order_of_the_batch_is_the_order_of_the_scores(loaded: Loaded, order: list[int]) -> None:
    samples = (*by_image(loaded.model), *by_prompt(loaded.model))[:BATCH]
    assert len(samples) == BATCH
    straight = scores(loaded.model, samples)
    assert scores(loaded.model, [samples[i] for i in order]) == [straight[i] for i in order]


def test_neighbours_do_not_change_a_score(model: RewardModel) -> None:
    """At the same batch size, which is what the engine's exact mode fixes."""
    samples = alike(model)
    assert len(samples) >= BATCH
    target, neighbours = samples[0], samples[1:]
    mixed = scores(model, [target, *neighbours[: BATCH - 1]])[0]
    copies = scores(model, [target] * BATCH)
    assert set(copies) == {mixed}
    assert scores(model, [*neighbours[-BATCH + 1 :], target])[-1] == mixed


def test_another_image_has_another_score(model: RewardModel) -> None:
    if "image" not in model.info.inputs:
        pytest.skip(f"{model.info.name} does not look at images")
    samples = by_image(model)
    assert len(samples) > 3
    assert spread(scores(model, samples)) > least_spread(model)


def test_the_prompt_matters_exactly_where_the_model_says_so(model: RewardModel) -> None:
    found = scores(model, by_prompt(model))
    assert len(found) > 1
    if "prompt" in model.info.inputs:
        assert spread(found) > least_spread(model)
    else:
        assert len(set(found)) == 1


def test_a_prompt_that_is_cut_off_is_reported(model: RewardModel) -> None:
    """A tower that does not see a word at the end says so, and no other; what reads no tokens must take the prompt."""
    canary = model.canary()
    words = canary.prompt + " lighthouse" * 120
    if not isinstance(model, TowerReward) or "prompt" not in model.info.inputs:
        assert is_sound(outcome(model, with_prompt(canary, words)))
        return
    prepared, other = model.prepare(with_prompt(canary, words)), model.prepare(with_prompt(canary, words + " harbour"))
    cut_off = torch.equal(prepared.tokens, other.tokens)
    assert ("prompt_truncated" in prepared.warnings) == cut_off
    assert "prompt_truncated" not in model.prepare(canary).warnings
    (output,) = run(model, [with_prompt(canary, words)])
    assert ("prompt_truncated" in output.warnings) == cut_off


@pytest.mark.parametrize("prompt", ["", " ", "\n"])
def test_a_prompt_without_words_has_a_score_or_a_typed_error(model: RewardModel, prompt: str) -> None:
    result = outcome(model, with_prompt(model.canary(), prompt))
    assert is_sound(result)
    assert isinstance(result, Output) or "prompt" in model.info.inputs


@pytest.mark.parametrize("size", [(16, 2000), (2000, 16), (1, 1), (8192, 16), (17, 3401)])
def test_an_extreme_shape_has_a_score_or_an_error_that_blames_the_image(
    model: RewardModel, size: tuple[int, int]
) -> None:
    canary = model.canary()
    result = outcome(model, with_image(canary, canary.image(model.info.name).resize(size)))
    assert is_sound(result)
    assert not isinstance(result, ModelError)  # which a client would retry


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_an_image_of_another_mode_has_a_score_or_a_typed_error(model: RewardModel, mode: str) -> None:
    canary = model.canary()
    assert is_sound(outcome(model, with_image(canary, canary.image(model.info.name).convert(mode))))


def test_bfloat16_is_near_float32(loaded: Loaded) -> None:
    if not loaded.model.uses_device:
        pytest.skip(f"{loaded.model.info.name} does not compute on the device")
    half = load_model(loaded.model.info.name, replace(loaded.options, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    samples = by_image(loaded.model)[:BATCH]
    exact, coarse = scores(loaded.model, samples), scores(half, samples)
    assert max(abs(a - b) for a, b in zip(exact, coarse, strict=True)) < 0.5 * spread(exact)


def gradient(model: TowerReward, pixels_B3HW: Tensor, prompt: str) -> Tensor:
    """d(score)/d(pixels) along the differentiable twin of the preprocessing."""
    pixels = pixels_B3HW.clone().requires_grad_()
    image_features = model.encode_image(model.preprocess_tensor(pixels))
    text_features = model.encode_text(model.prepare_text(prompt)[0][None])
    (found,) = torch.autograd.grad(model.head(image_features, text_features).score_B.sum(), pixels)
    return found


def test_the_twin_has_a_gradient_where_the_model_is_differentiable(tower: TowerReward) -> None:
    if not tower.info.differentiable:
        pytest.skip(f"{tower.info.name} is not differentiable")
    pixels = torch.rand(1, 3, 96, 80, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    found = gradient(tower, pixels, tower.canary().prompt)
    assert found.shape == pixels.shape
    assert bool(found.isfinite().all())
    assert all(channel.abs().max() > 0 for channel in found[0])


def test_what_is_not_an_image_is_a_typed_error(model: RewardModel) -> None:
    canary = model.canary()
    if "text" not in model.info.inputs:
        with pytest.raises(UnsupportedInput, match=model.info.name):
            model.prepare(Sample(canary.prompt, Candidate(text="an answer"), canary.context, canary.metadata))
