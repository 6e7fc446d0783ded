"""What the demo has to show, without saying how: the terminal and the HTML report are two renderings of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from PIL import Image as PILImage

Tone = Literal["", "good", "bad"]


@dataclass(frozen=True)
class Column:
    """A column of a table; numeric ones are aligned to the right with digits of equal width."""

    title: str
    numeric: bool = False


@dataclass(frozen=True)
class Row:
    """Cells as text, one a column; ``image`` is shown beside them where pictures can be shown."""

    cells: tuple[str, ...]
    image: PILImage.Image | None = None
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """Rows under a title; ``note`` says what the numbers mean. A row of another length than the columns raises."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"{self.title}: a row of {len(row.cells)} cells under {len(self.columns)} columns")


@dataclass(frozen=True)
class Figure:
    """A picture with its caption; ``side`` is its width in the report in CSS pixels."""

    image: PILImage.Image
    caption: str
    side: int = 208


@dataclass(frozen=True)
class Fact:
    """One number that matters, and what it is."""

    value: str
    label: str


@dataclass(frozen=True)
class Section:
    """One part of the demo. ``failures`` are sentences: what should have happened and did not."""

    title: str
    lead: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    facts: tuple[Fact, ...] = ()
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """One HTTP call: wall time as the client saw it, and the service's own stages, in milliseconds."""

    what: str
    route: str
    models: tuple[str, ...]
    images: int
    wall_ms: float
    stages_ms: Mapping[str, float]


@dataclass(frozen=True)
class Document:
    """The whole demo: ``about`` says on what it ran."""

    title: str
    lead: str
    sections: tuple[Section, ...]
    about: Mapping[str, str]

    @property
    def failures(self) -> list[str]:
        return [f"{section.title}: {failure}" for section in self.sections for failure in section.failures]


STAGES = ("decode", "queue", "forward")


def call_table(calls: Sequence[Call]) -> Table:
    """Where the time of the calls went; those of one purpose share a row, with their number and mean times."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[Call]] = {}
    for call in calls:
        groups.setdefault((call.what, call.route, call.models), []).append(call)
    numbers = ("images", *STAGES, "wall")
    columns = (Column("what"), Column("route"), Column("models"), *(Column(title, numeric=True) for title in numbers))
    rows = []
    for (what, route, models), same in groups.items():
        stages = [fmean(call.stages_ms[stage] for call in same) for stage in STAGES]
        numbered = (str(sum(call.images for call in same)), *(f"{ms:.1f}" for ms in stages))
        title = what if len(same) == 1 else f"{what} (× {len(same)})"
        rows.append(Row((title, route, ", ".join(models), *numbered, f"{fmean(c.wall_ms for c in same):.1f}")))
    note = (
        "Times are means of a row's calls. A stage is the longest that any sample of a call spent there; the models of "
        "a call work side by side. Wall is what the client waited, its own work and the transport included."
    )
    return Table("HTTP calls, times in ms", columns, tuple(rows), note)


def decimals(value: float | None, digits: int) -> str:
    """A number with ``digits`` decimals and never "-0.00"; a missing one is an en dash, not a zero."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text
