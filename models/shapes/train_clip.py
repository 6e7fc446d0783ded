"""Train shapes-clip from nothing: ``python -m models.shapes.train_clip`` writes its weights and its measured accuracy.

Stage 1, contrastive: rendered scenes against captions, where the truth decides which (caption, picture) pairs are
positive, so that a caption may have several right pictures in a batch (soft targets in CLIP's loss, Radford et al.
2021, figure 3). Stage 2: the Bradley-Terry loss on the head's scores over all pairs of pictures of a prompt. In
both, linear probes of the picture's features and patches predict what is in the 3x3 cells; they teach the vision
tower what a shape is within minutes on one CPU core, and are thrown away. That far the model knows what is there, but
hardly how it is arranged (swapped colours, relations). Stage 3 therefore freezes the vision tower, encodes a pool of
pictures once, and trains the text tower and the final head for many cheap steps: Bradley-Terry over the pictures of a
prompt and over the prompts of a picture, with sibling prompts (other relation, swapped colours, another count ...) and
pictures whose only fault is their arrangement, and a linear probe of the prompt's feature for what the prompt says.

Stage 3 starts from what stage 2 would store (rounded to float16), with random streams of its own.

Every step of every stage is one of ``models/fitting/optimise.py``, as those of ``reward-service fit`` are; the batches,
and what is frozen, are this file's own.

Everything random comes from the seed, and the number of steps is fixed: the same machine and versions give the same
weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from models.fitting.losses import all_pairs_bradley_terry_loss
from models.fitting.optimise import Descent, descend, muon_and_adamw, trapezoid
from models.shapes.clip_losses import (
    SLOTS,
    cell_labels,
    contrastive_loss,
    preference_labels,
    probe_loss,
    prompt_labels,
    slot_labels,
    slot_loss,
)
from models.shapes.clip_model import EMBED_DIM, WEIGHTS, PreferenceHead, pack
from models.shapes.evaluation import accuracy_report
from models.shapes.preferences import Batch, training_batch
from models.shapes.prompts import Prompt
from models.shapes.trainee import Trainee, rounded, score_pictures, to_pixels, to_tokens


@dataclass(frozen=True)
class TrainConfig:
    """What the weights depend on, apart from the code."""

    seed: int = 20
    contrastive_steps: int = 800
    preference_steps: int = 1900
    arrangement_steps: int = 2500
    pool: int = 1200
    units: int = 8
    prompts: int = 12
    per_prompt: int = 6
    muon_learning_rate: float = 0.006
    learning_rate: float = 0.001
    weight_decay: float = 0.02
    unknown_token_rate: float = 0.01
    evaluation_seed: int = 1_000_003
    evaluation_pairs: int = 4000


@dataclass
class _Log:
    """Running means for the progress line."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values[name] = value if name not in self.values else 0.98 * self.values[name] + 0.02 * value

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.3f}" for name, value in self.values.items())


@dataclass(frozen=True)
class _Unit:
    """Four prompts (two pairs of siblings) with N pictures' features [N, D], and the labels in both directions."""

    prompts: list[Prompt]
    features_ND: Tensor
    between_pictures: tuple[Tensor, Tensor]
    between_prompts: tuple[Tensor, Tensor]


Show = Callable[[int, int, str], None]


def train(config: TrainConfig, show: Show) -> Trainee:
    """All stages; ``show(step, total, text)`` reports progress after every step."""
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True)
    return arrange(rounded(learn(Trainee(), config, show)), config, show)


def learn(model: Trainee, config: TrainConfig, show: Show) -> Trainee:
    """Stages 1 and 2."""
    rng = np.random.default_rng(config.seed)
    log = _Log()

    def loss(step: int) -> Tensor:
        batch = training_batch(rng, config.prompts, config.per_prompt)
        return _first_loss(model, batch, rng, config, log, contrastive=step < config.contrastive_steps)

    steps = config.contrastive_steps + config.preference_steps
    _optimize(model, loss, config, steps, lambda step: show(step, _total(config), str(log)))
    return model.eval()


@torch.no_grad()
def make_pool(model: Trainee, config: TrainConfig, rng: np.random.Generator, show: Show) -> list[_Unit]:
    """The data of stage 3: small batches of four prompts, their pictures encoded once by the vision tower."""
    units = []
    for i in range(config.pool):
        batch = training_batch(rng, 4, config.per_prompt, siblings=True)
        features, _ = model.encode_image(to_pixels(batch.images))
        units.append(_Unit(batch.prompts, features, preference_labels(batch), prompt_labels(batch)))
        show(config.contrastive_steps + config.preference_steps, _total(config), f"pool {i + 1}/{config.pool}")
    return units


def arrange(model: Trainee, config: TrainConfig, show: Show) -> Trainee:
    """Stage 3: the final head and the text tower, with the vision tower as it is."""
    torch.manual_seed(config.seed + 1)
    rng = np.random.default_rng((config.seed, 3))
    log = _Log()
    # Attention takes another path in evaluation mode, whose last digits differ.
    pool = make_pool(model.eval(), config, rng, show)
    model.clip.visual.requires_grad_(False)
    model.head = PreferenceHead()
    probe = nn.Linear(EMBED_DIM, sum(SLOTS))

    def loss(step: int) -> Tensor:
        chosen = [pool[i] for i in rng.choice(len(pool), config.units, replace=False)]
        prompts = [prompt for unit in chosen for prompt in unit.prompts]
        text = model.encode_text(to_tokens(prompts, rng, config.unknown_token_rate))
        slots = slot_loss(probe(F.normalize(text, dim=-1) * EMBED_DIM**0.5), slot_labels(prompts))
        parts = torch.split(text, 4)
        scores = [_all_scores(model, unit.features_ND, part) for unit, part in zip(chosen, parts, strict=True)]
        by_prompt = all_pairs_bradley_terry_loss(
            torch.cat(scores), *_joined([unit.between_pictures for unit in chosen])
        )
        by_picture = all_pairs_bradley_terry_loss(
            torch.cat([each.T for each in scores]), *_joined([unit.between_prompts for unit in chosen])
        )
        log.add("between_pictures", by_prompt.item())
        log.add("between_prompts", by_picture.item())
        log.add("slots", slots.item())
        return by_prompt + by_picture + 0.1 * slots

    before = config.contrastive_steps + config.preference_steps
    trained = nn.ModuleList([model, probe])
    _optimize(trained, loss, config, config.arrangement_steps, lambda s: show(before + s, _total(config), str(log)))
    return model.eval()


def _joined(labels: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([preference for preference, _ in labels]), torch.cat([weight for _, weight in labels])


def _total(config: TrainConfig) -> int:
    return config.contrastive_steps + config.preference_steps + config.arrangement_steps


def _optimize(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    config: TrainConfig,
    steps: int,
    report: Callable[[int], None],
) -> None:
    """``steps`` steps of fresh optimizers on the parameters that aren't frozen, by the core of ``reward-service fit``.

    Muon takes the matrices inside the transformers.
    """
    model.train()
    optimizers = muon_and_adamw(
        model,
        lambda name: "resblocks" in name,
        muon_learning_rate=config.muon_learning_rate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    # What froze since still has gradients, which would count in the clipped norm.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    schedule = partial(trapezoid, steps=steps, warm_up=min(100, 1 + steps // 10))
    descent = Descent(optimizers, trained, schedule)
    for _ in descend(descent, range(steps), lambda step: [loss_of(step)]):
        report(descent.done)


def _features(
    model: Trainee, batch: Batch, rng: np.random.Generator, config: TrainConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of pictures [N, D], their patches [N, T, W], and features of prompts [G, D]."""
    features, patches = model.encode_image(to_pixels(batch.images))
    return features, patches, model.encode_text(to_tokens(batch.prompts, rng, config.unknown_token_rate))


def _all_scores(model: Trainee, features_ND: Tensor, text_GD: Tensor) -> Tensor:
    """Scores [G, N] of every picture under every prompt."""
    count = (len(text_GD), len(features_ND))
    scores: Tensor = model.head(features_ND[None].expand(*count, -1), text_GD[:, None].expand(*count, -1))
    return scores


def _first_loss(
    model: Trainee, batch: Batch, rng: np.random.Generator, config: TrainConfig, log: _Log, *, contrastive: bool
) -> Tensor:
    """The loss of stage 1 (contrastive) or 2."""
    features, patches, text = _features(model, batch, rng, config)
    probes = probe_loss(model, features, patches, cell_labels(batch.pictures))
    log.add("probes", probes.item())
    if contrastive:
        scale = model.clip.logit_scale.clamp(max=np.log(100.0)).exp()
        logits = scale * F.normalize(text, dim=-1) @ F.normalize(features, dim=-1).T
        loss = contrastive_loss(logits, torch.from_numpy(batch.content_GN >= 2.0).float())
        log.add("contrastive", loss.item())
        return loss + 0.5 * probes
    scores = _all_scores(model, features, text)
    preference, weight = preference_labels(batch)
    loss = all_pairs_bradley_terry_loss(scores, preference, weight)
    log.add("bradley_terry", loss.item())
    log.add("pairs_right", _share_right(scores, preference, weight))
    return loss + 0.2 * probes


@torch.no_grad()
def _share_right(scores_GN: Tensor, preference_GNN: Tensor, weight_GNN: Tensor) -> float:
    judged = (weight_GNN > 0) & (preference_GNN == 1)
    return (scores_GN[:, :, None] > scores_GN[:, None, :])[judged].float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="safetensors file; metrics go beside it as .json")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--threads", type=int, default=1, help="the weights depend on it in the last digits")
    parser.add_argument("--contrastive-steps", type=int, default=TrainConfig.contrastive_steps)
    parser.add_argument("--preference-steps", type=int, default=TrainConfig.preference_steps)
    parser.add_argument("--arrangement-steps", type=int, default=TrainConfig.arrangement_steps)
    parser.add_argument("--pool", type=int, default=TrainConfig.pool, help="small batches that stage 3 learns from")
    parser.add_argument("--evaluation-pairs", type=int, default=TrainConfig.evaluation_pairs)
    arguments = vars(parser.parse_args())
    output: Path = arguments.pop("output")
    threads: int = arguments.pop("threads")
    torch.set_num_threads(threads)
    config = TrainConfig(**arguments)
    started = time.monotonic()
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("training")

        def show(step: int, total: int, text: str) -> None:
            progress.update(task, completed=step, total=total, description=text)
            if not console.is_terminal and step % 100 == 0:
                progress.console.print(f"{step}/{total}  {time.monotonic() - started:.0f} s  {text}")

        model = rounded(train(config, show))
    seconds = time.monotonic() - started
    report = accuracy_report(
        lambda prompts, images: score_pictures(model, prompts, images), config.evaluation_seed, config.evaluation_pairs
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(pack(model.clip, model.head), output, metadata={"license": "project", "format": "pt"})
    record = {"config": asdict(config), "threads": threads, "torch": torch.__version__, "seconds": round(seconds)}
    output.with_suffix(".json").write_text(json.dumps({**report, "training": record}, indent=1) + "\n")
    console.print_json(data=report)
    console.print(f"{output} {output.stat().st_size / 1e6:.2f} MB after {seconds:.0f} s")


if __name__ == "__main__":
    main()
