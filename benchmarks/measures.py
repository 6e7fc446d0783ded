"""The arithmetic of the benchmark: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from scipy.stats import kendalltau


def ratio(value: float, base: float) -> float:
    """value / base; raises ValueError for a base that is not positive, because such a ratio says nothing."""
    if not base > 0:
        raise ValueError(f"a ratio over {base} says nothing")
    return value / base


def best(measurements: Sequence[float]) -> float:
    """The largest of repeated measurements of a rate: noise of a shared machine only ever slows a program down."""
    if not measurements:
        raise ValueError("nothing was measured")
    return max(measurements)


def verdict(value: float, target: float | None, direction: Literal["at least", "at most"] = "at least") -> str:
    """``meets``, ``misses``, or an empty string where there is no target."""
    if target is None:
        return ""
    return "meets" if (value >= target if direction == "at least" else value <= target) else "misses"


def largest_difference(reference: Mapping[int, float], others: Sequence[Mapping[int, float]]) -> float:
    """max |reference[i] - other[i]| over all samples i of ``others``; raises KeyError where the reference lacks one."""
    return max((abs(reference[i] - score) for other in others for i, score in other.items()), default=0.0)


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b of two scorings of the same images, in [-1, 1]. Raises ValueError where a scoring is constant."""
    statistic = float(kendalltau(first, second).statistic)
    if statistic != statistic:
        raise ValueError("Kendall's tau is not defined where all scores are equal")
    return statistic


def top1_agreement(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Share of the prompts (rows) for which both scorings put the same image (column) first."""
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} prompts cannot be compared")
    same = sum(
        max(range(len(a)), key=a.__getitem__) == max(range(len(b)), key=b.__getitem__)
        for a, b in zip(first, second, strict=True)
    )
    return same / len(first)


def rotations(count: int) -> list[list[int]]:
    """The orders in which each of ``count`` samples stands once at every position."""
    return [[(start + i) % count for i in range(count)] for start in range(count)]
