"""The arithmetic and the tables of the benchmark of judges: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.judge.agreement import Agreement
from benchmarks.judge.timing import IMAGES_FIRST, Timing
from benchmarks.measures import ratio, verdict

EXACT_TARGETS = {64: 4.0, 256: 6.0}
"""All pairs of 24 candidates in bfloat16: times faster than one by one, by tokens of an image."""
ADAPTIVE_TARGET = 15.0
TAU_TARGET = 0.9
COLUMNS = (
    "layout", "dtype", "tokens an image (a comparison)", "N", "one by one, ms (measured)", "all pairs, ms",
    "all pairs faster", "largest difference of P", "adaptive comparisons", "adaptive faster",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measurement of ``count`` candidates: one by one (before and after the rest), all pairs, adaptive pairs.

    ``layout``: "images first", as published judges are asked, or "text first", with images that do not see each other.
    """

    count: int
    tokens: int
    dtype: str
    naive: tuple[Timing, Timing]
    every: Timing
    few: Timing
    layout: str = IMAGES_FIRST

    @property
    def naive_pairs(self) -> int:
        """How many of the comparisons were made one by one."""
        return sum(len(each.probabilities) for each in self.naive)

    @property
    def naive_each(self) -> float:
        """Seconds of one comparison one by one."""
        return sum(each.seconds for each in self.naive) / self.naive_pairs

    @property
    def naive_all(self) -> float:
        """Seconds that all pairs in both orders would take one by one: the measured ones, scaled."""
        return self.naive_each * self.count * (self.count - 1)

    @property
    def exact_ratio(self) -> float:
        return ratio(self.naive_all, self.every.seconds)

    @property
    def adaptive_ratio(self) -> float:
        return ratio(self.naive_all, self.few.seconds)

    @property
    def difference(self) -> float:
        """Largest |P cached - P naive| over the comparisons that were made both ways."""
        pairs = [(timing.probabilities[pair], pair) for timing in self.naive for pair in timing.probabilities]
        return max(abs(value - self.every.probabilities[pair]) for value, pair in pairs)

    def target(self) -> float | None:
        """Of ``exact_ratio``."""
        asked = (self.layout, self.count, self.dtype) == (IMAGES_FIRST, 24, "bfloat16")
        return EXACT_TARGETS.get(self.tokens) if asked else None

    def line(self) -> str:
        return (
            f"{self.layout}, {self.dtype} N={self.count} {self.tokens} tokens: naive {1000 * self.naive_each:.0f} ms, "
            f"all pairs {1000 * self.every.each:.0f} ms ({self.exact_ratio:.1f}x), adaptive {self.adaptive_ratio:.1f}x"
        )


def mean(values: Sequence[float]) -> float:
    """Raises ValueError where there is none."""
    if not values:
        raise ValueError("nothing was measured")
    return sum(values) / len(values)


def shares(parts: dict[str, float]) -> str:
    """Parts in percent of their sum, the largest first."""
    whole = sum(parts.values())
    largest_first = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {100 * ratio(seconds, whole):.0f} %" for name, seconds in largest_first)


def _case_row(case: Case) -> str:
    mark = verdict(case.exact_ratio, case.target())
    exact = f"{case.exact_ratio:.1f}x" + (f" (≥ {case.target():g}: {mark})" if mark else "")
    adaptive = f"{case.adaptive_ratio:.1f}x"
    if case.target() is not None:
        adaptive += f" (≥ {ADAPTIVE_TARGET:g}: {verdict(case.adaptive_ratio, ADAPTIVE_TARGET)})"
    return (
        f"| {case.layout} | {case.dtype} | {case.tokens} ({case.every.tokens}) | {case.count} | "
        f"{1000 * case.naive_each:.0f} ({case.naive_pairs}) | "
        f"{1000 * case.every.each:.0f} | {exact} | {case.difference:.1g} | "
        f"{len(case.few.probabilities)} of {case.count * (case.count - 1)} | {adaptive} |"
    )


def _agreement_line(mode: str, found: Sequence[Agreement]) -> str:
    taus = [each.tau for each in found]
    return (
        f"- Adaptive pairs of `shapes-judge` ({mode}), {len(found)} captions: Kendall tau to all pairs in both orders "
        f"{mean(taus):.3f} (least {min(taus):.2f}) with {mean([each.comparisons for each in found]):.0f} comparisons "
        f"in {max(each.rounds for each in found)} rounds; "
        f"target ≥ {TAU_TARGET:g}: {verdict(mean(taus), TAU_TARGET)}."
    )


def markdown(cases: Sequence[Case], found: Mapping[str, Sequence[Agreement]], about: dict[str, Any]) -> str:
    """The report: costs, where the time goes, and by the judge's mode what adaptive pairs lose."""
    lines = [
        "<!-- written by python -m benchmarks.judge; definitions: benchmarks/README.md -->",
        "",
        f"{about['cores']} cores of {about['cpu']} ({about['instructions']}), {about['threads']} threads, torch "
        f"{about['torch']}, load before {about['load_average_before']}"
        + (". **Measured under load: other programs ran; not a final number.**" if about["under_load"] else "."),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_case_row, cases),
        "",
        *(_agreement_line(mode, agreements) for mode, agreements in found.items()),
        "",
        "Where the time of all pairs goes:",
        "",
        *(
            f"- {each.layout}, {each.dtype}, {each.tokens} tokens, N = {each.count}: {shares(each.every.parts)}"
            for each in cases
        ),
    ]
    return "\n".join(lines) + "\n"
