"""The demo against real services: it tells what is missing, what did not stop, and ends with 0 when all is well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.demo import pictures
from benchmarks.demo.__main__ import PARTS, main, run_part
from benchmarks.demo.mistakes import Mistake
from benchmarks.demo.scoring import photographs, unexpected_order
from benchmarks.demo.session import DidNotStopCleanly, Session, service
from models.jpeg import jpeg_kilobytes

ROOT = Path(__file__).parents[3]
JPEG_ONLY = {
    "REWARD_MODELS": '["jpeg-compressibility", "jpeg-incompressibility"]',
    "REWARD_DEVICE": "cpu",
    "REWARD_THREADS": "1",
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with service(JPEG_ONLY) as server:
        yield server.url


def test_photographs_are_ranked_by_their_size_and_the_numbers_are_the_models_own(url: str) -> None:
    with closing(Session(url)) as session:
        section = photographs(session)
    assert section.failures == ()
    kilobytes = {photo.name: jpeg_kilobytes(photo.image) for photo in pictures.photographs()}
    rows = [row.cells for row in section.tables[0].rows]
    assert [cells[1] for cells in rows] == sorted(kilobytes, key=lambda name: -kilobytes[name])
    assert [cells[0] for cells in rows] == list("123456")
    for cells in rows:
        assert float(cells[2]) == pytest.approx(kilobytes[cells[1]], abs=0.0051)
        assert float(cells[4]) == pytest.approx(-kilobytes[cells[1]] / 500, abs=0.000051)
    strengths = [float(cells[3]) for cells in rows]
    assert strengths == sorted(strengths, reverse=True)
    assert sum(strengths) == pytest.approx(0, abs=0.05)
    assert [(call.route, call.images) for call in session.calls] == [("/score", 6), ("/compare", 6), ("/compare", 6)]
    assert all(call.wall_ms > max(call.stages_ms.values()) for call in session.calls)


def test_a_service_without_some_models_fails_the_demo_by_name_and_the_rest_is_reported(
    url: str, tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(main)
    output = tmp_path / "new" / "report.html"
    result = CliRunner().invoke(app, ["--url", url, "--output", str(output)])
    assert result.exit_code == 1
    assert "Text rendering: the service does not offer ocr" in result.output
    assert "deep field" in result.output
    assert "every check passed" not in result.output
    page = output.read_text(encoding="utf-8")
    assert "does not offer shapes-clip" in page
    assert page.count('<td class="picture"><img') == 6


def test_a_service_that_is_gone_is_a_failure_in_words() -> None:
    with closing(Session("http://127.0.0.1:9", patience=0.0)) as session:
        section = run_part(PARTS[0], session, PARTS[0].needs)
    assert section.title == "Photographs"
    assert len(section.failures) == 1
    assert section.failures[0].startswith("ConnectionFailed: ")


def test_a_service_that_dies_is_not_taken_for_one_that_stopped() -> None:
    with pytest.raises(DidNotStopCleanly, match="not with 0"), service(JPEG_ONLY) as server:
        server.process.kill()


def test_an_order_that_the_prompt_does_not_ask_for_is_named() -> None:
    names = ["right", "also right", "wrong"]
    assert unexpected_order([1, 0, 2], {0, 1}, names, "ocr") == ()
    assert unexpected_order([0, 2, 1], {0, 1}, names, "ocr") == (
        "ocr ranks right and wrong first, which the prompt does not ask for",
    )


def test_a_mistake_with_a_number_or_another_code_is_not_as_expected() -> None:
    assert Mistake("x", "truncated_image", "truncated_image", "…").as_expected
    assert not Mistake("x", "truncated_image", "truncated_image", "…", score=0.0).as_expected
    assert not Mistake("x", "truncated_image", "invalid_image", "…").as_expected


@pytest.mark.slow
def test_a_demo_that_is_told_to_stop_stops_its_service(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.demo", "--output", str(tmp_path / "report.html")]
    demo = psutil.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while not (children := demo.children()):
        assert demo.poll() is None
        time.sleep(0.05)
    demo.terminate()
    assert demo.wait(120) == 128 + signal.SIGTERM
    assert psutil.wait_procs(children, timeout=30)[1] == []


@pytest.mark.slow
def test_the_whole_demo_ends_with_0_and_shows_every_part(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "140"}
    command = [sys.executable, "-m", "benchmarks.demo", "--output", str(output)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    page = output.read_text(encoding="utf-8")
    for part in PARTS:
        assert f"<h2>{part.title}</h2>" in page
        assert part.title in result.stdout
        assert all(model in page for model in part.needs)
    assert "every check passed" in page
    assert str(tmp_path) not in page
