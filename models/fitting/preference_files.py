"""Files of preference rows -> records: JSON, JSON lines, Parquet and webdataset tar files.

A record is one row as it is written, column by column. Pictures inside it are not read: a Parquet cell and a member of
an archive stand for themselves until somebody asks for their bytes. Nothing is unpacked to disk.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from models.fitting.preference_data import (
    ArchivePicture,
    DataProblem,
    FilePicture,
    Picture,
    SkippedRow,
    UnreadableRow,
)

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp"})
TEXT_EXTENSIONS = frozenset({"txt", "caption"})


@dataclass(frozen=True)
class Record:
    """One row. ``columns``: values as they are written, pictures as :class:`Picture`; ``members``: an archive's own."""

    key: str
    columns: Mapping[str, Any]
    members: Mapping[str, Picture] = field(default_factory=dict)


@dataclass(frozen=True)
class ParquetPicture:
    """One cell of a Parquet file: bytes, or the struct {bytes, path} of the datasets library; ``place`` in a list.

    ``folder`` is where a struct without bytes has its path looked up.
    """

    file: Path
    row_group: int
    row: int
    column: str
    place: int | None
    folder: Path

    @property
    def name(self) -> str:
        place = "" if self.place is None else f"[{self.place}]"
        return f"{self.column}{place} of row {self.row} in row group {self.row_group}"

    def read(self) -> bytes:
        try:
            cell = _row_group_column(self.file, self.row_group, self.column)[self.row].as_py()
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            raise UnreadableRow("image_unreadable", f"{self.name}: {error}") from error
        if self.place is not None:
            cell = cell[self.place]
        if isinstance(cell, bytes):
            return cell
        if isinstance(cell, Mapping):
            if cell.get("bytes") is not None:
                return bytes(cell["bytes"])
            if isinstance(cell.get("path"), str):
                return file_in(self.folder, cell["path"]).read()
        raise UnreadableRow("image_missing", f"{self.name} is empty")


def file_in(folder: Path, name: str) -> Picture:
    """The file ``name`` of ``folder``; raises :class:`UnreadableRow` for an address, a way out, and what is not there.

    Symbolic links are followed before it is asked whether the file lies inside.
    """
    if "://" in name:
        raise UnreadableRow("image_is_address", "images are not fetched: give them as files or bytes")
    if not name or "\0" in name:
        raise UnreadableRow("image_missing", "a path is empty or holds a zero byte")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UnreadableRow("path_outside", f"{name} is not inside the images folder")
    if not path.is_file():
        raise UnreadableRow("image_missing", f"{name} is not in the images folder")
    return FilePicture(path, name)


def read_records(path: Path, folder: Path) -> Iterator[Record | SkippedRow]:
    """Records of ``path`` in order, as its ending says; ``folder`` holds images that Parquet cells name by path.

    Raises :class:`DataProblem` for a file that is not there, has another ending, or is not what its ending says.
    """
    readers = {".json": _json, ".jsonl": _json_lines, ".tar": _tar}
    if not path.is_file():
        raise DataProblem(f"{path} is not a file")
    if path.suffix == ".parquet":
        return _parquet(path, folder)
    if path.suffix not in readers:
        raise DataProblem(f"{path.name}: the ending is one of .json, .jsonl, .parquet, .tar")
    return readers[path.suffix](path)


def _json(path: Path) -> Iterator[Record | SkippedRow]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataProblem(f"{path.name} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataProblem(f"{path.name} is not a list of rows")
    for number, row in enumerate(rows):
        yield _record(str(number), row)


def _json_lines(path: Path) -> Iterator[Record | SkippedRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield _record(str(number), json.loads(line))
                except ValueError:
                    yield SkippedRow(str(number), "not_json", "the line is not JSON")


def _record(key: str, row: object) -> Record | SkippedRow:
    return Record(key, row) if isinstance(row, dict) else SkippedRow(key, "not_a_row", "the row is not an object")


# ------------------------------------------------------------------------------------------------------------ Parquet


def _parquet(path: Path, folder: Path) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataProblem("Parquet files need pyarrow: pip install 'reward-service[data]'") from error
    try:
        with pq.ParquetFile(path) as file:
            pictures = [field.name for field in file.schema_arrow if _holds_pictures(field.type)]
            light = [field.name for field in file.schema_arrow if field.name not in pictures]
            lists = [name for name in pictures if _is_list(file.schema_arrow.field(name).type)]
            number = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=light)
                lengths = {name: _list_lengths(path, group, name) for name in lists}
                for row in range(file.metadata.row_group(group).num_rows):
                    columns = {name: table.column(name)[row].as_py() for name in light}
                    for name in pictures:
                        columns[name] = (
                            [ParquetPicture(path, group, row, name, i, folder) for i in range(lengths[name][row])]
                            if name in lists
                            else ParquetPicture(path, group, row, name, None, folder)
                        )
                    yield Record(str(number), columns)
                    number += 1
    except pa.ArrowInvalid as error:
        raise DataProblem(f"{path.name} is not a Parquet file: {error}") from error


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _holds_pictures(kind: pa.DataType) -> bool:
    """Bytes, the struct {bytes, path}, or a list of either."""
    from pyarrow import types

    if _is_list(kind):
        return _holds_pictures(kind.value_type)
    if types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} >= {"bytes", "path"}
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _list_lengths(path: Path, row_group: int, column: str) -> list[int]:
    import pyarrow.compute as pc

    return [length or 0 for length in pc.list_value_length(_row_group_column(path, row_group, column)).to_pylist()]


@lru_cache(maxsize=4)  # rows are asked in order: a row group's pictures are read once, and few groups are held
def _row_group_column(path: Path, row_group: int, column: str) -> pa.ChunkedArray:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=[column]).column(0)


# --------------------------------------------------------------------------------------------------------- webdataset


def _tar(path: Path) -> Iterator[Record | SkippedRow]:
    """Members grouped by their name up to the first dot after the last slash, as webdataset does."""
    samples: dict[str, dict[str, ArchivePicture]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                stem, dot, extension = name.name.partition(".")
                if member.isreg() and dot and stem:
                    key = str(name.with_name(stem))
                    picture = ArchivePicture(path, member.name, member.offset_data, member.size)
                    samples.setdefault(key, {})[extension.lower()] = picture
    except tarfile.TarError as error:
        raise DataProblem(f"{path.name} is not an uncompressed tar file: {error}") from error
    for key, members in samples.items():
        try:
            yield Record(key, _sample_columns(members), _sample_pictures(members))
        except UnreadableRow as problem:
            yield SkippedRow(key, problem.code, problem.message)


def _sample_columns(members: Mapping[str, ArchivePicture]) -> dict[str, Any]:
    """The fields of the .json member, the .txt as "prompt" where they have none, and jpg_0 and the like by name."""
    columns: dict[str, Any] = {name: picture for name, picture in members.items() if _is_numbered(name)}
    if "json" in members:
        text = members["json"].read()
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise UnreadableRow("not_json", "the .json member is not JSON") from error
        if not isinstance(fields, dict):
            raise UnreadableRow("not_a_row", "the .json member is not an object")
        columns = {**fields, **columns}
    for extension in TEXT_EXTENSIONS & members.keys():
        if "prompt" not in columns and "caption" not in columns:
            columns["prompt"] = members[extension].read().decode("utf-8", "replace").strip()
    return columns


def _is_numbered(extension: str) -> bool:
    kind, _, number = extension.partition("_")
    return kind in IMAGE_EXTENSIONS and number.isdigit()


def _sample_pictures(members: Mapping[str, ArchivePicture]) -> dict[str, Picture]:
    """Pictures by their whole name in the archive, by their file name, and by what follows the sample's key."""
    found: dict[str, Picture] = {}
    for extension, picture in members.items():
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS or _is_numbered(extension):
            found |= dict.fromkeys((picture.name, PurePosixPath(picture.name).name, extension), picture)
    return found
