"""Results in words: the rows of the table and the sentences below it, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LABELS = {
    "ranking_agreement": "ranking agreement, mean over prompts (HPDv2)",
    "kendall_tau_b": "Kendall's tau-b, mean over prompts",
    "pair_accuracy": "pair accuracy, people's ties left out (ImageReward, HPDv3)",
    "pair_accuracy_by_prompt": "pair accuracy, mean over prompts",
    "accuracy_with_ties": "accuracy with ties, half credit (Pick-a-Pic)",
    "accuracy_with_exact_ties": "accuracy with ties, no half credit (GenAI-Bench)",
    "position_bias": "position bias: P(image shown first) - 0.5",
    "order_flips": "verdicts that turn with the order",
}
"""The measures with an interval, in the order in which they are told."""

UNITS = {"ranking_agreement": "rankings", "kendall_tau_b": "rankings", "pair_accuracy_by_prompt": "prompts"}
SHARES = frozenset(LABELS) - {"kendall_tau_b", "position_bias"}


@dataclass(frozen=True)
class MeasureRow:
    """One line of the table, as text."""

    label: str
    value: str
    interval: str
    count: str
    headline: bool


def measure_rows(found: Mapping[str, Any]) -> list[MeasureRow]:
    """The measures of a results document that have a value; calibration, which has no interval, comes last."""
    measures = found["measures"]
    rows = []
    for name, label in LABELS.items():
        estimate = measures.get(name)
        if estimate is None or estimate["value"] is None:
            continue
        show = _percent if name in SHARES else _plain
        known = estimate["low"] is not None
        interval = f"{show(estimate['low'])} .. {show(estimate['high'])}" if known else "one prompt has none"
        rows.append(
            MeasureRow(
                label,
                show(estimate["value"]),
                interval,
                f"{estimate['count']} {UNITS.get(name, 'pairs')}",
                name == found["headline"],
            )
        )
    if "calibration_error" in measures:
        value = _percent(measures["calibration_error"])
        rows.append(MeasureRow("expected calibration error", value, "", f"{measures['pairs']} pairs", False))
    return rows


def counted(found: Mapping[str, Any]) -> list[str]:
    """What was asked, what is missing and why: nothing that failed is part of a measure."""
    data, measures = found["data"], found["measures"]
    drawn = "" if data["limit"] is None else f" (drawn with seed {data['seed']})"
    pairs = f"{measures['pairs']} pairs judged, {measures['ties']} of them ties of people's"
    lines = [f"{data['asked']} of {data['rows']} rows{drawn}, {pairs}"]
    if threshold := measures.get("tie_threshold"):
        lines.append(f"The model ties up to a probability gap of {threshold['value']:g} ({threshold['source']})")
    if measures.get("rankings_without_order"):
        lines.append(f"{measures['rankings_without_order']} rankings have equal scores or ranks throughout and no tau")
    if data["unreadable"]:
        lines.append(f"Unreadable rows, left out: {_codes(data['unreadable'])}")
    if data["without_verdict"]:
        lines.append(f"{data['without_verdict']} of {data['asked_pairs']} pairs have no verdict and are left out")
    if data["failures"]:
        lines.append(f"Failures: {_codes(data['failures'])}")
    return lines


def _codes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{code} {count}" for code, count in counts.items())


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _plain(value: float) -> str:
    return f"{value:+.3f}"
