"""The recipe of the synthetic checkpoints gives the published vectors and digests, bit for bit."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from models.parity_recipe import build, digest, fill, write_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures" / "pointwise"
SMALL = sorted(file.name for file in FIXTURES.glob("*_small.json"))

# name, shape, seed, dtype, first four values, sum in float64, sha256 of the bytes: the recipe's own self-test vectors
VECTORS: list[tuple[str, tuple[int, ...], int, str, list[float], float, str]] = [
    (
        "mlp.layers.0.weight",
        (1024, 768),
        1,
        "float32",
        [0.027732206508517265, 0.04016603156924248, 0.047352250665426254, -0.03257032856345177],
        -15.133179412455938,
        "9327c4bbbb37514e3cb5d34317964d7fc942c10ecaa49c7749a869b207b45f8e",
    ),
    (
        "mlp.layers.0.bias",
        (1024,),
        1,
        "float32",
        [0.028402911499142647, 0.013044018298387527, -0.0007279206765815616, 0.004530405160039663],
        0.18563325187460578,
        "d150e8c48b1e1a25e8e98b95a5db0c9bac1e86fa097e44e44ef5eef20ce32f03",
    ),
    (
        "blip.visual_encoder.norm.weight",
        (1024,),
        1,
        "float32",
        [1.0330862998962402, 0.9947551488876343, 1.0224655866622925, 0.9810458421707153],
        1022.8529859185219,
        "27b70212b9bb921ed8502eab42f44ab332cf68bd8c370ae909b8031431189745",
    ),
    (
        "blip.visual_encoder.patch_embed.proj.weight",
        (1024, 3, 16, 16),
        1,
        "float32",
        [0.06124969199299812, 0.0007830262184143066, 0.05285829305648804, -0.0013010278344154358],
        21.728182437995898,
        "58372f01b1edd58ffed8586a8e21ba217d3fa8b71e5896c6a6991d5eb5608520",
    ),
    (
        "blip.visual_encoder.pos_embed",
        (1, 197, 1024),
        1,
        "float32",
        [0.0867578312754631, -0.8587289452552795, -0.41424325108528137, -0.2996896505355835],
        -616.4259115312991,
        "738d5c3ae1d4a9b9d79e39eadfbea3777b4ade4e95cfc9f12f70e7899c3428ee",
    ),
    (
        "blip.text_encoder.embeddings.word_embeddings.weight",
        (100, 768),
        1,
        "float32",
        [-0.09541652351617813, -0.5617082715034485, -0.47364696860313416, -0.36900487542152405],
        -99.61653430713704,
        "d803a4922991969e926e386c9921998552017ceb6b08464eb898d566e0dd3086",
    ),
    (
        "blip.text_encoder.embeddings.position_ids",
        (1, 512),
        1,
        "int64",
        [0.0, 1.0, 2.0, 3.0],
        130816.0,
        "5738153ec97595b1c1e4dc027f7b7fb4534f19ed2ce9f9ee712e6d34a384cde7",
    ),
    (
        "logit_scale",
        (),
        1,
        "float32",
        [4.605199813842773],
        4.605199813842773,
        "dc1af2587712df515d4c37fe6356700413cafa9794866db427675d7881a3af63",
    ),
    (
        "visual.proj",
        (1280, 1024),
        2,
        "float32",
        [0.013187733478844166, -0.017850155010819435, 0.005756772588938475, -0.04350084811449051],
        -12.522333620851398,
        "7e77be9a05f50b92c1c7f1abe308b6621c951e170b59c509e8ca79e155115dd5",
    ),
    (
        "transformer.resblocks.0.attn.in_proj_weight",
        (3072, 1024),
        2,
        "float32",
        [-0.033777303993701935, -0.04361389949917793, 0.010375233367085457, -0.05067194998264313],
        5.615667440321147,
        "866bcad59df3c695f8179295acaa3212e097c58f0f1f8cb0b0e0b623f808c029",
    ),
    (
        "visual.class_embedding",
        (1281,),
        2,
        "float32",
        [-0.23584391176700592, -0.4543490409851074, -0.5849097371101379, 0.7953539490699768],
        -17.689689637627453,
        "d970d0e27eb506a732cbe7bc46e17132f9b769217bbf24f45ebafd9925acd7af",
    ),
    (
        "layers.7.bias",
        (1,),
        3,
        "float32",
        [-0.016208643093705177],
        -0.016208643093705177,
        "0f6a11bf0e6a229ebe265b18acee9549f1553c524a772a979684bf597b5ef3ff",
    ),
]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector[0])
def test_the_published_vectors(vector: tuple[str, tuple[int, ...], int, str, list[float], float, str]) -> None:
    name, shape, seed, dtype, first, total, sha256 = vector
    tensor = fill(name, shape, seed, dtype)
    assert tensor.shape == shape
    assert str(tensor.dtype) == f"torch.{dtype}"
    assert tensor.flatten()[:4].tolist() == first
    assert float(tensor.double().sum()) == pytest.approx(total, abs=1e-9 * max(1.0, abs(total)))
    assert hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() == sha256


def documents() -> list[Any]:
    """(manifest, seed, digest) of every small result file, heads included."""
    found = []
    for name in SMALL:
        document = json.loads((FIXTURES / name).read_text("utf-8"))
        for prefix in ("", "mlp_"):
            if f"{prefix}manifest" in document:
                where = document[f"{prefix}manifest"], document["fill_seed"], document[f"{prefix}weights_sha256"]
                found.append(pytest.param(*where, id=f"{name}:{prefix}weights"))
    return found


def test_every_small_model_is_there() -> None:
    assert [name.removesuffix("_small.json") for name in SMALL] == [
        "aesthetic",
        "clipscore",
        "hpsv2",
        "hpsv3",
        "imagereward",
        "pickscore",
    ]


@pytest.mark.parametrize(("manifest", "seed", "sha256"), documents())
def test_whole_checkpoints_have_the_digests_of_the_result_files(manifest: str, seed: int, sha256: str) -> None:
    document = json.loads((FIXTURES / manifest).read_text("utf-8"))
    tensors = build(document, seed)
    assert len(tensors) == document["n_tensors"]
    floats = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    assert floats == document["n_params"]
    assert digest(tensors.items()) == sha256
    name = next(name for name in tensors if name.endswith("weight"))
    tensors[name].flatten()[-1] += 1
    assert digest(tensors.items()) != sha256


@given(
    name=st.sampled_from(["a.weight", "a.bias", "token_embedding.weight", "visual.proj"]),
    shape=st.lists(st.integers(3, 9), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_a_tensor_is_a_function_of_name_shape_and_seed(name: str, shape: list[int], seed: int) -> None:
    tensor = fill(name, shape, seed)
    assert torch.equal(tensor, fill(name, shape, seed))
    assert not torch.equal(tensor, fill(name, shape, seed + 1))
    assert not torch.equal(tensor, fill("b." + name, shape, seed))


def test_values_do_not_depend_on_how_many_there_are() -> None:
    assert torch.equal(fill("a.bias", (7,), 3)[:4], fill("a.bias", (4,), 3))


def test_checkpoints_are_written_as_published(tmp_path: Path) -> None:
    tensors = {"a.weight": fill("a.weight", (3, 4), 0), "position_ids": fill("position_ids", (1, 5), 0, "int64")}
    flat = load_file(write_checkpoint(tensors, tmp_path / "flat.safetensors"))
    assert torch.equal(flat["a.weight"], tensors["a.weight"])
    assert torch.equal(flat["position_ids"], torch.arange(5)[None])
    torch_file = torch.load(write_checkpoint(tensors, tmp_path / "flat.pt"), weights_only=True)
    assert torch_file.keys() == tensors.keys()
    nested = torch.load(write_checkpoint(tensors, tmp_path / "nested.pt", nested="state_dict"), weights_only=True)
    assert torch.equal(nested["state_dict"]["a.weight"], tensors["a.weight"])
