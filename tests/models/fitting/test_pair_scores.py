"""Towers that stay as they are run once an image and once a prompt; what is kept changes no score."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import models.catalog  # noqa: F401
from models.fitting.config import FitConfig, What
from models.fitting.pair_scores import PreparedPair, Scorer, agreement
from models.fitting.prepare import prepare
from models.fitting.trainable import Steady, steady_towers, trainable
from models.registry import get_model, load_model
from models.towers import TowerReward
from tests.models.fitting.brightness import brighter, rows

pytestmark = pytest.mark.usefixtures("one_thread")


def loaded(name: str, folder: Path) -> TowerReward:
    model = load_model(name, get_model(name).random_checkpoint(folder))
    assert isinstance(model, TowerReward)
    return model


def pairs_for(model: TowerReward, count: int = 6) -> list[PreparedPair]:
    return prepare(model, rows(count, brighter), lambda items, _: iter(items)).pairs


@pytest.mark.parametrize(
    ("name", "train", "steady"),
    [
        ("shapes-clip", "head", Steady(True, True)),
        ("aesthetic", "head", Steady(True, True)),
        ("imagereward", "head", Steady(True, True)),
        ("hpsv3", "head", Steady(True, True)),
        # Its head is the towers' projections.
        ("pickscore", "head", Steady(False, False)),
        ("shapes-clip", "lora", Steady(False, False)),
        ("shapes-clip", "all", Steady(False, False)),
        # Its text is read by the head, and its tower is frozen by nobody.
        ("imagereward", "all", Steady(False, True)),
    ],
)
def test_a_tower_is_steady_where_no_trained_parameter_is_in_it(
    name: str, train: What, steady: Steady, tmp_path: Path
) -> None:
    model = loaded(name, tmp_path)
    trainable(model.fittable(), FitConfig(train=train))
    assert steady_towers(model, pairs_for(model, 1)[0].first) == steady


@pytest.mark.parametrize("name", ["shapes-clip", "imagereward", "hpsv3"])
def test_a_steady_tower_sees_every_image_once_and_the_head_still_learns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(name, tmp_path)
    trained = trainable(model.fittable(), FitConfig())
    pairs = pairs_for(model)
    images = [entry for pair in pairs for entry in (pair.first, pair.second)]
    encode, seen = model.encode_image, []

    def counting(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(model, "encode_image", counting)
    scorer = Scorer(model, Steady(True, True))
    for _ in range(3):
        scores = scorer(images).score_B
        agreement(scorer, pairs, 4)
    assert sum(seen) == len(images) == 12
    torch.autograd.backward(scores.sum())
    assert all(parameter.grad is not None for parameter in trained.parameters)


@pytest.mark.parametrize("name", ["shapes-clip", "imagereward", "hpsv3"])
def test_what_is_kept_changes_no_score(name: str, tmp_path: Path) -> None:
    """Nor does it where there is room for few features only, or for none."""
    model = loaded(name, tmp_path)
    images = [entry for pair in pairs_for(model) for entry in (pair.first, pair.second)]
    feature = model.encode_image(model.normalize(images[0].pixels[None]))[0]
    expected = Scorer(model, Steady(False, False))(images)
    for room in (0, 3 * feature.nbytes, 1 << 30):
        scorer = Scorer(model, Steady(True, True), feature_bytes=room)
        for _ in range(2):
            found = scorer(images)
            assert torch.allclose(found.score_B, expected.score_B, atol=1e-5)
            assert found.outputs.keys() == expected.outputs.keys()


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("imagereward", tmp_path)
    images = [entry for pair in pairs_for(model) for entry in (pair.first, pair.second)]
    encode, seen = model.encode_image, []

    def counting(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return encode(pixels)

    room = 5 * encode(model.normalize(images[0].pixels[None]))[0].nbytes
    monkeypatch.setattr(model, "encode_image", counting)
    scorer = Scorer(model, Steady(True, True), feature_bytes=room)
    for _ in range(3):
        scorer(images)
    assert sum(seen) == 12 + 2 * (12 - 5)
