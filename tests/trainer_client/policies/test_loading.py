"""Folders become policies of the family that they name; only safetensors are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.shapes.policy import build_pipeline, save_pipeline
from tests.trainer_client.policies.tiny_pipelines import BUILDERS, PROMPTS, build
from trainer_client.policies import FAMILIES, FlowPolicy, from_pretrained, policy_for

SIZE = {"height": 32, "width": 32}


@pytest.mark.parametrize("family", BUILDERS)
def test_a_folder_is_loaded_by_its_pipeline_class(family: str, tmp_path: Path) -> None:
    pipeline = build(family)
    pipeline.save_pretrained(tmp_path)
    policy = from_pretrained(tmp_path)
    assert policy.family == family
    ours = policy.sample(PROMPTS, [1, 2], steps=2, **SIZE)
    expected = policy_for(pipeline).sample(PROMPTS, [1, 2], steps=2, **SIZE)
    assert (ours - expected).abs().max() < 1e-5


def test_half_precision_leaves_the_vae_in_float32(tmp_path: Path) -> None:
    build("sd3").save_pretrained(tmp_path)
    policy = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert policy.dtype == policy.network.dtype == policy.pipeline.text_encoder_3.dtype == torch.bfloat16
    assert policy.vae.dtype == torch.float32


def test_the_shapes_policy_loads_without_t5(tmp_path: Path) -> None:
    """Its folder is float16 and has no third text encoder; the pipeline is asked for the same number of tokens."""
    save_pipeline(build_pipeline(width=64, layers=2), tmp_path)
    policy = from_pretrained(tmp_path, max_sequence_length=0)
    assert isinstance(policy, FlowPolicy)
    assert policy.dtype == torch.float32
    # An untrained network predicts zero; a trained one doesn't.
    torch.nn.init.normal_(policy.network.proj_out.weight, generator=torch.Generator().manual_seed(0))
    ours = policy.sample(PROMPTS, [1, 2], steps=3, guidance_scale=2.0)
    policy.pipeline.set_progress_bar_config(disable=True)
    theirs = policy.pipeline(
        PROMPTS, num_inference_steps=3, guidance_scale=2.0, max_sequence_length=0, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
    ).images  # fmt: skip
    assert ours.shape == (2, 3, 32, 32)
    assert (ours - theirs).abs().max() < 1e-4
    assert ours.std() > 0.02


def test_an_unknown_pipeline_names_the_families(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="is a KandinskyPipeline") as caught:
        from_pretrained(tmp_path)
    assert all(name in str(caught.value) for name in FAMILIES)
    with pytest.raises(ValueError, match="this is a Linear"):
        policy_for(torch.nn.Linear(1, 1))


def test_weights_that_would_be_unpickled_are_refused(tmp_path: Path) -> None:
    build("sd").save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.rglob("*.bin"))
    with pytest.raises(OSError, match="safetensors"):
        from_pretrained(tmp_path)
