"""Rows of people and verdicts of a model -> the numbers of results.json, the lines of rows.jsonl, the worst pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.fitting.evaluation import (
    Estimate,
    Floats,
    JudgedPairs,
    best_tie_threshold,
    by_prompt,
    credit_with_ties,
    expected_calibration_error,
    kendall_tau_b,
    position_bias,
    ranking_agreement,
    reliability,
    right_of_untied,
    weighted_mean,
)
from models.fitting.preference_data import LabelledPair, PreferenceData, PreferenceRow, RowContext
from service.evaluation.asking import Asked, PairVerdict, RowVerdict

HEADLINES = {
    "jsonl": "pair_accuracy",
    "hpdv2": "ranking_agreement",
    "pickapic": "accuracy_with_ties",
    "imagerewarddb": "pair_accuracy",
    "hpdv3": "pair_accuracy",
}
"""The measure that the schema's own paper reports."""


@dataclass(frozen=True)
class TieThreshold:
    """``value``: largest probability gap that counts as the model's tie; ``source``: where it comes from."""

    value: float = 0.0
    source: str = "equal scores only"


@dataclass(frozen=True, eq=False)
class Judged:
    """What was asked and answered: row by row, one verdict each."""

    rows: Sequence[PreferenceRow]
    verdicts: Sequence[RowVerdict]

    def pairs(self) -> Iterator[tuple[int, LabelledPair, PairVerdict]]:
        """(row, people's label, model's verdict) of every pair that was judged."""
        for number, (row, verdict) in enumerate(zip(self.rows, self.verdicts, strict=True)):
            labels = {(pair.first, pair.second): pair for pair in row.pairs}
            for judged in verdict.pairs:
                yield number, labels[judged.first, judged.second], judged

    def prompts(self) -> list[int]:
        """The prompt's number of each row: rows of one prompt are not independent."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(row.prompt, len(numbers)) for row in self.rows]

    def judged_pairs(self) -> JudgedPairs:
        prompts, found = self.prompts(), list(self.pairs())
        return JudgedPairs(
            margin=np.array([verdict.margin for _, _, verdict in found], dtype=np.float64),
            probability=np.array([verdict.probability for _, _, verdict in found], dtype=np.float64),
            label=np.array([label.label for _, label, _ in found], dtype=np.float64),
            prompt=np.array([prompts[row] for row, _, _ in found], dtype=np.int64),
            weight=np.array([self.rows[row].weight for row, _, _ in found], dtype=np.float64),
        )


def tuned_threshold(judged: Judged, name: str) -> TieThreshold:
    """Pick-a-Pic's threshold for ``judged``, a validation file called ``name``; raises ValueError for no pairs."""
    return TieThreshold(best_tie_threshold(judged.judged_pairs()), f"tuned on {name}")


def measures(judged: Judged, ties: TieThreshold, seed: int = 0) -> dict[str, Any]:
    """All measures that the data allows; see docs/evaluation.md for what each is and where it comes from."""
    pairs = judged.judged_pairs()
    found: dict[str, Any] = {"pairs": len(pairs), "ties": len(pairs) - len(pairs.untied)}
    if not len(pairs):
        return found
    untied = pairs.untied
    right = right_of_untied(untied)
    found["pair_accuracy"] = weighted_mean(right, untied.prompt, untied.weight, seed=seed)
    found["pair_accuracy_by_prompt"] = _mean_by_prompt(right, untied, seed)
    credit = credit_with_ties(pairs, ties.value)
    exact = credit_with_ties(pairs, ties.value, half=0.0)
    found["accuracy_with_ties"] = weighted_mean(credit, pairs.prompt, pairs.weight, seed=seed)
    found["accuracy_with_exact_ties"] = weighted_mean(exact, pairs.prompt, pairs.weight, seed=seed)
    found["tie_threshold"] = asdict(ties)
    found["calibration_error"] = expected_calibration_error(pairs)
    found["reliability"] = [asdict(row) for row in reliability(pairs)]
    found |= _of_rankings(judged, seed) | _of_orders(judged, seed)
    return {name: asdict(value) if isinstance(value, Estimate) else value for name, value in found.items()}


def _mean_by_prompt(right: Floats, pairs: JudgedPairs, seed: int) -> Estimate:
    _, place = np.unique(pairs.prompt, return_inverse=True)
    if not len(place):
        return Estimate(None, None, None, 0)
    means = np.bincount(place, right * pairs.weight) / np.bincount(place, pairs.weight)
    return weighted_mean(means, np.arange(len(means)), seed=seed)


def _of_rankings(judged: Judged, seed: int) -> dict[str, Any]:
    """Of rows that rank, and whose images all have a score."""
    scores, ranks = [], []
    for row, verdict in zip(judged.rows, judged.verdicts, strict=True):
        known = [score for score in verdict.scores if score is not None]
        if row.ranks is not None and len(known) == len(row.ranks):
            scores.append(np.array(known))
            ranks.append(np.array(row.ranks))
    if not scores:
        return {}
    agreement, _ = by_prompt(ranking_agreement, scores, ranks, seed)
    tau, without = by_prompt(kendall_tau_b, scores, ranks, seed)
    return {"ranking_agreement": agreement, "kendall_tau_b": tau, "rankings_without_order": without}


def _of_orders(judged: Judged, seed: int) -> dict[str, Any]:
    """Of pairs that were judged in both orders."""
    prompts = judged.prompts()
    both = [(verdict.orders, prompts[row]) for row, _, verdict in judged.pairs() if verdict.orders is not None]
    if not both:
        return {}
    orders = np.array([orders for orders, _ in both], dtype=np.float64)
    found = position_bias(orders[:, 0], orders[:, 1], np.array([prompt for _, prompt in both]), seed=seed)
    return {"position_bias": found.bias, "order_flips": found.flips}


def document(
    asked: Asked, data: PreferenceData, judged: Judged, ties: TieThreshold, about: dict[str, Any]
) -> dict[str, Any]:
    """What results.json holds; ``about``: file, seed and limit."""
    failures = Counter(failure.code for verdict in judged.verdicts for failure in verdict.failures)
    expected = sum(len(row.pairs) for row in judged.rows)
    found = measures(judged, ties, int(about["seed"]))
    headline = HEADLINES[data.schema]
    if found.get(headline, {}).get("value") is None:
        headline = "pair_accuracy"
    return {
        "model": {
            "name": asked.model.name,
            "kind": asked.model.kind,
            "fingerprint": asked.model.fingerprint,
            "dtype": asked.model.dtype,
            "calibration": asked.model.calibration.model_dump(),
            "route": asked.route,
        },
        "data": about
        | {
            "schema": data.schema,
            "rows": len(data.rows),
            "unreadable": data.skipped_by_code(),
            "asked": len(judged.rows),
            "asked_pairs": expected,
            "without_verdict": expected - found["pairs"],
            "failures": dict(failures.most_common()),
        },
        "headline": headline,
        "measures": found,
    }


def row_lines(judged: Judged) -> Iterator[dict[str, Any]]:
    """One object a row, for rows.jsonl."""
    for row, verdict in zip(judged.rows, judged.verdicts, strict=True):
        people = {"preference": row.preference} if row.ranks is None else {"ranks": list(row.ranks)}
        yield {
            "key": row.key,
            "prompt": row.prompt,
            "images": [picture.name for picture in row.images],
            **({} if row.context is None else {"context": _named(row.context)}),
            **people,
            "weight": row.weight,
            "scores": list(verdict.scores),
            "pairs": [asdict(pair) for pair in verdict.pairs],
            "failures": [asdict(failure) for failure in verdict.failures],
        }


def _named(context: RowContext) -> dict[str, Any]:
    """What a row says of its context; its pictures by their names."""
    shown = {"image": context.image, "mask": context.mask}
    named: dict[str, Any] = {name: picture.name for name, picture in shown.items() if picture is not None}
    if context.frames:
        named["frames"] = [frame.name for frame in context.frames]
    return named | context.texts


@dataclass(frozen=True)
class Disagreement:
    """A pair whose verdict is not people's. ``probability``: the model's, of the image that people like less."""

    row: int
    preferred: int
    other: int
    probability: float


def disagreements(judged: Judged, most: int) -> list[Disagreement]:
    """The worst ``most`` by probability of the wrong side, at most one a row; equal ones in the order of the rows."""
    worst: dict[int, Disagreement] = {}
    for row, people, model in judged.pairs():
        if people.label == 0.5 or (people.label - 0.5) * model.margin > 0:
            continue
        first_preferred = people.label > 0.5
        wrong = 1 - model.probability if first_preferred else model.probability
        preferred, other = (people.first, people.second) if first_preferred else (people.second, people.first)
        if wrong > worst.get(row, Disagreement(row, 0, 0, -math.inf)).probability:
            worst[row] = Disagreement(row, preferred, other, wrong)
    return sorted(worst.values(), key=lambda each: -each.probability)[:most]
