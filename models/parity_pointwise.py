"""Parity of PickScore, HPSv2, CLIPScore, the aesthetic predictor and ImageReward: their features and their handlers.

The rest is ``models.parity_checkpoint``; HPSv3, whose tokenizer the fixtures lack, is ``models.parity_hpsv3``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from models.imagereward import ImageReward
from models.parity import Topic, largest, parity_kind
from models.parity_checkpoint import (
    FEATURE_TOLERANCE,
    STATE_TOLERANCE,
    Cases,
    Kind,
    compare,
    difference,
    record_error,
    unit_record,
)
from models.towers import TowerReward

_IMAGE_FEATURES = {"image_embed_raw", "image_embed_normalised", "clip_embed_normalised", "image_features"}
_TEXT_FEATURES = {"text_embed_raw", "text_embed_normalised", "text_features"}


@torch.inference_mode()
def clip_features(model: TowerReward, cases: Cases) -> list[Topic]:
    """Features of CLIP towers at length 1, as far as the file records them."""
    image = [
        record_error(image_feature(model, cases.images[entry["image"]]), unit_record(entry[name]))
        for entry in cases.scores
        for name in entry.keys() & _IMAGE_FEATURES
    ]
    text = [
        record_error(text_feature(model, cases.prompt(entry)), unit_record(entry[name]))
        for entry in cases.scores
        for name in entry.keys() & _TEXT_FEATURES
    ]
    note = "at length 1"
    return [
        Topic("image features", len(image), largest(image), FEATURE_TOLERANCE, note),
        Topic("text features", len(text), largest(text), FEATURE_TOLERANCE, note),
    ]


def image_feature(model: TowerReward, image: PILImage.Image) -> Tensor:
    pixels = model.normalize(model.prepare_image(image)[None])
    return F.normalize(model.encode_image(pixels)[0].double(), dim=-1)


def text_feature(model: TowerReward, prompt: str) -> Tensor:
    return F.normalize(model.encode_text(model.prepare_text(prompt)[0][None])[0].double(), dim=-1)


@torch.inference_mode()
def blip_features(model: TowerReward, cases: Cases) -> list[Topic]:
    """ImageReward's vision tokens, text states and the head's output before standardisation.

    The last token of the reference is a pad unless the prompt fills the context, so the prompt is padded as there.
    """
    assert isinstance(model, ImageReward)
    tokens = {
        key: model.encode_image(model.normalize(model.prepare_image(image)[None]))
        for key, image in cases.images.items()
    }
    vision: list[float] = []
    for key, expected in cases.document["images"].items():
        parts = {"vision_cls": tokens[key][0, 0], "vision_last_token": tokens[key][0, -1], "vision_all": tokens[key][0]}
        vision += [record_error(part, expected[name]) for name, part in parts.items()]
    text: list[float] = []
    raw: list[float] = []
    for entry in cases.scores:
        ids = model.prepare_text(cases.prompt(entry))[0][None]
        padded = F.pad(ids, (0, len(cases.document["prompts"][entry["prompt"]]["input_ids"]) - ids.shape[-1]))
        text_cls = model.text_cls(tokens[entry["image"]], ids)
        last = model.network.blip.encode_text(padded, tokens[entry["image"]])[0, -1]
        text += [record_error(text_cls[0], entry["text_cls"]), record_error(last, entry["text_last_token"])]
        raw.append(difference(float(model.raw_score(text_cls)), entry["raw_mlp_output"]))
    return [
        Topic("vision tokens", len(vision), largest(vision), STATE_TOLERANCE, "layer-normed states"),
        Topic("text states", len(text), largest(text), STATE_TOLERANCE, "layer-normed states"),
        Topic("MLP output", len(raw), largest(raw), IMAGEREWARD.tolerance, "before standardisation"),
    ]


PICKSCORE = Kind("pickscore", "model.safetensors", 5e-6, clip_features)
HPSV2 = Kind("hpsv2", "HPS_v2_compressed.pt", 2e-6, clip_features, nested="state_dict", twin="hpsv2.1")
CLIPSCORE = Kind("clip-score", "model.safetensors", 2e-6, clip_features)
AESTHETIC = Kind("aesthetic", "model.safetensors", 2e-6, clip_features)
IMAGEREWARD = Kind("imagereward", "ImageReward.pt", 2e-5, blip_features, end_token=None)


@parity_kind("pickscore_*.json")
def pickscore(file: Path) -> Sequence[Topic]:
    """PickScore: HF names, score divided by 26."""
    return compare(file, PICKSCORE)


@parity_kind("hpsv2_*.json")
def hpsv2(file: Path) -> Sequence[Topic]:
    """HPSv2, whose structure HPSv2.1 shares: open_clip's names under ``state_dict``."""
    return compare(file, HPSV2)


@parity_kind("clipscore_*.json")
def clipscore(file: Path) -> Sequence[Topic]:
    """CLIPScore with the preprocessing of flow_grpo and DiffusionNFT."""
    return compare(file, CLIPSCORE)


@parity_kind("aesthetic_*.json")
def aesthetic(file: Path) -> Sequence[Topic]:
    """The LAION aesthetic predictor: tower and head are two files."""
    return compare(file, AESTHETIC)


@parity_kind("imagereward_*.json")
def imagereward(file: Path) -> Sequence[Topic]:
    """ImageReward v1.0."""
    return compare(file, IMAGEREWARD)
