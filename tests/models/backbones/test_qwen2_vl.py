"""The Qwen2-VL backbone against transformers' own forward passes, and the head that reads levels of quality."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from models.backbones.qwen2_vl import (
    LEVELS,
    LevelTokenHead,
    Qwen2VLBackbone,
    beyond_tensors,
    insert_image,
    published_name,
    qwen2_vl_config,
    sequential_positions,
    sizes,
)
from models.backbones.qwen2_vl_image import FACTOR, PATCH_SIZE, patchify
from models.base import WeightsError
from models.parity_recipe import fill

VOCABULARY, IMAGE_TOKEN = 200, 190
CONFIG = {
    "text": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]},
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
    },
    "vision": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
}


def config() -> Qwen2VLConfig:
    found = qwen2_vl_config(CONFIG, VOCABULARY)
    found.image_token_id = IMAGE_TOKEN
    return found


@pytest.fixture(scope="module")
def library() -> Qwen2VLForConditionalGeneration:
    model = Qwen2VLForConditionalGeneration(config()).eval().requires_grad_(False)
    filled = {name: fill(published_name(name), tensor.shape, seed=0) for name, tensor in model.state_dict().items()}
    model.load_state_dict(filled)
    return model


def tensors_of(library: Qwen2VLForConditionalGeneration) -> dict[str, Tensor]:
    named = {published_name(name): tensor for name, tensor in library.state_dict().items()}
    return {name: tensor for name, tensor in named.items() if name != "lm_head.weight"}


@pytest.fixture(scope="module")
def backbone(library: Qwen2VLForConditionalGeneration) -> Qwen2VLBackbone:
    ours = Qwen2VLBackbone(config())
    ours.assign(tensors_of(library), torch.float32, torch.device("cpu"))
    return ours


def pixels(batch: int, rows: int, columns: int) -> Tensor:
    return torch.randn(batch, 3, rows * FACTOR, columns * FACTOR, generator=torch.Generator().manual_seed(rows))


def turn(image_tokens: int, before: int = 4, after: int = 9) -> Tensor:
    """Ids [1, L] of text, image tokens, text."""
    ids = torch.randint(0, 180, (1, before + image_tokens + after), generator=torch.Generator().manual_seed(3))
    ids[:, before : before + image_tokens] = IMAGE_TOKEN
    return ids


def test_the_state_dict_has_the_published_names(backbone: Qwen2VLBackbone) -> None:
    names = set(backbone.state_dict())
    assert {"visual.patch_embed.proj.weight", "visual.merger.ln_q.weight", "model.embed_tokens.weight"} <= names
    assert {"model.layers.1.self_attn.k_proj.bias", "model.norm.weight"} <= names
    assert {name.split(".")[0] for name in names} == {"visual", "model"}


@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 2, 3), (3, 4, 2), (2, 1, 1)])
def test_a_batch_of_images_is_what_the_library_makes_of_each(
    library: Qwen2VLForConditionalGeneration, backbone: Qwen2VLBackbone, batch: int, rows: int, columns: int
) -> None:
    images = pixels(batch, rows, columns)
    grid = torch.tensor([[1, rows * 2, columns * 2]] * batch)
    expected = library.model.visual(patchify(images).flatten(0, 1), grid).pooler_output
    found = backbone.encode_image(images)
    assert found.shape == (batch, rows * columns, 64)
    torch.testing.assert_close(found.flatten(0, 1), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", ["sequential", "three-dimensional"])
def test_states_at_given_positions_are_the_library_s(
    library: Qwen2VLForConditionalGeneration, backbone: Qwen2VLBackbone, positions: str
) -> None:
    """The whole way: image tokens in their places, and the last norm."""
    images, grid = pixels(1, 3, 2), torch.tensor([[1, 6, 4]])
    ids = turn(image_tokens=6)
    kinds = (ids == IMAGE_TOKEN).int()
    if positions == "sequential":
        positions_3BL = sequential_positions(1, ids.shape[1], ids.device)
    else:
        positions_3BL, _ = library.model.get_rope_index(ids, kinds, image_grid_thw=grid)
        assert not torch.equal(positions_3BL[1], positions_3BL[2])
    expected = library.model(
        input_ids=ids,
        pixel_values=patchify(images)[0],
        image_grid_thw=grid,
        mm_token_type_ids=kinds,
        position_ids=positions_3BL,
    ).last_hidden_state
    place = 4
    short = torch.cat([ids[:, : place + 1], ids[:, place + 6 :]], dim=1)
    embeddings = insert_image(backbone.embed(short), backbone.encode_image(images), place)
    found = backbone.hidden_states(embeddings, positions_3BL)
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-5)
    for at in range(ids.shape[1]):
        pooled = backbone.pooled_state(embeddings, positions_3BL, torch.tensor([at]))
        torch.testing.assert_close(pooled, expected[:, at], atol=5e-6, rtol=1e-5)


def test_padding_on_the_right_needs_no_mask(
    library: Qwen2VLForConditionalGeneration, backbone: Qwen2VLBackbone
) -> None:
    """Against the library with its mask, at two places of two rows of different lengths."""
    ids = turn(image_tokens=0, after=20).expand(2, -1).clone()
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    positions = sequential_positions(2, ids.shape[1], ids.device)
    expected = library.model.language_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    ids[1, 11:] = 7  # whatever stands there
    found = backbone.pooled_state(backbone.embed(ids), positions, torch.tensor([ids.shape[1] - 1, 10]))
    torch.testing.assert_close(found, torch.stack([expected[0, -1], expected[1, 10]]), atol=5e-6, rtol=1e-5)


def test_both_passes_are_one_graph_each(backbone: Qwen2VLBackbone) -> None:
    """A graph break would cost a device-to-host copy in every layer; fullgraph raises at the first one."""
    images = pixels(2, 2, 2)
    vision = torch.compile(backbone.encode_image, fullgraph=True, backend="eager")
    torch.testing.assert_close(vision(images), backbone.encode_image(images))

    def text(ids: Tensor, places: Tensor) -> Tensor:
        return backbone.pooled_state(backbone.embed(ids), sequential_positions(2, 13, ids.device), places)

    ids, places = turn(image_tokens=0).expand(2, -1), torch.tensor([12, 3])
    compiled = torch.compile(text, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, places), text(ids, places))


def test_tensors_are_copied_even_where_they_need_no_cast(library: Qwen2VLForConditionalGeneration) -> None:
    tensors = tensors_of(library)
    same, cast = Qwen2VLBackbone(config()), Qwen2VLBackbone(config())
    same.assign(tensors, torch.float32, torch.device("cpu"))
    cast.assign(tensors, torch.bfloat16, torch.device("cpu"))
    # A mapped file that is replaced would change the scores, and one that is cut short would end the process.
    assert not any(tensor.data_ptr() == tensors[name].data_ptr() for name, tensor in same.state_dict().items())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in same.state_dict().items())
    assert {tensor.dtype for tensor in cast.state_dict().values()} == {torch.bfloat16}
    assert cast.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in same.parameters())
    # Angles stay exact in a coarse model.
    assert cast.model.rotary_emb.inv_freq.dtype == cast.visual.rotary_pos_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("rm_head.0.bias", "rm_head.0.bias"),
    ],
)
def test_names_of_both_generations_become_the_published_ones(new: str, old: str) -> None:
    assert published_name(new) == old
    assert published_name(old) == old


def test_a_config_file_gives_the_same_sizes_as_its_parts(tmp_path: Path) -> None:
    parts = qwen2_vl_config(CONFIG, VOCABULARY)
    parts.save_pretrained(tmp_path)
    content: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    for given in (str(tmp_path / "config.json"), tmp_path / "config.json", content):
        found = qwen2_vl_config(given, VOCABULARY)
        assert beyond_tensors(found) == beyond_tensors(parts)
        assert [part.hidden_size for part in sizes(found)] == [64, 64]
        assert sizes(found)[0].vocab_size == VOCABULARY


def test_a_flat_config_of_the_published_form_is_read() -> None:
    """Hub files of Qwen2-VL hold the language model's sizes at the top, and only ``vision_config`` nested."""
    flat = {**CONFIG["text"], "model_type": "qwen2_vl", "vision_config": {"model_type": "qwen2_vl", **CONFIG["vision"]}}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    assert beyond_tensors(qwen2_vl_config(flat, VOCABULARY)) == beyond_tensors(qwen2_vl_config(CONFIG, VOCABULARY))


def test_the_default_is_the_seven_billion_model(tmp_path: Path) -> None:
    backbone = Qwen2VLBackbone(qwen2_vl_config(None, 151658))
    count = sum(parameter.numel() for parameter in backbone.parameters())
    # The published total less lm_head and the MLP.
    head = 3584 * 1024 + 1024 + 1024 * 16 + 16 + 16 * 2 + 2
    assert count == 8_292_152_882 - 151658 * 3584 - head


def test_a_config_leaves_the_mapping_as_it_was() -> None:
    before = json.dumps(CONFIG)
    qwen2_vl_config(CONFIG, VOCABULARY)
    assert json.dumps(CONFIG) == before


def test_configs_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json"):
        qwen2_vl_config(str(tmp_path / "nothing.json"), VOCABULARY)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(WeightsError, match=r"broken\.json"):
        qwen2_vl_config(str(tmp_path / "broken.json"), VOCABULARY)
    with pytest.raises(WeightsError, match="mapping"):
        qwen2_vl_config([1, 2], VOCABULARY)  # type: ignore[arg-type]
    for wrong in ({"text": 1, "vision": 2}, {**CONFIG, "text": {"hidden_size": "x"}}):
        with pytest.raises(WeightsError, match="not one of a Qwen2-VL"):
            qwen2_vl_config(wrong, VOCABULARY)
    with pytest.raises(WeightsError, match="sliding"):
        qwen2_vl_config({**CONFIG, "text": {**CONFIG["text"], "use_sliding_window": True}}, VOCABULARY)
    other = {**CONFIG, "vision": {**CONFIG["vision"], "patch_size": PATCH_SIZE + 2}}
    with pytest.raises(WeightsError, match="patch"):
        qwen2_vl_config(other, VOCABULARY)


LEVEL_IDS = [17, 5, 101, 40, 8]


def test_the_level_score_is_the_expectation_of_a_naive_loop(
    library: Qwen2VLForConditionalGeneration, backbone: Qwen2VLBackbone
) -> None:
    """All logits of the whole model with ``lm_head``, softmaxed by hand over the five tokens."""
    ids = torch.randint(0, 180, (6, 15), generator=torch.Generator().manual_seed(4))
    logits = library(input_ids=ids).logits[:, -1].double()
    head = LevelTokenHead(library.lm_head.weight, LEVEL_IDS)
    positions = sequential_positions(6, 15, ids.device)
    states = backbone.pooled_state(backbone.embed(ids), positions, torch.full((6,), 14))
    found = head(states)
    for row in range(6):
        weights = [float(logits[row, token].exp()) for token in LEVEL_IDS]
        expected = sum(level * weight for level, weight in zip((5, 4, 3, 2, 1), weights, strict=True)) / sum(weights)
        assert float(found[row]) == pytest.approx(expected, abs=2e-5)
    assert float(found.max() - found.min()) > 0.1
    torch.testing.assert_close(head.probabilities(states).sum(-1), torch.ones(6))


def test_levels_are_ordered_from_best_to_worst() -> None:
    head = LevelTokenHead(torch.eye(5), range(5))
    certain = head(1000 * torch.eye(5))
    assert dict(zip(LEVELS, certain.tolist(), strict=True)) == {
        "excellent": 5.0,
        "good": 4.0,
        "fair": 3.0,
        "poor": 2.0,
        "bad": 1.0,
    }
    assert head(torch.zeros(1, 5)).item() == pytest.approx(3.0)


def test_the_level_score_has_a_gradient_and_is_float32_for_a_coarse_model() -> None:
    rows = torch.randn(120, 8, generator=torch.Generator().manual_seed(5)).bfloat16()
    head = LevelTokenHead(rows, LEVEL_IDS)
    states = torch.ones(2, 8, dtype=torch.bfloat16, requires_grad=True)
    score = head(states)
    assert score.dtype == torch.float32
    score.sum().backward()
    assert states.grad is not None
    assert bool(states.grad.abs().sum() > 0)


@pytest.mark.parametrize("ids", [[1, 2, 3, 4], [1, 2, 3, 4, 4]])
def test_five_different_tokens_are_needed(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="5 different tokens"):
        LevelTokenHead(torch.zeros(10, 4), ids)
