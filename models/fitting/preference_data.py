"""People's preferences between images of one prompt, and where the images lie; nothing is decoded before it is asked.

A row relates the images of one prompt in one of two ways: a *pair* has the share of people (or the label) that prefers
the first image, a *ranking* has one rank an image, lower better, equal ranks tied.
"""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image as PILImage


class DataProblem(ValueError):
    """The file as a whole cannot be used; the message is one line for the person who gave it."""


class UnreadableRow(ValueError):
    """One row cannot be used. ``code`` is stable and groups rows of the same fault; the message names the detail."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Picture(Protocol):
    """An encoded image that lies somewhere; ``name`` tells people which one."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes:
        """The encoded file; raises :class:`UnreadableRow` where it cannot be had any more."""
        ...


@dataclass(frozen=True)
class FilePicture:
    """A file in the images folder."""

    path: Path
    name: str

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UnreadableRow("image_unreadable", f"{self.name}: {error.strerror}") from error


@dataclass(frozen=True)
class ArchivePicture:
    """A member of an uncompressed tar file, read in place: ``size`` bytes from ``offset``."""

    archive: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        try:
            with self.archive.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise UnreadableRow("image_unreadable", f"{self.name}: {error.strerror}") from error
        if len(data) < self.size:
            raise UnreadableRow("image_unreadable", f"{self.name}: the archive ends within it")
        return data


def open_picture(picture: Picture) -> PILImage.Image:
    """The decoded picture, RGB; raises :class:`UnreadableRow` for what Pillow cannot read."""
    return decode_picture(picture.read(), picture.name)


def decode_picture(data: bytes, name: str) -> PILImage.Image:
    """An encoded picture, decoded to RGB; raises :class:`UnreadableRow`, which tells its ``name``."""
    try:
        with PILImage.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError) as error:
        raise UnreadableRow("image_unreadable", f"{name} is no image that Pillow reads") from error


@dataclass(frozen=True)
class LabelledPair:
    """``label`` in [0, 1]: how far people prefer image ``first`` to image ``second``; 0.5 is a tie."""

    first: int
    second: int
    label: float


@dataclass(frozen=True)
class RowContext:
    """What the images of a row were made from, as an item of POST /compare has it: for judges that look at it."""

    image: Picture | None = None
    frames: tuple[Picture, ...] = ()
    mask: Picture | None = None
    question: str | None = None
    task: str | None = None
    criterion: str | None = None

    @property
    def texts(self) -> dict[str, str]:
        """All that it says, by name."""
        said = {"question": self.question, "task": self.task, "criterion": self.criterion}
        return {name: text for name, text in said.items() if text is not None}


@dataclass(frozen=True)
class PreferenceRow:
    """The images of one prompt and how people relate them: exactly one of ``preference`` and ``ranks``.

    ``preference`` is of two images: 1 the first is preferred, 0 the second, 0.5 neither, between for shares. ``ranks``
    has one finite number an image, lower better. ``weight`` is positive. ``context`` None: the images were made from
    the prompt alone. Raises :class:`UnreadableRow` otherwise.
    """

    key: str
    prompt: str
    images: tuple[Picture, ...]
    preference: float | None = None
    ranks: tuple[float, ...] | None = None
    weight: float = 1.0
    context: RowContext | None = None

    def __post_init__(self) -> None:
        if (self.preference is None) == (self.ranks is None):
            raise UnreadableRow("no_label", "a row has either a preference or ranks")
        if self.preference is not None:
            if len(self.images) != 2:
                raise UnreadableRow("image_count", f"a preference is between two images, not {len(self.images)}")
            if not 0 <= self.preference <= 1:
                raise UnreadableRow("bad_label", f"a preference is in [0, 1], not {self.preference}")
        if self.ranks is not None:
            if len(self.images) < 2 or len(self.ranks) != len(self.images):
                raise UnreadableRow("image_count", f"{len(self.ranks)} ranks of {len(self.images)} images")
            if not all(map(math.isfinite, self.ranks)):
                raise UnreadableRow("bad_label", "a rank is not a finite number")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise UnreadableRow("bad_weight", f"a weight is positive and finite, not {self.weight}")

    @property
    def pairs(self) -> list[LabelledPair]:
        """The pair, or all n (n - 1) / 2 pairs of a ranking in the order of the images; ties are in it."""
        if self.preference is not None:
            return [LabelledPair(0, 1, self.preference)]
        ranks = self.ranks or ()
        return [
            LabelledPair(i, j, 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j]))
            for i, j in itertools.combinations(range(len(ranks)), 2)
        ]


@dataclass(frozen=True)
class SkippedRow:
    """A row that cannot be used, and why."""

    key: str
    code: str
    message: str


@dataclass(frozen=True)
class PreferenceData:
    """What a file holds: its schema's name, its rows in order, and the rows that could not be read."""

    schema: str
    rows: Sequence[PreferenceRow]
    skipped: Sequence[SkippedRow]

    def skipped_by_code(self) -> dict[str, int]:
        return dict(Counter(row.code for row in self.skipped).most_common())
