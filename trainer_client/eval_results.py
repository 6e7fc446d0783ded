"""What an evaluation found: scores of one or two policies -> numbers for evaluation.json and tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from trainer_client.eval_statistics import (
    Floats,
    Interval,
    PairedDifference,
    Wins,
    mean_interval,
    paired_difference,
    rows_by_tag,
    seed_wins,
    win_rate,
)
from trainer_client.prompts import Prompt

ALL = "all"
"""Stands in for a tag where all prompts are meant."""


@dataclass(frozen=True, eq=False)
class PolicyScores:
    """Scores [P, S] of one policy's images by the name of the reward, NaN where one failed.

    ``failures`` counts the reasons; ``seconds`` is the time it took to draw and score.
    """

    label: str
    scores: Mapping[str, Floats]
    failures: Mapping[str, int] = field(default_factory=dict)
    seconds: float = math.nan


@dataclass(frozen=True, eq=False)
class Judgement:
    """Probabilities [P, S] of the judge that the first policy's image is the better one, NaN where it failed."""

    name: str
    probabilities: Floats
    failures: Mapping[str, int] = field(default_factory=dict)


def groups(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """The rows of all prompts, and of each tag where there is more than one."""
    tagged = rows_by_tag([prompt.tag for prompt in prompts])
    return {ALL: list(range(len(prompts)))} | (tagged if len(tagged) > 1 else {})


def means(scores: Mapping[str, Floats], rows: Mapping[str, list[int]]) -> dict[str, dict[str, Interval]]:
    """The mean of each reward over each group of prompts."""
    return {name: {tag: mean_interval(table[kept]) for tag, kept in rows.items()} for name, table in scores.items()}


def differences(
    first: PolicyScores, second: PolicyScores, rows: Mapping[str, list[int]]
) -> dict[str, dict[str, PairedDifference]]:
    """By how much the first policy is above the second, by reward and group of prompts."""
    return {
        name: {tag: paired_difference(table[kept], second.scores[name][kept]) for tag, kept in rows.items()}
        for name, table in first.scores.items()
    }


def to_json(
    prompts: Sequence[Prompt], found: Sequence[PolicyScores], judgement: Judgement | None = None
) -> dict[str, Any]:
    """All numbers of one policy or two, and the scores that they come from; may hold NaN (``finite_or_none``)."""
    rows = groups(prompts)
    result: dict[str, Any] = {
        "results": {
            each.label: {
                name: {**asdict(by_tag[ALL]), "tags": {tag: asdict(by_tag[tag]) for tag in rows if tag != ALL}}
                for name, by_tag in means(each.scores, rows).items()
            }
            for each in found
        },
        "failures": {each.label: dict(each.failures) for each in found},
        "seconds": {each.label: round(each.seconds, 3) for each in found},
        "scores": {each.label: {name: table.tolist() for name, table in each.scores.items()} for each in found},
    }
    if len(found) == 2:
        first, second = found
        result["comparison"] = {
            name: {
                **asdict(by_tag[ALL]),
                "tags": {tag: asdict(by_tag[tag]) for tag in rows if tag != ALL},
                "seeds": [asdict(wins) for wins in seed_wins(first.scores[name], second.scores[name])],
            }
            for name, by_tag in differences(first, second, rows).items()
        }
    if judgement is not None:
        rates = {tag: asdict(win_rate(judgement.probabilities[kept])) for tag, kept in rows.items()}
        result["judge"] = {
            "name": judgement.name,
            **rates.pop(ALL),
            "tags": rates,
            "failures": dict(judgement.failures),
            "probabilities": judgement.probabilities.tolist(),
        }
    return result


# ---------------------------------------------------------------------------------------------------- for people


def tables(prompts: Sequence[Prompt], found: Sequence[PolicyScores], judgement: Judgement | None = None) -> list[Table]:
    """The same as tables: the means of each policy; for two, their differences and what the judge prefers."""
    rows = groups(prompts)
    seeds = next(iter(found[0].scores.values())).shape[1]
    made = [_means_table(each, rows, f"{each.label}: {len(prompts)} prompts x {seeds} seeds") for each in found]
    if len(found) == 2:
        made.append(_difference_table(found[0], found[1], rows))
    if judgement is not None:
        made.append(_judge_table(judgement, rows))
    return made


def _means_table(found: PolicyScores, rows: Mapping[str, list[int]], title: str) -> Table:
    table = Table("reward", "prompts", "mean", "95 % interval", "failed", title=title)
    for name, by_tag in means(found.scores, rows).items():
        for tag, interval in by_tag.items():
            failed = str(interval.failed) if interval.failed else ""
            table.add_row(
                _head(name, tag), str(interval.prompts), number(interval.mean), ends(interval), failed,
                end_section=tag == list(by_tag)[-1],
            )  # fmt: skip
    return table


def _difference_table(first: PolicyScores, second: PolicyScores, rows: Mapping[str, list[int]]) -> Table:
    wins = {name: seed_wins(table, second.scores[name]) for name, table in first.scores.items()}
    table = Table(
        "reward", "diff.", "95 % interval", "p", "better", "worse",
        title=f"{first.label} minus {second.label}, paired by prompt",
        caption="\n".join(f"prompts won and lost, by seed: {name} {_wins(each)}" for name, each in wins.items()),
    )  # fmt: skip
    for name, by_tag in differences(first, second, rows).items():
        for tag, found in by_tag.items():
            table.add_row(
                _head(name, tag), number(found.difference.mean, signed=True), ends(found.difference),
                p_value(found.p_value), percent(found.improved), percent(found.worse),
                end_section=tag == list(by_tag)[-1],
            )  # fmt: skip
    return table


def _judge_table(judgement: Judgement, rows: Mapping[str, list[int]]) -> Table:
    table = Table("judge", "win rate", "95 % interval", "p", "prob.", "failed")
    for tag, kept in rows.items():
        found = win_rate(judgement.probabilities[kept])
        failed = str(found.win_rate.failed) if found.win_rate.failed else ""
        table.add_row(
            _head(judgement.name, tag), number(found.win_rate.mean), ends(found.win_rate), p_value(found.p_value),
            number(found.probability.mean), failed,
        )  # fmt: skip
    return table


def _head(name: str, tag: str) -> str:
    return name if tag == ALL else f"  {tag}"


def _wins(wins: Sequence[Wins], most: int = 8) -> str:
    shown = ", ".join(f"{each.won}:{each.lost}" for each in wins[:most])
    return shown + (", ..." if len(wins) > most else "")


def number(value: float, *, signed: bool = False) -> str:
    """Four significant digits or a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:{'+' if signed else ''}#.4g}".removesuffix(".")


def percent(share: float) -> str:
    """A share as a percentage, or a dash for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def p_value(p: float) -> str:
    """A p-value, below 0.0001 as such."""
    return "-" if math.isnan(p) else "<0.0001" if p < 1e-4 else f"{p:.4f}"


def ends(interval: Interval) -> str:
    """ "low .. high", or a dash where there is no interval."""
    return "-" if math.isnan(interval.low) else f"{number(interval.low)} .. {number(interval.high)}"
