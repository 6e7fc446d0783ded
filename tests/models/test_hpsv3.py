"""HPSv3: parity on the reduced checkpoint, its product path against plain arrays, loading, errors and gradients."""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from models.backbones.qwen2_vl_image import patchify, resize_tensor
from models.backbones.qwen2_vl_tokenizer import IMAGE_TOKEN, REWARD_TOKEN, train_tokenizer
from models.base import Candidate, InputError, LoadOptions, Output, Sample, WeightsError
from models.hpsv3 import PIXELS, TEXT_LENGTHS, Hpsv3, Hpsv3Network, chat_text, user_text
from models.parity_recipe import build, digest, write_checkpoint
from models.preprocessing import normalize, to_uint8_tensor

FIXTURES = Path(__file__).parents[1] / "fixtures" / "pointwise"
ORACLE: dict[str, Any] = json.loads((FIXTURES / "hpsv3_small.json").read_text("utf-8"))
PROMPTS: dict[str, str] = json.loads((FIXTURES / "inputs.json").read_text("utf-8"))["prompts"]
IMAGES = list(ORACLE["preprocessing_full"])
CASES = {case["name"]: case for case in ORACLE["cases"]}


pytestmark = pytest.mark.usefixtures("one_thread")


def image(name: str) -> Image.Image:
    return Image.open(FIXTURES / "images" / f"{name}.png")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# The network, against the reference's numbers


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Hpsv3Network:
    """The reduced checkpoint of the fixture, written as published and read by the product's own loading."""
    manifest = json.loads((FIXTURES / ORACLE["manifest"]).read_text("utf-8"))
    tensors = build(manifest, ORACLE["fill_seed"])
    assert digest(tensors.items()) == ORACLE["weights_sha256"]
    file = write_checkpoint(tensors, tmp_path_factory.mktemp("hpsv3") / "HPSv3.safetensors")
    found, _ = Hpsv3Network.load(LoadOptions(weights=str(file), options={"config": manifest["config"]}))
    file.unlink()
    return found


def arrays(case: dict[str, Any]) -> dict[str, Tensor]:
    with np.load(FIXTURES / ORACLE["npz"]) as stored:
        return {name: torch.from_numpy(stored[key]) for name, key in case["arrays"].items()}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_reference_s_and_not_those_of_3d_positions(network: Hpsv3Network, name: str) -> None:
    case = CASES[name]
    found = network.logits(**arrays(case))
    torch.testing.assert_close(found, torch.tensor(case["logits_fp32"]), atol=1e-5, rtol=0)
    wrong = torch.tensor(case["diagnostic_not_reference_logits_with_3d_mrope"])
    assert float((found - wrong).abs().amax(-1).min()) > 1e-2


def test_a_row_alone_has_the_reference_s_logits_too(network: Hpsv3Network) -> None:
    case = CASES["batch3_right_padded"]
    inputs = arrays(case)
    patches = torch.split(inputs["pixel_values"], inputs["image_grid_thw"].prod(-1).tolist())
    for row, length in enumerate(case["lengths"]):
        found = network.logits(
            inputs["input_ids"][row : row + 1, :length], patches[row], inputs["image_grid_thw"][row : row + 1]
        )
        torch.testing.assert_close(found[0], torch.tensor(case["rows_alone_logits_fp32"][row]), atol=1e-5, rtol=0)


def test_arrays_that_are_no_turns_are_refused(network: Hpsv3Network) -> None:
    inputs = arrays(CASES["single_tiny"])
    left = torch.ones_like(inputs["input_ids"])
    left[0, 0] = 0
    with pytest.raises(ValueError, match="right"):
        network.logits(**{**inputs, "attention_mask": left})
    ids = inputs["input_ids"].clone()
    ids[0, 0] = network.reward_token_id
    with pytest.raises(ValueError, match="one reward token"):
        network.logits(**{**inputs, "input_ids": ids})


# Preparation, against the reference's hashes


@pytest.mark.parametrize("key", ORACLE["prompt_text"])
def test_the_text_is_the_reference_s(key: str) -> None:
    expected = ORACLE["prompt_text"][key]
    text = user_text(PROMPTS[key])
    assert (len(text), sha256(text)) == (expected["user_text_chars"], expected["user_text_sha256"])
    assert sha256(chat_text(PROMPTS[key])) == expected["assumed_chat_text_sha256"]


@dataclass(frozen=True)
class Tiny:
    """The random checkpoint, what loads it, and the model."""

    folder: Path
    options: LoadOptions
    model: Hpsv3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    options = Hpsv3.random_checkpoint(folder)
    return Tiny(folder, options, Hpsv3.load(options))


@pytest.mark.parametrize("key", IMAGES)
def test_pixels_are_the_reference_s(tiny: Tiny, key: str) -> None:
    expected = ORACLE["preprocessing_full"][key]
    pixels = tiny.model.prepare_image(image(key))
    assert list(pixels.shape[:0:-1]) == expected["resized_wh"]
    digest_HWC = hashlib.sha256(pixels.permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest()
    assert digest_HWC == expected["resized_rgb_sha256"]
    patches = patchify(tiny.model.normalize(pixels[None]))[0]
    record = expected["pixel_values"]
    assert list(patches.shape) == record["shape"]
    assert patches.flatten()[:8].tolist() == pytest.approx(record["first8"], abs=1e-6)
    places, values = zip(*record["probe"], strict=True)
    assert patches.flatten()[list(places)].tolist() == pytest.approx(values, abs=1e-6)
    assert [float(patches.mean()), float(patches.std(correction=0))] == pytest.approx(
        [record["mean"], record["std"]], abs=1e-5
    )
    tokens = tiny.model.encode_image(tiny.model.normalize(pixels[None]))
    assert tokens.shape[1] == expected["n_image_pad_tokens"]


@pytest.mark.parametrize("key", IMAGES)
def test_the_twin_of_the_preprocessing_is_within_the_stated_difference(tiny: Tiny, key: str) -> None:
    exact = tiny.model.prepare_image(image(key)).float()
    floats = to_uint8_tensor(image(key).convert("RGB"))[None].float() / 255
    difference = (resize_tensor(floats, PIXELS, PIXELS)[0] * 255 - exact).abs()
    assert difference.max() <= 1.15
    assert difference.mean() <= 0.31
    assert torch.equal(tiny.model.preprocess_tensor(floats), normalize(resize_tensor(floats, PIXELS, PIXELS)))


# The product path


def outputs(model: Hpsv3, samples: list[tuple[Image.Image, str]]) -> list[Output]:
    results = model.run([model.prepare(Sample(prompt, Candidate(image=picture))) for picture, prompt in samples])
    found = [result for result in results if isinstance(result, Output)]
    assert len(found) == len(samples), results
    return found


def processor_arrays(model: Hpsv3, picture: Image.Image, prompt: str) -> dict[str, Tensor]:
    """The whole turn as a processor gives it: every image token written out, nothing cut, nothing padded."""
    pixels = model.normalize(model.prepare_image(picture)[None])
    rows, columns = pixels.shape[-2] // 14, pixels.shape[-1] // 14
    text = chat_text(prompt).replace(IMAGE_TOKEN, IMAGE_TOKEN * (rows * columns // 4))
    ids = model.tokenizer.encode_all(text)
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": patchify(pixels)[0],
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


def test_a_score_is_that_of_the_whole_turn(tiny: Tiny) -> None:
    """Neither the cut after the reward token, nor padding, nor image tokens put in afterwards change the numbers."""
    samples = [
        (image(key), PROMPTS[prompt])
        for key in ("portrait", "square", "tiny")
        for prompt in ("long", "unicode", "empty")
    ]
    for (picture, prompt), found in zip(samples, outputs(tiny.model, samples), strict=True):
        inputs = processor_arrays(tiny.model, picture, prompt)
        prepared = tiny.model.prepare_text(prompt)[0]
        assert int((inputs["input_ids"] == tiny.model.tokenizer.reward_id).sum()) == 1
        assert int(inputs["input_ids"][0, -1]) != tiny.model.tokenizer.reward_id
        assert len(prepared) in TEXT_LENGTHS
        mean, raw = tiny.model.network.logits(**inputs)[0].tolist()
        assert found.score == pytest.approx(mean, abs=1e-5)
        assert found.outputs["uncertainty"] == pytest.approx(float(np.exp(raw)), rel=1e-5)


def test_tokens_after_the_reward_token_do_not_matter(tiny: Tiny) -> None:
    model = tiny.model
    entry = model.prepare(model.canary())
    with torch.inference_mode():
        features = model.encode_image(model.normalize(entry.pixels[None]))
        before = model.head(features, entry.tokens[None])
        other = entry.tokens.clone()
        place = int((other == model.tokenizer.reward_id).int().argmax())
        assert place + 1 < len(other)
        other[place + 1 :] = torch.arange(len(other) - place - 1) % model.tokenizer.image_id
        after = model.head(features, torch.cat([other, other])[None])
        other[place - 1] += 1
        changed = model.head(features, other[None])
    torch.testing.assert_close(after.score_B, before.score_B, atol=1e-5, rtol=0)
    assert abs(float(changed.score_B - before.score_B)) > 1e-3


def test_prompts_of_a_group_are_tokenized_once(tiny: Tiny) -> None:
    first, second = (tiny.model.prepare_text(PROMPTS["quoted"])[0] for _ in range(2))
    assert first is second


def test_a_long_prompt_is_read_to_its_end(tiny: Tiny) -> None:
    """The reference truncates nothing; only the last word differs, after far more than 77 tokens."""
    prompt = PROMPTS["long"] + " " + PROMPTS["long"]
    scores = [
        found.score for found in outputs(tiny.model, [(image("square"), f"{prompt} {w}") for w in ("red", "blue")])
    ]
    assert abs(scores[0] - scores[1]) > 1e-5
    assert tiny.model.prepare_text(prompt)[1] == ()


def test_a_prompt_that_would_hold_up_everything_is_a_typed_error_unless_it_is_allowed(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="2048") as error:
        tiny.model.prepare_text("x " * 4000)
    assert error.value.code == "prompt_too_long"
    given = {**tiny.options.options, "max_tokens": 16384}
    patient = Hpsv3.load(replace(tiny.options, options=given))
    assert len(patient.prepare_text("x " * 4000)[0]) in TEXT_LENGTHS
    with pytest.raises(InputError, match="16384"):
        patient.prepare_text("x " * 20000)
    for wrong in (0, 20000, "many"):
        with pytest.raises(ValueError, match="max_tokens"):
            Hpsv3.load(replace(tiny.options, options={**given, "max_tokens": wrong}))


@pytest.mark.parametrize("token", [IMAGE_TOKEN, REWARD_TOKEN])
def test_a_prompt_cannot_bring_its_own_image_or_reward_token(tiny: Tiny, token: str) -> None:
    with pytest.raises(InputError) as error:
        tiny.model.prepare_text(f"a cat {token}")
    assert error.value.code == "reserved_token"


def test_an_extreme_aspect_ratio_is_a_typed_error(tiny: Tiny) -> None:
    with pytest.raises(InputError) as error:
        tiny.model.prepare_image(Image.new("RGB", (2010, 10)))
    assert error.value.code == "aspect_ratio"
    assert tiny.model.prepare_image(Image.new("RGB", (2000, 10))).shape == (3, 56, 6356)


def test_bfloat16_keeps_the_order_beyond_four_times_its_noise_and_the_head_in_float32(tiny: Tiny) -> None:
    """The noise is the standard deviation of the differences, so an order beyond it is not true by definition."""
    coarse = Hpsv3.load(replace(tiny.options, dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in coarse.network.rm_head.parameters()} == {torch.float32}
    assert coarse.network.backbone.dtype == torch.bfloat16
    samples = [(image(key), prompt) for prompt in (PROMPTS["plain"], PROMPTS["quoted"]) for key in IMAGES]
    exact, rounded = (
        torch.tensor([found.score for found in outputs(model, samples)]).view(2, -1) for model in (tiny.model, coarse)
    )
    noise = float((rounded - exact).std())
    assert 0 < noise < 0.05
    far = [
        (row, i, j)
        for row in range(2)
        for i, j in combinations(range(len(IMAGES)), 2)
        if abs(exact[row, i] - exact[row, j]) > 4 * noise
    ]
    assert len(far) > 20
    assert all((exact[row, i] > exact[row, j]) == (rounded[row, i] > rounded[row, j]) for row, i, j in far)


def test_the_gradient_agrees_with_finite_differences_in_float64(tiny: Tiny) -> None:
    """From the pixels of the picture through resize, tower, language model and head."""
    model = Hpsv3.load(replace(tiny.options, dtype=torch.float64))
    model.network.rm_head.double()
    generator = torch.Generator().manual_seed(0)
    pixels = 0.2 + 0.6 * torch.rand(1, 3, 40, 60, generator=generator, dtype=torch.float64)
    direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
    ids = model.prepare_text(PROMPTS["plain"])[0][None]

    def score(at: Tensor) -> Tensor:
        return model.head(model.encode_image(model.preprocess_tensor(at)), ids).score_B.sum()

    leaf = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf), leaf)
    with_exact_norms(model.network.backbone)
    step = 1e-5
    difference = (score(pixels + step * direction) - score(pixels - step * direction)) / (2 * step)
    assert abs(float(difference)) > 1e-2
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-5)


def with_exact_norms(module: nn.Module) -> None:
    """The library's RMSNorm computes in float32 in any dtype, too coarse for differences; torch's own in float64."""
    for name, child in module.named_children():
        if isinstance(child, Qwen2VLRMSNorm):
            exact = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
            exact.weight = child.weight
            setattr(module, name, exact)
        else:
            with_exact_norms(child)


# Loading


def scores_of(model: Hpsv3) -> list[float]:
    return [found.score for found in outputs(model, [(image("square"), PROMPTS["plain"])])]


def test_names_of_transformers_5_give_the_same_model(tiny: Tiny, tmp_path: Path) -> None:
    prefixes = {"visual.": "model.visual.", "model.": "model.language_model."}
    tensors = load_file(tiny.folder / "HPSv3.safetensors")
    renamed = {
        next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name): tensor
        for name, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "new.safetensors")
    found = Hpsv3.load(replace(tiny.options, weights=str(tmp_path / "new.safetensors")))
    assert found.weights_hash == tiny.model.weights_hash
    assert scores_of(found) == scores_of(tiny.model)


@pytest.mark.parametrize("nested", [None, "model"])
def test_a_torch_file_is_read_flat_or_nested(tiny: Tiny, tmp_path: Path, nested: str | None) -> None:
    tensors = load_file(tiny.folder / "HPSv3.safetensors")
    file = write_checkpoint(tensors, tmp_path / "HPSv3.pth", nested=nested)
    found = Hpsv3.load(replace(tiny.options, weights=str(file)))
    assert found.weights_hash == tiny.model.weights_hash
    assert scores_of(found) == scores_of(tiny.model)


def test_a_file_that_is_replaced_while_it_is_used_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    file = Path(shutil.copy(str(tiny.options.weights), tmp_path))
    model = Hpsv3.load(replace(tiny.options, weights=str(file)))
    before = model.run([model.prepare(model.canary())])
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 3)
        content.write(bytes(file.stat().st_size // 2))
    assert model.run([model.prepare(model.canary())]) == before


def test_lm_head_is_not_needed_and_every_other_tensor_is(tiny: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny.folder / "HPSv3.safetensors")
    file = tmp_path / "HPSv3.safetensors"
    options = replace(tiny.options, weights=str(file))
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, file)
    assert Hpsv3.load(options).weights_hash == tiny.model.weights_hash
    for name in ("rm_head.3.bias", "model.norm.weight", "visual.merger.mlp.0.weight", "model.embed_tokens.weight"):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
        with pytest.raises(WeightsError, match=name):
            Hpsv3.load(options)
    save_file({**tensors, "rm_head.5.weight": torch.zeros(3, 16)}, file)
    with pytest.raises(WeightsError, match=r"rm_head\.5\.weight"):
        Hpsv3.load(options)


def test_the_hash_names_tensors_tokenizer_and_configuration(tiny: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny.folder / "HPSv3.safetensors")
    tensors["rm_head.5.bias"][0] += 1e-3
    save_file(tensors, tmp_path / "other.safetensors")
    train_tokenizer(["other words"], 300).save(str(tmp_path / "tokenizer.json"))
    config = json.loads(json.dumps(tiny.options.options["config"]))
    config["text"]["rope_theta"] = 2e6
    others = [
        replace(tiny.options, weights=str(tmp_path / "other.safetensors")),
        replace(tiny.options, options={**tiny.options.options, "tokenizer": str(tmp_path)}),
        replace(tiny.options, options={**tiny.options.options, "config": config}),
    ]
    hashes = {Hpsv3.load(options).weights_hash for options in others}
    assert len(hashes | {tiny.model.weights_hash}) == 4


def test_a_tokenizer_with_more_tokens_than_the_weights_have_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    words = [chat_text(prompt) for prompt in PROMPTS.values()]
    train_tokenizer(words, 5000).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(WeightsError, match="does not belong"):
        Hpsv3.load(replace(tiny.options, options={**tiny.options.options, "tokenizer": str(tmp_path)}))


def test_the_full_checkpoint_has_the_published_names_and_shapes() -> None:
    """Without writing its 17 GB: the modules of the default configuration, on the meta device."""
    manifest = json.loads((FIXTURES / "manifests" / "hpsv3_full.json").read_text("utf-8"))
    expected = {entry["name"]: entry["shape"] for entry in manifest["entries"]}
    rows, hidden = expected.pop("lm_head.weight")
    assert rows == expected["model.embed_tokens.weight"][0]
    found = Hpsv3Network(None, rows).published_state()
    assert {name: list(tensor.shape) for name, tensor in found.items()} == expected
    assert sum(tensor.numel() for tensor in found.values()) + rows * hidden == manifest["n_params"]
