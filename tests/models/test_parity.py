"""The parity runner passes on the project's fixtures, notices a changed number, and lists what nobody handles.

The rewards with checkpoints have a file of their own: test_parity_pointwise.py.
"""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, features
from rich.console import Console

from models import parity
from models.jpeg import jpeg_kilobytes

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
EMBEDDED = ("jpeg.json", "ocr_text.json")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The embedded rewards' files and what they name; the others take seconds each."""
    folder = tmp_path / "other" / "pointwise"
    shutil.copytree(FIXTURES / "pointwise" / "images", folder / "images")
    for name in ("inputs.json", *EMBEDDED):
        shutil.copy(FIXTURES / "pointwise" / name, folder)
    return tmp_path / "other"


def run(folder: Path, *options: str) -> tuple[int, str]:
    text = io.StringIO()
    status = parity.main([str(folder), *options], Console(file=text, width=200))
    return status, text.getvalue()


def edit(file: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(file.read_text("utf-8"))
    change(document)
    file.write_text(json.dumps(document), "utf-8")


def topics(folder: Path) -> dict[str, parity.Topic]:
    return {topic.name: topic for _, topic in parity.run(folder).topics}


def test_the_projects_fixtures_agree(copy: Path) -> None:
    found = topics(copy)
    scored = json.loads((FIXTURES / "pointwise" / "jpeg.json").read_text("utf-8"))["scores"]
    cases = json.loads((FIXTURES / "pointwise" / "ocr_text.json").read_text("utf-8"))["cases"]
    assert found["incompressibility"].cases == found["compressibility"].cases == len(scored)
    assert found["grey stays grey"].cases == 1
    assert found["transparency"].cases == 1
    ocr = ("reward", "prompt without target", "engine failure")
    assert sum(found[name].cases for name in ocr) == len(cases)
    status, text = run(copy)
    assert status == 0
    assert "jpeg.json" in text
    assert "ocr_text.json" in text
    assert "off" not in text


def test_every_case_file_of_the_project_has_a_handler() -> None:
    for module in parity.HANDLER_MODULES:
        import_module(module)
    files = [file for file in (FIXTURES / "pointwise").iterdir() if file.suffix in (".json", ".npz")]
    handled = [file for file in files if any(file.match(pattern) for pattern in parity._HANDLERS)]
    assert {file.name for file in files} - {file.name for file in handled} == {"inputs.json", "hpsv3_small.npz"}


def test_it_runs_as_a_module(copy: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "models.parity", str(copy)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "incompressibility" in done.stdout


def change_size(document: Any) -> None:
    document["scores"][1]["incompressibility_kB"] *= 1.01


def change_reward(document: Any) -> None:
    document["scores"][1]["compressibility"] *= 1.01


def change_grey(document: Any) -> None:
    case = next(case for case in document["scores"] if "as_2d_gray_array" in case)
    case["as_2d_gray_array"] = case["incompressibility_kB"]


def change_to_not_a_number(document: Any) -> None:
    document["scores"][0]["compressibility"] = float("nan")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_size, "incompressibility"),
        (change_reward, "compressibility"),
        (change_grey, "grey stays grey"),
        (change_to_not_a_number, "compressibility"),
    ],
)
def test_a_changed_jpeg_number_is_off(copy: Path, change: Callable[[Any], None], name: str) -> None:
    edit(copy / "pointwise" / "jpeg.json", change)
    assert [topic.name for _, topic in parity.run(copy).topics if not topic.ok] == [name]
    status, text = run(copy)
    assert status == 1
    assert "off" in text


def test_one_byte_counts_with_the_same_library_and_not_with_another(copy: Path) -> None:
    def of_this_library(document: Any) -> None:
        document["library"] |= {"pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo")}
        largest_image = max(document["scores"], key=lambda case: case["incompressibility_kB"])
        stored = Image.open(copy / "pointwise" / "images" / f"{largest_image['image']}.png")
        largest_image["incompressibility_kB"] = jpeg_kilobytes(stored.convert("RGB")) + 0.001

    def of_another(document: Any) -> None:
        document["library"]["libjpeg_turbo"] = "1.0"

    edit(copy / "pointwise" / "jpeg.json", of_this_library)
    assert not topics(copy)["incompressibility"].ok
    edit(copy / "pointwise" / "jpeg.json", of_another)
    assert topics(copy)["incompressibility"].ok


@pytest.mark.parametrize("index", [0, 2, 9])
def test_a_changed_ocr_reward_is_off(copy: Path, index: int) -> None:
    def change(document: Any) -> None:
        document["cases"][index]["reward"] -= 1e-9

    edit(copy / "pointwise" / "ocr_text.json", change)
    assert [topic.name for _, topic in parity.run(copy).topics if not topic.ok] == ["reward"]


def test_a_prompt_that_the_reference_refuses_must_be_refused(copy: Path) -> None:
    def change(document: Any) -> None:
        case = next(case for case in document["cases"] if "reference_error" in case)
        case["prompt"] = 'now there is a "target"'

    edit(copy / "pointwise" / "ocr_text.json", change)
    assert [topic.name for _, topic in parity.run(copy).topics if not topic.ok] == ["prompt without target"]


def test_other_images_of_other_sizes_work(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    kilobytes = len(file.getvalue()) / 1000
    case = {"image": "noise", "incompressibility_kB": kilobytes, "compressibility": -kilobytes / 500}
    (tmp_path / "inputs.json").write_text(json.dumps({"images": {"noise": {"file": "a.png"}}}))
    (tmp_path / "jpeg.json").write_text(json.dumps({"library": {}, "scores": [case]}))
    assert run(tmp_path)[0] == 0


def test_unknown_kinds_are_listed_and_do_not_fail(copy: Path) -> None:
    (copy / "rl").mkdir()
    (copy / "rl" / "unheard_of.npz").write_bytes(b"")
    status, text = run(copy)
    assert status == 0
    assert "nobody handles yet: rl: unheard_of.npz" in text
    assert "inputs.json" not in text


def test_models_of_the_true_size_run_only_when_asked_for(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(FIXTURES / "pointwise" / "hpsv2_full.json", copy / "pointwise")
    status, text = run(copy)
    assert status == 0
    assert "full size, left out without --full: pointwise: hpsv2_full.json" in text
    parity.run(copy)
    for pattern in list(parity._HANDLERS):
        if pattern.startswith("hpsv2"):
            monkeypatch.setitem(parity._HANDLERS, pattern, lambda file: [parity.Topic(file.name, 1, 2.0, 1.0)])
    status, text = run(copy, "--full")
    assert status == 1
    assert "left out" not in text


def test_a_folder_with_nothing_handled_fails(tmp_path: Path) -> None:
    (tmp_path / "unheard_of.json").write_text("{}")
    status, text = run(tmp_path)
    assert status == 2
    assert "nothing here is handled" in text


def test_a_file_without_cases_is_an_error(copy: Path) -> None:
    edit(copy / "pointwise" / "ocr_text.json", lambda document: document.update(cases=[]))
    with pytest.raises(ValueError, match=r"ocr_text\.json holds no case"):
        parity.run(copy)


def test_a_kind_has_one_handler() -> None:
    import_module("models.parity_embedded")
    with pytest.raises(ValueError, match=r"jpeg\.json"):
        parity.parity_kind("jpeg.json")(lambda file: [])


def test_largest_error_does_not_lose_what_is_not_a_number() -> None:
    assert parity.largest([0.1, 0.3, 0.2]) == 0.3
    assert not parity.Topic("x", 2, parity.largest([0.1, float("nan"), 0.2]), 1.0).ok
