"""Hugging Face's names and open_clip's are one model: against the published names, and against transformers itself."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from models.backbones.clip import VIT_H_14, VIT_L_14, ClipArchitecture, ClipSize, ClipTowers, empty_clip, size_of
from models.backbones.clip_hf import from_open_clip, is_hugging_face, names, to_open_clip
from tests.models.clip_checkpoints import read, tensors

HF_MANIFESTS = ["pickscore_small", "pickscore_full", "clip_vit_l14_small", "clip_vit_l14_full"]


def shapes(manifest: str) -> dict[str, tuple[int, ...]]:
    return {entry["name"]: tuple(entry["shape"]) for entry in read(f"manifests/{manifest}.json")["entries"]}


def architecture_of(manifest: str) -> ClipArchitecture:
    return VIT_L_14 if "l14" in manifest else VIT_H_14


@pytest.mark.parametrize("manifest", HF_MANIFESTS)
def test_names_and_shapes_are_those_of_the_published_structure(manifest: str) -> None:
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes(manifest).items()}
    ours = to_open_clip(published)
    architecture = architecture_of(manifest)
    size = size_of(ours, "test")
    assert (size == architecture.published) == ("full" in manifest)
    expected = empty_clip(architecture.config(size)).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in expected.items()}
    back = from_open_clip(expected)
    assert {name: tuple(t.shape) for name, t in back.items()} == shapes(manifest)


@pytest.mark.parametrize("manifest", ["hpsv2_small", "hpsv2_full"])
def test_open_clips_own_names_need_no_renaming(manifest: str) -> None:
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes(manifest).items()}
    assert not is_hugging_face(published)
    size = size_of(published, "test")
    assert (size == VIT_H_14.published) == ("full" in manifest)
    expected = empty_clip(VIT_H_14.config(size)).state_dict()
    assert {name: tuple(t.shape) for name, t in expected.items()} == shapes(manifest)


def test_there_and_back_gives_the_same_tensors() -> None:
    original = tensors("manifests/pickscore_small.json")
    back = from_open_clip(to_open_clip(original))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


def test_incomplete_query_key_and_value_are_left_out() -> None:
    incomplete = dict(tensors("manifests/pickscore_small.json"))
    del incomplete["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    renamed = to_open_clip(incomplete)
    assert "visual.transformer.resblocks.1.attn.in_proj_weight" not in renamed
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in renamed


def test_a_tensor_that_no_clip_has_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        names("visual.attn_pool.query")


@pytest.mark.parametrize(
    ("activation", "head_width", "quick"), [("gelu", 80, False), ("quick_gelu", 64, True)], ids=["H", "L"]
)
def test_towers_compute_what_transformers_computes(activation: str, head_width: int, quick: bool) -> None:
    common = {"hidden_act": activation, "projection_dim": 48}
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 2 * head_width, "intermediate_size": 8 * head_width, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=48)
    reference = CLIPModel(config).eval()
    with torch.no_grad():  # its own initial values are so small that errors would hide
        for name, parameter in reference.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "logit_scale" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = to_open_clip(reference.state_dict())
    architecture = ClipArchitecture("test", ClipSize(1, 1, 1, 1, 1), head_width, quick_gelu=quick)
    size = size_of(ours, "test")
    assert (size.image_size, size.vision_layers, size.text_layers, size.embed_dim) == (56, 3, 2, 48)
    towers = ClipTowers.from_config(architecture.config(size), tensors=ours)
    pixels = torch.randn(2, 3, 56, 56)
    tokens = torch.tensor([[49406, 320, 2368, 49407, 0, 0]])
    with torch.no_grad():
        images = reference.visual_projection(reference.vision_model(pixel_values=pixels).pooler_output)
        hidden = reference.text_model(input_ids=tokens).last_hidden_state
        texts = reference.text_projection(hidden[:, 3])
    torch.testing.assert_close(towers.encode_image(pixels), images, atol=2e-5, rtol=0)
    torch.testing.assert_close(towers.encode_text(tokens), texts, atol=2e-5, rtol=0)
    assert images.std() > 0.1
    assert texts.std() > 0.1
