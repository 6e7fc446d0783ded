"""One record of a file of preferences, column by column: values of the kind that is asked for, or why they are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.fitting.preference_data import Picture, UnreadableRow
from models.fitting.preference_files import Record, file_in

UID_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
NAMED = 20
"""Columns that a message names."""


@dataclass(frozen=True)
class Columns:
    """The columns of ``record``; images by name are looked up in ``folder``, or in the record's own archive.

    All readers raise :class:`UnreadableRow` for a column that is missing, or of another kind.
    """

    record: Record
    folder: Path

    def __contains__(self, column: str) -> bool:
        return column in self.record.columns

    def get(self, column: str) -> Any:
        """The value as it is written; None where the column is missing or empty."""
        return self.record.columns.get(column)

    def value(self, column: str) -> Any:
        found = self.get(column)
        if found is None:
            names = ", ".join(sorted(map(str, self.record.columns))[:NAMED]) or "none"
            raise UnreadableRow("missing_column", f"{column} is missing; the row's columns are {names}")
        return found

    def text(self, column: str) -> str:
        return _text(self.value(column), column)

    def number(self, column: str) -> float:
        return _number(self.value(column), column)

    def numbers(self, column: str) -> tuple[float, ...]:
        return tuple(_number(value, column) for value in self.sequence(column))

    def sequence(self, column: str) -> Sequence[Any]:
        found = self.value(column)
        if not isinstance(found, (list, tuple)):
            raise UnreadableRow("bad_column", f"{column} is not a list")
        return found

    def key(self, column: str) -> str:
        """What the row calls itself, or its place in the file."""
        found = self.get(column)
        return str(found) if isinstance(found, (str, int)) else self.record.key

    def picture(self, column: str) -> Picture:
        return self._picture(self.value(column), column)

    def pictures(self, column: str) -> tuple[Picture, ...]:
        return tuple(self._picture(value, column) for value in self.sequence(column))

    def picture_of_uid(self, uid: str) -> Picture:
        """The image file that has the uid for its name."""
        for extension in UID_EXTENSIONS:
            try:
                return self._picture(f"{uid}.{extension}", "uid")
            except UnreadableRow as problem:
                if problem.code != "image_missing":
                    raise
        raise UnreadableRow("image_missing", f"there is no image {uid}.png, nor .jpg, .jpeg or .webp")

    def inside(self, column: str) -> Columns:
        """The fields of an object in ``column``, as columns that are named after both."""
        found = self.value(column)
        if not isinstance(found, dict):
            raise UnreadableRow("bad_column", f"{column} is not an object")
        named = {f"{column}.{name}": value for name, value in found.items()}
        return Columns(Record(self.record.key, named, self.record.members), self.folder)

    def _picture(self, value: Any, column: str) -> Picture:
        if isinstance(value, str):
            if not self.record.members:
                return file_in(self.folder, value)
            if value not in self.record.members:
                raise UnreadableRow("image_missing", f"{value} is not among the sample's members of the archive")
            return self.record.members[value]
        if value is None or isinstance(value, (bool, int, float, bytes, list, dict)):
            raise UnreadableRow("bad_column", f"{column} holds no picture")
        picture: Picture = value
        return picture


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise UnreadableRow("bad_column", f"{column} is not a text")
    return value


def _number(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnreadableRow("bad_column", f"{column} is not a number")
    return float(value)
