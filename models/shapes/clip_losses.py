"""What shapes-clip learns from a batch: labels from the known scenes, and the losses of its stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.shapes.preferences import Batch, Picture
from models.shapes.prompts import RELATIONS, Prompt
from models.shapes.trainee import Trainee
from models.shapes.world import COLORS, GRID, SHAPES

_PATCHES = 8
_SHAPE_INDEX = {name: i for i, name in enumerate(SHAPES, start=1)}
_COLOR_INDEX = {name: i for i, name in enumerate(COLORS, start=1)}


def cell_labels(pictures: Sequence[Picture]) -> Tensor:
    """int64 [B, 2, 9]: shape and colour of each cell, 0 where it is empty."""
    labels = torch.zeros(len(pictures), 2, GRID, GRID, dtype=torch.int64)
    for i, picture in enumerate(pictures):
        for entry in picture.scene.objects:
            labels[i, 0][entry.cell] = _SHAPE_INDEX[entry.shape]
            labels[i, 1][entry.cell] = _COLOR_INDEX[entry.color]
    return labels.flatten(2)


def _patch_cells() -> Tensor:
    """The cell in which each patch's centre lies, int64 [64]."""
    cell = ((torch.arange(_PATCHES) + 0.5) / _PATCHES * GRID).long()
    return (cell[:, None] * GRID + cell[None, :]).flatten()


def probe_loss(model: Trainee, features_BD: Tensor, tokens_BTW: Tensor, labels_B2C: Tensor) -> Tensor:
    """Cross-entropy of the cells' shapes and colours, from the pooled feature and from each patch."""
    shapes = len(SHAPES) + 1
    cells = model.cell_probe(F.normalize(features_BD, dim=-1) * features_BD.shape[-1] ** 0.5)
    cells = cells.view(len(features_BD), GRID * GRID, -1)
    patches = model.patch_probe(tokens_BTW[:, -_PATCHES * _PATCHES :])
    patch_labels = labels_B2C[:, :, _patch_cells()]
    loss = features_BD.new_zeros(())
    for logits, labels in ((cells, labels_B2C), (patches, patch_labels)):
        loss = loss + F.cross_entropy(logits[..., :shapes].flatten(0, 1), labels[:, 0].flatten())
        loss = loss + F.cross_entropy(logits[..., shapes:].flatten(0, 1), labels[:, 1].flatten())
    return loss


def contrastive_loss(logits_GN: Tensor, positive_GN: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy with any number of positives a row: targets are uniform over them.

    Pictures that are right for no prompt serve as negatives only.
    """
    by_prompt = -(F.log_softmax(logits_GN, dim=1) * positive_GN).sum(1) / positive_GN.sum(1)
    right = positive_GN.sum(0) > 0
    columns = positive_GN[:, right]
    by_picture = -(F.log_softmax(logits_GN[:, right], dim=0) * columns).sum(0) / columns.sum(0)
    return (by_prompt.mean() + by_picture.mean()) / 2


def preference_labels(batch: Batch) -> tuple[Tensor, Tensor]:
    """(preference, weight) float32 [G, N, N] for every pair under every prompt.

    Content decides; where it is equal, less damage wins within a prompt's own group and equal damage is a tie. Pairs
    without a picture of the prompt's own group have weight 0; those with one outside count a quarter.
    """
    content = torch.from_numpy(batch.content_GN)
    damage = torch.from_numpy(batch.damage_N).float()
    groups, pictures = content.shape
    own = torch.arange(pictures)[None, :] // (pictures // groups) == torch.arange(groups)[:, None]
    difference = content[:, :, None] - content[:, None, :]
    equal = difference.abs() < 0.02
    cleaner = (damage[None, :] - damage[:, None]).sign()[None]
    preference = torch.where(equal, 0.5 + 0.5 * cleaner, (difference > 0).float())
    both = own[:, :, None] & own[:, None, :]
    one = own[:, :, None] ^ own[:, None, :]
    # Two pictures with the same content from different groups say little; two of a group teach what does not matter.
    weight = both.float() + 0.25 * (one & ~equal).float()
    weight = weight * torch.where(equal & (cleaner == 0), 0.3, 1.0)
    return preference, weight * ~torch.eye(pictures, dtype=torch.bool)


SLOTS = (len(SHAPES) + 1, len(COLORS) + 1, 5) * 2 + (len(RELATIONS) + 1,)
"""Classes of what a prompt says: shape, colour and count of both things (0: not named), and their relation."""


def slot_labels(prompts: Sequence[Prompt]) -> Tensor:
    """int64 [G, 7]: what each prompt says, in the classes of ``SLOTS``."""
    labels = torch.zeros(len(prompts), len(SLOTS), dtype=torch.int64)
    for row, prompt in zip(labels, prompts, strict=True):
        for i, include in enumerate(prompt.include):
            color = _COLOR_INDEX[include.color] if include.color else 0
            row[3 * i : 3 * i + 3] = torch.tensor((_SHAPE_INDEX[include.shape], color, include.count))
            if include.position:
                row[6] = RELATIONS.index(include.position[0]) + 1
    return labels


def slot_loss(logits_GK: Tensor, labels_G7: Tensor) -> Tensor:
    """Sum of the seven cross-entropies."""
    parts = torch.split(logits_GK, list(SLOTS), dim=-1)
    return torch.stack([F.cross_entropy(part, labels_G7[:, k]) for k, part in enumerate(parts)]).sum()


def prompt_labels(batch: Batch) -> tuple[Tensor, Tensor]:
    """(preference, weight) float32 [N, G, G]: which of two prompts suits a picture better, by its content.

    A tie counts only where the picture is fully right under both ("a star", "a red star"), so that being right is worth
    the same under every prompt.
    """
    content = torch.from_numpy(batch.content_GN).T
    difference = content[:, :, None] - content[:, None, :]
    equal = difference.abs() < 0.02
    preference = torch.where(equal, 0.5, (difference > 0).float())
    own = torch.arange(len(content))[:, None] // (len(content) // content.shape[1]) == torch.arange(content.shape[1])
    either = own[:, :, None] | own[:, None, :]
    weight = torch.where(equal, 0.3 * ((content[:, :, None] >= 2) & (content[:, None, :] >= 2)), 1.0)
    weight = weight * torch.where(either, 1.0, 0.25)
    return preference, weight * ~torch.eye(content.shape[1], dtype=torch.bool)
