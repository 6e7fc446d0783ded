"""A report as a browser reads it."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "img", "path", "line", "use", "rect"}


@dataclass
class Page(HTMLParser):
    """A page as a browser reads it: tags with attributes, texts, images, and the points of every curve."""

    text: str
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    curves: list[tuple[str, list[tuple[str, float, float]]]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._series: str | None = None
        self.feed(self.text)
        self.close()
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag not in VOID and tag != "!doctype":
            self.open.append(tag)
        self._take(tag, found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        self._take(tag, found)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1:] != ["style"]:
            self.texts.append(data.strip())

    def _take(self, tag: str, attributes: dict[str, str]) -> None:
        self._series = attributes.get("data-series", self._series)
        if tag == "path" and self._series is not None:
            points = [(way, float(x), float(y)) for way, x, y in re.findall(r"([ML]) (\S+) (\S+)", attributes["d"])]
            self.curves.append((self._series, points))
            self._series = None

    def curve(self, name: str) -> list[list[tuple[str, float, float]]]:
        """Points of every curve of this name."""
        return [points for found, points in self.curves if found == name]

    def images(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]

    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())
