"""Fitting learns a planted preference, does not learn a random one, and what it saves scores as it said."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import models.catalog  # noqa: F401
from models.base import LoadOptions
from models.fitting.config import FitConfig, FitProblem, Loss
from models.fitting.fit import RECORD, FitResult, batch_losses, fit, pair_loss
from models.fitting.losses import bradley_terry_loss
from models.fitting.pair_scores import Scorer, differences
from models.fitting.preference_data import PreferenceRow
from models.fitting.preference_losses import uncertainty_loss
from models.fitting.prepare import prepare, split
from models.fitting.trainable import Steady, trainable
from models.registry import get_model, load_model
from models.towers import HeadOutput, TowerReward
from tests.models.fitting.brightness import Prefer, brighter, by_chance, darker, rows

pytestmark = pytest.mark.usefixtures("one_thread")


def fitted(name: str, tmp_path: Path, config: FitConfig, prefer: Prefer = brighter) -> FitResult:
    (tmp_path / "random").mkdir()
    options = get_model(name).random_checkpoint(tmp_path / "random")
    count = 60 if name == "hpsv3" else 120
    return fit(name, options, rows(count, prefer), tmp_path / "out", config)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("shapes-clip", FitConfig(epochs=12, learning_rate=3e-3)),
        ("aesthetic", FitConfig(epochs=12, learning_rate=3e-3, loss="kl")),
        ("pickscore", FitConfig(epochs=8, learning_rate=1e-2)),
        ("imagereward", FitConfig(epochs=8, learning_rate=3e-3)),
        ("hpsv3", FitConfig(epochs=4, learning_rate=1e-2, loss="uncertainty", held_out=0.4)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_planted_preference_is_learned_and_read_back(name: str, config: FitConfig, tmp_path: Path) -> None:
    """Of two opposite preferences at least one is not what the random network happens to have already."""
    results = []
    for number, prefer in enumerate((brighter, darker)):
        folder = tmp_path / str(number)
        folder.mkdir()
        results.append(fitted(name, folder, config, prefer))
    assert all(result.after.accuracy > 0.85 for result in results)
    number, result = min(enumerate(results), key=lambda each: each[1].before.accuracy)
    assert result.before.accuracy <= 0.5
    record = json.loads((tmp_path / str(number) / "out" / RECORD).read_text())
    assert record["held_out"]["after"]["accuracy"] == result.after.accuracy
    assert record["weights"]["source"] != record["weights"]["fitted"]
    data = record["data"]
    assert data["pairs"] == record["pairs"] + record["choosing"]["pairs"] + record["held_out"]["after"]["pairs"]


def test_adapters_are_learned_and_become_plain_weights(tmp_path: Path) -> None:
    result = fitted("shapes-clip", tmp_path, FitConfig(train="lora", epochs=6, learning_rate=3e-3), darker)
    assert result.after.accuracy > 0.85
    model = load_model("shapes-clip", result.options)
    assert isinstance(model, TowerReward)
    assert not [name for name, _ in model.fittable().module.named_parameters() if "lora" in name]


def test_validation_rows_with_the_keys_of_taught_rows_are_other_pictures(tmp_path: Path) -> None:
    """Rows without a key have their line's number. Were features kept by it, this would teach the opposite."""
    options = get_model("aesthetic").random_checkpoint(tmp_path)
    taught = rows(60, brighter, seed=0)
    held = []
    for mine, other in zip(taught, rows(60, brighter, seed=1), strict=True):
        assert mine.key == other.key
        if mine.preference == other.preference:
            swapped = other.images[::-1]
            other = PreferenceRow(other.key, other.prompt, swapped, preference=1 - float(other.preference or 0))
        held.append(other)
    config = FitConfig(epochs=6, learning_rate=3e-3)
    result = fit(
        "aesthetic",
        options,
        taught,
        tmp_path / "out",
        config,
        validation=[replace(row, prompt=f"{row.prompt} again") for row in held],
    )
    assert result.before.accuracy < 0.5
    assert result.after.accuracy > 0.85


def test_labels_by_chance_teach_nothing(tmp_path: Path) -> None:
    result = fitted("aesthetic", tmp_path, FitConfig(epochs=4), by_chance)
    assert result.after.low < 0.5 < result.after.high


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fitted("aesthetic", tmp_path / name, FitConfig(epochs=2))
        written.append((tmp_path / name / "out" / "head.safetensors").read_bytes())
    assert written[0] == written[1]


def test_the_temperature_tells_how_sure_the_scores_are(tmp_path: Path) -> None:
    """A model that is certain of what people toss a coin about gets a large temperature."""
    sure = fitted("aesthetic", tmp_path, FitConfig(epochs=12, learning_rate=3e-3))

    def often(first: float, second: float, rng: np.random.Generator) -> float:
        return brighter(first, second, rng) if rng.random() < 0.75 else 1 - brighter(first, second, rng)

    (tmp_path / "unsure").mkdir()
    unsure = fitted("aesthetic", tmp_path / "unsure", FitConfig(epochs=12, learning_rate=3e-3), often)
    assert unsure.temperature is not None
    assert sure.temperature is None or unsure.temperature > sure.temperature


def test_batches_that_add_up_are_one_big_batch(tmp_path: Path) -> None:
    """To rounding, which AdamW enlarges where a gradient is next to nothing; a step on a small batch is another."""
    options, data = get_model("aesthetic").random_checkpoint(tmp_path), rows(120, brighter)
    told: dict[tuple[int, int], list[float]] = {}
    for batch, accumulate in ((24, 1), (6, 4), (8, 3), (6, 1)):
        lines: list[str] = []
        config = FitConfig(epochs=3, batch=batch, accumulate=accumulate, loss="kl")
        fit("aesthetic", options, data, tmp_path / f"{batch}-{accumulate}", config, report=lines.append)
        told[batch, accumulate] = [float(line.split("loss ")[1].split(",")[0]) for line in lines[1:]]
    whole = told.pop((24, 1))
    assert told.pop((6, 1)) != pytest.approx(whole, abs=0.01)
    assert list(told.values()) == [pytest.approx(whole, abs=3e-4)] * 2


@pytest.mark.parametrize("loss", ["bt", "kl", "uncertainty"])
def test_parts_of_a_batch_have_its_loss_and_its_gradient(loss: Loss, tmp_path: Path) -> None:
    """With weights, and with ties, which count in two of the losses."""
    model = load_model("hpsv3", get_model("hpsv3").random_checkpoint(tmp_path))
    assert isinstance(model, TowerReward)
    drawn = prepare(model, rows(9, lambda a, b, rng: float(rng.choice([0.0, 0.5, 1.0]))), lambda items, _: iter(items))
    batch = [replace(pair, weight=1.0 + i) for i, pair in enumerate(drawn.pairs)]
    assert {pair.label for pair in batch} == {0.0, 0.5, 1.0}
    trained = trainable(model.fittable(), FitConfig()).parameters
    scorer = Scorer(model, Steady(True, True))
    found = []
    for size in (9, 2):
        total = torch.stack(list(batch_losses(scorer, batch, FitConfig(loss=loss, batch=size)))).sum()
        gradients = torch.autograd.grad(total, trained)
        found.append((total.item(), torch.cat([gradient.flatten() for gradient in gradients])))
    (whole, gradient), (parts, summed) = found
    assert parts == pytest.approx(whole, rel=1e-5)
    assert gradient.norm() > 0
    assert (gradient - summed).norm() < 1e-4 * gradient.norm()
    ties = [replace(pair, label=0.5) for pair in batch]
    assert len(list(batch_losses(scorer, ties, FitConfig(loss=loss, batch=9)))) == (loss != "uncertainty")


def test_the_accuracy_is_of_pairs_that_did_not_choose_the_epoch(tmp_path: Path) -> None:
    """People of the prompts that choose say what the network says before it learns: no epoch is better for them."""
    given = rows(120, brighter)
    options = get_model("aesthetic").random_checkpoint(tmp_path)
    model = load_model("aesthetic", options)
    assert isinstance(model, TowerReward)
    config = FitConfig(epochs=3, learning_rate=3e-3)
    pairs = prepare(model, given, lambda items, _: iter(items)).pairs
    choosing = {pair.prompt for pair in split(pairs, config).choosing}
    with torch.no_grad():
        before = differences(Scorer(model, Steady(True, True)), pairs, 16) > 0
    told = [
        replace(row, preference=float(said)) if row.prompt in choosing else row
        for row, said in zip(given, before.tolist(), strict=True)
    ]
    result = fit("aesthetic", options, told, tmp_path / "out", config)
    assert (result.choosing.accuracy, result.best_epoch) == (1.0, 0)
    assert result.after == result.before
    assert result.after.accuracy < 1.0


def test_losses_are_those_of_the_library() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(12, generator=generator), torch.tensor([1.0, 0.0, 0.5, 1.0, 0.25, 0.0])
    first, second = scores.chunk(2)
    assert torch.allclose(
        pair_loss(HeadOutput(scores), labels, torch.ones(6), "bt"), bradley_terry_loss(first, second, labels)
    )
    tied = torch.full((6,), 0.5)
    assert float(pair_loss(HeadOutput(torch.zeros(12)), tied, torch.ones(6), "kl")) == pytest.approx(0.0, abs=1e-6)
    uncertainty = torch.rand(12, generator=generator) + 0.5
    mean, log_std = scores.chunk(2), uncertainty.log().chunk(2)
    chosen = torch.stack([torch.where(labels > 0.5, *mean), torch.where(labels > 0.5, *log_std)], -1)
    rejected = torch.stack([torch.where(labels > 0.5, *mean[::-1]), torch.where(labels > 0.5, *log_std[::-1])], -1)
    decided = labels != 0.5
    found = pair_loss(HeadOutput(scores, {"uncertainty": uncertainty}), labels, torch.ones(6), "uncertainty")
    assert torch.allclose(found, uncertainty_loss(chosen, rejected)[decided].mean())


@pytest.mark.parametrize(
    ("name", "data", "config", "says"),
    [
        ("ocr", rows(4, brighter), FitConfig(), "no reward model on towers"),
        ("shapes-clip", rows(1, brighter), FitConfig(), "at least three prompts"),
        ("shapes-clip", rows(20, lambda *_: 0.5), FitConfig(), "no decided pair"),
        ("shapes-clip", rows(20, brighter), FitConfig(loss="uncertainty"), "has none"),
        ("aesthetic", rows(20, brighter), FitConfig(train="lora"), "no linear layers"),
    ],
)
def test_what_cannot_be_fitted_says_why(
    name: str, data: list[PreferenceRow], config: FitConfig, says: str, tmp_path: Path
) -> None:
    (tmp_path / "random").mkdir()
    options = get_model(name).random_checkpoint(tmp_path / "random") if name != "ocr" else LoadOptions()
    with pytest.raises(FitProblem, match=says):
        fit(name, options, data, tmp_path / "out", config)


def test_prompts_of_the_validation_file_are_not_learned_from(tmp_path: Path) -> None:
    with pytest.raises(FitProblem, match="10 prompts are in the data and in the validation file"):
        fit(
            "shapes-clip", LoadOptions(), rows(20, brighter), tmp_path / "out", FitConfig(),
            validation=rows(20, brighter, 1),
        )  # fmt: skip


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(FitProblem):
        FitConfig(epochs=0)
    with pytest.raises(FitProblem):
        FitConfig(held_out=1.0)
