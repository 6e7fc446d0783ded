"""How long and how large each part of the benchmark is, and the form of a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.measures import verdict


@dataclass(frozen=True)
class Plan:
    """Sizes of one run. Times are in seconds; ``limit_images`` is the work of one measurement of the offline limit."""

    quick: bool = False
    seconds: float = 20.0
    warmup_s: float = 3.0
    overload_s: float = 45.0
    overload_warmup_s: float = 12.0
    limit_images: int = 96
    images: int = 96
    group: int = 24
    group_clients: int = 4
    queue_cost: int = 64
    overload_factor: int = 10
    neighbours: int = 8
    rank_images: int = 32
    rank_prompts: int = 12


QUICK = Plan(
    quick=True, seconds=5.0, warmup_s=2.0, overload_s=10.0, overload_warmup_s=4.0, limit_images=48, images=48,
    queue_cost=32, rank_images=16, rank_prompts=4,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One number of the report: usually a ratio, its target if it has one, and the numbers that it was made of."""

    section: str
    name: str
    value: float
    unit: str
    detail: str
    target: float | None = None
    direction: Literal["at least", "at most"] = "at least"

    @property
    def verdict(self) -> str:
        return verdict(self.value, self.target, self.direction)

    def as_dict(self) -> dict[str, Any]:
        return {
            "section": self.section, "name": self.name, "value": self.value, "unit": self.unit, "target": self.target,
            "direction": self.direction, "verdict": self.verdict, "detail": self.detail,
        }  # fmt: skip
