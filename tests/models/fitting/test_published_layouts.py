"""Layouts of published preferences that were read from documents only, and the context that rows of our own have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from models.fitting.preference_data import DataProblem, RowContext, open_picture
from models.fitting.preference_readers import detect_schema, read_preferences
from tests.models.fitting.preference_fixtures import (
    STRUCT,
    encoded,
    picture,
    write_images,
    write_json,
    write_lines,
    write_parquet,
    write_tar,
)

RED, BLUE, GREEN = picture("red"), picture("blue"), picture("green")


def ranking(best: Any, *uids: str | None, **more: Any) -> dict[str, Any]:
    """A row of PickaPic-rankings."""
    shown = {f"image_{i + 1}_uid": uid for i, uid in enumerate((*uids, None, None, None)[:4])}
    return {
        "ranking_id": 7, "created_at": "2023", "user_id": 1, "best_image_uid": best, "prompt": "p", **shown, **more
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, {"a.png": RED, "b.jpg": BLUE, "c.png": GREEN, "d.png": RED})
    return tmp_path


def test_the_best_of_a_ranking_is_before_each_of_the_others(folder: Path) -> None:
    """Nothing is known of the order of the others, so they are no pairs, and no ties."""
    data = read_preferences(write_json(folder / "rankings.json", [ranking("b", "a", "b", "c", "d")]))
    assert data.schema == "pickapic"
    found = [(row.key, [image.name for image in row.images], row.preference) for row in data.rows]
    assert found == [
        ("7:0", ["a.png", "b.jpg"], 0.0),
        ("7:2", ["b.jpg", "c.png"], 1.0),
        ("7:3", ["b.jpg", "d.png"], 1.0),
    ]
    assert {row.prompt for row in data.rows} == {"p"}


def test_rankings_of_fewer_images_and_those_that_cannot_be_used(folder: Path) -> None:
    rows = [
        ranking("a", "a", "b"),
        ranking("a", "a", "a", "b", ""),
        ranking("none", "a", "b", "c", "d"),
        ranking("a", "a"),
        ranking("a", "a", "gone"),
        ranking("a", "a", "../b"),
        ranking(None, "a", "b"),
        ranking("a", "a", 5),  # type: ignore[arg-type]
    ]
    data = read_preferences(write_json(folder / "rankings.json", rows))
    assert [[image.name for image in row.images] for row in data.rows] == [["a.png", "b.jpg"]] * 2
    assert [(row.key, row.code) for row in data.skipped] == [
        ("2", "no_label"), ("3", "image_count"), ("4", "image_missing"), ("5", "path_outside"),
        ("6", "missing_column"), ("7", "bad_column"),
    ]  # fmt: skip
    assert "gone.png, nor .jpg" in data.skipped[2].message


def test_rankings_in_parquet_and_in_archives(folder: Path) -> None:
    columns = {name: [value] for name, value in ranking("a", "a", "b", "c").items()}
    (row, _) = read_preferences(write_parquet(folder / "rows.parquet", columns)).rows
    assert open_picture(row.images[0]).size == RED.size
    members = {"0.json": json.dumps(ranking("0.x", "0.x", "0.y")).encode()}
    members |= {"0.x.png": encoded(RED), "0.y.webp": encoded(BLUE)}
    (row,) = read_preferences(write_tar(folder / "rows.tar", members)).rows
    assert [image.name for image in row.images] == ["0.x.png", "0.y.webp"]


def test_imagerewarddb_group_is_one_ranking_a_row(folder: Path) -> None:
    cells = [
        [{"bytes": encoded(image), "path": None} for image in images] for images in ((RED, BLUE, GREEN), (RED, BLUE))
    ]
    columns = {
        "prompt_id": ["1-2", "3-4"],
        "prompt": ["one", "two"],
        "classification": ["x", "x"],
        "image": pa.array(cells, pa.list_(STRUCT)),
        "rank": pa.array([[2, 1, 2], [1, 2]], pa.list_(pa.int8())),
        "overall_rating": pa.array([[5, 6, 5], [5, 6]], pa.list_(pa.int8())),
    }
    data = read_preferences(write_parquet(folder / "group.parquet", columns))
    assert data.schema == "imagerewarddb"
    assert [(row.key, row.prompt, row.ranks) for row in data.rows] == [
        ("1-2", "one", (2.0, 1.0, 2.0)),
        ("3-4", "two", (1.0, 2.0)),
    ]
    assert open_picture(data.rows[0].images[2]).tobytes() == GREEN.tobytes()


def test_imagerewarddb_pair_prefers_the_better_image(folder: Path) -> None:
    def column(*images: Any) -> Any:
        return pa.array([{"bytes": encoded(image), "path": None} for image in images], STRUCT)

    columns = {
        "prompt_id": ["1-2", "1-2"],
        "prompt": ["one", "one"],
        "img_better": column(RED, GREEN),
        "img_worse": column(BLUE, RED),
    }
    data = read_preferences(write_parquet(folder / "pair.parquet", columns))
    assert (data.schema, [(row.key, row.preference) for row in data.rows]) == (
        "imagerewarddb",
        [("0", 1.0), ("1", 1.0)],
    )
    assert open_picture(data.rows[1].images[0]).tobytes() == GREEN.tobytes()
    assert open_picture(data.rows[1].images[1]).tobytes() == RED.tobytes()


def test_columns_that_are_spelt_otherwise_are_named(folder: Path) -> None:
    """Of a file whose schema is not known, and of one whose schema was named."""
    rows = [{"prompt": "p", "better_img": "a.png", "worse_img": "c.png"}]
    path = write_json(folder / "pair.json", rows)
    with pytest.raises(DataProblem, match="better_img, prompt, worse_img are of no schema known"):
        read_preferences(path)
    with pytest.raises(DataProblem, match="the row's columns are better_img, prompt, worse_img"):
        read_preferences(path, schema="imagerewarddb")
    half = write_json(folder / "half.json", [{"prompt": "p", "img_better": "a.png", "img_lesser": "c.png"}])
    with pytest.raises(DataProblem, match="img_worse is missing; the row's columns are img_better, img_lesser, prompt"):
        read_preferences(half, schema="imagerewarddb")
    assert detect_schema(["prompt", "img_better", "img_worse", "classification"]) == "imagerewarddb"


CONTEXT = {"image": "a.png", "mask": "c.png", "frames": ["b.jpg"], "question": "q", "task": "fill", "criterion": "x"}


def test_a_row_may_have_a_context(folder: Path) -> None:
    good = {"prompt": "p", "images": ["a.png", "b.jpg"], "preference": 1}
    rows = [
        {**good, "context": CONTEXT},
        {**good, "context": {"task": "remove", "mask": None}},
        {**good, "context": None},
    ]
    first, second, third = read_preferences(write_lines(folder / "rows.jsonl", rows)).rows
    assert first.context is not None
    assert first.context.image is not None
    assert first.context.mask is not None
    assert (first.context.image.name, first.context.mask.name) == ("a.png", "c.png")
    assert [frame.name for frame in first.context.frames] == ["b.jpg"]
    assert first.context.texts == {"question": "q", "task": "fill", "criterion": "x"}
    assert second.context == RowContext(task="remove")
    assert third.context is None


def test_a_context_in_an_archive_shows_its_own_members(folder: Path) -> None:
    fields = {"prompt": "p", "images": ["0.png", "1.png"], "preference": 1, "context": {"image": "source.png"}}
    members = {"0.json": json.dumps(fields).encode(), "0.source.png": encoded(GREEN)}
    members |= {"0.0.png": encoded(RED), "0.1.png": encoded(BLUE)}
    (row,) = read_preferences(write_tar(folder / "rows.tar", members)).rows
    assert row.context is not None
    assert row.context.image is not None
    assert open_picture(row.context.image).tobytes() == GREEN.tobytes()


@pytest.mark.parametrize(
    ("context", "code", "says"),
    [
        ("fill", "bad_column", "context is not an object"),
        ({"tasks": "fill"}, "bad_column", "context.tasks: a context has context.image"),
        ({"task": 3}, "bad_column", "context.task is not a text"),
        ({"image": 3}, "bad_column", "context.image holds no picture"),
        ({"image": "gone.png"}, "image_missing", "gone.png"),
        ({"mask": "../a.png"}, "path_outside", "not inside"),
        ({"frames": "a.png"}, "bad_column", "context.frames is not a list"),
    ],
)
def test_a_context_that_cannot_be_read_is_a_row_that_cannot(folder: Path, context: Any, code: str, says: str) -> None:
    good = {"prompt": "p", "images": ["a.png", "b.jpg"], "preference": 1}
    data = read_preferences(write_lines(folder / "rows.jsonl", [good, {**good, "context": context}]))
    assert len(data.rows) == 1
    (skipped,) = data.skipped
    assert skipped.code == code
    assert says in skipped.message
