"""What a report says in numbers: where a run stands, and each reward before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from trainer_client._report_curves import stages_of, waited_share
from trainer_client._report_parts import Table, Tile, number, signed
from trainer_client._run_folder import TOTAL, Floats, RunFolder, Samples
from trainer_client.eval_statistics import Interval, mean_interval, paired_difference


@dataclass(frozen=True)
class RewardChange:
    """A reward before and after training on the same prompts and seeds; ``difference`` is paired over prompts.

    ``seeds`` of each prompt. Means are over the samples of their own time that have a score.
    """

    name: str
    trained: bool
    before: Interval
    after: Interval
    difference: Interval
    seeds: int

    @property
    def role(self) -> str:
        return "trained on" if self.trained else "held out"

    def told(self) -> str:
        """The difference with its interval, in words."""
        found = self.difference
        if math.isnan(found.mean):
            return "no pair of samples has both scores"
        if math.isnan(found.low):
            return f"{signed(found.mean)}, one prompt has no interval"
        return f"{signed(found.mean)}, 95 % interval {signed(found.low)} to {signed(found.high)}"


def reward_changes(run: RunFolder) -> list[RewardChange]:
    """Of every reward that the first and the last samples have; none where only one set was drawn."""
    if len(run.samples) < 2:
        return []
    first, last = run.samples[0], run.samples[-1]
    prompts = [prompt for prompt in dict.fromkeys(first.prompts) if prompt in set(last.prompts)]
    seeds = [seed for seed in first.seeds if seed in set(last.seeds)]
    changes = []
    for name in run.evaluated:
        if name in first.scores and name in last.scores and prompts and seeds:
            before, after = (_aligned(each, name, prompts, seeds) for each in (first, last))
            difference = paired_difference(after, before).difference
            trained = name in (*run.trained, TOTAL)
            changes.append(
                RewardChange(name, trained, mean_interval(before), mean_interval(after), difference, len(seeds))
            )
    return changes


def state(run: RunFolder) -> tuple[str, str]:
    """(In words how the run ended, or that it did not; "good", "bad" or "")."""
    ends = [event for event in run.events if event.get("kind") in ("start", "resume", "stop", "failure", "finish")]
    last = ends[-1] if ends else {}
    if last.get("kind") == "finish":
        return "finished", "good"
    if last.get("kind") in ("stop", "failure"):
        word = "stopped" if last["kind"] == "stop" else "broken off"
        return f"{word} at step {last['step']}: {last['text']}", "bad"
    total = f" of {run.total_steps}" if run.total_steps is not None else ""
    return f"unfinished: step {run.steps}{total}; it is still running, or it was killed", ""


def tiles_of(run: RunFolder) -> list[Tile]:
    """Steps, images, time, the share of waiting, failures; and each reward before and after."""
    rows = sorted((*run.train, *run.evaluations), key=lambda row: row["step"])
    total = f" of {run.total_steps:,}" if run.total_steps is not None else ""
    found = [Tile(f"{run.steps:,}{total}", "steps")]
    if rows:
        found += [Tile(f"{rows[-1]['images']:,}", "images sampled for training"), _time_tile(rows[-1]["seconds"])]
    if waits := [share for share in waited_share(run) if not math.isnan(share)]:
        found.append(Tile(f"{number(fmean(waits))} %", "of a step's time spent waiting for rewards, mean over steps"))
    if run.has("failed_ratio"):
        failed = [ratio for ratio in run.numbers("failed_ratio") if not math.isnan(ratio)]
        found.append(Tile(f"{number(100 * fmean(failed))} %", "of the training samples got no reward"))
    changes = reward_changes(run)
    found += [_change_tile(change) for change in changes]
    if not any(change.trained for change in changes):
        found += _training_tile(run)
    return found


def changes_table(runs: Mapping[str, RunFolder]) -> Table:
    """A row for each run and reward."""
    columns = ("run", "reward", "role", "before", "after", "difference", "95 % interval", "prompts", "seeds")
    rows = []
    for label, run in runs.items():
        for change in reward_changes(run):
            found = change.difference
            interval = "–" if math.isnan(found.low) else f"{signed(found.low)} to {signed(found.high)}"
            means = (number(change.before.mean), number(change.after.mean), signed(found.mean), interval)
            rows.append((label, change.name, change.role, *means, str(found.prompts), str(change.seeds)))
    return Table(columns, rows, frozenset(columns[3:]))


def runs_table(runs: Mapping[str, RunFolder]) -> Table:
    """A row for each run: how long, how fast, how it ended."""
    columns = ("run", "algorithm", "steps", "images", "minutes", "images/s", "waiting for rewards", "end")
    rows = []
    for label, run in runs.items():
        last = max((*run.train, *run.evaluations), key=lambda row: row["step"], default=None)
        images, seconds = (last["images"], last["seconds"]) if last else (0, 0.0)
        waits = [share for share in waited_share(run) if not math.isnan(share)]
        speed = number(images / seconds) if seconds > 0 else "–"
        waited = f"{number(fmean(waits))} %" if waits else "–"
        counts = (f"{run.steps:,}", f"{images:,}", number(seconds / 60), speed, waited)
        rows.append((label, run.algorithm, *counts, state(run)[0]))
    return Table(columns, rows, frozenset(columns[2:7]))


def stages_table(run: RunFolder) -> Table | None:
    """Seconds of all steps by stage, and of evaluations."""
    stages = stages_of(run)
    if not stages:
        return None
    sums = {name: math.fsum(value for value in values if not math.isnan(value)) for name, values in stages.items()}
    whole = math.fsum(sums.values())
    columns = ("stage", "seconds in all", "seconds per step", "share of steps")
    rows = [
        (name.replace("_", " "), number(total), number(total / len(run.train)), f"{number(100 * total / whole)} %")
        for name, total in sums.items()
        if whole > 0
    ]
    evaluated = [value for value in run.numbers("time/evaluate", run.evaluations) if not math.isnan(value)]
    if evaluated:
        rows.append((f"{len(evaluated)} evaluations", number(math.fsum(evaluated)), "–", "between steps"))
    return Table(columns, rows, frozenset(columns[1:]))


def events_table(runs: Mapping[str, RunFolder]) -> Table | None:
    """All events, each run's in their order; the run's name only where there are several."""
    several = len(runs) > 1
    columns = (*(("run",) if several else ()), "step", "time (UTC)", "kind", "what")
    rows = [
        (*((label,) if several else ()), *(str(event.get(key, "")) for key in ("step", "time", "kind", "text")))
        for label, run in runs.items()
        for event in run.events
    ]
    return Table(columns, rows, frozenset({"step"})) if rows else None


def settings_rows(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) pairs."""
    if isinstance(value, Mapping) and value:
        return [
            row for key, each in value.items() for row in settings_rows(each, f"{name}.{key}" if name else str(key))
        ]
    if isinstance(value, list | tuple):
        return [(name, ", ".join(str(each) for each in value))]
    return [(name, "" if value is None else str(value))]


def _aligned(samples: Samples, name: str, prompts: Sequence[str], seeds: Sequence[int]) -> Floats:
    places = samples.places()
    rows = [places[prompt, samples.seeds[0]][0] for prompt in prompts]
    columns = [list(samples.seeds).index(seed) for seed in seeds]
    found: Floats = samples.scores[name][rows][:, columns]
    return found


def _change_tile(change: RewardChange) -> Tile:
    tone = "good" if change.difference.low > 0 else "bad" if change.difference.high < 0 else ""
    counts = f"{change.difference.prompts} prompts × {change.seeds} seeds"
    value = f"{number(change.before.mean)} → {number(change.after.mean)}"
    return Tile(value, f"{change.name}, {change.role}: {change.told()} ({counts})", tone, wide=True)  # type: ignore[arg-type]


def _training_tile(run: RunFolder) -> list[Tile]:
    known = [value for value in run.numbers(f"reward/{TOTAL}") if not math.isnan(value)]
    if len(known) < 2:
        return []
    part = max(len(known) // 10, 1)
    told = f"training reward, mean of the first {part} and of the last {part} steps, whose prompts differ"
    return [Tile(f"{number(fmean(known[:part]))} → {number(fmean(known[-part:]))}", told, wide=True)]


def _time_tile(seconds: float) -> Tile:
    return Tile(number(seconds / 60), "minutes of training")
