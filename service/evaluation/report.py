"""report.html: one document that needs nothing else, with the worst disagreements as pictures.

Every text is escaped where it enters the page; prompts, keys and messages are somebody else's.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image as PILImage

from models.fitting.preference_data import Picture, SkippedRow, UnreadableRow, open_picture
from service.evaluation.results import Disagreement, Judged
from service.evaluation.wording import MeasureRow, counted, measure_rows

SHOWN = 200
"""Side of a picture on the page in CSS pixels; stored twice as large, for dense displays."""
LISTED = 20
"""Rows of the list of unreadable and failed ones."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --band: #f5f7f9;
        --good: #17803d; --bad: #cf222e; --accent: #0a5fc4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1318; --ink: #e4e9ee; --soft: #97a3af; --line: #2c343d; --band: #171d24;
          --good: #4cc26a; --bad: #ff7b72; --accent: #6cb0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 56px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 36px 0 8px; padding-top: 20px; border-top: 1px solid var(--line); }
p { margin: 0 0 8px; max-width: 88ch; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.headline { font-size: 40px; line-height: 1.2; font-weight: 650; color: var(--accent); margin: 18px 0 0; }
.scroll { overflow-x: auto; margin-bottom: 14px; }
table { width: 100%; border-collapse: collapse; font-size: 15px; }
th { font-size: 13px; font-weight: 600; color: var(--soft); text-align: left; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; vertical-align: top; }
td:first-child { min-width: 170px; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr.first td { font-weight: 650; }
.split { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 16px 32px; }
svg { display: block; width: 100%; max-width: 400px; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 28px 32px; }
.card { min-width: 0; }
.card > p { margin: 0 0 8px; line-height: 1.35; overflow-wrap: anywhere; }
.pair { display: flex; gap: 16px; }
figure { margin: 0; width: 200px; min-width: 0; }
.frame { display: flex; height: 200px; align-items: center; justify-content: center; background: var(--band);
         border-radius: 6px; overflow: hidden; border: 2px solid transparent; }
.people .frame { border-color: var(--good); }
.model .frame { border-color: var(--bad); }
.frame img { max-width: 100%; max-height: 100%; }
.frame img.small { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
figcaption { font-size: 13px; line-height: 1.4; color: var(--soft); margin-top: 6px; overflow-wrap: anywhere; }
figcaption b { display: block; }
.people b { color: var(--good); }
.model b { color: var(--bad); }
"""


def render(
    found: Mapping[str, Any], skipped: Sequence[SkippedRow], judged: Judged, worst: Sequence[Disagreement]
) -> str:
    """The whole page of a results document."""
    model, data = found["model"], found["data"]
    title = f"{model['name']} on {data['file']}"
    source = f"{data['schema']} rows · asked by /{model['route']} · {model['dtype']} · {model['fingerprint']}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(source)}</p>',
        _measures(measure_rows(found)),
        "".join(f'<p class="soft">{_text(line)}.</p>' for line in counted(found)),
        _calibration(found),
        _worst(judged, worst, "score" if model["route"] == "score" else "strength"),
        _left_out(skipped, judged),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _measures(rows: Sequence[MeasureRow]) -> str:
    if not rows:
        return '<p class="headline">no pair could be judged</p>'
    first = next((row for row in rows if row.headline), rows[0])
    interval = f"; 95 % interval {first.interval}" if first.interval else ""
    head = f'<p class="headline">{_text(first.value)}</p><p class="soft">{_text(first.label)}{_text(interval)}</p>'
    table = _table(
        ("measure", "value", "95 % interval", "of"),
        [(row.label, row.value, row.interval, row.count) for row in rows],
        first=rows.index(first),
    )
    return f"{head}<h2>Agreement with people</h2>{table}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], first: int | None = None) -> str:
    """The first column is text, the others are numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=number' if i else ''}>{_text(cell)}</{tag}>" for i, cell in enumerate(row))

    body = "".join(
        f"<tr{' class=first' if number == first else ''}>{cells('td', row)}</tr>" for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><tr>{cells("th", columns)}</tr>{body}</table></div>'


# --------------------------------------------------------------------------------------------------- calibration


def _calibration(found: Mapping[str, Any]) -> str:
    bins = found["measures"].get("reliability")
    if not bins:
        return ""
    calibration = found["model"]["calibration"]
    scored = found["model"]["route"] == "score"
    said = f"Probabilities are sigmoid(score difference / {calibration['temperature']:g}); {calibration['source']}."
    rows = [
        (f"{100 * row['low']:.0f} – {100 * row['high']:.0f} %", f"{row['count']}", f"{100 * row['confidence']:.1f} %",
         f"{100 * row['agreement']:.1f} %")
        for row in bins
    ]  # fmt: skip
    table = _table(("probability of the verdict", "pairs", "said", "people agree"), rows)
    lead = f'<p class="soft">{_text(said)}</p>' if scored else ""
    return f'<h2>Calibration</h2>{lead}<div class="split"><div>{_diagram(bins)}</div><div>{table}</div></div>'


def _diagram(bins: Sequence[Mapping[str, Any]]) -> str:
    """Agreement over confidence; the area of a dot is the share of its bin, the dashed line perfect calibration."""
    left, top, width, height = 62, 20, 310, 240
    total = sum(row["weight"] for row in bins)

    def across(value: float) -> float:
        return left + (value - 0.5) / 0.5 * width

    def down(value: float) -> float:
        return top + (1 - value) * height

    lines = "".join(
        f'<line x1="{left}" x2="{left + width}" y1="{down(y):.1f}" y2="{down(y):.1f}" stroke="var(--line)"/>'
        f'<text x="{left - 20}" y="{down(y) + 4:.1f}" text-anchor="end">{100 * y:.0f} %</text>'
        for y in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    labels = "".join(
        f'<text x="{across(x):.1f}" y="{top + height + 30}" text-anchor="middle">{100 * x:.0f} %</text>'
        for x in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    )
    dots = "".join(
        f'<circle cx="{across(row["confidence"]):.1f}" cy="{down(row["agreement"]):.1f}" '
        f'r="{3 + 13 * (row["weight"] / total) ** 0.5:.1f}" fill="var(--accent)" fill-opacity="0.65"/>'
        for row in bins
    )
    return (
        f'<svg viewBox="0 0 {left + width + 24} {top + height + 56}" role="img" '
        f'aria-label="People&#x27;s agreement over the probability of the verdict">{lines}{labels}'
        f'<line x1="{across(0.5)}" y1="{down(0.5)}" x2="{across(1)}" y2="{down(1)}" stroke="var(--soft)" '
        f'stroke-dasharray="5 4"/>{dots}'
        f'<text x="{left + width / 2}" y="{top + height + 50}" text-anchor="middle">probability of the verdict; '
        "height: how often people agree</text></svg>"
    )


# -------------------------------------------------------------------------------------------------------- pictures


def _worst(judged: Judged, worst: Sequence[Disagreement], scale: str) -> str:
    if not worst:
        return ""
    cards = "".join(_card(judged, each, scale) for each in worst)
    return (
        '<h2>Worst disagreements</h2><p class="soft">Pairs that people decided otherwise, the surest wrong verdict '
        f'first, one a row at most.</p><div class="cards">{cards}</div>'
    )


def _card(judged: Judged, each: Disagreement, scale: str) -> str:
    row, verdict = judged.rows[each.row], judged.verdicts[each.row]

    def figure(kind: str, place: int, said: str) -> str:
        score = verdict.scores[place]
        number = "" if score is None else f" · {scale} {score:.4g}"
        rank = "" if row.ranks is None else f" · rank {row.ranks[place]:g}"
        return (
            f'<figure class="{kind}"><div class="frame">{_picture(row.images[place])}</div>'
            f"<figcaption><b>{said}</b>{_text(row.images[place].name)}{rank}{number}</figcaption></figure>"
        )

    asked = "" if row.context is None else "".join(f" · {_text(said)}" for said in row.context.texts.values())
    choice = "equal" if each.probability == 0.5 else f"{100 * each.probability:.1f} % sure"
    return (
        f'<div class="card"><p>{_text(row.prompt)} <span class="soft">{asked} · row {_text(row.key)}</span></p>'
        '<div class="pair">'
        f"{figure('people', each.preferred, 'people prefer this')}"
        f"{figure('model', each.other, f'the model: {choice}')}</div></div>"
    )


def _picture(picture: Picture) -> str:
    """A thumbnail as PNG inside the page; words where the picture cannot be read."""
    try:
        image = open_picture(picture)
    except UnreadableRow as problem:
        return f"<span>{_text(problem.message)}</span>"
    image.thumbnail((2 * SHOWN, 2 * SHOWN), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    small = ' class="small"' if max(image.size) < SHOWN else ""
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img{small} src="data:image/png;base64,{data}" alt="{_text(picture.name)}">'


# --------------------------------------------------------------------------------------------------------- left out


def _left_out(skipped: Sequence[SkippedRow], judged: Judged) -> str:
    rows = [(each.key, each.code, each.message) for each in skipped]
    for row, verdict in zip(judged.rows, judged.verdicts, strict=True):
        rows += [(row.key, failure.code, failure.message) for failure in verdict.failures]
    if not rows:
        return ""
    head = "<tr><th>row</th><th>code</th><th>reason</th></tr>"
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows[:LISTED])
    more = f'<p class="soft">and {len(rows) - LISTED} more: see rows.jsonl.</p>' if len(rows) > LISTED else ""
    return f'<h2>Left out</h2><div class="scroll"><table>{head}{body}</table></div>{more}'
