"""Pictures of a report: the same prompts and seeds before and after, through a run, and of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from trainer_client._report_parts import escaped, number, picture
from trainer_client._run_folder import TOTAL, Place, RunFolder, Samples

T = TypeVar("T")
MOST_PROMPTS = 9
"""Prompts that are shown, evenly spaced among all: chosen by nothing that a score could influence."""
MOST_SEEDS = 2
MOST_STEPS = 6
STRIPS = 4
"""Prompts that are shown through the whole run."""
COMPARED = 6
"""Prompts that are shown of several runs."""


def pairs(
    columns: Mapping[str, Samples], names: Sequence[str], *, prompts: int = MOST_PROMPTS, seeds: int = MOST_SEEDS
) -> str:
    """A card for each prompt: for each seed a row of one picture a column, with its scores by ``names`` below.

    Prompts and seeds are those of the first column; where a later one lacks them a box says so. "" for none.
    """
    if not columns:
        return ""
    first = next(iter(columns.values()))
    cards = []
    for prompt in evenly(list(dict.fromkeys(first.prompts)), prompts):
        rows = "".join(_row(columns, (prompt, seed), names) for seed in list(first.seeds)[:seeds])
        cards.append(f'<div class="card"><p>{escaped(prompt)}</p>{rows}</div>')
    broad = " broad" if len(columns) > 2 else ""
    return f'<div class="cards{broad}">{"".join(cards)}</div>'


def before_and_after(run: RunFolder) -> dict[str, Samples]:
    """The first and the last samples of a run by what they are called; one of them where there are no more."""
    if not run.samples:
        return {}
    first, last = run.samples[0], run.samples[-1]
    named = {_called(first): first}
    if last.step != first.step:
        named[_called(last)] = last
    return named


def through(run: RunFolder) -> dict[str, Samples]:
    """At most MOST_STEPS samples of a run, evenly spaced, the first and the last among them; {} for fewer than 3."""
    if len(run.samples) < 3:
        return {}
    return {_called(each): each for each in evenly(list(run.samples), MOST_STEPS)}


def side_by_side(runs: Mapping[str, RunFolder]) -> dict[str, Samples]:
    """What every run began with (once, if it is the same) and where each ended."""
    drawn = {name: run for name, run in runs.items() if run.samples}
    starts = {name: run.samples[0] for name, run in drawn.items()}
    columns: dict[str, Samples] = {}
    if starts and len({_content(samples) for samples in starts.values()}) == 1:
        columns["before"] = next(iter(starts.values()))
    else:
        columns |= {f"{name}: before": samples for name, samples in starts.items()}
    ends = {name: run.samples[-1] for name, run in drawn.items() if len(run.samples) > 1}
    return columns | {f"{name}: step {samples.step}": samples for name, samples in ends.items()}


def shown_names(samples: Samples) -> list[str]:
    """Rewards whose scores stand under a picture; the sum only beside several."""
    return [name for name in samples.scores if name != TOTAL]


def evenly(values: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the values, evenly spaced, with the first and (for two or more) the last one."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[0]]
    return [values[round(k * (len(values) - 1) / (most - 1))] for k in range(most)]


def _row(columns: Mapping[str, Samples], place: Place, names: Sequence[str]) -> str:
    shots = []
    for label, samples in columns.items():
        scores = samples.scores_of(place)
        told = [
            (name, number(scores[name]) if scores[name] is not None else "failed") for name in names if name in scores
        ]
        shots.append(picture(samples.picture(place), label, told))
    return f'<div class="row">{"".join(shots)}</div>'


def _called(samples: Samples) -> str:
    return "before" if samples.step == 0 else f"step {samples.step}"


def _content(samples: Samples) -> tuple[tuple[Place, bytes], ...]:
    """Pictures by prompt and seed, byte by byte."""
    paths = {place: samples.path(place) for place in samples.places()}
    return tuple((place, path.read_bytes()) for place, path in sorted(paths.items()) if path is not None)
