"""Published preference rows, as files on disk: what they say, and what becomes of rows that cannot be read."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from models.fitting.preference_data import (
    DataProblem,
    FilePicture,
    LabelledPair,
    PreferenceRow,
    UnreadableRow,
    open_picture,
)
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


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.size == right.size and np.array_equal(np.asarray(left), np.asarray(right))


def shown(row: PreferenceRow) -> list[Image.Image]:
    return [open_picture(each) for each in row.images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, {"a/red.png": RED, "a/blue.png": BLUE, "a/green.png": GREEN})
    return tmp_path


def test_own_lines(folder: Path) -> None:
    path = write_lines(
        folder / "rows.jsonl",
        [
            {"prompt": "p", "images": ["a/red.png", "a/blue.png"], "preference": 0.25, "weight": 2, "key": "k"},
            {"prompt": "q", "images": ["a/red.png", "a/blue.png", "a/green.png"], "ranks": [2, 1, 2]},
        ],
    )
    data = read_preferences(path)
    first, second = data.rows
    assert (data.schema, data.skipped) == ("jsonl", [])
    assert (first.key, first.prompt, first.preference, first.ranks, first.weight) == ("k", "p", 0.25, None, 2.0)
    assert [same(*each) for each in zip(shown(first), (RED, BLUE), strict=True)] == [True, True]
    assert first.pairs == [LabelledPair(0, 1, 0.25)]
    assert second.pairs == [LabelledPair(0, 1, 0.0), LabelledPair(0, 2, 0.5), LabelledPair(1, 2, 1.0)]


def test_hpdv2_train_and_test_rows(folder: Path) -> None:
    train = read_preferences(
        write_json(
            folder / "train.json",
            [{"prompt": "p", "file_path": ["red.png", "blue.png"], "human_preference": [0, 1]}],
        ),
        folder / "a",
    )
    assert (train.schema, train.rows[0].preference) == ("hpdv2", 0.0)
    test = read_preferences(
        write_json(
            folder / "test.json",
            [
                {
                    "prompt": "p",
                    "image_path": ["red.png", "blue.png", "green.png"],
                    "rank": [3, 1, 2],
                    "raw_annotations": [{"rank": [3, 1, 2], "user_hash": "x"}],
                }
            ],
        ),
        folder / "a",
    )
    assert (test.schema, test.rows[0].ranks) == ("hpdv2", (3.0, 1.0, 2.0))
    assert same(shown(test.rows[0])[2], GREEN)


def pickapic_columns(labels: list[tuple[float, float]], images: list[tuple[bytes | None, bytes | None]]) -> Any:
    count = len(labels)
    return {
        "are_different": [a != b for a, b in labels],
        "best_image_uid": ["u"] * count,
        "caption": [f"caption {i}" for i in range(count)],
        "created_at": ["2023"] * count,
        "has_label": [True] * count,
        "image_0_uid": ["u"] * count,
        "image_0_url": ["https://example.org/0"] * count,
        "jpg_0": pa.array([pair[0] for pair in images], pa.binary()),
        "jpg_1": pa.array([pair[1] for pair in images], pa.binary()),
        "label_0": [a for a, _ in labels],
        "label_1": [b for _, b in labels],
        "ranking_id": list(range(100, 100 + count)),
        "num_example_per_prompt": [1] * count,
    }


def test_pickapic_parquet_with_bytes(tmp_path: Path) -> None:
    red, blue = encoded(RED), encoded(BLUE)
    columns = pickapic_columns(
        [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.7, 0.1), (1.0, 0.0)],
        [(red, blue), (blue, red), (red, red), (red, blue), (None, blue)],
    )
    columns["has_label"][2] = False
    data = read_preferences(write_parquet(tmp_path / "test_unique.parquet", columns))
    assert data.schema == "pickapic"
    assert [(row.key, row.prompt, row.preference) for row in data.rows] == [
        ("100", "caption 0", 1.0),
        ("101", "caption 1", 0.5),
        ("104", "caption 4", 1.0),
    ]
    assert [(row.key, row.code) for row in data.skipped] == [("2", "no_label"), ("3", "bad_label")]
    assert same(shown(data.rows[1])[0], BLUE)
    assert same(shown(data.rows[1])[1], RED)
    with pytest.raises(UnreadableRow, match="empty"):
        data.rows[2].images[0].read()


def test_pickapic_addresses_are_not_fetched(tmp_path: Path) -> None:
    columns = pickapic_columns([(1.0, 0.0)], [(b"", b"")])
    del columns["jpg_0"], columns["jpg_1"]
    with pytest.raises(DataProblem, match="image_is_address"):
        read_preferences(write_parquet(tmp_path / "rows.parquet", columns))


def test_imagerewarddb_rows_are_grouped_by_prompt_id(tmp_path: Path) -> None:
    write_images(tmp_path, {"files/green.png": GREEN})
    cells = [
        {"bytes": encoded(RED), "path": "red.webp"},
        {"bytes": encoded(BLUE), "path": None},
        {"bytes": encoded(BLUE), "path": None},
        {"bytes": None, "path": "green.png"},
        {"bytes": encoded(RED), "path": None},
    ]
    columns = {
        "image": pa.array(cells, STRUCT),
        "prompt_id": ["1-2", "3-4", "1-2", "1-2", "9-9"],
        "prompt": ["one", "two", "one", "one", "alone"],
        "classification": ["x"] * 5,
        "image_amount_in_total": [3, 2, 3, 3, 1],
        "rank": [2, 1, 1, 3, 1],
        "overall_rating": [5, 5, 5, 5, 5],
    }
    data = read_preferences(write_parquet(tmp_path / "t.parquet", columns), tmp_path / "files")
    (row,) = data.rows
    assert (data.schema, row.key, row.prompt, row.ranks) == ("imagerewarddb", "1-2", "one", (2.0, 1.0, 3.0))
    assert [same(*each) for each in zip(shown(row), (RED, BLUE, GREEN), strict=True)] == [True] * 3
    assert data.skipped_by_code() == {"image_count": 2}


def test_imagerewarddb_json_of_the_repository(folder: Path) -> None:
    row = {"id": "5-6", "prompt": "p", "generations": ["a/red.png", "a/blue.png"], "ranking": [1, 2]}
    data = read_preferences(write_json(folder / "test.json", [row]))
    assert (data.schema, data.rows[0].key, data.rows[0].ranks) == ("imagerewarddb", "5-6", (1.0, 2.0))


def test_hpdv3_prefers_the_first_path(folder: Path) -> None:
    row = {
        "prompt": "p",
        "choice_dist": [12, 7],
        "confidence": None,
        "path1": "a/red.png",
        "path2": "a/blue.png",
        "model1": "m",
        "model2": "n",
    }
    data = read_preferences(write_json(folder / "test.json", [row]))
    assert (data.schema, data.rows[0].preference) == ("hpdv3", 1.0)
    parquet = write_parquet(folder / "rows.parquet", {name: [value] for name, value in row.items()})
    assert [each.images for each in read_preferences(parquet).rows] == [each.images for each in data.rows]


def test_lists_of_pictures_in_parquet(tmp_path: Path) -> None:
    cells = [[{"bytes": encoded(image), "path": None} for image in (RED, GREEN)]] * 3
    columns = {"prompt": ["a", "b", "c"], "images": pa.array(cells, pa.list_(STRUCT)), "preference": [1.0, 0.5, None]}
    data = read_preferences(write_parquet(tmp_path / "rows.parquet", columns))
    assert [row.preference for row in data.rows] == [1.0, 0.5]
    assert [row.code for row in data.skipped] == ["no_label"]
    assert same(shown(data.rows[1])[1], GREEN)


def test_webdataset_with_numbered_pictures_and_with_names(tmp_path: Path) -> None:
    pick = json.dumps({"caption": "c", "label_0": 0.0, "label_1": 1.0, "has_label": True}).encode()
    path = write_tar(
        tmp_path / "pick.tar",
        {"s/000.json": pick, "s/000.jpg_0": encoded(RED, "JPEG"), "s/000.jpg_1": encoded(BLUE), "s/001.json": b"{"},
    )
    data = read_preferences(path)
    (row,) = data.rows
    assert (data.schema, row.preference, row.prompt) == ("pickapic", 0.0, "c")
    assert same(shown(row)[1], BLUE)
    assert [(skipped.key, skipped.code) for skipped in data.skipped] == [("s/001", "not_json")]

    fields = json.dumps({"images": ["x.0.png", "1.png"], "ranks": [1, 2]}).encode()
    members = {"x.json": fields, "x.0.png": encoded(GREEN), "x.1.png": encoded(RED), "x.txt": b"from the text\n"}
    (row,) = read_preferences(write_tar(tmp_path / "own.tar", members)).rows
    assert (row.prompt, row.ranks) == ("from the text", (1.0, 2.0))
    assert [same(*each) for each in zip(shown(row), (GREEN, RED), strict=True)] == [True, True]


def test_an_archive_reaches_nothing_outside_of_itself(tmp_path: Path) -> None:
    write_images(tmp_path, {"secret.png": RED})
    fields = {"prompt": "p", "preference": 1}
    path = tmp_path / "rows.tar"
    with tarfile.open(path, "w") as archive:
        for key, images in (
            ("a", ["../secret.png", "b.png"]),
            ("b", ["secret.png", "secret.png"]),
            ("c", ["c.link.png", "c.0.png"]),
            ("d", ["d.0.png", "d.0.png"]),
        ):
            data = json.dumps({**fields, "images": images}).encode()
            info = tarfile.TarInfo(f"{key}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            image = encoded(BLUE)
            info = tarfile.TarInfo(f"{key}.0.png")
            info.size = len(image)
            archive.addfile(info, io.BytesIO(image))
        link = tarfile.TarInfo("c.link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        archive.addfile(link)
    data = read_preferences(path)
    assert [row.key for row in data.rows] == ["d"]
    assert [(row.key, row.code) for row in data.skipped] == [(key, "image_missing") for key in "abc"]


def test_rows_that_cannot_be_read_are_listed_with_their_reason(folder: Path) -> None:
    (folder.parent / f"{folder.name}-outside.png").write_bytes(encoded(RED))
    (folder / "a" / "link.png").symlink_to(folder.parent / f"{folder.name}-outside.png")
    good = ["a/red.png", "a/blue.png"]
    rows: list[Any] = [
        {"prompt": "p"},
        {"prompt": "p", "images": good, "preference": 1},
        {"prompt": "p", "images": [f"../{folder.name}-outside.png", "a/red.png"], "preference": 1},
        {"prompt": "p", "images": ["a/link.png", "a/red.png"], "preference": 1},
        {"prompt": "p", "images": ["/etc/hostname", "a/red.png"], "preference": 1},
        {"prompt": "p", "images": ["https://example.org/x.png", "a/red.png"], "preference": 1},
        {"prompt": "p", "images": ["a/none.png", "a/red.png"], "preference": 1},
        {"prompt": 3, "images": good, "preference": 1},
        {"images": good, "preference": 1},
        {"prompt": "p", "images": "a/red.png", "preference": 1},
        {"prompt": "p", "images": [1, 2], "preference": 1},
        {"prompt": "p", "images": good, "preference": 1.5},
        {"prompt": "p", "images": good, "preference": "1"},
        {"prompt": "p", "images": good, "preference": True},
        {"prompt": "p", "images": good, "preference": 1, "ranks": [1, 2]},
        {"prompt": "p", "images": good, "ranks": [1]},
        {"prompt": "p", "images": good, "ranks": [1, float("nan")]},
        {"prompt": "p", "images": good[:1], "preference": 1},
        {"prompt": "p", "images": good, "preference": 1, "weight": 0},
        ["not", "an", "object"],
    ]
    path = write_lines(folder / "rows.jsonl", rows)
    path.write_text(path.read_text() + "{broken\n\n")
    data = read_preferences(path)
    assert [row.key for row in data.rows] == ["2"]
    assert {int(row.key): row.code for row in data.skipped} == {
        1: "missing_column",
        3: "path_outside",
        4: "path_outside",
        5: "path_outside",
        6: "image_is_address",
        7: "image_missing",
        8: "bad_column",
        9: "missing_column",
        10: "bad_column",
        11: "bad_column",
        12: "bad_label",
        13: "bad_column",
        14: "bad_column",
        15: "no_label",
        16: "image_count",
        17: "bad_label",
        18: "image_count",
        19: "bad_weight",
        20: "not_a_row",
        21: "not_json",
    }
    assert all(row.message for row in data.skipped)


def test_published_labels_that_make_no_sense(folder: Path) -> None:
    good = {"prompt": "p", "file_path": ["a/red.png", "a/blue.png"]}
    rows = [{**good, "human_preference": votes} for votes in ([1, 0], [0, 0], [-1, 2], [1, 0, 0], [1, "0"])]
    data = read_preferences(write_json(folder / "train.json", rows))
    assert len(data.rows) == 1
    assert [row.code for row in data.skipped] == ["bad_label", "bad_label", "bad_label", "bad_column"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.json", "{", "not JSON"),
        ("rows.json", "{}", "not a list"),
        ("rows.json", "[]", "no rows"),
        ("rows.jsonl", "", "no rows"),
        ("rows.jsonl", "x\n", "1 unreadable: row 1: not_json"),
        ("rows.jsonl", '{"prompt": "p", "picture": "x"}\n', "columns picture, prompt are of no schema known"),
        ("rows.jsonl", '{"prompt": "p", "images": ["x", "y"], "preference": 1}\n', "no usable jsonl row"),
        ("rows.parquet", "PAR", "not a Parquet file"),
        ("rows.tar", "nothing", "not an uncompressed tar file"),
        ("rows.csv", "a,b", "the ending is one of"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str, told: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataProblem, match=told):
        read_preferences(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match="is not a file"):
        read_preferences(tmp_path / "none.jsonl")
    path = write_lines(tmp_path / "rows.jsonl", [{}])
    with pytest.raises(DataProblem, match="folder of images"):
        read_preferences(path, tmp_path / "none")


def test_a_schema_that_is_named_is_not_guessed(folder: Path) -> None:
    path = write_json(folder / "rows.json", [{"prompt": "p", "path1": "a/red.png", "path2": "a/blue.png"}])
    with pytest.raises(DataProblem, match="missing_column: label_0"):
        read_preferences(path, schema="pickapic")
    assert read_preferences(path, schema="hpdv3").schema == detect_schema(["prompt", "path1", "path2"]) == "hpdv3"


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {"prompt": ["p"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataProblem, match=r"reward-service\[data\]"):
        read_preferences(path)


def test_pictures_that_vanish_or_are_none_say_so(tmp_path: Path) -> None:
    write_images(tmp_path, {"a.png": RED, "b.png": BLUE})
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "images": ["a.png", "b.png"], "preference": 1}])
    (row,) = read_preferences(path).rows
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableRow, match=r"a\.png: No such file"):
        row.images[0].read()
    with pytest.raises(UnreadableRow, match="no image that Pillow reads"):
        open_picture(row.images[1])
    assert isinstance(row.images[0], FilePicture)


def test_an_archive_that_was_cut_off_is_not_half_a_picture(tmp_path: Path) -> None:
    fields = json.dumps({"prompt": "p", "images": ["0.png", "0.png"], "preference": 1}).encode()
    path = write_tar(tmp_path / "rows.tar", {"x.json": fields, "x.0.png": encoded(RED)})
    (row,) = read_preferences(path).rows
    with path.open("r+b") as file:
        file.truncate(2 * 512 + 512 + 20)
    with pytest.raises(UnreadableRow, match="ends within it"):
        row.images[0].read()
