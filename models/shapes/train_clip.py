"""Train shapes-clip from nothing: ``python -m models.shapes.train_clip`` writes its weights and its measured accuracy.

Stage 1, contrastive: rendered scenes against captions, where the truth decides which (caption, picture) pairs are
positive, so that a caption may have several right pictures in a batch (soft targets in CLIP's loss, Radford et al.
2021, figure 3). Stage 2: the Bradley-Terry loss on the head's scores over all pairs of pictures of a prompt. In
both, linear probes of the picture's features and patches predict what is in the 3x3 cells; they teach the vision
tower what a shape is within minutes on one CPU core, and are thrown away.

Everything random comes from the seed, and the number of steps is fixed: the same machine and versions give the same
weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from models.backbones.clip import tokenize
from models.fitting.losses import all_pairs_bradley_terry_loss
from models.preprocessing import clip_preprocess, normalize
from models.shapes.clip_model import IMAGE_SIZE, WEIGHTS, PreferenceHead, clip_config, compact_index, pack, unpack
from models.shapes.evaluation import accuracy_report
from models.shapes.preferences import Batch, Picture, training_batch
from models.shapes.prompts import Prompt
from models.shapes.world import COLORS, GRID, SHAPES

_PATCHES = 8
_SHAPE_INDEX = {name: i for i, name in enumerate(SHAPES, start=1)}
_COLOR_INDEX = {name: i for i, name in enumerate(COLORS, start=1)}


@dataclass(frozen=True)
class TrainConfig:
    """What the weights depend on, apart from the code."""

    seed: int = 20
    contrastive_steps: int = 800
    preference_steps: int = 1900
    prompts: int = 12
    per_prompt: int = 6
    muon_learning_rate: float = 0.006
    learning_rate: float = 0.001
    weight_decay: float = 0.02
    unknown_token_rate: float = 0.01
    evaluation_seed: int = 1_000_003
    evaluation_pairs: int = 4000


def to_pixels(images: Sequence[object]) -> Tensor:
    """Exact preprocessing, as the service does it: float32 [B, 3, 64, 64], normalised."""
    return normalize(torch.stack([clip_preprocess(image, IMAGE_SIZE) for image in images]))  # type: ignore[arg-type]


def to_tokens(prompts: Sequence[Prompt], rng: np.random.Generator | None = None, unknown_rate: float = 0.0) -> Tensor:
    """Rows of the compact embedding table, int64 [G, L]; padding is cut to the longest. With ``rng`` some words are
    replaced by the row that stands for every unknown token."""
    rows = [compact_index()[tokenize(prompt.text)[0]] for prompt in prompts]
    end = int(compact_index().max())
    length = max(int(row.argmax()) for row in rows) + 1
    tokens = torch.full((len(rows), length), int(compact_index()[0]), dtype=torch.int64)
    for i, row in enumerate(rows):
        count = min(length, len(row))
        tokens[i, :count] = row[:count]
    if rng is not None and unknown_rate > 0:
        drop = torch.from_numpy(rng.random(tokens.shape) < unknown_rate)
        drop[:, 0] = False
        tokens = torch.where(drop & (tokens != end), 0, tokens)
    return tokens


class Trainee(nn.Module):
    """CLIP with the compact vocabulary, the head, and the probes that exist during training only."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = CLIP(**clip_config(compact=True))
        self.clip.visual.output_tokens = True
        width = 128
        self.head = PreferenceHead()
        self.cell_probe = nn.Linear(self.clip.text_projection.shape[1], GRID * GRID * (len(SHAPES) + len(COLORS) + 2))
        self.patch_probe = nn.Linear(width, len(SHAPES) + len(COLORS) + 2)

    def encode_image(self, pixels_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and patch tokens [B, T, W]."""
        features, tokens = self.clip.visual(pixels_B3SS)
        return features, tokens

    def encode_text(self, tokens_GL: Tensor) -> Tensor:
        """Features [G, D]; works on any length since attention is causal."""
        clip, length = self.clip, tokens_GL.shape[1]
        hidden = clip.token_embedding(tokens_GL) + clip.positional_embedding[:length]
        hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))
        pooled: Tensor = hidden[torch.arange(len(hidden)), tokens_GL.argmax(dim=-1)] @ clip.text_projection
        return pooled


def cell_labels(pictures: Sequence[Picture]) -> Tensor:
    """int64 [B, 2, 9]: shape and colour of each cell, 0 where it is empty."""
    labels = torch.zeros(len(pictures), 2, GRID, GRID, dtype=torch.int64)
    for i, picture in enumerate(pictures):
        for entry in picture.scene.objects:
            labels[i, 0][entry.cell] = _SHAPE_INDEX[entry.shape]
            labels[i, 1][entry.cell] = _COLOR_INDEX[entry.color]
    return labels.flatten(2)


def _patch_cells() -> Tensor:
    """The cell in which each patch's centre lies, int64 [64]."""
    cell = ((torch.arange(_PATCHES) + 0.5) / _PATCHES * GRID).long()
    return (cell[:, None] * GRID + cell[None, :]).flatten()


def probe_loss(model: Trainee, features_BD: Tensor, tokens_BTW: Tensor, labels_B2C: Tensor) -> Tensor:
    """Cross-entropy of the cells' shapes and colours, from the pooled feature and from each patch."""
    shapes = len(SHAPES) + 1
    cells = model.cell_probe(F.normalize(features_BD, dim=-1) * features_BD.shape[-1] ** 0.5)
    cells = cells.view(len(features_BD), GRID * GRID, -1)
    patches = model.patch_probe(tokens_BTW[:, -_PATCHES * _PATCHES :])
    patch_labels = labels_B2C[:, :, _patch_cells()]
    loss = features_BD.new_zeros(())
    for logits, labels in ((cells, labels_B2C), (patches, patch_labels)):
        loss = loss + F.cross_entropy(logits[..., :shapes].flatten(0, 1), labels[:, 0].flatten())
        loss = loss + F.cross_entropy(logits[..., shapes:].flatten(0, 1), labels[:, 1].flatten())
    return loss


def contrastive_loss(logits_GN: Tensor, positive_GN: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy with any number of positives a row: targets are uniform over them.

    Pictures that are right for no prompt serve as negatives only.
    """
    by_prompt = -(F.log_softmax(logits_GN, dim=1) * positive_GN).sum(1) / positive_GN.sum(1)
    right = positive_GN.sum(0) > 0
    columns = positive_GN[:, right]
    by_picture = -(F.log_softmax(logits_GN[:, right], dim=0) * columns).sum(0) / columns.sum(0)
    return (by_prompt.mean() + by_picture.mean()) / 2


def preference_labels(batch: Batch) -> tuple[Tensor, Tensor]:
    """(preference, weight) float32 [G, N, N] for every pair under every prompt.

    Content decides; where it is equal, less damage wins within a prompt's own group and equal damage is a tie. Pairs
    without a picture of the prompt's own group have weight 0; those with one outside count a quarter.
    """
    content = torch.from_numpy(batch.content_GN)
    damage = torch.from_numpy(batch.damage_N).float()
    groups, pictures = content.shape
    own = torch.arange(pictures)[None, :] // (pictures // groups) == torch.arange(groups)[:, None]
    difference = content[:, :, None] - content[:, None, :]
    equal = difference.abs() < 0.02
    cleaner = (damage[None, :] - damage[:, None]).sign()[None]
    preference = torch.where(equal, 0.5 + 0.5 * cleaner, (difference > 0).float())
    both = own[:, :, None] & own[:, None, :]
    one = own[:, :, None] ^ own[:, None, :]
    # Two pictures with the same content from different groups say little; two of a group teach what does not matter.
    weight = both.float() + 0.25 * (one & ~equal).float()
    weight = weight * torch.where(equal & (cleaner == 0), 0.3, 1.0)
    return preference, weight * ~torch.eye(pictures, dtype=torch.bool)


def _optimizers(model: Trainee, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformers, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = "resblocks" in name and parameter.ndim == 2
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)),
    ]


def _schedule(step: int, total: int) -> float:
    """Warm-up over 100 steps, constant, and linear to zero over the last 40 %."""
    return min(1.0, (step + 1) / 100, (total - step) / (0.4 * total))


@dataclass
class _Log:
    """Running means for the progress line."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values[name] = value if name not in self.values else 0.98 * self.values[name] + 0.02 * value

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.3f}" for name, value in self.values.items())


def train(config: TrainConfig, show: Callable[[int, int, str], None]) -> Trainee:
    """Both stages; ``show(step, total, text)`` reports progress after every step."""
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True)
    rng = np.random.default_rng(config.seed)
    model = Trainee().train()
    optimizers = _optimizers(model, config)
    base = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    total = config.contrastive_steps + config.preference_steps
    log = _Log()
    for step in range(total):
        for optimizer, rate in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = rate * _schedule(step, total)
        batch = training_batch(rng, config.prompts, config.per_prompt)
        loss = _loss(model, batch, rng, config, log, contrastive=step < config.contrastive_steps)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.clip.logit_scale.clamp_(0.0, np.log(100.0))
        show(step + 1, total, str(log))
    return model.eval()


def _loss(
    model: Trainee, batch: Batch, rng: np.random.Generator, config: TrainConfig, log: _Log, *, contrastive: bool
) -> Tensor:
    features, patches = model.encode_image(to_pixels(batch.images))
    text = model.encode_text(to_tokens(batch.prompts, rng, config.unknown_token_rate))
    probes = probe_loss(model, features, patches, cell_labels(batch.pictures))
    log.add("probes", probes.item())
    if contrastive:
        logits = model.clip.logit_scale.exp() * F.normalize(text, dim=-1) @ F.normalize(features, dim=-1).T
        loss = contrastive_loss(logits, torch.from_numpy(batch.content_GN >= 2.0).float())
        log.add("contrastive", loss.item())
        return loss + 0.5 * probes
    count = (len(text), len(features))
    scores = model.head(features[None].expand(*count, -1), text[:, None].expand(*count, -1))
    preference, weight = preference_labels(batch)
    loss = all_pairs_bradley_terry_loss(scores, preference, weight)
    log.add("bradley_terry", loss.item())
    with torch.no_grad():
        judged = (weight > 0) & (preference == 1)
        right = (scores[:, :, None] > scores[:, None, :])[judged].float().mean()
        log.add("pairs_right", right.item())
    return loss + 0.2 * probes


def rounded(model: Trainee) -> Trainee:
    """The model as it is stored: weights rounded to float16, computing in float32."""
    clip, head = unpack(pack(model.clip, model.head), compact=True)
    model.clip.load_state_dict(clip)
    model.head.load_state_dict(head)
    return model


@torch.inference_mode()
def score_pictures(model: Trainee, prompts: Sequence[Prompt], images: Sequence[object]) -> list[float]:
    """One score for each (prompt, image), in chunks of 100."""
    scores: list[float] = []
    for i in range(0, len(prompts), 100):
        features, _ = model.encode_image(to_pixels(images[i : i + 100]))
        scores += model.head(features, model.encode_text(to_tokens(prompts[i : i + 100]))).tolist()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="safetensors file; metrics go beside it as .json")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--threads", type=int, default=1, help="the weights depend on it in the last digits")
    parser.add_argument("--contrastive-steps", type=int, default=TrainConfig.contrastive_steps)
    parser.add_argument("--preference-steps", type=int, default=TrainConfig.preference_steps)
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
