"""Pieces of HTML that reports are made of. Every text is escaped here, and nowhere else."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from trainer_client._charts import COLOURS, Series, legend_line
from trainer_client._report_style import STYLE

SHOWN = 160
"""Width of a picture on the page in CSS pixels."""
_LARGEST = 2 * SHOWN  # dense displays show two pixels for one


@dataclass(frozen=True)
class Tile:
    """One number that matters, and what it is."""

    value: str
    label: str
    tone: Literal["", "good", "bad"] = ""
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text; the columns named in ``numeric`` are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[str] = frozenset()


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document that needs nothing else: no script, no address, no file of elsewhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def escaped(text: str) -> str:
    """Text as it may stand in elements and attributes."""
    return html.escape(text, quote=True)


def section(title: str, parts: Sequence[str], lead: str = "") -> str:
    """Nothing where no part has anything."""
    found = [part for part in parts if part]
    if not found:
        return ""
    said = f'<p class="lead">{escaped(lead)}</p>' if lead else ""
    return f"<section><h2>{escaped(title)}</h2>{said}" + "\n".join(found) + "</section>"


def tiles(found: Sequence[Tile]) -> str:
    shown = "".join(
        f'<p class="tile{" wide" if tile.wide else ""}"><b{_class(tile.tone)}>{escaped(tile.value)}</b> '
        f"{escaped(tile.label)}</p>"
        for tile in found
    )
    return f'<div class="tiles">{shown}</div>'


def table(found: Table) -> str:
    kinds = [_class("number" if column in found.numeric else "") for column in found.columns]
    head = "".join(f"<th{kind}>{escaped(column)}</th>" for kind, column in zip(kinds, found.columns, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{escaped(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in found.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def chart(title: str, drawing: str, series: Sequence[Series] = (), note: str = "", *, areas: bool = False) -> str:
    """A drawing with its title, a legend where several series have one, and a note."""
    entries = "".join(f"<li>{_swatch(each, areas)}{escaped(each.name)}</li>" for each in series)
    legend = f'<ul class="legend">{entries}</ul>' if len(series) > 1 or areas else ""
    said = f"<figcaption>{escaped(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escaped(title)}</h3>{drawing}{legend}{said}</figure>"


def charts(figures: Sequence[str]) -> str:
    found = [figure for figure in figures if figure]
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def picture(image: Image.Image | None, label: str, scores: Sequence[tuple[str, str]]) -> str:
    """A picture as wide as SHOWN with its label above and its scores below; None: a box that says it is missing."""
    if image is None:
        shown = '<span class="none">no picture</span>'
    else:
        small = ' class="small"' if max(image.size) < SHOWN else ""
        shown = f'<img{small} src="{data_address(image)}" alt="{escaped(label)}">'
    below = "".join(
        f'<dt title="{escaped(name)}">{escaped(name)}</dt><dd>{escaped(score)}</dd>' for name, score in scores
    )
    return f'<div class="shot"><b>{escaped(label)}</b>{shown}<dl>{below}</dl></div>'


def data_address(image: Image.Image) -> str:
    """A data: address. Small pictures are enlarged pixel by pixel as PNG, large ones shrunk, JPEG where PNG is long."""
    shown = image.convert("RGB")
    if (factor := SHOWN // max(shown.size)) > 1:
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    elif max(shown.size) > _LARGEST:
        shown.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "png"
    shown.save(buffer, "PNG", optimize=True)
    if buffer.tell() > 20_000:
        buffer, kind = io.BytesIO(), "jpeg"
        shown.save(buffer, "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant ones, a real minus sign, an en dash for what is unknown."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        text = f"{value:.{digits - 1}e}"
    else:
        whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
        text = f"{value:,.{max(digits - whole, 0)}f}"
    return text.replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    return number(value, digits) if value < 0 or math.isnan(value) else f"+{number(value, digits)}"


def _swatch(series: Series, areas: bool) -> str:
    if areas:
        return f'<span class="box" style="background: var(--c{series.style % COLOURS})"></span>'
    return legend_line(series) if series.line else '<span class="dot"></span>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
