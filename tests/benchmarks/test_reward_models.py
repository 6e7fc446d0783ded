"""The benchmark of the reward models, on tiny checkpoints: what it runs is real, its numbers mean nothing here."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import typer
from PIL import Image as PILImage

from benchmarks import reward_models, samples
from benchmarks.reward_models import SHARED, Speed
from models.registry import get_model


@pytest.fixture(scope="module")
def photos() -> list[PILImage.Image]:
    return [PILImage.fromarray(pixels) for pixels in samples.crops(3, side=64)]


def test_a_model_is_loaded_and_scores_different_images_differently(
    photos: list[PILImage.Image], tmp_path: Path
) -> None:
    load = get_model("pickscore").random_checkpoint(tmp_path)
    full, half = (
        asyncio.run(reward_models.speed("pickscore", dtype, load, photos)) for dtype in ("float32", "bfloat16")
    )
    assert full.images_per_s > 0
    assert [len(row) for row in full.scores] == [3] * reward_models.GROUPS
    assert all(len(set(row)) == 3 for row in full.scores)
    assert full.scores != half.scores
    assert full.scores[0] == pytest.approx(half.scores[0], abs=0.05)
    assert -1 <= reward_models.rank_agreement(full, half) <= 1


def test_both_rewards_of_one_tower_are_asked_on_one_file(photos: list[PILImage.Image], tmp_path: Path) -> None:
    loads = reward_models._one_tower(tmp_path, "tiny")
    assert loads[SHARED[0]].weights == loads[SHARED[1]].weights
    ratios = asyncio.run(reward_models.sharing(loads, photos))
    assert set(ratios) == {"equal preprocessing", "as published"}
    assert all(value > 0 for value in ratios.values())


def test_rank_agreement_is_one_for_equal_orders_and_minus_one_for_reversed_ones() -> None:
    rising = Speed("x", "float32", 1.0, 1.0, ((1.0, 2.0, 3.0),))
    falling = Speed("x", "bfloat16", 1.0, 1.0, ((3.0, 2.0, 1.0),))
    constant = Speed("x", "bfloat16", 1.0, 1.0, ((1.0, 1.0, 1.0),))
    assert reward_models.rank_agreement(rising, rising) == 1
    assert reward_models.rank_agreement(rising, falling) == -1
    assert reward_models.rank_agreement(constant, constant) == 1


def test_models_that_want_metadata_or_prompts_of_their_own_are_asked_with_their_canary() -> None:
    row = reward_models._row("shapes-oracle", ["float32"], "tiny", [PILImage.new("RGB", (64, 64), "white")] * 2, print)
    assert row[0] == "`shapes-oracle`"
    assert float(row[1]) > 0
    assert row[2] == ""  # it does not compute on the device: it has no dtype


def test_the_markdown_has_a_row_for_each_model_and_the_shared_tower() -> None:
    about = {"cores": 2, "cpu": "x", "instructions": "y", "amx": False, "torch": "2"}
    rows = [["`a`", "1", "2", "0.9", "3", "4 MB"], ["`b`", "1", "", "", "3", "4 MB"]]
    text = reward_models.markdown(rows, {"equal preprocessing": 1.01}, about)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 4
    assert "equal preprocessing 1.01" in text


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="no-such-model"):
        reward_models.main(model=["no-such-model"])
