"""Scores of pairs while a reward model is fitted: with features kept where they may be, agreement, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from models.towers import HeadOutput, TowerInput, TowerReward, alike

TEMPERATURE_REACH = math.log(1e3)
"""Temperatures are sought between 1/1000 and 1000."""


@dataclass(frozen=True, eq=False)
class PreparedPair:
    """Two images of one prompt, ready for the towers; ``label`` in [0, 1] is how far the first is preferred."""

    first: TowerInput
    second: TowerInput
    label: float
    weight: float
    prompt: str


@dataclass(frozen=True)
class Agreement:
    """Share of decided pairs whose preferred image has the higher score, and its 95 % interval (Wilson)."""

    accuracy: float
    low: float
    high: float
    pairs: int


class Scorer:
    """Scores of prepared inputs; features are kept where only the head changes."""

    def __init__(self, model: TowerReward, *, keep_features: bool) -> None:
        """``keep_features``: the towers stay as they are, and the head reads nothing but features."""
        self.model = model
        self._keep = keep_features
        self._images: dict[str, Tensor] = {}
        self._texts: dict[str, Tensor] = {}

    def __call__(self, inputs: Sequence[TowerInput]) -> HeadOutput:
        model = self.model
        if self._keep:
            with torch.no_grad():
                images = torch.stack([self._image(entry) for entry in inputs])
                texts = torch.stack([self._text(entry) for entry in inputs])
            return model.head(images, texts)
        scores: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        for places in alike({i: (entry.pixels.shape, entry.tokens.shape) for i, entry in enumerate(inputs)}):
            pixels = torch.stack([inputs[place].pixels for place in places]).to(model.device)
            tokens = torch.stack([inputs[place].tokens for place in places]).to(model.device)
            head = model.head(model.encode_image(model.normalize(pixels)), model.encode_text(tokens))
            for row, place in enumerate(places):
                scores[place] = head.score_B[row], {name: values[row] for name, values in head.outputs.items()}
        ordered = [scores[place] for place in range(len(inputs))]
        outputs = {name: torch.stack([extra[name] for _, extra in ordered]) for name in ordered[0][1]}
        return HeadOutput(torch.stack([score for score, _ in ordered]), outputs)

    def _image(self, entry: TowerInput) -> Tensor:
        if entry.image_id not in self._images:
            pixels = self.model.normalize(entry.pixels[None].to(self.model.device))
            self._images[entry.image_id] = self.model.encode_image(pixels)[0]
        return self._images[entry.image_id]

    def _text(self, entry: TowerInput) -> Tensor:
        if entry.text_id not in self._texts:
            self._texts[entry.text_id] = self.model.encode_text(entry.tokens[None].to(self.model.device))[0]
        return self._texts[entry.text_id]


@torch.no_grad()
def differences(scorer: Scorer, pairs: Sequence[PreparedPair], batch: int) -> Tensor:
    """Score of the first image minus that of the second [pairs], float64."""
    found = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        first, second = scorer([*(p.first for p in part), *(p.second for p in part)]).score_B.chunk(2)
        found.append((first - second).double().cpu())
    return torch.cat(found)


def agreement(scorer: Scorer, pairs: Sequence[PreparedPair], batch: int) -> Agreement:
    """Of decided pairs; equal scores are wrong."""
    decided = [pair for pair in pairs if pair.label != 0.5]
    signs = torch.tensor([1.0 if pair.label > 0.5 else -1.0 for pair in decided], dtype=torch.float64)
    right = int((differences(scorer, decided, batch) * signs > 0).sum())
    count, z = len(decided), 1.959963985
    share = right / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Agreement(share, center - half, center + half, count)


def temperature(scorer: Scorer, pairs: Sequence[PreparedPair], batch: int) -> float | None:
    """The temperature at which held-out pairs are likeliest under Bradley-Terry; None where there is no such."""
    difference = differences(scorer, pairs, batch).numpy()
    label = np.array([pair.label for pair in pairs])

    def surprise(log_temperature: float) -> float:
        margin = difference / math.exp(log_temperature)
        return float(np.mean(np.logaddexp(0.0, -margin) * label + np.logaddexp(0.0, margin) * (1 - label)))

    found = float(minimize_scalar(surprise, bounds=(-TEMPERATURE_REACH, TEMPERATURE_REACH), method="bounded").x)
    return None if abs(found) > 0.98 * TEMPERATURE_REACH else math.exp(found)
