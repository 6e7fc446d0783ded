"""Fitting learns a planted preference, does not learn a random one, and what it saves scores as it said."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models.catalog  # noqa: F401
from models.base import LoadOptions
from models.fitting.fit import RECORD, FitConfig, FitProblem, FitResult, fit, pair_loss, split
from models.fitting.losses import bradley_terry_loss
from models.fitting.pair_scores import PreparedPair
from models.fitting.preference_data import PreferenceRow
from models.fitting.preference_losses import uncertainty_loss
from models.registry import get_model, load_model
from models.towers import HeadOutput, TowerInput, TowerReward

PROMPTS = tuple(f"a photo of a red circle number {i}" for i in range(10))


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Drawn:
    """A picture in memory."""

    data: bytes
    name: str

    def read(self) -> bytes:
        return self.data


def picture(brightness: float, rng: np.random.Generator) -> Drawn:
    noise = rng.integers(0, 60, (48, 48, 3))
    file = io.BytesIO()
    Image.fromarray((noise + 195 * brightness).astype(np.uint8)).save(file, "PNG")
    return Drawn(file.getvalue(), f"{brightness:.2f}")


Prefer = Callable[[float, float, np.random.Generator], float]


def rows(count: int, prefer: Prefer, seed: int = 0) -> list[PreferenceRow]:
    """Pairs of pictures of different brightness, several of each prompt."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        dark, light = sorted(rng.uniform(0, 1, 2).tolist())
        first, second = (dark, light) if rng.random() < 0.5 else (light, dark)
        images = (picture(first, rng), picture(second, rng))
        made.append(PreferenceRow(str(i), PROMPTS[i % len(PROMPTS)], images, preference=prefer(first, second, rng)))
    return made


def brighter(first: float, second: float, _: np.random.Generator) -> float:
    return float(first > second)


def darker(first: float, second: float, _: np.random.Generator) -> float:
    return float(first < second)


def by_chance(_first: float, _second: float, rng: np.random.Generator) -> float:
    return float(rng.random() < 0.5)


def fitted(name: str, tmp_path: Path, config: FitConfig, prefer: Prefer = brighter) -> FitResult:
    (tmp_path / "random").mkdir()
    options = get_model(name).random_checkpoint(tmp_path / "random")
    count = 40 if name == "hpsv3" else 120
    return fit(name, options, rows(count, prefer), tmp_path / "out", config)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("shapes-clip", FitConfig(epochs=12, learning_rate=3e-3)),
        ("aesthetic", FitConfig(epochs=12, learning_rate=3e-3, loss="kl")),
        ("pickscore", FitConfig(epochs=8, learning_rate=1e-2)),
        ("imagereward", FitConfig(epochs=8, learning_rate=3e-3)),
        ("hpsv3", FitConfig(epochs=4, learning_rate=1e-2, loss="uncertainty")),
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


def test_no_prompt_is_on_both_sides() -> None:
    empty = TowerInput(torch.zeros(3, 1, 1), torch.zeros(1), "", "")
    pairs = [PreparedPair(empty, empty, 1.0, 1.0, PROMPTS[i % 7]) for i in range(50)]
    held, taught = split(pairs, FitConfig())
    assert held
    assert taught
    assert not {pair.prompt for pair in held} & {pair.prompt for pair in taught}
    assert len(held) + len(taught) == 50


@pytest.mark.parametrize(
    ("name", "data", "config", "says"),
    [
        ("ocr", rows(4, brighter), FitConfig(), "no reward model on towers"),
        ("shapes-clip", rows(1, brighter), FitConfig(), "at least two prompts"),
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
