"""Training: labels and losses as defined, and the same seed gives the same weights."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from torch import Tensor, nn

from models.backbones.clip import tokenize
from models.base import LoadOptions, Output, WeightsError
from models.fitting.optimise import Descent
from models.shapes import train_clip
from models.shapes.clip_losses import (
    SLOTS,
    cell_labels,
    contrastive_loss,
    preference_labels,
    prompt_labels,
    slot_labels,
    slot_loss,
)
from models.shapes.clip_model import PreferenceHead, clip_config, compact_index, known_tokens, pack, unpack
from models.shapes.preferences import training_batch
from models.shapes.prompts import TASKS, parse
from models.shapes.scenes import random_prompt
from models.shapes.train_clip import TrainConfig, arrange, learn, main, train
from models.shapes.trainee import Trainee, rounded, to_pixels, to_tokens
from models.shapes_clip import ShapesClip

SMALL = replace(
    TrainConfig(), contrastive_steps=2, preference_steps=2, arrangement_steps=2, prompts=3, per_prompt=4, pool=8
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


def test_the_same_seed_gives_the_same_weights_and_the_stages_train_every_part() -> None:
    steps: list[tuple[int, int]] = []
    trained = [train(SMALL, lambda step, total, text: steps.append((step, total))) for _ in range(2)]
    assert steps == [(step, 6) for step in (1, 2, 3, 4, *[4] * SMALL.pool, 5, 6)] * 2
    first, second = (pack(model.clip, model.head) for model in trained)
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(SMALL.seed)
    untrained = dict(Trainee().named_parameters())
    towers = [(name, value) for name, value in trained[0].named_parameters() if not name.startswith("head.")]
    assert [name for name, value in towers if torch.equal(value, untrained[name])] == []
    torch.manual_seed(SMALL.seed + 1)
    head = PreferenceHead().state_dict()
    assert [name for name, value in trained[0].head.named_parameters() if torch.equal(value, head[name])] == []


def test_the_last_stage_starts_from_what_would_be_stored_so_it_can_be_repeated_alone() -> None:
    torch.manual_seed(SMALL.seed)
    torch.use_deterministic_algorithms(True)
    first_stages = learn(Trainee(), SMALL, lambda *_: None)
    stored = pack(first_stages.clip, first_stages.head)
    torch.manual_seed(99)
    fresh = Trainee()
    fresh.clip.load_state_dict(unpack(stored, compact=True)[0])
    alone = arrange(fresh, SMALL, lambda *_: None)
    whole = train(SMALL, lambda *_: None)
    first, second = (pack(model.clip, model.head) for model in (alone, rounded(whole)))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_all_stages_step_through_the_core_of_fit_as_a_plain_loop_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored weights were trained before there was a core: its steps must be the same to the last bit."""
    stepped: list[int] = []
    step = Descent.step

    def counted(descent: Descent, losses: Iterable[Tensor]) -> float:
        stepped.append(len(descent.parameters))
        return step(descent, losses)

    monkeypatch.setattr(Descent, "step", counted)
    by_core = train(SMALL, lambda *_: None)
    steps = SMALL.contrastive_steps + SMALL.preference_steps
    assert len(stepped) == steps + SMALL.arrangement_steps
    assert len(set(stepped[:steps])) == 1
    assert stepped[-1] < stepped[0]  # without the vision tower

    monkeypatch.setattr(train_clip, "_optimize", plain_loop)
    by_loop = train(SMALL, lambda *_: None)
    assert len(stepped) == steps + SMALL.arrangement_steps
    assert all(torch.equal(one, other) for one, other in zip(by_core.parameters(), by_loop.parameters(), strict=True))


def plain_loop(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    config: TrainConfig,
    steps: int,
    report: Callable[[int], None],
) -> None:
    model.train()
    model.zero_grad()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in named if "resblocks" in name and parameter.ndim == 2]
    others = [parameter for name, parameter in named if not ("resblocks" in name and parameter.ndim == 2)]
    muon = torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
    adamw = torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    for step in range(steps):
        factor = min(1.0, (step + 1) / min(100, 1 + steps // 10), (steps - step) / (0.4 * steps))
        muon.param_groups[0]["lr"] = config.muon_learning_rate * factor
        adamw.param_groups[0]["lr"] = config.learning_rate * factor
        loss = loss_of(step)
        model.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        report(step + 1)


def test_slot_labels_say_what_the_prompt_says() -> None:
    prompts = [parse(text) for text in ("three red stars", "a circle left of a blue square", "a cross")]
    labels = slot_labels([prompt for prompt in prompts if prompt is not None])
    assert labels.tolist() == [
        [5, 1, 3, 0, 0, 0, 0],
        [2, 6, 1, 1, 0, 1, 1],
        [4, 0, 1, 0, 0, 0, 0],
    ]
    assert (labels < torch.tensor(SLOTS)).all()
    sharp = torch.cat([50 * F.one_hot(labels[:, k], classes) for k, classes in enumerate(SLOTS)], 1).float()
    assert slot_loss(sharp, labels) < 1e-6
    assert slot_loss(torch.zeros_like(sharp), labels).item() == pytest.approx(sum(math.log(c) for c in SLOTS), rel=1e-5)


def test_prompt_labels_follow_content() -> None:
    batch = training_batch(np.random.default_rng(2), 4, 4, siblings=True)
    preference, weight = prompt_labels(batch)
    assert preference.shape == weight.shape == (16, 4, 4)
    for n in range(16):
        for g in range(4):
            for h in range(4):
                one, other = batch.content_GN[g, n], batch.content_GN[h, n]
                if abs(one - other) >= 0.02:
                    assert preference[n, g, h] == float(one > other)
                    assert weight[n, g, h] == (1.0 if n // 4 in (g, h) else 0.25)
                else:
                    assert preference[n, g, h] == 0.5
                    assert (weight[n, g, h] > 0) == (g != h and one == 2.0)


def test_preference_labels_follow_content_then_damage() -> None:
    batch = training_batch(np.random.default_rng(2), 3, 4)
    preference, weight = preference_labels(batch)
    for g in range(3):
        for i in range(12):
            for j in range(12):
                own = (i // 4 == g) + (j // 4 == g)
                difference = float(batch.content_GN[g, i]) - float(batch.content_GN[g, j])
                if abs(difference) >= 0.02:
                    assert preference[g, i, j] == float(difference > 0)
                else:
                    cleaner = np.sign(batch.damage_N[j] - batch.damage_N[i])
                    assert preference[g, i, j] == 0.5 + 0.5 * cleaner
                if i == j or own == 0:
                    assert weight[g, i, j] == 0
                elif own == 2:
                    assert weight[g, i, j] >= 0.3
                else:
                    assert weight[g, i, j] in (0, 0.25)
    assert torch.equal(preference + preference.transpose(1, 2), torch.ones_like(preference))


def test_contrastive_loss_equals_clips_for_one_positive_each() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    target = torch.arange(5)
    clips = (
        torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    assert contrastive_loss(logits, torch.eye(5)).item() == pytest.approx(clips.item(), rel=1e-6)
    worse = contrastive_loss(torch.cat([logits, torch.full((5, 2), 3.0)], 1), torch.eye(5, 7))
    assert worse > clips


def test_cell_labels_name_what_stands_where() -> None:
    batch = training_batch(np.random.default_rng(3), 3, 4)
    labels = cell_labels(batch.pictures)
    assert labels.shape == (12, 2, 9)
    for picture, row in zip(batch.pictures, labels, strict=True):
        taken = {3 * entry.cell[0] + entry.cell[1] for entry in picture.scene.objects}
        assert {i for i in range(9) if row[0, i] > 0} == {i for i in range(9) if row[1, i] > 0} == taken


def test_every_word_of_the_grammar_has_a_token_row_of_its_own() -> None:
    rng = np.random.default_rng(4)
    for i in range(300):
        prompt = random_prompt(rng, TASKS[i % 6])
        assert (compact_index()[tokenize(prompt.text)[0]] > 0).all(), prompt.text
    assert (compact_index()[tokenize("a photograph of a dachshund")[0]] == 0).any()
    end = SimpleTokenizer().eot_token_id
    assert compact_index().argmax() == end
    assert len(set(compact_index()[list(known_tokens())].tolist())) == len(known_tokens())


def test_the_expanded_text_tower_equals_the_compact_one_at_every_padding() -> None:
    torch.manual_seed(0)
    model = Trainee().eval()
    tensors = pack(model.clip, model.head)
    compact, _ = unpack(tensors, compact=True)
    model.clip.load_state_dict(compact)
    full = CLIP(**clip_config(compact=False)).eval()
    full.load_state_dict(unpack(tensors)[0])
    prompts = [random_prompt(np.random.default_rng(seed)) for seed in range(6)]
    with torch.inference_mode():
        trained = model.encode_text(to_tokens(prompts))
        for row, prompt in zip(trained, prompts, strict=True):
            served = full.encode_text(tokenize(prompt.text, (77,))[0][None])[0]
            assert torch.allclose(served, row, atol=1e-5)


def test_pixels_are_normalised_and_words_are_sometimes_unknown() -> None:
    batch = training_batch(np.random.default_rng(5), 3, 4)
    assert to_pixels(batch.images).shape == (12, 3, 64, 64)
    known = to_tokens(batch.prompts)
    dropped = to_tokens(batch.prompts, np.random.default_rng(0), 0.5)
    assert (known > 0).all()
    assert (dropped == 0).float().mean() > 0.2
    assert torch.equal(known.argmax(1), dropped.argmax(1))


def test_foreign_tensors_are_refused() -> None:
    model = Trainee()
    tensors = pack(model.clip, model.head)
    with pytest.raises(WeightsError, match=r"clip\.\* or head\.\*"):
        unpack({**tensors, "other": torch.zeros(1)})
    with pytest.raises(WeightsError, match="token rows"):
        unpack({**tensors, "clip.token_embedding.weight": torch.zeros(3, 128)})


def test_the_command_writes_weights_that_load_and_their_measured_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "small.safetensors"
    stages = [f"--{stage}-steps=1" for stage in ("contrastive", "preference", "arrangement")]
    monkeypatch.setattr(
        "sys.argv", ["train_clip", "--output", str(output), *stages, "--pool=8", "--evaluation-pairs=24", "--seed=3"]
    )
    main()
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["training"]["config"]["seed"] == 3
    assert report["held_out"]["n"] == report["out_of_domain"]["n"] == 24
    assert str(report["held_out"]["accuracy"]) in capsys.readouterr().out
    model = ShapesClip.load(LoadOptions(weights=str(output)))
    (scored,) = model.run([model.prepare(model.canary())])
    assert isinstance(scored, Output)
