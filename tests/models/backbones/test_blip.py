"""BLIP's towers compute what timm's ViT and the BLIP text model of transformers compute from the same tensors."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.backbones.blip import BlipConfig, BlipEncoder, attend
from models.base import WeightsError

SMALL = BlipConfig(
    image_size=64,
    vision_width=128,
    vision_layers=3,
    vision_hidden=256,
    text_width=128,
    text_layers=2,
    text_hidden=192,
    vocabulary=300,
    positions=40,
)
IDS = torch.tensor([[101, 5, 6, 7, 102, 0, 0, 0], [101, 0, 102, 9, 8, 0, 102, 0], [101, 5, 6, 7, 8, 9, 10, 102]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0], [1] * 8])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def blip() -> BlipEncoder:
    """Weights far from an initialisation's, so that every part moves the result; embeddings so small that eps does."""
    made = BlipEncoder(SMALL).eval().requires_grad_(False)
    for seed, (name, parameter) in enumerate(made.named_parameters()):
        embeds = "embed" in name.rsplit(".", 2)[-2] or name.endswith(("_token", "pos_embed", "patch_embed.proj.weight"))
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_((1.5e-4 if embeds else 0.15) * random(*parameter.shape, seed=seed) + is_norm)
    return made


@pytest.fixture(scope="module")
def vision(blip: BlipEncoder) -> Tensor:
    return blip.encode_image(random(len(IDS), 3, 64, 64))


def test_vision_tokens_are_those_of_timms_vit(blip: BlipEncoder, vision: Tensor) -> None:
    vit = VisionTransformer(
        img_size=64,
        patch_size=16,
        embed_dim=128,
        depth=3,
        num_heads=2,
        mlp_ratio=2,
        num_classes=0,
        global_pool="",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()
    vit.load_state_dict(blip.visual_encoder.state_dict())
    assert vision.shape == (3, 17, 128)
    assert vision.std() > 0.1
    torch.testing.assert_close(vision, vit(random(len(IDS), 3, 64, 64)), atol=1e-5, rtol=0)


def test_text_states_are_those_of_the_model_in_transformers(blip: BlipEncoder, vision: Tensor) -> None:
    from transformers import BlipTextConfig, BlipTextModel

    config = BlipTextConfig(
        vocab_size=300,
        hidden_size=128,
        encoder_hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        layer_norm_eps=1e-12,
        is_decoder=True,  # gives the layers their cross attention; the call below turns the causal mask off
        bos_token_id=1,
        eos_token_id=2,
        sep_token_id=102,
    )
    reference = BlipTextModel(config, add_pooling_layer=False).eval()
    reference.load_state_dict(blip.text_encoder.state_dict())
    expected = reference(IDS, MASK, encoder_hidden_states=vision, is_decoder=False).last_hidden_state
    states = blip.encode_text(IDS, vision)
    assert states.shape == (3, 8, 128)
    torch.testing.assert_close(states[MASK.bool()], expected[MASK.bool()], atol=1e-5, rtol=0)


def test_pads_change_nothing_and_everything_before_them_counts(blip: BlipEncoder, vision: Tensor) -> None:
    exact, seen = deepcopy(blip).double(), vision[:1].double()
    states = exact.encode_text(IDS[:1, :5], seen)
    for length in (6, 8):
        longer = exact.encode_text(IDS[:1, :length], seen)[:, :5]
        torch.testing.assert_close(longer, states, atol=1e-12, rtol=0)
    other = IDS[:1].clone()
    other[0, 3] = 11
    assert (exact.encode_text(other, seen)[0, 0] - states[0, 0]).abs().max() > 1e-3


def test_the_text_sees_every_vision_token(blip: BlipEncoder, vision: Tensor) -> None:
    states = blip.encode_text(IDS[:1], vision[:1])[0, 0]
    for place in (0, 1, 16):
        changed = vision[:1].clone()
        changed[0, place] += 1
        assert (blip.encode_text(IDS[:1], changed)[0, 0] - states).abs().max() > 1e-4


def test_attention_is_the_softmax_of_scaled_products_in_each_head() -> None:
    query, key, value = random(2, 3, 128), random(2, 5, 128, seed=1), random(2, 5, 128, seed=2)
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)[:, None, None]
    found = attend(query, key, value, mask)
    for row in range(2):
        seen = mask[row, 0, 0]
        for head in (slice(0, 64), slice(64, 128)):
            weights = torch.softmax(query[row, :, head] @ key[row, seen, head].T / 8, dim=-1)
            torch.testing.assert_close(found[row, :, head], weights @ value[row, seen, head], atol=1e-5, rtol=0)


def test_too_many_tokens_are_refused(blip: BlipEncoder, vision: Tensor) -> None:
    with pytest.raises(ValueError, match="41 tokens do not fit into 40 positions"):
        blip.encode_text(torch.full((3, 41), 102), vision)


def tensors_of(config: BlipConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return BlipEncoder(config).state_dict()


def test_sizes_are_read_from_a_checkpoint() -> None:
    assert BlipConfig.of(tensors_of(SMALL)) == SMALL
    assert BlipConfig.of(tensors_of(BlipConfig())) == BlipConfig()
    deep = replace(SMALL, vision_layers=11, text_layers=12)
    named = {f"blip.{name}": tensor for name, tensor in tensors_of(deep).items()}
    assert BlipConfig.of(named, "blip.") == deep


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("visual_encoder.patch_embed.proj.weight", None, r"patch_embed\.proj\.weight is missing"),
        ("visual_encoder.patch_embed.proj.weight", (128, 768), r"is \[128, 768\], not of 4 axes"),
        ("visual_encoder.pos_embed", (1, 16, 128), "16 places: not a class token and a square"),
        ("visual_encoder.pos_embed", (1, 1, 128), "1 places"),
        ("visual_encoder.blocks.0.mlp.fc1.weight", None, r"blocks\.0\.mlp\.fc1\.weight is missing"),
        ("text_encoder.embeddings.word_embeddings.weight", (300, 100), "not multiples of a head's 64"),
        ("text_encoder.encoder.layer.0.intermediate.dense.weight", None, r"layer\.0\.intermediate.* is missing"),
        ("text_encoder.embeddings.position_embeddings.weight", (40,), r"is \[40\], not of 2 axes"),
    ],
)
def test_what_is_no_blip_is_named(name: str, shape: tuple[int, ...] | None, message: str) -> None:
    tensors = tensors_of(SMALL)
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = torch.empty(shape, device="meta")
    with pytest.raises(WeightsError, match=message):
        BlipConfig.of(tensors)
