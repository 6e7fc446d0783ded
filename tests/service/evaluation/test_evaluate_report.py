"""``reward-service evaluate``: its report, what it says of bad input, and a running service in place of its own."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.settings import Settings
from tests.models.fitting.preference_fixtures import (
    write_images,
    write_lines,
)
from tests.service.evaluation.cases import (
    Pairs,
    Run,
    own_lines,
    results,
)
from tests.service.in_thread import served


class Page(html.parser.HTMLParser):
    """Which elements a page has, and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_shows_the_worst_first_and_escapes_what_others_wrote(run: Run, tmp_path: Path, pairs: Pairs) -> None:
    path = own_lines(tmp_path, pairs, [0.0] * 24)
    broken = {"prompt": "<script>alert(1)</script>", "images": ["0/a.png", "0/b.png"], "preference": 1}
    lost = {"prompt": "p", "images": ["none<b>.png", "0/b.png"], "preference": 1}
    path.write_text(path.read_text() + json.dumps(broken) + "\n" + json.dumps(lost) + "\n")
    out = tmp_path / "out"
    result = run("shapes-oracle", "--data", path, "--out", out, "--worst", "5")
    assert result.exit_code == 0, result.output
    assert "Unreadable rows, left out: image_missing 1" in result.stdout
    assert "1 of 25 pairs have no verdict and are left out" in result.stdout
    assert "Failures: prompt_not_understood 2" in result.stdout
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("img") == 10
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "none&lt;b&gt;.png" in text
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    sure = [line["prompt"] for line in lines if line.get("pairs") and line["pairs"][0]["probability"] > 0.9]
    assert len(sure) >= 5
    places = [text.find(f"<p>{prompt} <span") for prompt in sure[:5]]
    assert places == sorted(places)
    assert places[0] > 0
    assert lines[-1]["unreadable"]["code"] == "image_missing"
    assert lines[-2]["scores"] == [None, None]


def test_nothing_judged_is_no_number(run: Run, tmp_path: Path, pairs: Pairs) -> None:
    write_images(tmp_path, {"a.png": pairs[0][1], "b.png": pairs[0][2]})
    row = {"prompt": "nothing of shapes", "images": ["a.png", "b.png"], "preference": 1}
    result = run("shapes-oracle", "--data", write_lines(tmp_path / "r.jsonl", [row]), "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert "no pair could be judged" in (tmp_path / "out" / "report.html").read_text()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["measures"] == {"pairs": 0, "ties": 0}
    assert found["data"]["without_verdict"] == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["no-such-model", "--data", "rows.jsonl"], "unknown reward model no-such-model; known:"),
        (["shapes-oracle", "--data", "none.jsonl"], "none.jsonl is not a file"),
        (["shapes-oracle", "--data", "empty.jsonl"], "empty.jsonl holds no rows"),
        (["shapes-oracle", "--data", "columns.jsonl"], "are of no schema known"),
        (["shapes-oracle", "--data", "rows.jsonl", "--format", "hpdv3"], "no usable hpdv3 row"),
        (["shapes-oracle", "--data", "rows.jsonl", "--images", "none"], "is not a folder of images"),
        (["shapes-oracle", "--data", "rows.jsonl", "--validation", "none.jsonl"], "none.jsonl is not a file"),
        (["shapes-oracle", "--data", "rows.jsonl", "--out", "taken"], "holds an evaluation already"),
        (["shapes-oracle", "--data", "rows.jsonl", "--out", "empty.jsonl"], "File exists"),
        (["shapes-oracle", "--data", "rows.jsonl", "--url", "http://127.0.0.1:9"], "nothing answers at"),
        (
            ["shapes-oracle", "--data", "rows.jsonl", "--validation", "rows.jsonl", "--ties-threshold", "0.1"],
            "either given or tuned",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    own_lines(tmp_path, pairs[:1], [1.0])
    write_lines(tmp_path / "empty.jsonl", [])
    write_lines(tmp_path / "columns.jsonl", [{"text": "p"}])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "results.json").write_text("{}")
    result = run(*options)
    assert result.exit_code == 2, result.output
    said = [line for line in result.stderr.splitlines() if line.strip()]
    assert told in said[-1]
    assert len([line for line in said if "━" not in line]) == 1


def test_settings_and_weights_that_are_wrong_are_told(run: Run, tmp_path: Path, pairs: Pairs) -> None:
    path = own_lines(tmp_path, pairs[:1], [1.0])
    config = tmp_path / "service.yaml"
    config.write_text("models: {shapes-clip: {weights: /no/such/file.safetensors}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARD_CONFIG", str(config))
        result = run("shapes-clip", "--data", path)
        assert result.exit_code == 2, result.output
        assert "/no/such/file.safetensors" in result.stderr
        config.write_text("device: [1, 2]\n")
        patch.delenv("REWARD_DEVICE")
        result = run("shapes-clip", "--data", path)
        assert result.exit_code == 2, result.output
        assert "settings: device" in result.stderr


@pytest.fixture
def url() -> Iterator[str]:
    settings = Settings(models=["shapes-oracle"], device="cpu", api_keys=["open sesame"])  # type: ignore[arg-type]
    with served(settings) as address:
        yield address


def test_a_running_service_gives_the_same_numbers(run: Run, tmp_path: Path, pairs: Pairs, url: str) -> None:
    path = own_lines(tmp_path, pairs, [1.0] * 24)
    here = results(run("shapes-oracle", "--data", path, "--json"))
    there = results(run("shapes-oracle", "--data", path, "--json", "--url", url, "--key", "open sesame"))
    assert there["measures"] == here["measures"]
    refused = run("shapes-oracle", "--data", path, "--url", url, "--key", "wrong")
    assert refused.exit_code == 2
    assert "401" in refused.stderr
    absent = run("shapes-clip", "--data", path, "--url", url, "--key", "open sesame")
    assert absent.exit_code == 2
    assert "shapes-clip" in absent.stderr
