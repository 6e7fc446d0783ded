"""What comes back: small values. A sample that failed is None and has a :class:`SampleFailure`, never a number.

The three responses are sequences with one entry per item, in the order asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from trainer_client.errors import SampleFailure, SamplesFailed

T = TypeVar("T")


class MaskedArray(NamedTuple):
    """``values`` float64 with NaN where there is none, and ``ok``, a bool array of the same shape: where there is."""

    values: npt.NDArray[np.float64]
    ok: npt.NDArray[np.bool_]


def _masked(values: Any) -> MaskedArray:
    array = np.array(values, dtype=np.float64)  # None becomes NaN
    return MaskedArray(array, ~np.isnan(array))


@dataclass(frozen=True)
class SampleWarning:
    """What the caller should know about a score that was given, for instance that the prompt was truncated."""

    model: str | None
    code: str
    message: str


@dataclass(frozen=True)
class ModelIdentity:
    """Which scoring function answered: two scores are comparable if their fingerprints are equal."""

    fingerprint: str
    dtype: str


@dataclass(frozen=True)
class ModelInfo:
    """One row of ``GET /models``; ``raw`` is all that the service says of it. ``range`` is the usual one, no bound."""

    name: str
    kind: str | None
    inputs: tuple[str, ...]
    differentiable: bool
    range: tuple[float, float] | None
    license: str | None
    fingerprint: str | None
    ready: bool
    raw: Mapping[str, Any] = field(repr=False)


class _Item:
    errors: list[list[SampleFailure]]

    def failures(self) -> list[tuple[str, SampleFailure]]:
        """Where ("candidate 2") and why samples of this item have no score."""
        return [(f"candidate {k}", failure) for k, each in enumerate(self.errors) for failure in each]

    def raise_for_errors(self) -> Self:
        """Self if everything has a score; raises :class:`SamplesFailed` with every failure otherwise."""
        if found := self.failures():
            raise SamplesFailed(found)
        return self


class _Scored(_Item):
    scores: dict[str, list[float | None]]
    total: list[float | None]
    warnings: list[list[SampleWarning]]

    def as_array(self, model: str | None = None) -> MaskedArray:
        """Scores [K] of ``model`` (None: the weighted total), NaN where failed, with the mask ``ok``.

        Raises KeyError for a model that was not asked.
        """
        return _masked(self.total if model is None else self.scores[model])

    def __repr__(self) -> str:
        failed = len(self.failures())
        return f"{type(self).__name__}(total={self.total}, scores={self.scores}, failures={failed})"


@dataclass(frozen=True, repr=False)
class ItemScores(_Scored):
    """Scores of one item's K candidates.

    ``scores`` has a list [K] per model and ``total`` the weighted sums [K]; ``outputs`` further numbers and
    ``details`` (with ``explain``) reasons and the like, for the models that give them; ``errors`` and ``warnings`` a
    list per candidate.
    """

    scores: dict[str, list[float | None]]
    total: list[float | None]
    errors: list[list[SampleFailure]]
    warnings: list[list[SampleWarning]]
    outputs: dict[str, list[dict[str, float] | None]]
    details: dict[str, list[dict[str, Any] | None]]


@dataclass(frozen=True, repr=False, eq=False)
class ItemGradients(_Scored):
    """Scores of one item's K images and ``gradients``: per image d(total)/d(image), float32 [3, H, W], or None."""

    scores: dict[str, list[float | None]]
    total: list[float | None]
    errors: list[list[SampleFailure]]
    warnings: list[list[SampleWarning]]
    gradients: list[npt.NDArray[np.float32] | None]


@dataclass(frozen=True)
class ComparisonResult:
    """Whether candidate ``i`` is preferred to ``j``.

    ``probability`` in [0, 1] over the orders asked; ``orders`` the probability that i is preferred when shown as
    (i, j) and as (j, i), None for one not asked; ``text`` the judge's words of each order with ``explain``; ``parse``
    "ok" or a code; ``error`` why ``probability`` is None.
    """

    i: int
    j: int
    probability: float | None
    orders: tuple[float | None, float | None]
    text: tuple[str | None, ...] | None
    parse: str
    error: SampleFailure | None


@dataclass(frozen=True, repr=False)
class ItemComparisons(_Item):
    """Comparisons among one item's N candidates.

    ``probabilities`` [N][N]: entry (i, j) is how likely i is preferred to j, None where not asked or failed.
    ``win_rate`` [N] in [0, 1]; ``strength`` and ``strength_stderr`` [N]: Bradley-Terry, in logits; ``ranking``
    indices, best first; ``errors`` and ``warnings`` a list per candidate. Where the item has a reference,
    ``reference`` [N] is how likely each candidate is preferred to it, and its comparisons name it by the index N.
    ``position_bias``: by how much a judge prefers what it is shown first, 0 without bias; None where it is not known.
    """

    probabilities: list[list[float | None]]
    win_rate: list[float | None]
    strength: list[float | None]
    strength_stderr: list[float | None]
    ranking: list[int]
    comparisons: list[ComparisonResult]
    errors: list[list[SampleFailure]]
    warnings: list[list[SampleWarning]]
    reference: list[float | None] | None = None
    position_bias: float | None = None

    def failures(self) -> list[tuple[str, SampleFailure]]:
        """Where ("candidate 2", "comparison (0, 2)") and why preferences are missing."""
        failed = [(f"comparison ({c.i}, {c.j})", c.error) for c in self.comparisons if c.error is not None]
        return super().failures() + failed

    def as_array(self, what: str = "win_rate") -> MaskedArray:
        """``win_rate``, ``strength``, ``strength_stderr`` [N] or ``probabilities`` [N, N], NaN where there is none."""
        if what not in ("win_rate", "strength", "strength_stderr", "probabilities"):
            raise KeyError(what)
        return _masked(getattr(self, what))

    def __repr__(self) -> str:
        asked, failed = len(self.comparisons), len(self.failures())
        return f"ItemComparisons(ranking={self.ranking}, win_rate={self.win_rate}, asked={asked}, failures={failed})"


ItemResult = TypeVar("ItemResult", bound=_Item)


@dataclass(frozen=True, repr=False, eq=False)
class _Response(Sequence[ItemResult], Generic[ItemResult]):
    results: list[ItemResult]
    models: dict[str, ModelIdentity]
    timing_ms: dict[str, float]

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each model that answered."""
        return {name: identity.fingerprint for name, identity in self.models.items()}

    def failures(self) -> list[tuple[str, SampleFailure]]:
        """Where ("item 0 candidate 2") and why samples have no score."""
        return [
            (f"item {i} {where}", failure) for i, each in enumerate(self.results) for where, failure in each.failures()
        ]

    def raise_for_errors(self) -> Self:
        """Self if everything has a score; raises :class:`SamplesFailed` with every failure otherwise."""
        if found := self.failures():
            raise SamplesFailed(found)
        return self

    @overload
    def __getitem__(self, index: int) -> ItemResult: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ItemResult]: ...

    def __getitem__(self, index: int | slice) -> ItemResult | Sequence[ItemResult]:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        names = ", ".join(self.models)
        return f"{type(self).__name__}({len(self)} items by {names}, failures={len(self.failures())})"


def _concatenate(arrays: Iterable[MaskedArray]) -> MaskedArray:
    listed = list(arrays)
    return MaskedArray(np.concatenate([a.values for a in listed]), np.concatenate([a.ok for a in listed]))


class ScoreResponse(_Response[ItemScores]):
    """The answer to ``score``: one :class:`ItemScores` per item, ``models`` that answered, ``timing_ms`` by stage."""

    def as_array(self, model: str | None = None) -> MaskedArray:
        """Scores of ``model`` (None: the total) of all items' candidates in one row, NaN where failed, and ``ok``."""
        return _concatenate(item.as_array(model) for item in self.results)


class CompareResponse(_Response[ItemComparisons]):
    """The answer to ``compare``: one :class:`ItemComparisons` per item."""


class GradientResponse(_Response[ItemGradients]):
    """The answer to ``gradient``: one :class:`ItemGradients` per item."""

    def as_array(self, model: str | None = None) -> MaskedArray:
        """Scores of ``model`` (None: the total) of all items' images in one row, NaN where failed, and ``ok``."""
        return _concatenate(item.as_array(model) for item in self.results)


@dataclass(frozen=True)
class WireCounts:
    """What a client has done so far.

    ``requests`` sent, of which ``retries`` after a failure; ``bytes_sent`` and ``bytes_received`` of bodies;
    ``cpu_seconds`` of this process for conversion, sending, reading and checking (an async client counts conversion
    and checking only: the sockets are its event loop's).
    """

    requests: int = 0
    retries: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    cpu_seconds: float = 0.0


def merge_scores(weights: Mapping[str, float], parts: Sequence[ScoreResponse]) -> ScoreResponse:
    """Answers about different models and the same items -> one; a total needs every score and is None without.

    ``weights`` holds all the models, in the order in which the result has them.
    """
    merged = []
    for items in zip(*parts, strict=True):
        scores = _by_name(weights, [item.scores for item in items])
        merged.append(
            ItemScores(
                scores,
                _totals(weights, scores),
                _merge_errors(items),
                _merge_warnings(items),
                outputs=_by_name(weights, [item.outputs for item in items]),
                details=_by_name(weights, [item.details for item in items]),
            )
        )
    return ScoreResponse(merged, _by_name(weights, [part.models for part in parts]), _slowest(parts))


def merge_gradients(weights: Mapping[str, float], parts: Sequence[GradientResponse]) -> GradientResponse:
    """As :func:`merge_scores`; the gradient of a total is the sum of the parts', which are weighted already."""
    merged = []
    for items in zip(*parts, strict=True):
        scores = _by_name(weights, [item.scores for item in items])
        totals = _totals(weights, scores)
        gradients: list[npt.NDArray[np.float32] | None] = []
        for k, total in enumerate(totals):
            # a sample with every score has every part's total and gradient: the parser refuses other answers
            shares = [gradient for item in items if (gradient := item.gradients[k]) is not None]
            gradients.append(None if total is None else np.sum(shares, axis=0, dtype=np.float32))
        merged.append(ItemGradients(scores, totals, _merge_errors(items), _merge_warnings(items), gradients))
    return GradientResponse(merged, _by_name(weights, [part.models for part in parts]), _slowest(parts))


def _by_name(weights: Mapping[str, float], parts: Sequence[Mapping[str, T]]) -> dict[str, T]:
    found = {name: value for part in parts for name, value in part.items()}
    return {name: found[name] for name in weights if name in found}


def _totals(weights: Mapping[str, float], scores: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    rows: list[list[float | None]] = [list(row) for row in zip(*(scores[name] for name in weights), strict=True)]
    return [
        None
        if None in row
        else math.fsum(weight * (score or 0.0) for weight, score in zip(weights.values(), row, strict=True))
        for row in rows
    ]


def _merge_errors(items: Sequence[_Scored]) -> list[list[SampleFailure]]:
    """Failures per candidate; one for every model of a part is for every model only if all parts have one."""
    merged = []
    for per_part in zip(*(item.errors for item in items), strict=True):
        for_all = [[failure for failure in failures if failure.model is None] for failures in per_part]
        if all(for_all):
            merged.append(for_all[0])
            continue
        row = []
        for item, failures in zip(items, per_part, strict=True):
            for failure in failures:
                named = item.scores if failure.model is None else [failure.model]
                row += [SampleFailure(model, failure.code, failure.message) for model in named]
        merged.append(row)
    return merged


def _merge_warnings(items: Sequence[_Scored]) -> list[list[SampleWarning]]:
    """Warnings per candidate, each once: what is said of an image is said by every service that saw it."""
    return [
        list(dict.fromkeys(warning for warnings in per_part for warning in warnings))
        for per_part in zip(*(item.warnings for item in items), strict=True)
    ]


def _slowest(parts: Sequence[ScoreResponse] | Sequence[GradientResponse]) -> dict[str, float]:
    """Parts run side by side: each stage took as long as its slowest."""
    stages = dict.fromkeys(stage for part in parts for stage in part.timing_ms)
    return {stage: max(part.timing_ms.get(stage, 0.0) for part in parts) for stage in stages}
