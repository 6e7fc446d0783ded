"""Preference accuracy of a scoring function on pairs of pictures whose better one is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage

from models.shapes.preferences import Pair, draw, held_out_pairs, random_picture, sibling_prompt
from models.shapes.prompts import Prompt
from models.shapes.rules import exact_score
from models.shapes.scenes import EVERYTHING, right_scene, truth

Scorer = Callable[[Sequence[Prompt], Sequence[PILImage.Image]], Sequence[float]]


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927)."""
    if count <= 0 or not 0 <= right <= count:
        raise ValueError(f"{right} of {count} is no proportion")
    share, square = right / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z * ((share * (1 - share) + square / 4) / count) ** 0.5 / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(outcomes: Sequence[bool]) -> dict[str, Any]:
    """Share of true outcomes with its number and 95 % interval, rounded to four digits."""
    right = sum(outcomes)
    low, high = wilson_interval(right, len(outcomes))
    return {"accuracy": round(right / len(outcomes), 4), "n": len(outcomes), "ci95": [round(low, 4), round(high, 4)]}


def judge_pairs(scorer: Scorer, pairs: Sequence[Pair], seed: int) -> tuple[list[bool], list[float]]:
    """Whether the better picture of each pair scores strictly higher, and all scores (better ones first)."""
    rng = np.random.default_rng(seed)
    images = draw([pair.better for pair in pairs] + [pair.worse for pair in pairs], rng)
    prompts = [pair.prompt for pair in pairs] * 2
    scores = list(scorer(prompts, images))
    better, worse = scores[: len(pairs)], scores[len(pairs) :]
    return [high > low for high, low in zip(better, worse, strict=True)], scores


def judge_prompts(scorer: Scorer, prompts: Sequence[Prompt], seed: int) -> list[bool]:
    """Whether a right picture of each prompt scores strictly higher under it than under a slightly changed prompt."""
    rng = np.random.default_rng(seed)
    scenes = [right_scene(prompt, rng) for prompt in prompts]
    others = []
    for prompt, scene in zip(prompts, scenes, strict=True):
        other = sibling_prompt(prompt, rng, EVERYTHING)
        while exact_score(other, truth(scene)):
            other = sibling_prompt(prompt, rng, EVERYTHING)
        others.append(other)
    images = draw([random_picture(scene, rng, 0) for scene in scenes], rng)
    scores = list(scorer([*prompts, *others], images * 2))
    return [own > other for own, other in zip(scores[: len(prompts)], scores[len(prompts) :], strict=True)]


def accuracy_report(scorer: Scorer, seed: int, count: int) -> dict[str, Any]:
    """Accuracy on ``count`` fresh in-domain and as many out-of-domain pairs: overall, per task and per kind of pair,
    and how often a picture scores higher under its own prompt than under a slightly changed one ("between_prompts").

    Also the 1st and 99th percentile of the in-domain scores, which tell the model's usual range.
    """
    report: dict[str, Any] = {}
    for offset, (name, out_of_domain) in enumerate((("held_out", False), ("out_of_domain", True))):
        pairs = held_out_pairs(np.random.default_rng(seed + offset), count, out_of_domain=out_of_domain)
        outcomes, scores = judge_pairs(scorer, pairs, seed + offset)
        report[name] = {
            **accuracy(outcomes),
            "tasks": _grouped([pair.prompt.task for pair in pairs], outcomes),
            "kinds": _grouped([pair.kind for pair in pairs], outcomes),
            "faults": _grouped([pair.fault for pair in pairs], outcomes),
            "between_prompts": accuracy(judge_prompts(scorer, [pair.prompt for pair in pairs], seed + offset)),
        }
        if not out_of_domain:
            report["score_percentiles_1_99"] = [round(float(v), 3) for v in np.percentile(scores, (1, 99))]
    return report


def _grouped(keys: Sequence[str], outcomes: Sequence[bool]) -> dict[str, Any]:
    return {
        key: accuracy([right for other, right in zip(keys, outcomes, strict=True) if other == key])
        for key in dict.fromkeys(filter(None, keys))
    }
