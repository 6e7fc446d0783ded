"""Small files of the published schemas, of rendered pictures: JSON with files, Parquet with bytes, tar archives."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from models.shapes.world import Scene, SceneObject, render

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""How the datasets library stores an image."""


def picture(color: str = "red", shape: str = "circle", size: int = 48) -> Image.Image:
    return render(Scene((SceneObject(shape, color, (1, 1)),)), size)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_images(folder: Path, images: Mapping[str, Image.Image]) -> None:
    for name, image in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image, "JPEG" if path.suffix == ".jpg" else "PNG"))


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: Mapping[str, Any], row_group: int = 2) -> Path:
    """Several row groups, as published files have."""
    pq.write_table(pa.table(dict(columns)), path, row_group_size=row_group)
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
