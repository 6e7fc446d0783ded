"""Charts as SVG that takes its colours from the page: matplotlib draws, and the result is cleaned for use inline.

Colours are variables of the style sheet (``--c0`` ... ``--c7``, ``--ink``, ``--soft``, ``--line``), so a chart is
readable on light and dark pages. Words that a user chose stand in the legend, which is HTML, and not in the drawing.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = 8
"""Colours of series, counted from 0."""
BAD, SOFT = -1, -2
"""Styles of what is an alarm, and of what only stands by."""
MOST_POINTS = 1000
"""Points of a curve; longer ones are averaged over equal runs of neighbours."""
FAINT = 0.35
MOST_AREAS = 200
"""The same for areas, which are hard to read when they flicker."""
DASHES = ("solid", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 2, 2)))
_WIDTH, _HEIGHT = 500, 250
_DPI = 72  # SVG of matplotlib has 72 points an inch: one is then one unit of the drawing
_SOFT, _LINE, _BAD = "#010003", "#010004", "#010005"
_STEM = "series-"
_TICKS = [1, 2, 2.5, 5, 10]
_SETTINGS: dict[Any, Any] = {  # Any: matplotlib types its keys by a literal of hundreds
    "svg.fonttype": "none",
    "svg.hashsalt": "run",
    "text.parse_math": False,
    "path.simplify": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "text.color": _SOFT,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "font.size": 12,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Series:
    """A curve: ``y`` may hold NaN, where it is broken; ``low`` and ``high`` are the ends of intervals.

    ``style`` numbers colour and dashes, or is BAD or SOFT; ``faint`` curves lie behind; ``markers`` are drawn at every
    point, and nothing but markers where ``line`` is False; with ``steps`` a value holds until the next one.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    faint: bool = False
    markers: bool = False
    line: bool = True
    steps: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at ``x``: an event. ``word`` stands at its top, and is one of ours; ``style`` as of a series."""

    x: float
    word: str
    style: int = BAD


@dataclass(frozen=True)
class Axis:
    """What a chart's axes say, with units. ``least_top``: the y-axis begins at 0 and reaches at least so far."""

    x: str
    y: str
    least_top: float | None = None
    ticks: Sequence[tuple[float, str]] = field(default=())


def line_chart(series: Sequence[Series], axis: Axis, marks: Sequence[Mark] = ()) -> str:
    """SVG of curves; every curve's path is in a group with ``data-series`` = its name."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _axes(axis)
        for index, each in enumerate(series):
            _draw(axes, each).set_gid(_gid(index))
        if axis.least_top is not None:
            axes.set_ylim(0, max(axes.get_ylim()[1], axis.least_top))
        _draw_marks(axes, marks)
        return _svg(figure, [each.name for each in series])


def stacked_chart(x: Sequence[float], layers: Sequence[Series], axis: Axis, marks: Sequence[Mark] = ()) -> str:
    """SVG of areas, one upon the other; ``layers`` share ``x``, NaN counts as 0."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _axes(axis)
        heights = [np.nan_to_num(np.array(thinned(layer.y, MOST_AREAS))) for layer in layers]
        places = np.array(thinned(x, MOST_AREAS))
        if len(places) == 1:
            places, heights = places + np.array([-0.5, 0.5]), [np.repeat(height, 2) for height in heights]
        below = np.zeros(len(places))
        for index, (layer, height) in enumerate(zip(layers, heights, strict=True)):
            colour = _colour(layer.style)
            area = axes.fill_between(
                places, below, below + height, facecolor=colour, edgecolor=colour, linewidth=0.6, alpha=0.85
            )
            area.set_gid(_gid(index))
            below = below + height
        axes.set_ylim(bottom=0)
        _draw_marks(axes, marks)
        return _svg(figure, [layer.name for layer in layers])


def thinned(values: Sequence[float], most: int = MOST_POINTS) -> list[float]:
    """At most ``most`` values: means over equal runs of neighbours, NaN left out."""
    if len(values) <= most:
        return list(values)
    runs = np.array_split(np.asarray(values, dtype=np.float64), most)
    return [float(np.nanmean(run)) if not np.isnan(run).all() else math.nan for run in runs]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and its neighbours, ``window`` // 2 on either side where there are so many, NaN left out."""
    array = np.asarray(values, dtype=np.float64)
    known, places = ~np.isnan(array), np.arange(len(array))
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    start = np.maximum(places - window // 2, 0)
    end = np.minimum(places + window // 2 + 1, len(array))
    count = counts[end] - counts[start]
    found = np.where(count > 0, (sums[end] - sums[start]) / np.maximum(count, 1), math.nan)
    return [float(value) for value in found]


def legend_line(series: Series) -> str:
    """The stroke of a series as a small SVG for an HTML legend."""
    dashes, opacity = DASHES[_dash(series.style)], FAINT if series.faint else 1.0
    pattern = "" if isinstance(dashes, str) else f' stroke-dasharray="{" ".join(str(part) for part in dashes[1])}"'
    return (
        f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><line x1="0" y1="4" x2="24" y2="4" '
        f'style="stroke: {_VARIABLES[_colour(series.style)]}" stroke-width="2.5" opacity="{opacity}"{pattern}/></svg>'
    )


def _axes(axis: Axis) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI, layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel(axis.x)
    axes.set_ylabel(axis.y)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_TICKS, integer=axis.x in ("step", "images sampled")))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    if axis.ticks:
        axes.set_yticks([place for place, _ in axis.ticks], [word for _, word in axis.ticks])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICKS))
    return figure, axes


def _draw(axes: Axes, series: Series) -> Line2D:
    x, y = thinned(series.x), thinned(series.y)
    colour, alone = _colour(series.style), len(y) == 1
    if series.low:
        axes.fill_between(
            x, thinned(series.low), thinned(series.high), facecolor=colour, alpha=0.18, linewidth=0, zorder=2
        )
        if alone:
            axes.vlines(x, series.low, series.high, colors=colour, linewidth=2)
    (line,) = axes.plot(
        x,
        y,
        color=colour,
        alpha=FAINT if series.faint else 1.0,
        linewidth=1.0 if series.faint else 2.0,
        linestyle=DASHES[_dash(series.style)] if series.line else "none",
        drawstyle="steps-post" if series.steps else "default",
        marker="o" if series.markers or alone else "",
        markersize=4 if series.line else 6,
        zorder=2 if series.faint else 3,
    )
    return line


def _draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    for mark in marks:
        dotted = ":" if mark.style == SOFT else "-"
        axes.axvline(mark.x, color=_colour(mark.style), linewidth=1.3, linestyle=dotted, zorder=4)
        axes.annotate(
            mark.word, (mark.x, 1), xycoords=("data", "axes fraction"), xytext=(-3, -2), textcoords="offset points",
            rotation=90, ha="right", va="top", color=_colour(mark.style), fontsize=10.5,
        )  # fmt: skip


def _colour(style: int) -> str:
    return {BAD: _BAD, SOFT: _SOFT}.get(style, f"#0200{style % COLOURS:02x}")


def _dash(style: int) -> int:
    # Neighbours differ in dashes too, for who does not see the colours apart.
    return {BAD: 1, SOFT: 1}.get(style, style % len(DASHES))


_VARIABLES = {_SOFT: "var(--soft)", _LINE: "var(--line)", _BAD: "var(--bad)"} | {
    _colour(style): f"var(--c{style})" for style in range(COLOURS)
}


def _gid(index: int) -> str:
    return f"{_STEM}{index}"


def _svg(figure: Figure, names: Sequence[str]) -> str:
    """The drawing without what a page does not need: headers, addresses, sizes, ids that nothing refers to."""
    buffer = io.StringIO()
    # All of it None: matplotlib then writes no metadata, in which addresses stand.
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<svg [^>]*>", f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">', text, count=1)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", lambda tag: _clean_tag(tag[0]), text)
    return _own_ids(re.sub(r"\n\s*", "\n", text), names)


def _clean_tag(tag: str) -> str:
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    tag = re.sub(r"#0[12]00[0-9a-f]{2}", lambda found: _VARIABLES[found[0]], tag)
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", tag)


def _own_ids(text: str, names: Sequence[str]) -> str:
    """Ids that differ from those of the page's other drawings; those of series become ``data-series``."""
    prefix = f"p{hashlib.sha256(text.encode()).hexdigest()[:10]}-"
    used = {name for pair in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text) for name in pair if name}

    def renamed(found: re.Match[str]) -> str:
        if found[1].startswith(_STEM):
            return f' data-series="{html.escape(names[int(found[1].removeprefix(_STEM))], quote=True)}"'
        return f' id="{prefix}{found[1]}"' if found[1] in used else ""

    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}", text)
    return re.sub(r' id="([^"]*)"', renamed, text)
