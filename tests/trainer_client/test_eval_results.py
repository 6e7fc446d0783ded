"""Scores to numbers and tables: the numbers are those of the statistics, tags have their own, NaN is a dash."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from trainer_client.eval_results import Judgement, PolicyScores, ends, groups, number, p_value, percent, tables, to_json
from trainer_client.eval_statistics import Interval, finite_or_none, mean_interval, paired_difference, win_rate
from trainer_client.prompts import Prompt

PROMPTS = [Prompt(f"prompt {p}", tag="colors" if p % 3 else "counting") for p in range(12)]


def scores(label: str, seed: int) -> PolicyScores:
    generator = np.random.default_rng(seed)
    quality, exact = generator.normal(20, 2, (12, 4)), generator.integers(0, 2, (12, 4)).astype(float)
    quality[3, 1] = np.nan
    return PolicyScores(label, {"quality": quality, "exact": exact}, {"quality: bad_image: torn": 1}, 1.5)


def printed(found: list[PolicyScores], judgement: Judgement | None = None, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for table in tables(PROMPTS, found, judgement):
        console.print(table)
    return console.export_text()


def test_numbers_are_those_of_the_statistics_over_all_prompts_and_each_tag() -> None:
    first, second = scores("policy", 0), scores("against", 1)
    judgement = Judgement("judge", np.random.default_rng(2).random((12, 4)))
    document = json.loads(json.dumps(finite_or_none(to_json(PROMPTS, [first, second], judgement)), allow_nan=False))
    counting = [0, 3, 6, 9]
    table = first.scores["quality"]
    own = document["results"]["policy"]["quality"]
    assert own["mean"] == mean_interval(table).mean
    assert (own["samples"], own["failed"]) == (47, 1)
    assert own["tags"]["counting"]["low"] == mean_interval(table[counting]).low
    compared = document["comparison"]["exact"]
    expected = paired_difference(first.scores["exact"], second.scores["exact"])
    assert (compared["p_value"], compared["improved"]) == (expected.p_value, expected.improved)
    by_tag = paired_difference(first.scores["exact"][counting], second.scores["exact"][counting])
    assert compared["tags"]["counting"]["difference"]["high"] == by_tag.difference.high
    assert [sum(seed.values()) for seed in compared["seeds"]] == [12] * 4
    assert document["judge"]["win_rate"]["mean"] == win_rate(judgement.probabilities).win_rate.mean
    assert document["scores"]["policy"]["quality"][3][1] is None
    assert document["failures"] == {
        "policy": {"quality: bad_image: torn": 1},
        "against": {"quality: bad_image: torn": 1},
    }


def test_one_policy_is_compared_with_nothing() -> None:
    document = to_json(PROMPTS, [scores("policy", 0)])
    assert "comparison" not in document
    assert "judge" not in document


def test_tables_show_the_means_and_fit_a_terminal() -> None:
    first, second = scores("policy", 0), scores("against", 1)
    text = printed([first, second], Judgement("judge", np.full((12, 4), 0.75)))
    mean = mean_interval(first.scores["quality"])
    assert f"{mean.mean:.2f}" in text
    difference = paired_difference(first.scores["quality"], second.scores["quality"]).difference
    assert f"{difference.mean:+#.4g}" in text
    assert "12 prompts x 4 seeds" in text
    assert "policy minus against" in text
    for part in ("counting", "colors", "quality", "exact", "judge", "1.000"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_reward_that_always_failed_has_dashes_and_no_number() -> None:
    failed = PolicyScores("policy", {"quality": np.full((12, 4), np.nan)})
    text = printed([failed])
    rows = [line for line in text.splitlines() if "quality" in line]
    assert len(rows) == 1
    assert [cell.strip() for cell in rows[0].strip("│ ").split("│")] == ["quality", "0", "-", "-", "48"]
    assert "nan" not in text


def test_a_single_tag_is_no_group_of_its_own() -> None:
    assert groups([Prompt("a", tag="x"), Prompt("b", tag="x")]) == {"all": [0, 1]}
    assert groups([Prompt("a", tag="x"), Prompt("b"), Prompt("c", tag="y")]) == {"all": [0, 1, 2], "x": [0], "y": [2]}


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        (number(math.nan), "-"), (number(0.5), "0.5000"), (number(1234.0), "1234"), (number(-20.0), "-20.00"),
        (number(0.25, signed=True), "+0.2500"), (percent(0.254), "25 %"), (percent(math.nan), "-"),
        (p_value(0.00001), "<0.0001"), (p_value(0.0345), "0.0345"), (p_value(math.nan), "-"),
        (ends(Interval(1.0, math.nan, math.nan, 1, 1, 0)), "-"),
        (ends(Interval(1.0, 0.5, 1.5, 3, 3, 0)), "0.5000 .. 1.500"),
    ],
)  # fmt: skip
def test_numbers_for_people(shown: str, said: str) -> None:
    assert shown == said
