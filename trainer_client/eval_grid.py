"""A sheet of pictures: a row for each prompt, its seeds side by side, one block of columns for each policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 128
"""Pixels that a picture's longer side has on the sheet: small ones are enlarged without smoothing."""
_GAP, _BLOCK_GAP, _LINE, _MARGIN = 6, 24, 15, 12
_PAPER, _INK, _PALE, _FRAME = (255, 255, 255), (20, 20, 20), (105, 105, 105), (190, 190, 190)


@dataclass(frozen=True)
class GridRow:
    """One prompt: its text, and for each policy the pictures of its seeds with what stands under each."""

    text: str
    pictures: Sequence[Sequence[Image.Image]]
    captions: Sequence[Sequence[str]]


def fitted(picture: Image.Image, cell: int = CELL) -> Image.Image:
    """The picture with a longer side of ``cell`` pixels; a small one by nearest neighbour, as its pixels are."""
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smoothing = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, smoothing)


def draw_grid(rows: Sequence[GridRow], titles: Sequence[str], cell: int = CELL) -> Image.Image:
    """The sheet; ``titles`` are those of the policies. Raises ValueError for no rows or rows of different shapes."""
    shapes = {tuple(len(seeds) for seeds in row.pictures) for row in rows}
    if len(shapes) != 1 or shapes != {tuple(len(seeds) for seeds in row.captions) for row in rows}:
        raise ValueError("a grid has rows, and all have the same number of pictures and captions")
    counts = shapes.pop()
    if len(counts) != len(titles):
        raise ValueError(f"{len(titles)} titles for {len(counts)} policies")
    lefts = _lefts(counts, cell)
    width = lefts[-1][-1] + cell + _MARGIN
    font = ImageFont.load_default(11)
    wrapped = [wrap(row.text, width - 2 * _MARGIN, font) for row in rows]
    heights = [_LINE * len(lines) + cell + _LINE + 2 * _GAP for lines in wrapped]
    sheet = Image.new("RGB", (width, 2 * _MARGIN + _LINE + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for block, title in zip(lefts, titles, strict=True):
        room = block[-1] + cell - block[0]
        draw.text((block[0], _MARGIN - 4), shorten(title, room, font), _INK, font)
    top = _MARGIN + _LINE
    for row, lines, height in zip(rows, wrapped, heights, strict=True):
        draw.multiline_text((_MARGIN, top), "\n".join(lines), _INK, font, spacing=_LINE - 11)
        below = top + _LINE * len(lines) + _GAP
        for block, pictures, captions in zip(lefts, row.pictures, row.captions, strict=True):
            for left, picture, caption in zip(block, pictures, captions, strict=True):
                shown = fitted(picture, cell)
                sheet.paste(shown, (left, below))
                # A frame, for pictures as white as the paper.
                draw.rectangle((left - 1, below - 1, left + shown.width, below + shown.height), outline=_FRAME)
                draw.text((left, below + cell + 1), shorten(caption, cell, font), _PALE, font)
        top += height
    return sheet


def _lefts(counts: Sequence[int], cell: int) -> list[list[int]]:
    """Where the pictures of each block begin."""
    lefts, at = [], _MARGIN
    for count in counts:
        lefts.append([at + i * (cell + _GAP) for i in range(count)])
        at = lefts[-1][-1] + cell + _BLOCK_GAP
    return lefts


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def wrap(text: str, width: int, font: Font, lines: int = 3) -> list[str]:
    """The text in at most so many lines of ``width`` pixels, broken at blanks; the last ends in an ellipsis."""
    made = [""]
    words = text.split()
    for i, word in enumerate(words):
        longer = f"{made[-1]} {word}".strip()
        if font.getlength(longer) <= width or not made[-1]:
            made[-1] = longer
        elif len(made) == lines:
            made[-1] = " ".join([made[-1], *words[i:]])
            break
        else:
            made.append(word)
    return [shorten(line, width, font) for line in made]


def shorten(text: str, width: int, font: Font) -> str:
    """The text, or as much of its beginning as fits into ``width`` pixels with three dots."""
    if font.getlength(text) <= width:
        return text
    end = len(text)
    while end and font.getlength(f"{text[:end].rstrip()}...") > width:
        end -= 1
    return f"{text[:end].rstrip()}..."


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices 0 .. count - 1, evenly spread and with the first."""
    kept = min(count, most)
    return [i * count // kept for i in range(kept)]
