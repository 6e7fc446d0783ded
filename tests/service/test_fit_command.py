"""``reward-service fit`` as a user calls it, and what it serves afterwards."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner

from service.app import create_app
from service.cli import app
from service.settings import Settings

PROMPTS = tuple(f"a red circle number {i}" for i in range(8))


pytestmark = pytest.mark.usefixtures("one_thread")


def write_pairs(folder: Path, count: int = 80, prompts: tuple[str, ...] = PROMPTS) -> Path:
    """Pairs of a darker and a lighter picture in random order; the darker one is preferred."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        values = rng.uniform(0, 220, 2)
        for k, value in enumerate(values):
            noise = rng.integers(0, 30, (40, 40, 3))
            Image.fromarray((noise + value).astype(np.uint8)).save(folder / f"{i}-{k}.png")
        images = [f"{i}-0.png", f"{i}-1.png"]
        row = {"prompt": prompts[i % len(prompts)], "images": images, "preference": float(values[0] < values[1])}
        lines.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["fit", *map(str, arguments)])
    return result.exit_code, result.output


def test_what_is_fitted_is_served(tmp_path: Path) -> None:
    data, out = write_pairs(tmp_path, 120), tmp_path / "fitted"
    code, said = run(
        "shapes-clip", "--data", data, "--out", out, "--epochs", 12, "--lr", 3e-3, "--held-out", 0.5,
        "--batch", 8, "--accumulate", 2,
    )  # fmt: skip
    assert code == 0, said
    record = json.loads((out / "fit.json").read_text())
    assert (record["pairs"], record["choosing"]["pairs"], record["held_out"]["after"]["pairs"]) == (60, 30, 30)
    assert (record["configuration"]["batch"], record["configuration"]["accumulate"]) == (8, 2)
    assert record["held_out"]["after"]["accuracy"] > 0.85
    assert f"{record['held_out']['after']['accuracy']:.4f}" in said
    settings = Settings(
        models={"shapes-clip": {"weights": record["settings"]["weights"], "dtype": "float32"}}, log_level="ERROR"
    )
    import base64

    def picture(value: int) -> str:
        file = io.BytesIO()
        Image.new("RGB", (40, 40), (value, value, value)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    item = {"prompt": PROMPTS[0], "images": [picture(220), picture(120), picture(20)]}
    with TestClient(create_app(settings)) as client:
        answer = client.post("/score", json={"models": {"shapes-clip": 1.0}, "items": [item]}).json()
    light, middle, dark = answer["results"][0]["scores"]["shapes-clip"]
    assert light < middle < dark


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nobody"], "unknown reward model nobody"),
        (["ocr"], "no reward model on towers"),
        (["shapes-clip", "--loss", "uncertainty"], "has none"),
        (["shapes-clip", "--lr", "0"], "learning rate is positive"),
        (["shapes-clip", "--format", "hpdv3"], "path1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    code, said = run(*arguments, "--data", write_pairs(tmp_path, 8), "--out", tmp_path / "fitted")
    assert code == 2, said
    assert says in said
    assert "Traceback" not in said


def test_a_missing_file_and_a_folder_that_is_there_are_refused(tmp_path: Path) -> None:
    code, said = run("shapes-clip", "--data", tmp_path / "no.jsonl", "--out", tmp_path / "out")
    assert code == 2, said
    data = write_pairs(tmp_path, 8)
    code, said = run("shapes-clip", "--data", data, "--out", tmp_path)
    assert code == 2, said
    assert "is there already" in said
    code, said = run("shapes-clip", "--data", write_pairs(tmp_path, 8, ("one prompt",)), "--out", tmp_path / "out")
    assert code == 2, said
    assert "three prompts" in said
