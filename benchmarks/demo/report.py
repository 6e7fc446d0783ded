"""The demo as one HTML file that needs nothing else: pictures and style are inside, and there is no script."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence

from PIL import Image as PILImage

from benchmarks.demo.document import Call, Column, Document, Fact, Figure, Row, Section, Table, call_table
from benchmarks.demo.style import STYLE

THUMBNAIL = 224
"""Longest side of a picture in a table, in pixels: twice its size on the page, for dense displays."""
_NEGATIVE = re.compile(r"^-(?=[\d.])")


def render(document: Document, calls: Sequence[Call]) -> str:
    """The whole page. Every text is escaped; it holds no address, no script and no file of elsewhere."""
    parts = [_header(document)]
    parts += [_section(section) for section in document.sections]
    if calls:
        timing = Section("Timing", "Where the time of each HTTP call went.", (call_table(calls),))
        parts.append(_section(timing))
    parts.append(_about(document))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def data_address(image: PILImage.Image, longest: int | None = None) -> str:
    """The picture as a data: address, shrunk to ``longest`` pixels: JPEG for photographs, PNG for what is small."""
    shown = image.convert("RGB")
    if longest is not None and max(shown.size) > longest:
        shown.thumbnail((longest, longest), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    kind = "png"
    if buffer.tell() > 20_000:
        buffer = io.BytesIO()
        shown.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _header(document: Document) -> str:
    failures = document.failures
    state = (
        f'<p class="state bad">✗ {len(failures)} of the checks failed</p>'
        if failures
        else '<p class="state good">✓ every check passed</p>'
    )
    return f"<header><h1>{_text(document.title)}</h1><p>{_text(document.lead)}</p>{state}</header>"


def _section(section: Section) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>"]
    if section.lead:
        parts.append(f'<p class="lead">{_text(section.lead)}</p>')
    parts += [f'<p class="failure">✗ {_text(failure)}</p>' for failure in section.failures]
    if section.facts:
        parts.append(f'<div class="facts">{"".join(map(_fact, section.facts))}</div>')
    if section.figures:
        parts.append(f'<div class="figures">{"".join(map(_figure, section.figures))}</div>')
    parts += [_table(table) for table in section.tables]
    return "<section>" + "\n".join(parts) + "</section>"


def _fact(fact: Fact) -> str:
    return f'<p class="fact"><b>{_text(fact.value)}</b> {_text(fact.label)}</p>'


def _figure(figure: Figure) -> str:
    return (
        f'<figure style="width:{figure.side}px"><img src="{data_address(figure.image)}" alt="{_text(figure.caption)}">'
        f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    pictures = any(row.image is not None for row in table.rows)
    head = "".join(f"<th{_class(column)}>{_text(column.title)}</th>" for column in table.columns)
    body = "".join(_row(row, table.columns, pictures) for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll"><table{" class=pictures" if pictures else ""}><caption>{_text(table.title)}</caption>'
        f"<thead><tr>{'<th></th>' if pictures else ''}{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def _row(row: Row, columns: Sequence[Column], pictures: bool) -> str:
    picture = ""
    if pictures:
        image = "" if row.image is None else f'<img src="{data_address(row.image, THUMBNAIL)}" alt="">'
        picture = f'<td class="picture">{image}</td>'
    cells = "".join(_cell(cell, column) for cell, column in zip(row.cells, columns, strict=True))
    return f"<tr{f' class={row.tone}' if row.tone else ''}>{picture}{cells}</tr>"


def _cell(cell: str, column: Column) -> str:
    shown = _NEGATIVE.sub("−", cell) if column.numeric else cell
    return f'<td{_class(column)} data-label="{_text(column.title)}">{_text(shown)}</td>'


def _class(column: Column) -> str:
    return " class=number" if column.numeric else ""


def _about(document: Document) -> str:
    entries = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in document.about.items())
    return f'<footer><dl class="about">{entries}</dl></footer>'
