"""The parity runner passes on the project's fixtures, notices a changed number, and lists what nobody handles."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from models import parity

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES, tmp_path / "other", dirs_exist_ok=True)
    return tmp_path / "other"


def run(folder: Path) -> tuple[int, str]:
    text = io.StringIO()
    status = parity.main([str(folder)], Console(file=text, width=200))
    return status, text.getvalue()


def edit(file: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(file.read_text("utf-8"))
    change(document)
    file.write_text(json.dumps(document), "utf-8")


def topics(folder: Path) -> dict[str, parity.Topic]:
    return {topic.name: topic for _, topic in parity.run(folder).topics}


def test_the_projects_fixtures_agree() -> None:
    found = topics(FIXTURES / "pointwise")
    scored = json.loads((FIXTURES / "pointwise" / "jpeg.json").read_text("utf-8"))["scores"]
    cases = json.loads((FIXTURES / "pointwise" / "ocr_text.json").read_text("utf-8"))["cases"]
    assert found["incompressibility"].cases == found["compressibility"].cases == len(scored)
    assert found["grey stays grey"].cases == 1
    assert found["transparency"].cases == 1
    ocr = ("reward", "prompt without target", "engine failure")
    assert sum(found[name].cases for name in ocr) == len(cases)
    status, text = run(FIXTURES)
    assert status == 0
    assert "jpeg.json" in text
    assert "ocr_text.json" in text
    assert "off" not in text


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "models.parity", str(FIXTURES)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "incompressibility" in done.stdout


def change_kilobytes(document: Any) -> None:
    document["scores"][1]["incompressibility_kB"] += 0.001


def change_compressibility(document: Any) -> None:
    document["scores"][1]["compressibility"] *= -1


def change_grey(document: Any) -> None:
    next(case for case in document["scores"] if case["image"] == "gray")["as_2d_gray_array"] = 69.909


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_kilobytes, "incompressibility"),
        (change_compressibility, "compressibility"),
        (change_grey, "grey stays grey"),
    ],
)
def test_a_changed_size_is_off(copy: Path, change: Callable[[Any], None], name: str) -> None:
    edit(copy / "pointwise" / "jpeg.json", lambda document: document.update(library=topics_library()))
    edit(copy / "pointwise" / "jpeg.json", change)
    found = topics(copy)
    assert [topic for topic, value in found.items() if not value.ok] == ([name] if same_bytes() else [name])
    assert run(copy)[0] == 1
