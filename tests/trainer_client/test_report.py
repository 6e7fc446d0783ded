"""The report of a run: what a reader sees is what the run's files say."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from scipy import stats
from typer.testing import CliRunner

from tests.trainer_client.example_run import HELDOUT, PROMPTS, TRAINED, write_run
from tests.trainer_client.report_page import Page
from trainer_client._report_parts import number
from trainer_client._report_summary import reward_changes, state
from trainer_client._run_folder import read_run
from trainer_client.report import report_command, write_comparison, write_report
from trainer_client.run_log import RunLog

STEPS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "example", steps=STEPS, seed=3)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(run, tmp_path / "example"))


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


# One file


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in {"src", "href", "xlink:href"} & attributes.keys():
            assert attributes[name].startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,"))
    styles = re.findall(r"<style>.*?</style>|style=\"[^\"]*\"", page.text, re.DOTALL)
    assert not [text for text in styles if "@import" in text or re.search(r"url\((?!#)", text)]
    assert "w3.org" not in page.text


def test_ids_are_unique_and_every_reference_has_one(page: Page) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    references = {name for pair in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page.text) for name in pair if name}
    assert len(references) > 20
    assert references <= ids.keys()


def test_the_same_run_gives_the_same_page(run: Path, page: Page) -> None:
    assert write_report(run).read_text(encoding="utf-8") == page.text
    assert [path.name for path in run.glob(".partial*")] == []


# Numbers


def test_tiles_tell_steps_images_time_and_waiting(run: Path, page: Page) -> None:
    train = rows(run, "train")
    shares = [100 * row["time/reward_wait"] / row["time/step"] for row in train]
    words = page.words()
    assert "finished" in words
    for told in (f"{STEPS} of {STEPS} steps", f"{train[-1]['images']:,} images", "2.60 minutes of training"):
        assert told in words
    assert f"{statistics.fmean(shares):.2f} % of a step's time" in words


@pytest.mark.parametrize("name", [TRAINED, HELDOUT])
def test_before_and_after_are_as_scipy_finds_them(run: Path, page: Page, name: str) -> None:
    def scores(step: int) -> np.ndarray:
        return np.array(json.loads((run / f"samples/step-{step:08d}/samples.json").read_text())["scores"][name])

    before, after = scores(0), scores(STEPS)
    differences = (after - before).mean(axis=1)
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    told = (
        f"{before.mean():.3f} → {after.mean():.3f} {name}, {'trained on' if name == TRAINED else 'held out'}: "
        f"{differences.mean():+.3f}, 95 % interval {interval.low:+.3f} to {interval.high:+.3f} "
        f"({len(PROMPTS)} prompts × 4 seeds)"
    )
    assert told in page.words()


def test_failed_samples_are_left_out_of_pairs_and_not_zeros(own: Path) -> None:
    for step, place in ((0, (0, 0)), (STEPS, (1, 1))):
        path = own / f"samples/step-{step:08d}/samples.json"
        about = json.loads(path.read_text())
        about["scores"][HELDOUT][place[0]][place[1]] = None
        path.write_text(json.dumps(about))
    change = next(found for found in reward_changes(read_run(own)) if found.name == HELDOUT)
    assert (change.before.failed, change.after.failed, change.difference.failed) == (1, 1, 2)
    page = Page(write_report(own).read_text(encoding="utf-8"))
    # The first prompt's first seed is shown, in a pair and in a strip; the second prompt is not among those shown.
    assert page.texts.count("failed") == 2
    assert change.told() in page.words()


def test_the_events_and_the_configuration_are_there(run: Path, page: Page) -> None:
    for line in (run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        assert event["text"] in page.texts
        assert event["time"] in page.texts
    for told in ("rewards.models.shapes-clip", "evaluation.heldout", "http://service:8000", "sha256:cafe"):
        assert told in page.texts


def test_time_by_stage_adds_up_to_the_step(run: Path, page: Page) -> None:
    train = rows(run, "train")
    whole = sum(row["time/step"] for row in train)
    other = whole - sum(row[f"time/{name}"] for row in train for name in ("sample", "decode", "reward_wait", "train"))
    place = page.texts.index("seconds per step", page.texts.index("seconds in all"))
    table = page.texts[place:]
    assert table[table.index("other") + 1] == number(other)
    assert table[table.index("sample") + 3] == f"{number(100 * sum(row['time/sample'] for row in train) / whole)} %"


# Curves


def test_curves_have_a_point_for_each_row(run: Path, page: Page) -> None:
    assert {len(points) for points in page.curve("each step")} == {STEPS}
    evaluations = len(rows(run, "eval"))
    assert [len(points) for points in page.curve(TRAINED)] == [evaluations] * 2
    assert [len(points) for points in page.curve(HELDOUT)] == [evaluations] * 2


def test_the_evaluation_curve_is_the_logged_one(run: Path, page: Page) -> None:
    evaluations = rows(run, "eval")
    by_images, by_time = page.curve(HELDOUT)
    drawn = np.array([[x, y] for _, x, y in by_images])
    means = [row[f"eval/{HELDOUT}"] for row in evaluations]
    slope, offset = np.polyfit(means, drawn[:, 1], 1)
    assert slope < 0  # upwards on the page
    np.testing.assert_allclose(drawn[:, 1], slope * np.array(means) + offset, atol=0.02)
    for points, name in ((by_images, "images"), (by_time, "seconds")):
        places = [row[name] for row in evaluations]
        np.testing.assert_allclose(np.corrcoef(places, [x for _, x, _ in points])[0, 1], 1, atol=1e-6)


def test_charts_take_their_colours_from_the_page(page: Page) -> None:
    drawings = re.findall(r'<svg class="plot".*?</svg>', page.text, re.DOTALL)
    assert len(drawings) > 15
    for drawing in drawings:
        assert set(re.findall(r"(?:stroke|fill): (#\w+)", drawing)) <= {"#000000", "#ffffff"}
        assert "var(--c0)" in drawing


# The guard


@pytest.fixture(scope="module")
def hacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "hacked", steps=120, hacked=True)


def test_the_guard_is_marked_where_it_spoke(hacked: Path) -> None:
    events = [json.loads(line) for line in (hacked / "events.jsonl").read_text().splitlines()]
    spoken = [event for event in events if event["kind"] == "guard"]
    assert spoken, "the example no longer trips the guard"
    page = Page(write_report(hacked).read_text(encoding="utf-8"))
    assert any(text.startswith("guard: ") for text in page.texts)
    looks = {(row["guard/diversity/mean"], row["step"] // 10) for row in rows(hacked, "train")
             if row.get("guard/diversity/fires", 0) >= 1}  # fmt: skip
    assert len({mean for mean, _ in looks}) == 2
    legend = page.texts.count("the guard's signal fires")
    assert legend == 3  # diversity, and the held-out reward by images and by time
    limits = page.curve("the guard's limit")
    assert len(limits) == 4  # spread, diversity, and the held-out reward by images and by time
    assert all(len({round(y, 1) for _, _, y in points}) == 1 for points in limits[2:])


# Pictures


def test_pictures_are_the_runs_own_enlarged_pixel_by_pixel(run: Path, page: Page) -> None:
    before, after = page.images()[:2]
    for shown, step in ((before, 0), (after, STEPS)):
        source = Image.open(run / f"samples/step-{step:08d}/000-00.png")
        wanted = source.resize((160, 160), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(wanted))
    assert len(page.images()) == 9 * 2 * 2 + 4 * 6


def test_scores_stand_below_their_picture(run: Path, page: Page) -> None:
    about = json.loads((run / f"samples/step-{STEPS:08d}/samples.json").read_text())
    first = page.text.index(f"step {STEPS}</b>")
    shot = page.text[first : page.text.index("</dl>", first)]
    for name in (TRAINED, HELDOUT):
        assert f"{name}</dt><dd>{number(about['scores'][name][0][0])}</dd>" in shot


def test_a_picture_that_is_missing_is_said_to_be(own: Path) -> None:
    (own / f"samples/step-{STEPS:08d}/000-00.png").unlink()
    page = Page(write_report(own).read_text(encoding="utf-8"))
    assert page.texts.count("no picture") == 2  # among the pairs and in the strip


# Texts that are not ours


def test_every_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(\"1\")</script> & 'x' ]]> --> <img src=x onerror=y>"
    folder = tmp_path / "a <b>&"
    with RunLog(folder, total_steps=2, tensorboard=False, progress=False) as log:
        log.event(0, "start", evil)
        for step in (0, 1, 2):
            numbers = {f"eval/{evil}": 0.5, f"eval/{evil}/low": 0.4, f"eval/{evil}/high": 0.6}
            log.evaluation(step, numbers, seconds=step, images=step)
            log.samples(step, [evil], [1], torch.zeros(1, 1, 3, 8, 8), {evil: [[0.5]]})
            log.train(step + 1, {f"reward/{evil}": 0.1, evil: 1.0}, seconds=step + 1, images=step + 1)
        log.event(2, "stop", evil)
    (folder / "config.json").write_text(json.dumps({"algorithm": evil, "configuration": {evil: [evil]}}))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert not {"script", "b>"} & {tag for tag, _ in page.tags}
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert page.texts.count(evil) >= 5  # prompt, score's name, event, setting and value
    assert page.curve(evil)
    compared = write_comparison({evil: folder, "b": folder}, tmp_path / "c.html", evil, lead=evil)
    assert "script" not in {tag for tag, _ in Page(compared.read_text(encoding="utf-8")).tags}


# Runs that are not whole


def test_a_killed_run_is_told_as_far_as_it_came(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "killed", steps=100, until=23)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "kind": "tr')
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "unfinished: step 23 of 100; it is still running, or it was killed" in page.texts
    assert len(page.curve(HELDOUT)[0]) == 3
    assert "23 of 100 steps" in page.words()


@pytest.mark.parametrize("kept", [["config.json"], ["events.jsonl"], ["metrics.jsonl"], ["events.jsonl", "samples"]])
def test_whatever_there_is_gives_a_report(own: Path, kept: list[str]) -> None:
    for path in own.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = Page(write_report(own).read_text(encoding="utf-8")).words()
    told = {"config.json": "unfinished: step 0 of 60", "events.jsonl": "finished"}
    assert told.get(kept[0], "unfinished: step 60;") in words
    assert ("Before and after" in words) == ("samples" in kept)


def test_a_run_without_evaluations_shows_its_training_reward(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    with RunLog(folder, total_steps=20, tensorboard=False, progress=False) as log:
        for step in range(1, 21):
            log.train(step, {"reward/total": step / 20, "reward/x": step / 20}, seconds=step, images=step)
    words = Page(write_report(folder).read_text(encoding="utf-8")).words()
    assert "0.075 → 0.975 training reward, mean of the first 2 and of the last 2 steps" in words


def test_a_stopped_run_says_why(own: Path) -> None:
    with (own / "events.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "time": "", "kind": "stop", "text": "stop: heldout/x: it fell"}) + "\n")
    assert state(read_run(own)) == ("stopped at step 60: stop: heldout/x: it fell", "bad")
    with (own / "events.jsonl").open("a") as file:
        file.write(json.dumps({"step": 61, "time": "", "kind": "failure", "text": "RewardError: away"}) + "\n")
    assert state(read_run(own)) == ("broken off at step 61: RewardError: away", "bad")


def test_damage_is_named(own: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder of a run"):
        write_report(tmp_path)
    lines = (own / "metrics.jsonl").read_text().splitlines()
    (own / "metrics.jsonl").write_text("\n".join([*lines[:3], "{oops", *lines[4:]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 4: "):
        write_report(own)


# Comparison


def test_a_comparison_lays_runs_over_each_other(run: Path, hacked: Path, tmp_path: Path) -> None:
    extra = {"Share of signed pictures": {"hacked": [(0, 0.0), (120, 0.75)]}}
    out = write_comparison({"plain": run, "hacked": hacked}, tmp_path / "c.html", "Two runs", lead="Why.", extra=extra)
    page = Page(out.read_text(encoding="utf-8"))
    words = page.words()
    assert words.startswith("Two runs Two runs Why.")
    lengths = {name: Counter(len(points) for points in page.curve(name)) for name in ("plain", "hacked")}
    assert lengths["plain"] == {60: 2 + 9, 7: 2 * 2 + 2}
    assert lengths["hacked"] == {120: 2 + 9, 13: 2 * 2 + 2, 2: 1}
    for name, folder in (("plain", run), ("hacked", hacked)):
        for change in reward_changes(read_run(folder)):
            assert f"{name} {change.name} {change.role} {number(change.before.mean)}" in words
    assert "plain: before" in words  # their beginnings differ, so both are shown
    same = write_comparison({"a": run, "b": run}, tmp_path / "same.html", "t").read_text(encoding="utf-8")
    assert "a: before" not in same
    assert same.count(">before</b>") == 6


def test_comparisons_that_cannot_be(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no runs"):
        write_comparison({}, tmp_path / "c.html", "t")
    with pytest.raises(ValueError, match="no run 'b' among a"):
        write_comparison({"a": run}, tmp_path / "c.html", "t", extra={"x": {"b": [(0, 0)]}})


# The command


def command(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(report_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_reports(own: Path, hacked: Path, tmp_path: Path) -> None:
    (own / "report.html").unlink()
    found = command(own)
    assert (found.exit_code, found.output.strip()) == (0, str(own / "report.html"))
    assert "<h1>flow-grpo: example</h1>" in (own / "report.html").read_text()
    found = command(own, hacked, "--out", tmp_path / "both.html", "--title", "Both")
    assert found.exit_code == 0, found.output
    assert "<h1>Both</h1>" in (tmp_path / "both.html").read_text()


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    found = command(tmp_path / "none")
    assert found.exit_code == 2
    assert found.stderr.startswith("reward-trainer report: ")
    assert found.stderr.count("\n") == 1
