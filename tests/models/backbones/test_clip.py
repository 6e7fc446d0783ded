"""The towers are open_clip's, at any token length; the tokenizer gives its ids in the smallest bucket."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.backbones.clip import (
    CONTEXT_LENGTH,
    TEXT_LENGTHS,
    VIT_H_14,
    VIT_L_14,
    ClipArchitecture,
    ClipTowers,
    empty_clip,
    size_of,
    tokenize,
)
from models.base import WeightsError

INPUTS = Path(__file__).parents[2] / "fixtures" / "pointwise" / "inputs.json"
PROMPTS = list(json.loads(INPUTS.read_text("utf-8"))["prompts"].values())
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 4},
}
END = 49407


@pytest.fixture(scope="module")
def towers() -> ClipTowers:
    return ClipTowers.from_config(SMALL, seed=1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_short_text_gives_open_clips_features_of_the_full_length(towers: ClipTowers, prompt: str) -> None:
    tokens, _ = tokenize(prompt)
    expected = towers.clip.encode_text(open_clip.tokenize([prompt]))
    torch.testing.assert_close(towers.encode_text(tokens[None]), expected, atol=1e-6, rtol=0)


def test_every_length_gives_the_same_features(towers: ClipTowers) -> None:
    features = [towers.encode_text(tokenize("two cats", (length,))[0][None]) for length in (4, 16, 32, 77)]
    for other in features[1:]:
        torch.testing.assert_close(other, features[0], atol=1e-6, rtol=0)
    different = towers.encode_text(tokenize("two dogs", (16,))[0][None])
    assert (different - features[0]).abs().max() > 1e-3


def test_image_tower_is_open_clips(towers: ClipTowers) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(towers.encode_image(pixels), towers.clip.encode_image(pixels))
    assert towers.encode_image(pixels).shape == (2, 32)


def test_too_many_tokens_are_refused(towers: ClipTowers) -> None:
    with pytest.raises(ValueError, match="78 tokens do not fit into a context of 77"):
        towers.encode_text(torch.zeros(1, 78, dtype=torch.int64))


def test_seed_makes_the_weights_and_leaves_the_callers_random_numbers() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = ClipTowers.from_config(SMALL, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    two, other = (ClipTowers.from_config(SMALL, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_weights_are_frozen_and_cast_except_the_scale(towers: ClipTowers) -> None:
    tensors = towers.clip.state_dict()
    cast = ClipTowers.from_config(SMALL, tensors=tensors, dtype=torch.bfloat16)
    assert not cast.training
    assert not any(parameter.requires_grad for parameter in cast.parameters())
    dtypes = {name: parameter.dtype for name, parameter in cast.clip.named_parameters()}
    assert dtypes.pop("logit_scale") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert torch.equal(cast.logit_scale, towers.logit_scale)

    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert cast.encode_image(pixels).dtype == torch.bfloat16
    cosine = torch.cosine_similarity(cast.encode_image(pixels).float(), towers.encode_image(pixels))
    assert cosine.min() > 0.999


def test_gradients_reach_the_pixels(towers: ClipTowers) -> None:
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    towers.encode_image(pixels).sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_of_another_model_are_refused(towers: ClipTowers, change: str) -> None:
    tensors = dict(towers.clip.state_dict())
    if change == "missing":
        del tensors["ln_final.weight"]
    elif change == "unknown":
        tensors["ln_final.gain"] = torch.ones(1)
    else:
        tensors["ln_final.weight"] = torch.ones(3)
    with pytest.raises(WeightsError, match="ln_final"):
        ClipTowers.from_config(SMALL, tensors=tensors)


def test_weights_are_copied_and_score_bit_for_bit_like_their_origin(towers: ClipTowers) -> None:
    tensors = {name: tensor.clone() for name, tensor in towers.clip.state_dict().items()}
    loaded = ClipTowers.from_config(SMALL, tensors=tensors)
    for tensor in tensors.values():
        tensor.zero_()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = tokenize("two cats")[0][None]
    assert torch.equal(loaded.encode_image(pixels), towers.encode_image(pixels))
    assert torch.equal(loaded.encode_text(tokens), towers.encode_text(tokens))
    assert loaded.image_size == 32


def test_double_precision_towers_compute_in_double(towers: ClipTowers) -> None:
    double = ClipTowers.from_config(SMALL, tensors=towers.clip.state_dict(), dtype=torch.float64)
    tokens = tokenize("two cats")[0][None]
    assert double.encode_text(tokens).dtype == torch.float64
    torch.testing.assert_close(double.encode_text(tokens).float(), towers.encode_text(tokens), atol=1e-5, rtol=0)


def test_sizes_are_read_from_the_shapes(towers: ClipTowers) -> None:
    size = size_of(towers.clip.state_dict(), "test")
    architecture = ClipArchitecture("test", size, vision_head_width=32, text_head_width=16)
    assert architecture.config(size) == SMALL | {"quick_gelu": False}


@pytest.mark.parametrize(
    ("architecture", "parameters"), [(VIT_L_14, 427_616_513), (VIT_H_14, 986_109_441)], ids=["L", "H"]
)
def test_published_sizes_have_the_published_number_of_parameters(
    architecture: ClipArchitecture, parameters: int
) -> None:
    clip = empty_clip(architecture.config(architecture.published))
    assert sum(parameter.numel() for parameter in clip.parameters()) == parameters


@pytest.mark.parametrize("name", ["visual.conv1.weight", "text_projection", "token_embedding.weight"])
def test_a_tensor_that_tells_a_size_is_asked_for_by_name(towers: ClipTowers, name: str) -> None:
    tensors = dict(towers.clip.state_dict())
    wrong = tensors.pop(name)
    with pytest.raises(WeightsError, match=f"not those of test: {name} is missing"):
        size_of(tensors, "test")
    with pytest.raises(WeightsError, match=f"{name} is of shape"):
        size_of(tensors | {name: wrong[None]}, "test")


def test_a_tower_without_layers_is_no_clip(towers: ClipTowers) -> None:
    tensors = {name: tensor for name, tensor in towers.clip.state_dict().items() if not name.startswith("transformer")}
    with pytest.raises(WeightsError, match="no layers"):
        size_of(tensors, "test")


def test_text_towers_that_cannot_be_shortened_are_refused() -> None:
    for text in ({"pool_type": "last"}, {"no_causal_mask": True}):
        with pytest.raises(ValueError, match="text tower"):
            ClipTowers.from_config(SMALL | {"text_cfg": SMALL["text_cfg"] | text}, seed=0)


@settings(deadline=None)
@given(st.one_of(st.sampled_from(PROMPTS), st.text(max_size=200)))
def test_ids_are_open_clips_in_the_smallest_bucket(prompt: str) -> None:
    tokens, truncated = tokenize(prompt)
    full = open_clip.tokenize([prompt])[0]
    used = int((full != 0).nonzero().max()) + 1
    assert len(tokens) == min(length for length in TEXT_LENGTHS if length >= used)
    assert torch.equal(tokens, full[: len(tokens)])
    assert truncated == (len(open_clip.tokenizer._tokenizer.encode(prompt)) > CONTEXT_LENGTH - 2)


@pytest.mark.parametrize("words", [75, 76, 5000])
def test_truncation_keeps_the_end_token_last(words: int) -> None:
    tokens, truncated = tokenize("cat " * words)
    assert len(tokens) == CONTEXT_LENGTH
    assert tokens[-1] == END
    assert truncated == (words > 75)


@pytest.mark.parametrize(("words", "length"), [(0, 16), (14, 16), (15, 32), (30, 32), (31, 77)])
def test_bucket_holds_start_and_end(words: int, length: int) -> None:
    tokens, truncated = tokenize("cat " * words)
    assert len(tokens) == length
    assert tokens[words + 1] == END
    assert not truncated
