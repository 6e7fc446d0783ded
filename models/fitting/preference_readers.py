"""Records -> preference rows, by the schemas in which preferences are published.

================ ========================================================== =========================================
schema           columns that are read                                      label
================ ========================================================== =========================================
jsonl            prompt, images, preference or ranks; key, weight           as given (this project's own)
hpdv2            prompt, file_path, human_preference [a, b]                 a / (a + b)
hpdv2            prompt, image_path, rank                                   ranking, lower better
pickapic         caption, jpg_0, jpg_1, label_0, label_1; has_label         label_0; 0.5 is a tie
imagerewarddb    prompt_id, prompt, image, rank: one row an image           ranking by prompt_id, lower better
imagerewarddb    id, prompt, generations, ranking                           ranking, lower better
hpdv3            prompt, path1, path2                                       path1 is preferred
================ ========================================================== =========================================

Sources: HPDv2 (arXiv:2306.09341, ymhao/HPDv2), Pick-a-Pic (arXiv:2305.01569, yuvalkirstain/pickapic_v1 and v2),
ImageRewardDB (arXiv:2304.05977, zai-org/ImageRewardDB), HPDv3 (arXiv:2508.03789, MizzenAI/HPDv3). Images are paths in
the images folder, names in the archive, or bytes; addresses (``image_0_url``) are not fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from models.fitting.preference_data import (
    DataProblem,
    Picture,
    PreferenceData,
    PreferenceRow,
    SkippedRow,
    UnreadableRow,
)
from models.fitting.preference_files import Record, file_in, read_records

Schema: TypeAlias = Literal["jsonl", "hpdv2", "pickapic", "imagerewarddb", "hpdv3"]
SCHEMAS: tuple[Schema, ...] = get_args(Schema)
SEEN = 100
"""Rows whose columns tell the schema: the first one alone may be a broken one."""


@dataclass(frozen=True)
class _Reader:
    """Reads the columns of records; images by name are looked up in ``folder``, or in the record's own archive."""

    folder: Path

    def text(self, record: Record, column: str) -> str:
        value = _column(record, column)
        if not isinstance(value, str):
            raise UnreadableRow("bad_column", f"{column} is not a text")
        return value

    def picture(self, record: Record, column: str) -> Picture:
        return self._picture(record, _column(record, column), column)

    def pictures(self, record: Record, column: str) -> tuple[Picture, ...]:
        return tuple(self._picture(record, value, column) for value in _list(record, column))

    def _picture(self, record: Record, value: Any, column: str) -> Picture:
        if isinstance(value, str):
            if not record.members:
                return file_in(self.folder, value)
            if value not in record.members:
                raise UnreadableRow("image_missing", f"{value} is not among the sample's members of the archive")
            return record.members[value]
        if value is None or isinstance(value, (bool, int, float, list, dict)):
            raise UnreadableRow("bad_column", f"{column} holds no picture")
        picture: Picture = value
        return picture


def read_preferences(path: Path, images: Path | None = None, schema: Schema | None = None) -> PreferenceData:
    """All rows of a .json, .jsonl, .parquet or .tar file; ``images`` (default: the file's folder) holds named images.

    ``schema`` None is told from the columns. Raises :class:`DataProblem` for a file that cannot be used: not there, of
    an unknown ending or unknown columns, or without one usable row.
    """
    folder = path.parent if images is None else images
    if not folder.is_dir():
        raise DataProblem(f"{folder} is not a folder of images")
    records: list[Record] = []
    skipped: list[SkippedRow] = []
    for entry in read_records(path, folder):
        if isinstance(entry, Record):
            records.append(entry)
        else:
            skipped.append(entry)
    if not records:
        raise DataProblem(f"{path.name} holds no rows" + _reasons(skipped))
    columns = {name for record in records[:SEEN] for name in record.columns}
    chosen = schema or detect_schema(columns)
    reader = _Reader(folder)
    if chosen == "imagerewarddb" and "generations" not in columns:
        rows = _grouped_by_prompt(records, reader, skipped)
    else:
        rows = _each(records, lambda record: _PARSERS[chosen](record, reader), skipped)
    if not rows:
        raise DataProblem(f"{path.name} holds no usable {chosen} row" + _reasons(skipped))
    return PreferenceData(chosen, rows, skipped)


def detect_schema(columns: Iterable[str]) -> Schema:
    """The schema that has these columns; raises :class:`DataProblem` naming the columns if there is none."""
    names = set(columns)
    wanted: list[tuple[Schema, set[str]]] = [
        ("pickapic", {"caption", "label_0", "label_1"}),
        ("hpdv3", {"path1", "path2"}),
        ("hpdv2", {"file_path", "human_preference"}),
        ("hpdv2", {"image_path", "rank"}),
        ("imagerewarddb", {"prompt_id", "image", "rank"}),
        ("imagerewarddb", {"generations", "ranking"}),
        ("jsonl", {"images", "preference"}),
        ("jsonl", {"images", "ranks"}),
    ]
    for schema, needed in wanted:
        if needed <= names:
            return schema
    raise DataProblem(
        f"the columns {', '.join(sorted(names)) or '(none)'} are of no schema known: {', '.join(SCHEMAS)}"
    )


# ---------------------------------------------------------------------------------------------------------- schemas


def _own(record: Record, reader: _Reader) -> PreferenceRow:
    columns = record.columns
    preference, ranks, weight = columns.get("preference"), columns.get("ranks"), columns.get("weight")
    return PreferenceRow(
        key=_key(record, "key"),
        prompt=reader.text(record, "prompt"),
        images=reader.pictures(record, "images"),
        preference=None if preference is None else _number(preference, "preference"),
        ranks=None if ranks is None else _numbers(record, "ranks"),
        weight=1.0 if weight is None else _number(weight, "weight"),
    )


def _hpdv2(record: Record, reader: _Reader) -> PreferenceRow:
    prompt = reader.text(record, "prompt")
    if "human_preference" not in record.columns:
        ranks = _numbers(record, "rank")
        return PreferenceRow(record.key, prompt, reader.pictures(record, "image_path"), ranks=ranks)
    votes = _numbers(record, "human_preference")
    if len(votes) != 2 or min(votes) < 0 or not sum(votes) > 0:
        raise UnreadableRow("bad_label", f"human_preference is {list(votes)}")
    images = reader.pictures(record, "file_path")
    return PreferenceRow(record.key, prompt, images, preference=votes[0] / sum(votes))


def _pickapic(record: Record, reader: _Reader) -> PreferenceRow:
    columns = record.columns
    if columns.get("has_label") is False:
        raise UnreadableRow("no_label", "has_label is false")
    if columns.get("jpg_0") is None and columns.get("image_0_url"):
        raise UnreadableRow("image_is_address", "the row has addresses and no pictures; addresses are not fetched")
    first, second = (_number(_column(record, name), name) for name in ("label_0", "label_1"))
    if first + second != 1 or first not in (0.0, 0.5, 1.0):
        raise UnreadableRow("bad_label", f"label_0 and label_1 are {first:g} and {second:g}")
    images = (reader.picture(record, "jpg_0"), reader.picture(record, "jpg_1"))
    return PreferenceRow(_key(record, "ranking_id"), reader.text(record, "caption"), images, preference=first)


def _hpdv3(record: Record, reader: _Reader) -> PreferenceRow:
    images = (reader.picture(record, "path1"), reader.picture(record, "path2"))
    return PreferenceRow(record.key, reader.text(record, "prompt"), images, preference=1.0)


def _imagereward_json(record: Record, reader: _Reader) -> PreferenceRow:
    images = reader.pictures(record, "generations")
    ranks = _numbers(record, "ranking")
    return PreferenceRow(_key(record, "id"), reader.text(record, "prompt"), images, ranks=ranks)


_PARSERS: Mapping[Schema, Callable[[Record, _Reader], PreferenceRow]] = {
    "jsonl": _own,
    "hpdv2": _hpdv2,
    "pickapic": _pickapic,
    "hpdv3": _hpdv3,
    "imagerewarddb": _imagereward_json,
}


def _grouped_by_prompt(records: Sequence[Record], reader: _Reader, skipped: list[SkippedRow]) -> list[PreferenceRow]:
    """One ranking a prompt_id, in the order in which the prompts first come; an image that is missing is left out."""
    groups: dict[str, list[tuple[str, Picture, float]]] = {}
    for record in records:
        try:
            entry = (
                reader.text(record, "prompt"),
                reader.picture(record, "image"),
                _number(_column(record, "rank"), "rank"),
            )
            groups.setdefault(str(_column(record, "prompt_id")), []).append(entry)
        except UnreadableRow as problem:
            skipped.append(SkippedRow(record.key, problem.code, problem.message))
    rows = []
    for key, entries in groups.items():
        prompts, images, ranks = zip(*entries, strict=True)
        try:
            if len(set(prompts)) > 1:
                raise UnreadableRow("bad_column", "one prompt_id has several prompts")
            rows.append(PreferenceRow(key, prompts[0], tuple(images), ranks=tuple(ranks)))
        except UnreadableRow as problem:
            skipped.append(SkippedRow(key, problem.code, problem.message))
    return rows


def _each(
    records: Iterable[Record], parse: Callable[[Record], PreferenceRow], skipped: list[SkippedRow]
) -> list[PreferenceRow]:
    rows = []
    for record in records:
        try:
            rows.append(parse(record))
        except UnreadableRow as problem:
            skipped.append(SkippedRow(record.key, problem.code, problem.message))
    return rows


# ---------------------------------------------------------------------------------------------------------- columns


def _column(record: Record, column: str) -> Any:
    value = record.columns.get(column)
    if value is None:
        raise UnreadableRow("missing_column", f"{column} is missing")
    return value


def _list(record: Record, column: str) -> Sequence[Any]:
    value = _column(record, column)
    if not isinstance(value, (list, tuple)):
        raise UnreadableRow("bad_column", f"{column} is not a list")
    return value


def _number(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnreadableRow("bad_column", f"{column} is not a number")
    return float(value)


def _numbers(record: Record, column: str) -> tuple[float, ...]:
    return tuple(_number(value, column) for value in _list(record, column))


def _key(record: Record, column: str) -> str:
    """What the row calls itself, or its place in the file."""
    value = record.columns.get(column)
    return str(value) if isinstance(value, (str, int)) else record.key


def _reasons(skipped: Sequence[SkippedRow]) -> str:
    """The first few reasons, for a message."""
    told = "; ".join(f"row {row.key}: {row.code}: {row.message}" for row in skipped[:3])
    return f" ({len(skipped)} unreadable: {told})" if skipped else ""
