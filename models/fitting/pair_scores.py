"""Scores of pairs while a reward model is fitted, their agreement and calibration; steady towers' features are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from models.fitting.trainable import Steady
from models.towers import HeadOutput, TowerInput, TowerReward, alike

TEMPERATURE_REACH = math.log(1e3)
"""Temperatures are sought between 1/1000 and 1000."""
FEATURE_BYTES = 2 << 30
"""For the features of one tower in float32: 699 000 vectors of 768 numbers, or 2661 images of ImageReward."""


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
    """Scores of prepared inputs; features of towers that stay as they are are computed once."""

    def __init__(self, model: TowerReward, steady: Steady, *, feature_bytes: int = FEATURE_BYTES) -> None:
        """``feature_bytes`` of each tower's features are kept, in main memory; what comes after is computed anew."""
        self.model = model
        self._image_features = _Features(lambda pixels: model.encode_image(model.normalize(pixels)), feature_bytes)
        self._text_features = _Features(model.encode_text, feature_bytes)
        self._steady = steady

    def __call__(self, inputs: Sequence[TowerInput]) -> HeadOutput:
        """Scores [B] and outputs [B] in the order of the inputs; equal images and prompts are encoded once."""
        device = self.model.device
        images = self._image_features([(one.image_id, one.pixels) for one in inputs], self._steady.image, device)
        texts = self._text_features([(one.text_id, one.tokens) for one in inputs], self._steady.text, device)
        scores: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        for places in alike({i: (images[i].shape, texts[i].shape) for i in range(len(inputs))}):
            head = self.model.head(
                torch.stack([images[place] for place in places]), torch.stack([texts[place] for place in places])
            )
            for row, place in enumerate(places):
                scores[place] = head.score_B[row], {name: values[row] for name, values in head.outputs.items()}
        ordered = [scores[place] for place in range(len(inputs))]
        outputs = {name: torch.stack([extra[name] for _, extra in ordered]) for name in ordered[0][1]}
        return HeadOutput(torch.stack([score for score, _ in ordered]), outputs)


class _Features:
    """What one tower makes of its inputs, by their names."""

    def __init__(self, encode: Callable[[Tensor], Tensor], most_bytes: int) -> None:
        self._encode = encode
        self._kept: dict[str, Tensor] = {}
        self._room = most_bytes

    def __call__(self, named: Sequence[tuple[str, Tensor]], steady: bool, device: torch.device) -> list[Tensor]:
        """Features, one an input; those of a ``steady`` tower are without gradient and are kept while there is room."""
        missing = {name: value for name, value in named if name not in self._kept}
        found: dict[str, Tensor] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not steady):
            for names in alike({name: value.shape for name, value in missing.items()}):
                encoded = self._encode(torch.stack([missing[name] for name in names]).to(device))
                found |= zip(names, encoded, strict=True)
        features = [found[name] if name in found else self._kept[name].to(device) for name, _ in named]
        if steady:
            self._keep(found)
        return features

    def _keep(self, found: Mapping[str, Tensor]) -> None:
        for name, feature in found.items():
            if feature.nbytes > self._room:
                return
            # A copy: a row alone would hold the whole batch.
            self._kept[name] = feature.to("cpu", copy=True)
            self._room -= feature.nbytes


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
