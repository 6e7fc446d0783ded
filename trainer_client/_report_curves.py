"""The curves of a report, of one run or of several: rewards, what the policy does, where the time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from trainer_client._charts import BAD, SOFT, Axis, Mark, Series, line_chart, moving_mean, stacked_chart
from trainer_client._report_parts import chart
from trainer_client._run_folder import TOTAL, Row, RunFolder
from trainer_client.guard import SEVERITY

Runs: TypeAlias = Mapping[str, RunFolder]
"""Runs by the names that the legends show."""
By: TypeAlias = Literal["step", "images", "seconds"]
SMOOTHED = 20
"""Steps around one whose mean a smooth curve shows; a quarter of all in a short run."""
STAGES = ("sample", "decode", "reward_wait", "train")


@dataclass(frozen=True)
class Quantity:
    """A number of training rows: its title, the label of its axis, its guard signal if it has one."""

    name: str
    title: str
    unit: str
    least_top: float | None = None
    signal: str = ""


HEALTH = (
    Quantity("group_std", "Spread of rewards within groups", "std, in units of the reward", 0.0, "group_std"),
    Quantity("zero_std_ratio", "Groups whose rewards are all equal", "share of groups", 0.05),
    Quantity("diversity", "Diversity of the images of a group", "RMS distance of pixels", 0.0, "diversity"),
    Quantity("kl", "Distance from the reference policy", "KL, nats per element", None, "drift"),
    Quantity("approx_kl", "Change of the policy within a step", "approximate KL, nats per element"),
    Quantity("clip_fraction", "Samples outside the clip range", "share of samples", 0.05),
    Quantity("ratio_mean", "Mean ratio of new to old policy", "ratio"),
    Quantity("grad_norm", "Gradient before clipping", "norm", 0.0),
    Quantity("advantage_abs", "Size of advantages", "mean |advantage|", 0.0),
    Quantity("loss", "Loss", "loss"),
    Quantity("kl_weight", "Weight of the KL term", "weight", 0.0),
    Quantity("lr", "Learning rate", "learning rate", 0.0),
)
TROUBLE = (
    Quantity("failed_ratio", "Samples without a reward", "share of samples", 0.05),
    Quantity("wire/retries", "Requests that were repeated", "requests per step", 1.0),
)
_SHOWN_ELSEWHERE = ("reward/", "time/", "guard/")


def quantity_chart(runs: Runs, quantity: Quantity, by: By = "step") -> str:
    """A number of training steps; of one run with its guard's limit, of several one smooth curve each. "" for none."""
    series: list[Series] = []
    axis, scale = _axis(runs, by)
    for style, (name, run) in enumerate(runs.items()):
        if not run.has(quantity.name):
            continue
        x, y = _places(run.train, by, scale), run.numbers(quantity.name)
        series += _smooth(x, y, quantity.title) if len(runs) == 1 else [_one(name, x, y, style)]
        if quantity.signal and len(runs) == 1:
            series += _limit_of_blocks(run, quantity.signal, x)
    if not series:
        return ""
    drawing = line_chart(series, Axis(axis, quantity.unit, quantity.least_top), _marks(runs, by, scale))
    note = f"Each point is the mean of up to {SMOOTHED + 1} steps around it." if len(runs) > 1 else ""
    return chart(quantity.title, drawing, series, note)


def evaluation_chart(runs: Runs, name: str, by: By) -> str:
    """The mean of an evaluated reward with its interval over prompts. "" where no run has it."""
    series: list[Series] = []
    axis, scale = _axis(runs, by)
    for style, (label, run) in enumerate(runs.items()):
        rows = [row for row in run.evaluations if row.get(f"eval/{name}") is not None]
        if not rows:
            continue
        x, ends = _places(rows, by, scale), (f"eval/{name}/low", f"eval/{name}/high")
        low, high = (run.numbers(end, rows) for end in ends)
        shown = name if len(runs) == 1 else label
        series.append(Series(shown, x, run.numbers(f"eval/{name}", rows), style, low, high, markers=True))
        if len(runs) == 1:
            series += _limit_of_heldout(run, rows, name, x)
    if not series:
        return ""
    drawing = line_chart(series, Axis(axis, "mean reward"), _marks(runs, by, scale))
    note = "Bands and bars: 95 % interval over prompts." if any(each.low for each in series) else ""
    return chart(f"{name}, {_role(runs, name)}: {_axis_word(by)}", drawing, series, note)


def training_chart(runs: Runs, name: str, by: By) -> str:
    """The mean training reward ``name`` of every step's samples."""
    quantity = Quantity(f"reward/{name}", f"{name}: {_axis_word(by)}", "mean reward")
    return quantity_chart(runs, quantity, by)


def eval_quantity_chart(runs: Runs, name: str, title: str, unit: str, least_top: float | None = None) -> str:
    """A number of evaluation rows that has no interval."""
    axis, scale = _axis(runs, "step")
    series = []
    for style, (label, run) in enumerate(runs.items()):
        rows = [row for row in run.evaluations if row.get(name) is not None]
        if rows:
            x = _places(rows, "step", scale)
            series.append(Series(title if len(runs) == 1 else label, x, run.numbers(name, rows), style, markers=True))
    if not series:
        return ""
    return chart(title, line_chart(series, Axis(axis, unit, least_top), _marks(runs, "step", scale)), series)


def step_chart(title: str, unit: str, curves: Mapping[str, Sequence[tuple[float, float]]], runs: Runs) -> str:
    """Given points (step, value) by run, coloured as the runs are."""
    styles = {name: style for style, name in enumerate(runs)}
    series = [
        Series(name, [x for x, _ in points], [y for _, y in points], styles[name], markers=True)
        for name, points in curves.items()
    ]
    return chart(title, line_chart(series, Axis("step", unit)), series)


def other_quantities(run: RunFolder) -> list[Quantity]:
    """Numbers of the algorithm that have no chart of their own, by name."""
    known = {quantity.name for quantity in (*HEALTH, *TROUBLE)} | {"step", "kind", "seconds", "images"}
    names = sorted({name for row in run.train for name in row} - known)
    return [Quantity(name, name, "") for name in names if not name.startswith(_SHOWN_ELSEWHERE) and run.has(name)]


def guard_chart(run: RunFolder) -> str:
    """What the guard said at each step, from ok to stop."""
    rows = sorted((*run.train, *run.evaluations), key=lambda row: row["step"])
    rows = [row for row in rows if row.get("guard/action") is not None]
    if not rows:
        return ""
    axis, scale = _axis({"": run}, "step")
    series = [Series("guard/action", _places(rows, "step", scale), run.numbers("guard/action", rows), steps=True)]
    ticks = [(float(place), word.replace("_", " ")) for place, word in enumerate(SEVERITY)]
    drawing = line_chart(series, Axis(axis, "", len(SEVERITY) - 0.8, ticks))
    return chart("What the guard says", drawing)


def stages_of(run: RunFolder) -> dict[str, list[float]]:
    """Seconds of each step by stage; ``other`` is what no stage measured."""
    found = {name.removeprefix("time/") for row in run.train for name in row if name.startswith("time/")} - {"step"}
    names = [name for name in STAGES if name in found] + sorted(found - set(STAGES))
    stages = {name: run.numbers(f"time/{name}") for name in names}
    if run.has("time/step"):
        sums = [
            math.fsum(value for value in row if not math.isnan(value)) for row in zip(*stages.values(), strict=True)
        ]
        whole = run.numbers("time/step")
        known = sums or [0.0] * len(whole)
        stages["other"] = [max(total - part, 0.0) for total, part in zip(whole, known, strict=True)]
    return stages


def time_chart(run: RunFolder) -> str:
    """Seconds of a step by stage, stacked."""
    stages = stages_of(run)
    if not stages:
        return ""
    x = [float(row["step"]) for row in run.train]
    layers = [Series(name.replace("_", " "), x, values, style) for style, (name, values) in enumerate(stages.items())]
    drawing = stacked_chart(x, layers, Axis("step", "seconds per step"), _marks({"": run}, "step", 1.0))
    return chart("Time of a step by stage", drawing, layers, areas=True)


def waited_share(run: RunFolder) -> list[float]:
    """Percent of each step's time that was spent waiting for rewards."""
    pairs = zip(run.numbers("time/reward_wait"), run.numbers("time/step"), strict=True)
    return [100 * waited / whole if whole > 0 else math.nan for waited, whole in pairs]


def wait_chart(runs: Runs) -> str:
    """The share of time spent waiting for rewards."""
    series: list[Series] = []
    for style, (name, run) in enumerate(runs.items()):
        if run.has("time/reward_wait") and run.has("time/step"):
            x, y = _places(run.train, "step", 1.0), waited_share(run)
            series += _smooth(x, y, "waiting") if len(runs) == 1 else [_one(name, x, y, style)]
    if not series:
        return ""
    drawing = line_chart(series, Axis("step", "% of the step's time", 5.0), _marks(runs, "step", 1.0))
    return chart("Waiting for rewards", drawing, series)


def _smooth(x: Sequence[float], y: Sequence[float], name: str) -> list[Series]:
    if (window := _window(y)) < 2:
        return [Series(name, x, y)]
    told = f"mean of the {2 * (window // 2) + 1} steps around"
    return [Series("each step", x, y, faint=True), Series(told, x, moving_mean(y, window))]


def _one(name: str, x: Sequence[float], y: Sequence[float], style: int) -> Series:
    return Series(name, x, moving_mean(y, _window(y)), style)


def _window(values: Sequence[float]) -> int:
    return min(SMOOTHED, len(values) // 4)


def _limit_of_blocks(run: RunFolder, signal: str, x: Sequence[float]) -> list[Series]:
    """The value that the guard fires below (drift: above), and where it did."""
    mean, change, limit = (run.numbers(f"guard/{signal}/{part}") for part in ("mean", "change", "limit"))
    if all(math.isnan(value) for value in limit):
        return []
    if signal == "drift":
        edge = limit
    else:  # the change is relative to the first block
        edge = [
            m / (1 + c) * (1 - part) if c > -1 else math.nan for m, c, part in zip(mean, change, limit, strict=True)
        ]
    looks = list(zip(run.numbers(f"guard/{signal}/fires"), mean, strict=True))
    # A look's numbers stay in the rows until the next look.
    fresh = [look != before for look, before in zip(looks, [None, *looks], strict=False)]
    fired = [value if n >= 1 and new else math.nan for (n, value), new in zip(looks, fresh, strict=True)]
    return [Series("the guard's limit", x, edge, BAD), *_fired(x, fired, "the guard's signal fires")]


def _limit_of_heldout(run: RunFolder, rows: Sequence[Row], name: str, x: Sequence[float]) -> list[Series]:
    stem = f"guard/heldout/{name}"
    mean, change, limit, fires = (run.numbers(f"{stem}/{part}", rows) for part in ("mean", "change", "limit", "fires"))
    if all(math.isnan(value) for value in limit):
        return []
    edge = [m - c - part for m, c, part in zip(mean, change, limit, strict=True)]
    fired = [value if n >= 1 else math.nan for value, n in zip(run.numbers(f"eval/{name}", rows), fires, strict=True)]
    return [Series("the guard's limit", x, edge, BAD), *_fired(x, fired, "the guard's signal fires")]


def _fired(x: Sequence[float], y: Sequence[float], name: str) -> list[Series]:
    places = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(b)]
    return (
        [Series(name, [a for a, _ in places], [b for _, b in places], BAD, markers=True, line=False)] if places else []
    )


def _marks(runs: Runs, by: By, scale: float) -> list[Mark]:
    """Events of one run in the colour of alarms, of several in the runs' own."""
    found: list[Mark] = []
    for style, run in enumerate(runs.values()):
        rows = [{"step": 0, "images": 0, "seconds": 0.0}, *run.train, *run.evaluations]
        for step, (word, resumed) in _words(run).items():
            known = max((row for row in rows if row["step"] <= step), key=lambda row: row["step"])
            colour = SOFT if resumed else BAD if len(runs) == 1 else style
            if not (resumed and len(runs) > 1):
                found.append(Mark(known[by] / scale, word, colour))
    return found


def _words(run: RunFolder) -> dict[int, tuple[str, bool]]:
    """(What is written at the line, whether it is a resume) by step; the last event of a step counts."""
    found: dict[int, tuple[str, bool]] = {}
    said = ""
    for event in run.events:
        kind, word = event.get("kind"), str(event.get("text", "")).split(":")[0]
        if kind == "guard":
            shown = f"guard: {word.replace('_', ' ')}" if word in SEVERITY else "KL weight raised"
            if shown != said or shown == "KL weight raised":
                found[event["step"]] = (shown, False)
            said = shown
        elif kind in ("stop", "failure"):
            found[event["step"]] = ("stopped" if kind == "stop" else "broken off", False)
        elif kind == "resume":
            found.setdefault(event["step"], ("resumed", True))
    return found


def _axis(runs: Runs, by: By) -> tuple[str, float]:
    """The label of the x-axis, and what its values are divided by."""
    if by == "step":
        return "step", 1.0
    if by == "images":
        return "images sampled", 1.0
    longest = max((row["seconds"] for run in runs.values() for row in (*run.train, *run.evaluations)), default=0.0)
    unit, scale = ("s", 1.0) if longest < 180 else ("min", 60.0) if longest < 3 * 3600 else ("h", 3600.0)
    return f"time of training ({unit})", scale


def _axis_word(by: By) -> str:
    return {"step": "by step", "images": "by images", "seconds": "by time"}[by]


def _places(rows: Sequence[Row], by: By, scale: float) -> list[float]:
    return [row[by] / scale for row in rows]


def _role(runs: Runs, name: str) -> str:
    roles = {name in (*run.trained, TOTAL) for run in runs.values()}
    return "trained on" if roles == {True} else "held out" if roles == {False} else "trained on or held out"
