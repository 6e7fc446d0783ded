"""What the tests of the command share: files of pairs of the shapes world, and scores without a service."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from click.testing import Result
from PIL import Image

import models.catalog  # noqa: F401  (registers the reward models)
from models.base import Candidate, LoadOptions, Output, Sample
from models.registry import load_model
from tests.models.fitting.preference_fixtures import (
    encoded,
    write_images,
    write_lines,
    write_parquet,
)

Run = Callable[..., Result]
Pairs = list[tuple[str, Image.Image, Image.Image]]


def results(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def scores_of(name: str, prompts: list[str], images: list[Image.Image]) -> list[float]:
    """One by one, without a service."""
    model = load_model(name, LoadOptions())
    found = []
    for prompt, image in zip(prompts, images, strict=True):
        (output,) = model.run([model.prepare(Sample(prompt, Candidate(image=image)))])
        assert isinstance(output, Output)
        found.append(output.score)
    return found


def own_lines(folder: Path, pairs: Pairs, labels: list[float]) -> Path:
    for i, (_, first, second) in enumerate(pairs):
        write_images(folder, {f"{i}/a.png": first, f"{i}/b.png": second})
    rows = [
        {"prompt": prompt, "images": [f"{i}/a.png", f"{i}/b.png"], "preference": label}
        for i, ((prompt, _, _), label) in enumerate(zip(pairs, labels, strict=True))
    ]
    return write_lines(folder / "rows.jsonl", rows)


def pickapic(path: Path, pairs: Pairs, labels: list[float]) -> Path:
    columns = {
        "caption": [prompt for prompt, _, _ in pairs],
        "jpg_0": pa.array([encoded(first) for _, first, _ in pairs], pa.binary()),
        "jpg_1": pa.array([encoded(second) for _, _, second in pairs], pa.binary()),
        "label_0": labels,
        "label_1": [1 - label for label in labels],
        "has_label": [True] * len(pairs),
        "ranking_id": list(range(len(pairs))),
    }
    return write_parquet(path, columns, row_group=7)


def labelled_by_oracle(pairs: Pairs) -> list[float]:
    prompts = [prompt for prompt, _, _ in pairs]
    first = scores_of("shapes-oracle", prompts, [image for _, image, _ in pairs])
    second = scores_of("shapes-oracle", prompts, [image for _, _, image in pairs])
    return [0.5 if a == b else float(a > b) for a, b in zip(first, second, strict=True)]
