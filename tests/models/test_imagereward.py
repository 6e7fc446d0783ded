"""ImageReward: its preprocessing, prompts, checkpoints and gradient; the reference's numbers are `make parity`'s."""

import json
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision import transforms

from models.backbones.blip import BlipConfig
from models.base import Candidate, InputError, LoadOptions, Output, Sample, WeightsError
from models.imagereward import (
    REWARD_STD,
    TEXT_LENGTHS,
    TINY,
    ImageReward,
    checkpoint_shapes,
    imagereward_preprocess,
    refuse_cut_short,
)
from models.preprocessing import OPENAI_STD
from models.weights import load_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures" / "pointwise"
IMAGES = {path.stem: Image.open(path) for path in sorted((FIXTURES / "images").glob("*.png"))}
PROMPTS = json.loads((FIXTURES / "inputs.json").read_text("utf-8"))["prompts"]
LONGEST = TEXT_LENGTHS[-1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ImageReward.random_checkpoint(tmp_path_factory.mktemp("imagereward"))
    assert options.weights is not None
    return Path(options.weights)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ImageReward:
    return loaded(checkpoint)


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> ImageReward:
    return ImageReward.load(LoadOptions(weights=str(path), dtype=dtype))


def features_of(model: ImageReward, images: list[Image.Image]) -> Tensor:
    return model.encode_image(model.normalize(torch.stack([model.prepare_image(image) for image in images])))


def outputs(model: ImageReward, prompt: str, images: list[Image.Image]) -> list[Output]:
    results = model.run([model.prepare(Sample(prompt, Candidate(image=image))) for image in images])
    found = [result for result in results if isinstance(result, Output)]
    assert len(found) == len(images), results
    return found


def scores(model: ImageReward, prompt: str) -> Tensor:
    """One score for each of the fixtures' images."""
    return torch.tensor([output.score for output in outputs(model, prompt, list(IMAGES.values()))])


# Images


REFERENCE_PREPROCESSING = transforms.Compose(
    [
        transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        lambda image: image.convert("RGB"),
        transforms.PILToTensor(),
    ]
)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I", "F"])
@pytest.mark.parametrize("name", ["portrait", "landscape", "tiny", "edge224"])
def test_images_of_every_mode_are_prepared_as_torchvision_does(name: str, mode: str) -> None:
    image = IMAGES[name].convert(mode)
    assert torch.equal(imagereward_preprocess(image), REFERENCE_PREPROCESSING(image))


@pytest.mark.parametrize("size", [(1, 150), (200, 1), (3000, 100), (3000, 224), (225, 224), (1, 1), (224, 447)])
def test_extreme_shapes_are_prepared_as_torchvision_does(size: tuple[int, int]) -> None:
    image = IMAGES["rgba"].resize(size)
    assert imagereward_preprocess(image).shape == (3, 224, 224)
    assert torch.equal(imagereward_preprocess(image), REFERENCE_PREPROCESSING(image))


def test_the_order_of_crop_and_conversion_matters_for_palettes_and_alpha() -> None:
    """Otherwise the tests above could not tell the published order from the usual one."""
    for name in ("palette", "rgba"):
        image = IMAGES[name]
        usual = REFERENCE_PREPROCESSING(image.convert("RGB")).float()
        assert (imagereward_preprocess(image).float() - usual).abs().max() > 5


def test_a_mode_without_a_conversion_is_an_input_error(model: ImageReward) -> None:
    image = IMAGES["rgba"].convert("LA").convert("La")
    with pytest.raises(InputError, match="mode La cannot become RGB"):
        model.prepare(Sample("a cat", Candidate(image=image)))


def test_the_differentiable_twin_stays_within_the_rounding_of_pil(model: ImageReward) -> None:
    for name in ("portrait", "landscape", "tiny", "square", "edge224"):
        image = IMAGES[name].convert("RGB")
        exact = model.normalize(model.prepare_image(image)[None])
        pixels = transforms.functional.pil_to_tensor(image)[None] / 255
        levels = (model.preprocess_tensor(pixels) - exact).abs() * torch.tensor(OPENAI_STD).view(3, 1, 1) * 255
        assert levels.max() < 1.1  # measured for the preprocessing as a whole in models.preprocessing: 1.06


# Prompts


@pytest.mark.parametrize(
    "prompt", [*PROMPTS.values(), "a [SEP] b", "[PAD] [PAD]", "cat " * 9, "cat " * 17, "cat " * 33]
)
def test_a_shorter_bucket_gives_the_score_of_35_tokens(model: ImageReward, prompt: str) -> None:
    features = features_of(model, [IMAGES["portrait"], IMAGES["palette"]])
    tokens, _ = model.prepare_text(prompt)
    assert len(tokens) in TEXT_LENGTHS
    padded = torch.cat([tokens, torch.zeros(LONGEST - len(tokens), dtype=torch.int64)])
    short, long = (model.head(features, rows.expand(2, -1)).score_B for rows in (tokens, padded))
    torch.testing.assert_close(short, long, atol=1e-6, rtol=0)


def test_prompts_of_all_buckets_meet_in_one_batch(model: ImageReward) -> None:
    prompts = ["a cat", "cat " * 15, "cat " * 30, ""]
    batch = [model.prepare(Sample(prompt, Candidate(image=IMAGES["square"]))) for prompt in prompts]
    assert {len(entry.tokens) for entry in batch} == set(TEXT_LENGTHS)
    together = [output.score for output in model.run(batch) if isinstance(output, Output)]
    alone = [outputs(model, prompt, [IMAGES["square"]])[0].score for prompt in prompts]
    assert together == pytest.approx(alone, abs=2e-6)
    assert min(abs(a - b) for a, b in combinations(alone, 2)) > 1e-3


def test_a_truncated_prompt_warns_and_what_was_cut_off_does_not_count(model: ImageReward) -> None:
    image = [IMAGES["square"]]
    (cut,), (fits,) = outputs(model, "cat " * 33 + "dog", image), outputs(model, "cat " * 33, image)
    assert cut.warnings == ("prompt_truncated",)
    assert fits.warnings == ()
    assert cut.score == fits.score
    assert outputs(model, "cat " * 32 + "dog", image)[0].score != fits.score


def test_an_empty_prompt_has_a_score_of_its_own(model: ImageReward) -> None:
    (empty,), (cat,) = outputs(model, "", [IMAGES["tiny"]]), outputs(model, "a cat", [IMAGES["tiny"]])
    assert math.isfinite(empty.score)
    assert empty.warnings == ()
    assert abs(empty.score - cat.score) > 1e-3


# Checkpoints


@pytest.mark.parametrize(
    ("manifest", "config"), [("full", BlipConfig()), ("small", BlipConfig(vision_layers=2, text_layers=2))]
)
def test_random_checkpoints_have_the_published_names_and_shapes(manifest: str, config: BlipConfig) -> None:
    entries = json.loads((FIXTURES / "manifests" / f"imagereward_{manifest}.json").read_text())["entries"]
    assert checkpoint_shapes(config) == {entry["name"]: entry["shape"] for entry in entries}


def test_the_tiny_checkpoint_is_small_and_complete(checkpoint: Path) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in load_checkpoint(checkpoint).items()}
    assert shapes == checkpoint_shapes(TINY)
    assert checkpoint.stat().st_size < 12e6


def test_every_used_tensor_moves_the_score(model: ImageReward) -> None:
    """Square matrices are transposed, others shifted by one element. Keys' biases cancel in the softmax."""
    pixels = torch.stack([model.normalize(model.prepare_image(IMAGES[name])) for name in ("portrait", "square")])
    tokens = model.prepare_text(PROMPTS["plain"])[0].expand(2, -1)

    def score() -> Tensor:
        return model.head(model.encode_image(pixels), tokens).score_B

    before = score()
    changes = {}
    for name, tensor in model.network.state_dict().items():
        kept = tensor.clone()
        square = kept.ndim == 2 and kept.shape[0] == kept.shape[1]
        moved = kept.T if square else kept.flatten().roll(1).view_as(kept)
        tensor.copy_(kept + 0.1 if kept.numel() == 1 else moved)
        changes[name] = float((score() - before).abs().max())
        tensor.copy_(kept)
    assert torch.equal(score(), before)
    keys = {name: change for name, change in changes.items() if name.endswith(".key.bias")}
    assert len(keys) == 2 * TINY.text_layers
    assert max(keys.values()) < 1e-5
    assert min(change for name, change in changes.items() if name not in keys) > 2e-4


def rewritten(checkpoint: Path, folder: Path, changes: dict[str, Tensor | None]) -> Path:
    """A copy of the checkpoint with tensors replaced, added or (None) left out."""
    tensors = {**load_checkpoint(checkpoint), **changes}
    path = folder / "changed.pt"
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


def test_tensors_that_no_score_depends_on_may_be_missing(checkpoint: Path, model: ImageReward, tmp_path: Path) -> None:
    unused = [name for name in checkpoint_shapes(TINY) if "_proj." in name or name.endswith("position_ids")]
    assert len(unused) == 5
    without = loaded(rewritten(checkpoint, tmp_path, dict.fromkeys(unused)))
    assert without.weights_hash == model.weights_hash
    assert torch.equal(scores(without, "a cat"), scores(model, "a cat"))


def test_safetensors_and_half_precision_files_load_too(checkpoint: Path, model: ImageReward, tmp_path: Path) -> None:
    tensors = load_checkpoint(checkpoint)
    save_file(tensors, tmp_path / "w.safetensors")
    assert loaded(tmp_path / "w.safetensors").weights_hash == model.weights_hash
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "half.safetensors")
    half = loaded(tmp_path / "half.safetensors")
    assert half.weights_hash != model.weights_hash
    assert 0 < (scores(half, "a cat") - scores(model, "a cat")).abs().max() < 0.01


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blip.visual_encoder.blocks.0.attn.qkv.bias", None, r"not those of imagereward: 1 missing \(blip\.visual"),
        ("mlp.layers.7.weight", None, r"1 missing \(mlp\.layers\.7\.weight\)"),
        ("blip.text_encoder.pooler.dense.weight", torch.zeros(64, 64), r"1 unknown \(blip\.text_encoder\.pooler"),
        ("mlp.layers.0.weight", torch.zeros(64, 1024), r"1 misshapen \(mlp\.layers\.0\.weight \[64, 1024\]"),
        ("blip.visual_encoder.cls_token", torch.zeros(1, 1, 64), r"1 misshapen \(blip\.visual_encoder\.cls_token"),
        ("blip.text_encoder.embeddings.word_embeddings.weight", None, r"word_embeddings\.weight is missing"),
        ("blip.text_encoder.embeddings.word_embeddings.weight", torch.zeros(30_522, 64), "30522 tokens at 512 places"),
        ("blip.text_encoder.embeddings.position_embeddings.weight", torch.zeros(34, 64), "30524 tokens at 34 places"),
    ],
)
def test_a_checkpoint_of_another_structure_is_refused(
    checkpoint: Path, tmp_path: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        loaded(rewritten(checkpoint, tmp_path, {name: tensor}))


@pytest.mark.parametrize("lost", [{"vision_layers": 23}, {"text_layers": 11}])
def test_a_file_that_lacks_the_last_layers_of_a_tower_is_refused(lost: dict[str, int]) -> None:
    """Of the published widths: at its size such a file is 1.8 GB, so only its sizes are looked at here."""
    with pytest.raises(WeightsError, match="cut short"):
        refuse_cut_short(BlipConfig(**lost))
    for whole in (BlipConfig(), TINY, BlipConfig(vision_layers=2, text_layers=2)):
        refuse_cut_short(whole)


def test_missing_weights_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"models\.imagereward\.weights.*nothing\.pt"):
        loaded(tmp_path / "nothing.pt")


# Scores


def test_scores_are_standardised_and_calibrated_on_the_raw_output(model: ImageReward) -> None:
    features = features_of(model, [IMAGES["portrait"], IMAGES["tiny"]])
    tokens = model.prepare_text("a cat")[0].expand(2, -1)
    raw = model.raw_score(model.text_cls(features, model.encode_text(tokens)))
    score = model.head(features, tokens).score_B
    torch.testing.assert_close(score, (raw - 0.16717362830052426) / 1.0333394966054072)
    first, second = (score / model.info.calibration.temperature).tolist()
    assert first - second == pytest.approx(float(raw[0] - raw[1]), rel=1e-5)
    assert model.info.calibration.temperature == pytest.approx(1 / REWARD_STD)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from(sorted(IMAGES)), min_size=1, max_size=5), prompt=st.sampled_from(list(PROMPTS)))
def test_neighbours_move_a_score_by_rounding_only(model: ImageReward, names: list[str], prompt: str) -> None:
    together = outputs(model, PROMPTS[prompt], [IMAGES[name] for name in names])
    for name, output in zip(names, together, strict=True):
        alone = outputs(model, PROMPTS[prompt], [IMAGES[name]])[0]
        assert output.score == pytest.approx(alone.score, abs=3e-6)


def test_bfloat16_keeps_the_order_of_images_beyond_its_noise(checkpoint: Path, model: ImageReward) -> None:
    cast = loaded(checkpoint, torch.bfloat16)
    expected = torch.stack([scores(model, prompt) for prompt in PROMPTS.values()])
    found = torch.stack([scores(cast, prompt) for prompt in PROMPTS.values()])
    noise = (found - expected).square().mean().sqrt()
    assert 0 < noise < 0.02  # 0.006 here; the scores' standard deviation is 0.6
    pairs = list(combinations(range(len(IMAGES)), 2))
    gaps, found_gaps = (torch.stack([s[:, i] - s[:, j] for i, j in pairs]) for s in (expected, found))
    clear = gaps.abs() > 4 * noise
    assert clear.float().mean() > 0.5
    assert torch.equal(gaps.sign()[clear], found_gaps.sign()[clear])


def test_bfloat16_towers_end_in_a_float32_head(checkpoint: Path) -> None:
    cast = loaded(checkpoint, torch.bfloat16)
    features = features_of(cast, list(IMAGES.values()))
    assert features.dtype == torch.bfloat16
    score = cast.head(features, cast.prepare_text("a cat")[0].expand(len(IMAGES), -1)).score_B
    assert score.dtype == torch.float32
    assert not torch.equal(score, score.bfloat16().float())


# Gradients


def test_the_gradient_is_that_of_finite_differences(checkpoint: Path) -> None:
    """In float64 from the tower's input to the score, along random directions."""
    exact = loaded(checkpoint, torch.float64)
    generator = torch.Generator().manual_seed(0)
    pixels = exact.normalize(torch.stack([exact.prepare_image(IMAGES[name]) for name in ("portrait", "tiny")]))
    tokens = exact.prepare_text(PROMPTS["quoted"])[0].expand(2, -1)

    def score(x: Tensor) -> Tensor:
        return exact.head(exact.encode_image(x), tokens).score_B

    leaf = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf).sum(), leaf)
    assert gradient.dtype == torch.float64
    for _ in range(3):
        direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        step = 1e-5 * direction
        difference = (score(pixels + step) - score(pixels - step)) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(dim=(1, 2, 3)), difference, rtol=1e-6, atol=1e-9)


def test_the_gradient_reaches_the_images_own_pixels(model: ImageReward) -> None:
    """Through the differentiable twin, in float32: a small step along the gradient raises the score by its norm."""
    image = transforms.functional.pil_to_tensor(IMAGES["landscape"])[None] / 255
    pixels = (0.2 + 0.6 * image).requires_grad_()
    tokens = model.prepare_text("a cat")[0][None]

    def score(x: Tensor) -> Tensor:
        return model.head(model.encode_image(model.preprocess_tensor(x)), tokens).score_B

    (gradient,) = torch.autograd.grad(score(pixels).sum(), pixels)
    assert gradient.shape == pixels.shape
    norm = float(gradient.norm())
    assert norm > 1e-3
    with torch.no_grad():
        step = 0.05 * gradient / norm
        rise = float(score(pixels + step) - score(pixels - step)) / 0.1
    assert rise == pytest.approx(norm, rel=0.02)
    assert gradient[..., 0].abs().max() == 0  # the crop leaves these columns out
