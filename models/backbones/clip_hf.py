"""CLIP checkpoints under Hugging Face's names (transformers' CLIPModel), read as open_clip's.

The two differ in names, in query, key and value, which open_clip holds as one matrix, and in the two projections, which
open_clip holds transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

LEGACY_BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""Counters 0, 1, 2 ... that files saved by transformers before 4.31 hold: tolerated, never read."""

_TOP = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # so spelled in the published files
    "visual.ln_post": "vision_model.post_layernorm",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(?P<tower>visual\.)?transformer\.resblocks\.(?P<layer>\d+)\.(?P<part>.+)")
_IN_PROJ = re.compile(r"attn\.in_proj_(weight|bias)")


def is_hugging_face(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of transformers' CLIPModel."""
    return any(name.startswith(("text_model.", "vision_model.")) for name in tensors)


def names(open_clip_name: str) -> tuple[str, ...]:
    """Where a tensor of open_clip's lies in a Hugging Face file: one name, or those of query, key and value.

    Raises KeyError for a tensor that the published CLIPs do not have.
    """
    block = _BLOCK.fullmatch(open_clip_name)
    if block is None:
        if open_clip_name in _TOP:
            return (_TOP[open_clip_name],)
        if open_clip_name in _PROJECTIONS:
            return (_PROJECTIONS[open_clip_name],)
        norm, _, leaf = open_clip_name.rpartition(".")
        return (f"{_NORMS[norm]}.{leaf}",)
    prefix = f"{'vision' if block['tower'] else 'text'}_model.encoder.layers.{block['layer']}"
    joined = _IN_PROJ.fullmatch(block["part"])
    if joined is not None:
        return tuple(f"{prefix}.self_attn.{part}_proj.{joined[1]}" for part in "qkv")
    part, _, leaf = block["part"].rpartition(".")
    return (f"{prefix}.{_LAYER[part]}.{leaf}",)


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors under Hugging Face's names and in their shapes; works on the meta device too."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        targets = names(name)
        if name in _PROJECTIONS:
            tensor = tensor.T
        renamed |= zip(targets, tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,), strict=True)
    return renamed


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a Hugging Face file under open_clip's names, as far as they have one and are complete.

    What is left out shows when the result is compared with what a model of its size holds.
    """
    renamed = {}
    for name in _open_clip_names(tensors):
        sources = names(name)
        if any(source not in tensors for source in sources):
            continue
        parts = [tensors[source] for source in sources]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        renamed[name] = tensor.T if name in _PROJECTIONS else tensor
    return renamed


def _open_clip_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The open_clip names of a model with as many layers as ``tensors`` name."""
    found = [*_TOP, *_PROJECTIONS, *(f"{norm}.{leaf}" for norm in _NORMS for leaf in ("weight", "bias"))]
    parts = [f"{part}.{leaf}" for part in _LAYER for leaf in ("weight", "bias")]
    parts += ["attn.in_proj_weight", "attn.in_proj_bias"]
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        layer = re.compile(rf"{tower}\.encoder\.layers\.(\d+)\.")
        layers = {match[1] for match in map(layer.match, tensors) if match is not None}
        found += [f"{prefix}transformer.resblocks.{n}.{part}" for n in sorted(layers, key=int) for part in parts]
    return found
