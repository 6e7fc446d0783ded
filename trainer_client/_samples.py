"""Samples as other people's loops have them, flat lists of prompts and candidates -> items, and their scores back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trainer_client._images import TensorLike, iterate_images
from trainer_client.client import RewardClient
from trainer_client.errors import SampleFailure, SamplesFailed
from trainer_client.items import Candidate, Item

Models: TypeAlias = str | Sequence[str] | Mapping[str, float]
"""One reward model, several of weight 1, or weights by name."""
Scores: TypeAlias = npt.NDArray[np.float64]
Metadata: TypeAlias = Sequence[Mapping[str, Any] | None] | Mapping[str, Any] | None
"""A mapping (or None) per sample; None, or an empty mapping, for all of them."""


@dataclass(frozen=True, eq=False)
class SampleScores:
    """Scores of B samples in the order asked: float64 [B], NaN where a sample failed.

    ``total`` is weighted, ``scores`` holds each model's own. ``failures`` says by place why a score is missing.
    """

    total: Scores
    scores: dict[str, Scores]
    failures: dict[int, list[SampleFailure]]
    fingerprints: dict[str, str]

    def raise_for_errors(self) -> None:
        """Raise :class:`SamplesFailed` with every failure, if there is one."""
        if self.failures:
            raise SamplesFailed([(f"sample {place}", each) for place in self.failures for each in self.failures[place]])

    def info(self) -> dict[str, Any]:
        """What a trainer may log beside the scores: ``ok`` bool [B], ``failures``, ``fingerprints``."""
        return {"ok": ~np.isnan(self.total), "failures": self.failures, "fingerprints": self.fingerprints}


def score_samples(
    client: RewardClient,
    models: Models,
    prompts: Sequence[str],
    candidates: Sequence[Candidate],
    metadata: Metadata = None,
    *,
    deadline: float | None = None,
) -> SampleScores:
    """Score B samples in one call, samples of equal prompt and metadata as one item.

    ``deadline``: seconds. Raises ValueError where the lengths differ, TypeError for metadata of another form, and what
    :meth:`RewardClient.score` raises.
    """
    places = group(prompts, candidates, _rows(metadata, len(candidates)))
    items = [item for item, _ in places]
    response = client.score(items, models, deadline=deadline)
    order = np.array([place for _, each in places for place in each])
    failures: dict[int, list[SampleFailure]] = {}
    for (_, each), result in zip(places, response, strict=True):
        failures |= {place: errors for place, errors in zip(each, result.errors, strict=True) if errors}
    return SampleScores(
        total=_ordered(response.as_array().values, order),
        scores={name: _ordered(response.as_array(name).values, order) for name in response.models},
        failures=dict(sorted(failures.items())),
        fingerprints=response.fingerprints,
    )


def _ordered(values: Scores, order: npt.NDArray[np.int_]) -> Scores:
    ordered = np.empty_like(values)
    ordered[order] = values
    return ordered


def group(
    prompts: Sequence[str], candidates: Sequence[Candidate], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[Item, list[int]]]:
    """Items, which are samples of equal prompt and metadata, each with the places of its candidates."""
    if len(prompts) != len(candidates):
        raise ValueError(f"{len(prompts)} prompts and {len(candidates)} candidates")
    groups: dict[str, list[int]] = {}
    for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        groups.setdefault(json.dumps([prompt, row], sort_keys=True), []).append(place)
    return [
        (Item(prompts[p[0]], metadata=rows[p[0]], candidates=[candidates[place] for place in p]), p)
        for p in groups.values()
    ]


def _rows(metadata: Metadata, count: int) -> list[dict[str, Any]]:
    if metadata is None or (isinstance(metadata, Mapping) and not metadata):
        return [{} for _ in range(count)]
    if isinstance(metadata, Mapping | str):
        raise TypeError("metadata is a sequence with a mapping (or None) per sample")
    if len(metadata) != count:
        raise ValueError(f"{len(metadata)} rows of metadata for {count} samples")
    return [dict(row or {}) for row in metadata]


def image_candidates(images: Any) -> list[Candidate]:
    """A batch [B, ...] or a sequence of images as candidates; a lone image raises TypeError."""
    if isinstance(images, TensorLike):
        images = images.detach().cpu()  # one copy from the device instead of one per image
    return [Candidate(image=image) for image in iterate_images(images)]
