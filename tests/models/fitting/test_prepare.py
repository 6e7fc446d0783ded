"""What was read is named by a hash, and no prompt is in two parts of the data."""

from dataclasses import replace

import pytest
import torch

import models.catalog  # noqa: F401
from models.base import LoadOptions
from models.fitting.config import FitConfig, FitProblem
from models.fitting.pair_scores import PreparedPair
from models.fitting.preference_data import PreferenceRow
from models.fitting.prepare import DataRead, Parts, prepare, split, split_with
from models.registry import load_model
from models.towers import TowerInput, TowerReward
from tests.models.fitting.brightness import PROMPTS, Drawn, brighter, rows

EMPTY = TowerInput(torch.zeros(3, 1, 1), torch.zeros(1), "", "")


def pairs(count: int, prompts: int, label: float = 1.0, name: str = "prompt") -> list[PreparedPair]:
    return [PreparedPair(EMPTY, EMPTY, label, 1.0, f"{name} {i % prompts}") for i in range(count)]


def prompts_of(parts: Parts) -> list[set[str]]:
    return [{pair.prompt for pair in part} for part in (parts.taught, parts.choosing, parts.measuring)]


def read(given: list[PreferenceRow]) -> DataRead:
    model = load_model("shapes-clip", LoadOptions())
    assert isinstance(model, TowerReward)
    return prepare(model, given, lambda items, _: iter(items)).read


@pytest.mark.parametrize("prompts", [3, 4, 7, 25])
def test_no_prompt_is_in_two_parts(prompts: int) -> None:
    parts = split(pairs(50, prompts), FitConfig())
    taught, choosing, measuring = prompts_of(parts)
    assert taught
    assert choosing
    assert measuring
    assert len(taught) + len(choosing) + len(measuring) == len(taught | choosing | measuring) == prompts
    assert len(parts.taught) + len(parts.choosing) + len(parts.measuring) == 50
    assert len(choosing | measuring) == max(2, round(0.2 * prompts))
    assert split(pairs(50, prompts), FitConfig()).taught[0].prompt == parts.taught[0].prompt


def test_a_validation_file_is_halved_by_its_prompts() -> None:
    parts = split_with(pairs(20, 4), pairs(30, 5, name="other"), FitConfig())
    taught, choosing, measuring = prompts_of(parts)
    assert len(taught) == 4
    assert (len(choosing), len(measuring)) == (2, 3)
    assert not choosing & measuring


@pytest.mark.parametrize(
    ("data", "validation", "says"),
    [
        (pairs(9, 2), None, "at least three prompts"),
        (pairs(9, 3, 0.5), None, "no decided pair to learn from"),
        (pairs(9, 3), pairs(4, 1, name="other"), "validation file needs at least two prompts"),
        (pairs(9, 3), pairs(4, 2), "2 prompts are in the data and in the validation file"),
        (pairs(9, 3), pairs(4, 2, 0.5, name="other"), "no decided pair to choose the epoch by"),
    ],
)
def test_what_cannot_be_split_says_why(
    data: list[PreparedPair], validation: list[PreparedPair] | None, says: str
) -> None:
    with pytest.raises(FitProblem, match=says):
        split(data, FitConfig()) if validation is None else split_with(data, validation, FitConfig())


def test_what_was_read_is_counted_and_named_by_a_hash() -> None:
    given = rows(12, brighter)
    found = read(given)
    assert (found.rows, found.skipped, found.prompts, found.pictures, found.pairs, found.ties) == (12, 0, 10, 24, 12, 0)
    # Keys are names of rows, not data.
    assert read([replace(row, key=f"{row.key} again") for row in given]) == found


def test_rankings_are_counted_by_their_pairs() -> None:
    images = tuple(image for row in rows(2, brighter) for image in row.images)
    found = read([PreferenceRow("k", PROMPTS[0], images, ranks=(1, 2, 2, 3))])
    assert (found.rows, found.pictures, found.pairs, found.ties) == (1, 4, 6, 1)


def test_another_order_preference_prompt_or_picture_is_another_hash() -> None:
    given = rows(4, brighter)
    first, *others = given
    changed = [
        [*others, first],
        [replace(first, preference=0.5), *others],
        [replace(first, prompt="another"), *others],
        [replace(first, images=first.images[::-1]), *others],
        [replace(first, weight=2.0), *others],
        others,
    ]
    assert len({read(each).sha256 for each in (given, *changed)}) == 1 + len(changed)


def test_rows_that_cannot_be_used_have_no_part_in_the_hash() -> None:
    given = rows(4, brighter)
    broken = replace(given[0], images=(Drawn(b"no picture", "broken"), given[0].images[1]))
    found = read([given[0], broken, *given[1:]])
    assert (found.rows, found.skipped) == (4, 1)
    assert found.sha256 == read(given).sha256
