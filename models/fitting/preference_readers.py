"""Records -> preference rows, by the schemas in which preferences are published.

================ ========================================================== =========================================
schema           columns that are read                                      label
================ ========================================================== =========================================
jsonl            prompt, images, preference or ranks; key, weight, context  as given (this project's own)
hpdv2            prompt, file_path, human_preference [a, b]                 a / (a + b)
hpdv2            prompt, image_path, rank                                   ranking, lower better
pickapic         caption, jpg_0, jpg_1, label_0, label_1; has_label         label_0; 0.5 is a tie
pickapic         prompt, image_1_uid .. image_4_uid, best_image_uid         the best one before each of the others
imagerewarddb    prompt_id, prompt, image, rank: one row an image           ranking by prompt_id, lower better
imagerewarddb    prompt_id, prompt, image [], rank []: one row a prompt     ranking, lower better
imagerewarddb    prompt, img_better, img_worse                              img_better is preferred
imagerewarddb    id, prompt, generations, ranking                           ranking, lower better
hpdv3            prompt, path1, path2                                       path1 is preferred
================ ========================================================== =========================================

Sources: HPDv2 (arXiv:2306.09341, ymhao/HPDv2), Pick-a-Pic (arXiv:2305.01569, yuvalkirstain/pickapic_v1, v2 and
PickaPic-rankings), ImageRewardDB (arXiv:2304.05977, zai-org/ImageRewardDB: 1k, 1k_group, 1k_pair and the like), HPDv3
(arXiv:2508.03789, MizzenAI/HPDv3). Images are paths in the images folder, names in the archive, or bytes; an image that
is named by its uid alone is the file UID.png, .jpg, .jpeg or .webp. Addresses (``image_0_url``) are not fetched.

No published file of PickaPic-rankings, ``_group`` or ``_pair`` has been read by this code: their columns are those of
their documents and loading scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from models.fitting.preference_columns import Columns
from models.fitting.preference_data import (
    DataProblem,
    Picture,
    PreferenceData,
    PreferenceRow,
    RowContext,
    SkippedRow,
    UnreadableRow,
)
from models.fitting.preference_files import Record, read_records

Schema: TypeAlias = Literal["jsonl", "hpdv2", "pickapic", "imagerewarddb", "hpdv3"]
SCHEMAS: tuple[Schema, ...] = get_args(Schema)
SEEN = 100
"""Rows whose columns tell the schema: the first one alone may be a broken one."""
RANKED_UIDS = ("image_1_uid", "image_2_uid", "image_3_uid", "image_4_uid")


def read_preferences(path: Path, images: Path | None = None, schema: Schema | None = None) -> PreferenceData:
    """All rows of a .json, .jsonl, .parquet or .tar file; ``images`` (default: the file's folder) holds named images.

    ``schema`` None is told from the columns. Raises :class:`DataProblem` for a file that cannot be used: not there, of
    an unknown ending or unknown columns, or without one usable row.
    """
    folder = path.parent if images is None else images
    if not folder.is_dir():
        raise DataProblem(f"{folder} is not a folder of images")
    records: list[Columns] = []
    skipped: list[SkippedRow] = []
    for entry in read_records(path, folder):
        if isinstance(entry, Record):
            records.append(Columns(entry, folder))
        else:
            skipped.append(entry)
    if not records:
        raise DataProblem(f"{path.name} holds no rows" + _reasons(skipped))
    chosen = schema or detect_schema({name for each in records[:SEEN] for name in each.record.columns})
    if chosen == "imagerewarddb" and _one_row_an_image(records):
        rows = _grouped_by_prompt(records, skipped)
    else:
        rows = _each(records, _PARSERS[chosen], skipped)
    if not rows:
        raise DataProblem(f"{path.name} holds no usable {chosen} row" + _reasons(skipped))
    return PreferenceData(chosen, rows, skipped)


def detect_schema(columns: Iterable[str]) -> Schema:
    """The schema that has these columns; raises :class:`DataProblem` naming the columns if there is none."""
    names = set(columns)
    wanted: list[tuple[Schema, set[str]]] = [
        ("pickapic", {"caption", "label_0", "label_1"}),
        ("pickapic", {"prompt", "best_image_uid", "image_1_uid", "image_2_uid"}),
        ("hpdv3", {"path1", "path2"}),
        ("hpdv2", {"file_path", "human_preference"}),
        ("hpdv2", {"image_path", "rank"}),
        ("imagerewarddb", {"prompt_id", "image", "rank"}),
        ("imagerewarddb", {"generations", "ranking"}),
        ("imagerewarddb", {"prompt", "img_better", "img_worse"}),
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


def _own(row: Columns) -> list[PreferenceRow]:
    return [
        PreferenceRow(
            key=row.key("key"),
            prompt=row.text("prompt"),
            images=row.pictures("images"),
            preference=None if row.get("preference") is None else row.number("preference"),
            ranks=None if row.get("ranks") is None else row.numbers("ranks"),
            weight=1.0 if row.get("weight") is None else row.number("weight"),
            context=None if row.get("context") is None else _context(row.inside("context")),
        )
    ]


def _context(row: Columns) -> RowContext:
    known = [f"context.{each.name}" for each in fields(RowContext)]
    if unknown := row.record.columns.keys() - set(known):
        raise UnreadableRow("bad_column", f"{', '.join(sorted(unknown))}: a context has {', '.join(known)}")

    def picture(name: str) -> Picture | None:
        return None if row.get(name) is None else row.picture(name)

    def text(name: str) -> str | None:
        return None if row.get(name) is None else row.text(name)

    return RowContext(
        image=picture("context.image"),
        frames=() if row.get("context.frames") is None else row.pictures("context.frames"),
        mask=picture("context.mask"),
        question=text("context.question"),
        task=text("context.task"),
        criterion=text("context.criterion"),
    )


def _hpdv2(row: Columns) -> list[PreferenceRow]:
    key, prompt = row.record.key, row.text("prompt")
    if "human_preference" not in row:
        return [PreferenceRow(key, prompt, row.pictures("image_path"), ranks=row.numbers("rank"))]
    votes = row.numbers("human_preference")
    if len(votes) != 2 or min(votes) < 0 or not sum(votes) > 0:
        raise UnreadableRow("bad_label", f"human_preference is {list(votes)}")
    return [PreferenceRow(key, prompt, row.pictures("file_path"), preference=votes[0] / sum(votes))]


def _pickapic(row: Columns) -> list[PreferenceRow]:
    if "best_image_uid" in row and "label_0" not in row:
        return _pickapic_ranking(row)
    if row.get("has_label") is False:
        raise UnreadableRow("no_label", "has_label is false")
    if row.get("jpg_0") is None and row.get("image_0_url"):
        raise UnreadableRow("image_is_address", "the row has addresses and no pictures; addresses are not fetched")
    first, second = row.number("label_0"), row.number("label_1")
    if first + second != 1 or first not in (0.0, 0.5, 1.0):
        raise UnreadableRow("bad_label", f"label_0 and label_1 are {first:g} and {second:g}")
    images = (row.picture("jpg_0"), row.picture("jpg_1"))
    return [PreferenceRow(row.key("ranking_id"), row.text("caption"), images, preference=first)]


def _pickapic_ranking(row: Columns) -> list[PreferenceRow]:
    """The best of up to four images, and nothing of the others' order: one pair of it with each of them."""
    uids = list(dict.fromkeys(row.text(name) for name in RANKED_UIDS if row.get(name)))
    best, key, prompt = row.text("best_image_uid"), row.key("ranking_id"), row.text("prompt")
    if len(uids) < 2:
        raise UnreadableRow("image_count", f"a ranking is of two or more images, not {len(uids)}")
    if best not in uids:
        # The publication writes "none" where nobody was preferred.
        raise UnreadableRow("no_label", f"best_image_uid is {best!r}, none of the images")
    place, pictures = uids.index(best), [row.picture_of_uid(uid) for uid in uids]
    return [
        PreferenceRow(
            f"{key}:{other}",
            prompt,
            (pictures[min(place, other)], pictures[max(place, other)]),
            preference=float(place < other),
        )
        for other in range(len(uids))
        if other != place
    ]


def _hpdv3(row: Columns) -> list[PreferenceRow]:
    images = (row.picture("path1"), row.picture("path2"))
    return [PreferenceRow(row.record.key, row.text("prompt"), images, preference=1.0)]


def _imagerewarddb(row: Columns) -> list[PreferenceRow]:
    """A row of the repository's JSON, of ``_group`` or of ``_pair``."""
    prompt = row.text("prompt")
    if "generations" in row:
        return [PreferenceRow(row.key("id"), prompt, row.pictures("generations"), ranks=row.numbers("ranking"))]
    if "img_better" in row or "img_worse" in row:
        images = (row.picture("img_better"), row.picture("img_worse"))
        # Pairs of one prompt share its prompt_id, which therefore is no key.
        return [PreferenceRow(row.record.key, prompt, images, preference=1.0)]
    return [PreferenceRow(row.key("prompt_id"), prompt, row.pictures("image"), ranks=row.numbers("rank"))]


_PARSERS: Mapping[Schema, Callable[[Columns], Sequence[PreferenceRow]]] = {
    "jsonl": _own,
    "hpdv2": _hpdv2,
    "pickapic": _pickapic,
    "hpdv3": _hpdv3,
    "imagerewarddb": _imagerewarddb,
}


def _one_row_an_image(rows: Sequence[Columns]) -> bool:
    """ImageRewardDB's plain configurations: neither the repository's JSON nor ``_group`` nor ``_pair``."""
    whole = ("generations", "img_better", "img_worse")
    return not any(
        isinstance(row.get("rank"), (list, tuple)) or any(name in row for name in whole) for row in rows[:SEEN]
    )


def _grouped_by_prompt(records: Sequence[Columns], skipped: list[SkippedRow]) -> list[PreferenceRow]:
    """One ranking a prompt_id, in the order in which the prompts first come; an image that is missing is left out."""
    groups: dict[str, list[tuple[str, Picture, float]]] = {}
    for row in records:
        try:
            entry = (row.text("prompt"), row.picture("image"), row.number("rank"))
            groups.setdefault(str(row.value("prompt_id")), []).append(entry)
        except UnreadableRow as problem:
            skipped.append(SkippedRow(row.record.key, problem.code, problem.message))
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
    records: Iterable[Columns], parse: Callable[[Columns], Sequence[PreferenceRow]], skipped: list[SkippedRow]
) -> list[PreferenceRow]:
    rows: list[PreferenceRow] = []
    for row in records:
        try:
            rows += parse(row)
        except UnreadableRow as problem:
            skipped.append(SkippedRow(row.record.key, problem.code, problem.message))
    return rows


def _reasons(skipped: Sequence[SkippedRow]) -> str:
    """The first few reasons, for a message."""
    told = "; ".join(f"row {row.key}: {row.code}: {row.message}" for row in skipped[:3])
    return f" ({len(skipped)} unreadable: {told})" if skipped else ""
