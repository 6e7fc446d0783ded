"""Parity of HPSv3 on its published checkpoint's structure: ``hpsv3_small.json`` with its arrays in ``hpsv3_small.npz``.

The network is compared from token ids and patches, which the file gives as arrays; the image pipeline and the user's
text on their own, because the published tokenizer is not part of the fixtures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backbones import qwen2_vl_image
from models.base import LoadOptions
from models.hpsv3 import PIXELS, Hpsv3Network, chat_text, user_text
from models.parity import Topic, largest, parity_kind
from models.parity_checkpoint import (
    FEATURE_TOLERANCE,
    ISSUE_BOUND,
    PIXEL_TOLERANCE,
    STATE_TOLERANCE,
    Cases,
    Kind,
    bfloat16_order,
    read_cases,
    record_error,
    unit_record,
    written,
)
from models.preprocessing import normalize

HPSV3 = Kind("hpsv3", "HPSv3.safetensors", 1e-5)
_DIAGNOSTIC = "diagnostic_not_reference_logits_with_3d_mrope"

Arrays = Mapping[str, Tensor]


def sizes(cases: Cases) -> dict[str, Any]:
    """The option ``config``: the parts text and vision of the manifest's."""
    manifest = json.loads((cases.file.parent / cases.document["manifest"]).read_text("utf-8"))
    return {part: manifest["config"][part] for part in ("text", "vision")}


def read_arrays(cases: Cases) -> list[Arrays]:
    """The arrays of each case: the arguments of :meth:`Hpsv3Network.logits` by name."""
    with np.load(cases.file.with_name(cases.document["npz"])) as stored:
        return [
            {name: torch.from_numpy(stored[key]) for name, key in case["arrays"].items()}
            for case in cases.document["cases"]
        ]


def rows_alone(arrays: Arrays) -> list[Arrays]:
    """Every row as a batch of its own, without padding."""
    counts = arrays["image_grid_thw"].prod(-1).tolist()
    return [
        {
            "input_ids": ids[mask.bool()][None],
            "attention_mask": mask[mask.bool()][None],
            "pixel_values": patches,
            "image_grid_thw": grid[None],
        }
        for ids, mask, patches, grid in zip(
            arrays["input_ids"],
            arrays["attention_mask"],
            torch.split(arrays["pixel_values"], counts),
            arrays["image_grid_thw"],
            strict=True,
        )
    ]


def run(network: Hpsv3Network, arrays: Arrays) -> Tensor:
    """(mean, raw second output) [B, 2]."""
    names = ("input_ids", "pixel_values", "image_grid_thw", "attention_mask")
    ids, pixels, grid, mask = (arrays[name] for name in names)
    return network.logits(ids, pixels, grid, mask)


def gap(found: Tensor, expected: Sequence[Sequence[float]]) -> float:
    return float((found.double() - torch.tensor(expected, dtype=torch.float64)).abs().max())


@torch.inference_mode()
def reward_states(network: Hpsv3Network, cases: Cases, arrays: Sequence[Arrays]) -> Topic:
    """The hidden states at the reward tokens: what the head is given."""
    states: list[Tensor] = []
    handle = network.rm_head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    for inputs in arrays:
        run(network, inputs)
    handle.remove()
    records = [record for case in cases.document["cases"] for record in case["hidden_at_reward"]]
    errors = [record_error(state, record) for state, record in zip(torch.cat(states), records, strict=True)]
    return Topic("states at the reward", len(errors), largest(errors), STATE_TOLERANCE, "normed states")


@torch.inference_mode()
def logits(network: Hpsv3Network, cases: Cases, arrays: Sequence[Arrays]) -> list[Topic]:
    """(mean, raw second output) of every case, as a padded batch and each row alone; then the positions."""
    batch: list[float] = []
    relative: list[float] = []
    alone: list[float] = []
    same_as_3d = 0
    document = cases.document["cases"]
    expected = torch.tensor([row[0] for case in document for row in case["logits_fp32"]], dtype=torch.float64)
    spread = float(expected.std(correction=0))
    for case, inputs in zip(document, arrays, strict=True):
        found = run(network, inputs)
        batch.append(gap(found, case["logits_fp32"]))
        relative += [
            abs(ours - score) / max(abs(score), spread)
            for ours, score in zip(found[:, 0].tolist(), case["score_fp32"], strict=True)
        ]
        single = torch.cat([run(network, row) for row in rows_alone(inputs)])
        alone.append(gap(single, case.get("rows_alone_logits_fp32", case["logits_fp32"])))
        other = torch.tensor(case[_DIAGNOSTIC], dtype=torch.float64)
        same_as_3d += int(((found.double() - other).abs().amax(-1) <= HPSV3.tolerance).sum())
    return [
        Topic("mean and second output", len(expected), largest(batch), HPSV3.tolerance, "absolute, as batched there"),
        Topic("rows alone", len(expected), largest(alone), HPSV3.tolerance, "absolute, without padding"),
        Topic("score, relative", len(relative), largest(relative), ISSUE_BOUND, "to max(|score|, std of the file)"),
        Topic("sequential positions", len(expected), same_as_3d, 0, "rows equal to those of 3-D positions"),
    ]


@torch.inference_mode()
def vision(network: Hpsv3Network, cases: Cases, arrays: Sequence[Arrays]) -> Topic:
    """Image tokens of all images of a case."""
    errors = []
    for case, inputs in zip(cases.document["cases"], arrays, strict=True):
        tokens = [
            network.backbone.encode_patches(row["pixel_values"][None], *row["image_grid_thw"][0, 1:].tolist())[0]
            for row in rows_alone(inputs)
        ]
        record = case["visual_tokens"]
        found = torch.cat(tokens)
        shape = list(found.shape) == record["shape"]
        errors.append(
            record_error(found.double() / found.double().norm(), unit_record(record)) if shape else float("inf")
        )
    return Topic("image tokens", len(errors), largest(errors), FEATURE_TOLERANCE, "all of a case at length 1")


def images(cases: Cases) -> list[Topic]:
    """The image pipeline at its true size: resized pixels, grid and patches."""
    wrong = 0
    errors: list[float] = []
    for key, expected in cases.document["preprocessing_full"].items():
        resized = qwen2_vl_image.resize(cases.images[key], PIXELS, PIXELS)
        height, width = resized.shape[-2:]
        digest = hashlib.sha256(resized.permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest()
        grid = [1, height // qwen2_vl_image.PATCH_SIZE, width // qwen2_vl_image.PATCH_SIZE]
        tokens = grid[1] * grid[2] // qwen2_vl_image.MERGE_SIZE**2
        found = {
            "resized_wh": [width, height],
            "resized_rgb_sha256": digest,
            "image_grid_thw": grid,
            "n_image_pad_tokens": tokens,
        }
        wrong += any(found[name] != expected[name] for name in found)
        patches = qwen2_vl_image.patchify(normalize(resized[None]))[0]
        errors.append(record_error(patches, expected["pixel_values"]))
    return [
        Topic("resized images", len(errors), wrong, 0, "sizes, grids and sha256 of the pixels"),
        Topic("preprocessing", len(errors), largest(errors), PIXEL_TOLERANCE, "normalised pixels in patches"),
    ]


def texts(cases: Cases) -> list[Topic]:
    """The user's text by length and hash, and the chat template around it as the file assumes it."""
    user = chat = 0
    for key, expected in cases.document["prompt_text"].items():
        text = user_text(cases.prompts[key])
        user += (len(text), _sha256(text)) != (expected["user_text_chars"], expected["user_text_sha256"])
        chat += _sha256(chat_text(cases.prompts[key])) != expected["assumed_chat_text_sha256"]
    count = len(cases.prompts)
    return [
        Topic("user text", count, user, 0, "length and sha256"),
        Topic("chat text", count, chat, 0, "sha256; the file itself assumes the template"),
    ]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@parity_kind("hpsv3_small.json")
def hpsv3(file: Path) -> Sequence[Topic]:
    """HPSv3 from the published tensor names; the checkpoint's tokenizer is not needed for any of it."""
    cases = read_cases(file)
    arrays = read_arrays(cases)
    with written(cases, HPSV3) as (weights, built):
        options = replace(weights, options={"config": sizes(cases)})
        network = load(options)
        topics = [built, *images(cases), *texts(cases), vision(network, cases, arrays)]
        topics += [reward_states(network, cases, arrays), *logits(network, cases, arrays)]
        exact = all_scores(network, arrays)
        coarse = all_scores(load(replace(options, dtype=torch.bfloat16)), arrays)
        topics.append(bfloat16_order(exact[None], coarse[None], "pairs of rows"))
    return topics


def load(options: LoadOptions) -> Hpsv3Network:
    return Hpsv3Network.load(options)[0]


def all_scores(network: Hpsv3Network, arrays: Sequence[Arrays]) -> Tensor:
    """The means of all rows of all cases [N], float64."""
    return torch.cat([run(network, inputs)[:, 0] for inputs in arrays]).double()
