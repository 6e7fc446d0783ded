"""Rows of pictures that differ in brightness, and people who prefer by it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from models.fitting.preference_data import PreferenceRow

PROMPTS = tuple(f"a photo of a red circle number {i}" for i in range(10))


@dataclass(frozen=True)
class Drawn:
    """A picture in memory."""

    data: bytes
    name: str

    def read(self) -> bytes:
        return self.data


def picture(brightness: float, rng: np.random.Generator) -> Drawn:
    noise = rng.integers(0, 60, (48, 48, 3))
    file = io.BytesIO()
    Image.fromarray((noise + 195 * brightness).astype(np.uint8)).save(file, "PNG")
    return Drawn(file.getvalue(), f"{brightness:.2f}")


Prefer = Callable[[float, float, np.random.Generator], float]


def rows(count: int, prefer: Prefer, seed: int = 0) -> list[PreferenceRow]:
    """Pairs of pictures of different brightness, several of each prompt."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        dark, light = sorted(rng.uniform(0, 1, 2).tolist())
        first, second = (dark, light) if rng.random() < 0.5 else (light, dark)
        images = (picture(first, rng), picture(second, rng))
        made.append(PreferenceRow(str(i), PROMPTS[i % len(PROMPTS)], images, preference=prefer(first, second, rng)))
    return made


def brighter(first: float, second: float, _: np.random.Generator) -> float:
    return float(first > second)


def darker(first: float, second: float, _: np.random.Generator) -> float:
    return float(first < second)


def by_chance(_first: float, _second: float, rng: np.random.Generator) -> float:
    return float(rng.random() < 0.5)
