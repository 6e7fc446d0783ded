"""The command line against a real server on a real port, with the models that need no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from service import cli
from service.settings import Settings
from tests.service.in_thread import served

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    settings = Settings(
        models=["jpeg-compressibility", "jpeg-incompressibility"],  # type: ignore[arg-type]
        device="cpu",
        api_keys=["open sesame"],
    )
    with served(settings) as address:
        yield address


@pytest.fixture
def run(url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("REWARD_URL", url)
    monkeypatch.setenv("REWARD_API_KEY", "open sesame")
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str | Path) -> Result:
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Three images that JPEG compresses worse and worse."""
    random = np.random.default_rng(0)
    paths = []
    for name, noise in (("flat.png", 1), ("grainy.png", 40), ("noise.png", 255)):
        pixels = random.integers(0, noise, (64, 64, 3), dtype=np.uint8)
        paths.append(tmp_path / name)
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_score_prints_the_best_first(run: Run, photos: list[Path]) -> None:
    result = run("score", *photos, "--prompt", "noise", "--model", "jpeg-incompressibility")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if ".png" in line]
    assert [next(p.name for p in photos if p.name in line) for line in lines] == [
        "noise.png", "grainy.png", "flat.png",
    ]  # fmt: skip


def test_weights_of_models_add_up(run: Run, photos: list[Path]) -> None:
    result = run(
        "score", *photos, "--prompt", "x", "--json",
        "--model", "jpeg-incompressibility=2", "--model", "jpeg-compressibility=-1",
    )  # fmt: skip
    answer = json.loads(result.stdout)["results"][0]
    for i, total in enumerate(answer["total"]):
        parts = answer["scores"]
        assert total == pytest.approx(2 * parts["jpeg-incompressibility"][i] - parts["jpeg-compressibility"][i])


def test_many_images_travel_in_several_requests_and_print_as_json(run: Run, photos: list[Path]) -> None:
    count = cli.IMAGES_PER_REQUEST + 3
    files = (photos * count)[:count]
    result = run("score", *files, "--prompt", "x", "--model", "jpeg-incompressibility", "--json")
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    assert sum(len(answer["results"][0]["total"]) for answer in answers) == count


def test_a_file_that_is_no_image_is_named_and_the_others_are_scored(run: Run, photos: list[Path]) -> None:
    broken = photos[0].parent / "broken.png"
    broken.write_bytes(b"not an image")
    result = run("score", broken, photos[0], "--prompt", "x", "--model", "jpeg-incompressibility")
    assert result.exit_code == 0
    first, last = (line for line in result.stdout.splitlines() if ".png" in line)
    assert "flat.png" in first
    assert "broken.png" in last
    assert " - " in last
    assert run("score", broken, "--prompt", "x", "--model", "jpeg-incompressibility").exit_code == 1


def test_brackets_in_a_prompt_or_a_name_are_text(run: Run, photos: list[Path]) -> None:
    odd = photos[0].rename(photos[0].with_name("[bold]odd.png"))
    prompt = "a sign that says [/red] [link=x]"
    for command in (("score",), ("compare",)):
        result = run(*command, odd, photos[1], "--prompt", prompt, "--model", "jpeg-incompressibility")
        assert result.exit_code == 0, result.output
        assert "[bold]odd.png" in result.stdout
        assert "[/red] [link=x]" in result.stdout


def test_compare_prints_the_ranking(run: Run, photos: list[Path]) -> None:
    result = run("compare", *photos, "--prompt", "x", "--model", "jpeg-incompressibility")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if ".png" in line]
    assert ["noise.png" in lines[0], "flat.png" in lines[2]] == [True, True]
    as_json = run("compare", *photos, "--prompt", "x", "--model", "jpeg-incompressibility", "--json")
    assert json.loads(as_json.stdout)["results"][0]["ranking"] == [2, 1, 0]


def test_compare_explains_each_comparison_and_tells_those_that_failed(run: Run, photos: list[Path]) -> None:
    command = ("compare", *photos, "--prompt", "x", "--model", "jpeg-incompressibility")
    assert "P(first)" not in run(*command).stdout
    told = [line for line in run(*command, "--explain").stdout.splitlines() if "P(first)" in line]
    assert len(told) == 3
    broken = photos[0].parent / "broken.png"
    broken.write_bytes(b"not an image")
    failed = run("compare", broken, *photos[:2], "--prompt", "x", "--model", "jpeg-incompressibility")
    assert failed.exit_code == 0, failed.output
    assert failed.stdout.count("score_missing") == 2


def test_models_lists_what_is_loaded(run: Run) -> None:
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)["models"]}
    assert rows["jpeg-compressibility"]["ready"] is True
    assert rows["ocr"]["ready"] is False
    table = run("models")
    assert table.exit_code == 0
    assert rows["jpeg-compressibility"]["fingerprint"][7:19] in table.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "jpeg-compressibility=much"], "the weight is not a finite number"),
        (["--model", "jpeg-compressibility", "--metadata", "[1]"], "--metadata is not a JSON object"),
        (["--model", "nothing"], "404 unknown_model"),
        (["--model", "ocr"], "404 model_not_loaded"),
        (["--model", "jpeg-compressibility", "--key", "wrong"], "401 unauthorized"),
        (["--model", "jpeg-compressibility=nan"], "the weight is not a finite number"),
        (["--model", "jpeg-compressibility", "--url", "http://127.0.0.1:1"], "nothing answers at"),
        (["--model", "jpeg-compressibility", "--url", "no url"], "url"),
    ],
)
def test_mistakes_end_with_two_and_a_line_that_says_what_is_wrong(
    arguments: list[str], says: str, run: Run, photos: list[Path]
) -> None:
    result = run("score", photos[0], "--prompt", "x", *arguments)
    assert result.exit_code == 2, repr(result.exception)
    assert says.lower() in result.stderr.lower()
    assert "Traceback" not in result.stderr


def test_serve_names_a_bad_setting_before_it_loads_anything(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_CONFIG", "restored at the end of the test")
    for name, text in (("typo.yaml", "prot: 1\n"), ("damaged.yaml", "models: [ocr\n"), ("list.yaml", "- a\n")):
        config = tmp_path / name
        config.write_text(text)
        result = run("serve", "--config", config)
        assert result.exit_code == 2, repr(result.exception)
        assert result.stderr.startswith("settings: ")
    missing = run("serve", "--config", tmp_path / "missing.yaml")
    assert (missing.exit_code, "missing.yaml" in missing.stderr) == (2, True)


def test_serve_names_a_port_that_is_taken(run: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REWARD_URL", "REWARD_API_KEY"):  # the command line's own; the server does not know them
        monkeypatch.delenv(name)
    result = run("serve", "--port", url.rpartition(":")[2])
    assert result.exit_code == 2, repr(result.exception)
    assert "cannot listen on 127.0.0.1:" in result.stderr
