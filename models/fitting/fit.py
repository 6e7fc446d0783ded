"""Fit a reward model to preferences: its head, low-rank adapters of its layers, or all of it.

Pairs of one prompt are never on both sides of the split. What is saved is the best epoch by held-out accuracy, in the
model's own checkpoint form; the accuracy afterwards is that of the checkpoint read back, not of the network in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import LoadOptions, SampleError
from models.fitting.fittable import Fittable
from models.fitting.pair_scores import Agreement, PreparedPair, Scorer, agreement, temperature
from models.fitting.preference_data import PreferenceRow, UnreadableRow, open_picture
from models.fitting.preference_losses import preference_kl_loss, uncertainty_loss, weighted_mean
from models.registry import load_model
from models.towers import HeadOutput, TowerInput, TowerReward

What: TypeAlias = Literal["head", "lora", "all"]
Loss: TypeAlias = Literal["bt", "kl", "uncertainty"]
RECORD = "fit.json"


class FitProblem(ValueError):
    """What was asked for cannot be fitted; the message is one line for the person who asked."""


@dataclass(frozen=True)
class FitConfig:
    """``learning_rate`` rises over ``warm_up`` of the steps and falls to zero as a cosine.

    ``patience`` epochs without a better held-out accuracy end the fit. Raises FitProblem for values out of range.
    """

    train: What = "head"
    loss: Loss = "bt"
    epochs: int = 5
    batch: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warm_up: float = 0.05
    max_grad_norm: float = 1.0
    held_out: float = 0.2
    patience: int = 3
    lora_rank: int = 8
    lora_alpha: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.epochs, self.batch, self.patience, self.lora_rank, self.lora_alpha)
        if min(counts) < 1 or not self.learning_rate > 0 or not 0 < self.held_out < 1 or not 0 <= self.warm_up < 1:
            raise FitProblem("counts are at least 1, the learning rate is positive, shares are between 0 and 1")


@dataclass(frozen=True)
class FitResult:
    """Held-out agreement before and after; ``temperature`` calibrates P = sigmoid(difference / temperature), None where
    the held-out pairs leave it open: all of them right, or none."""

    before: Agreement
    after: Agreement
    temperature: float | None
    best_epoch: int
    trained_parameters: int
    skipped: int
    options: LoadOptions


Report = Callable[[str], None]


def fit(
    name: str,
    options: LoadOptions,
    rows: Sequence[PreferenceRow],
    out: Path,
    config: FitConfig,
    *,
    validation: Sequence[PreferenceRow] = (),
    report: Report = lambda line: None,
    track: Callable[[Sequence[Any], str], Iterator[Any]] = lambda items, _: iter(items),
) -> FitResult:
    """Fit the model ``name`` to ``rows`` and write it to the new folder ``out``.

    ``validation`` is held out in place of a share of the rows. Raises :class:`FitProblem` for a model that cannot be
    fitted so, fewer than two prompts, or nothing but ties; WeightsError as the model's loading does.
    """
    torch.manual_seed(config.seed)
    model, fittable = _load(name, options)
    if config.loss == "uncertainty" and "uncertainty" not in model.info.outputs:
        raise FitProblem(f"the uncertainty loss wants a model with an uncertainty (hpsv3); {name} has none")
    pairs, skipped = prepare(model, rows, track)
    held, taught = (prepare(model, validation, track)[0], pairs) if validation else split(pairs, config)
    if shared := {pair.prompt for pair in held} & {pair.prompt for pair in taught}:
        raise FitProblem(f"{len(shared)} prompts are in the data and in the validation file, such as {min(shared)!r}")
    _check(taught, held)
    scorer = _scorer(model, fittable, config)
    before = agreement(scorer, held, config.batch)
    report(f"before: {before.accuracy:.4f} [{before.low:.4f}, {before.high:.4f}] of {before.pairs} held-out pairs")
    trained, merge = _trainable(fittable, config)
    best_epoch = _train(scorer, trained, taught, held, config, report, track)
    merge()
    out.mkdir(parents=True, exist_ok=True)
    saved = fittable.save(out)
    again_options = {**options.options, **saved.options}
    saved = LoadOptions(options.device, torch.float32, saved.weights, again_options, options.weights_dir)
    again, as_saved = _load(name, saved)
    reloaded = _scorer(again, as_saved, config)
    after = agreement(reloaded, held, config.batch)
    count = sum(parameter.numel() for parameter in trained)
    result = FitResult(before, after, temperature(reloaded, held, config.batch), best_epoch, count, skipped, saved)
    _write_record(out / RECORD, name, model.weights_hash, again.weights_hash, config, result, len(taught))
    return result


def _load(name: str, options: LoadOptions) -> tuple[TowerReward, Fittable]:
    model = load_model(name, options)
    if not isinstance(model, TowerReward) or model.dtype != torch.float32:
        raise FitProblem(f"{name} is no reward model on towers: it has nothing that can be fitted here")
    try:
        return model, model.fittable()
    except NotImplementedError as error:
        raise FitProblem(f"{name} cannot be fitted") from error


def _scorer(model: TowerReward, fittable: Fittable, config: FitConfig) -> Scorer:
    return Scorer(model, keep_features=fittable.reads_features and config.train == "head")


def prepare(
    model: TowerReward, rows: Sequence[PreferenceRow], track: Callable[[Sequence[Any], str], Iterator[Any]]
) -> tuple[list[PreparedPair], int]:
    """All pairs of the rows as the towers take them, and how many rows had something that the model refuses."""
    pairs: list[PreparedPair] = []
    skipped = 0

    def inputs(row: PreferenceRow) -> list[TowerInput] | None:
        try:
            tokens, warnings = model.prepare_text(row.prompt)
            images = [model.prepare_image(open_picture(picture)) for picture in row.images]
            return [TowerInput(pixels, tokens, _digest(pixels), row.prompt, warnings) for pixels in images]
        except (SampleError, UnreadableRow):
            return None

    with ThreadPoolExecutor(4) as pool:
        for row, made in track(list(zip(rows, pool.map(inputs, rows), strict=True)), "images"):
            if made is None:
                skipped += 1
                continue
            pairs += [
                PreparedPair(made[pair.first], made[pair.second], pair.label, row.weight, row.prompt)
                for pair in row.pairs
            ]
    return pairs, skipped


def _digest(pixels: Tensor) -> str:
    """Features are kept by this: rows of two files may have the same key, and a picture may be in many rows."""
    shape = f"{pixels.dtype}{tuple(pixels.shape)}".encode()
    return hashlib.blake2b(shape + pixels.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def split(pairs: Sequence[PreparedPair], config: FitConfig) -> tuple[list[PreparedPair], list[PreparedPair]]:
    """(held out, taught): a share of the prompts with all their pairs, drawn by the seed."""
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < 2:
        raise FitProblem("pairs of at least two prompts are needed: one to learn from and one to be held out")
    order = np.random.default_rng((config.seed, 1)).permutation(len(prompts))
    count = min(len(prompts) - 1, max(1, round(config.held_out * len(prompts))))
    held = {prompts[i] for i in order[:count]}
    return [pair for pair in pairs if pair.prompt in held], [pair for pair in pairs if pair.prompt not in held]


def _check(taught: Sequence[PreparedPair], held: Sequence[PreparedPair]) -> None:
    for what, pairs in (("learn from", taught), ("hold out", held)):
        if not any(pair.label != 0.5 for pair in pairs):
            raise FitProblem(f"there is no decided pair to {what}")


def pair_loss(both: HeadOutput, labels_B: Tensor, weights_B: Tensor, loss: Loss) -> Tensor:
    """Of 2B scores, those of the first images before those of the second; a scalar.

    ``bt``: Bradley-Terry; ``kl``: KL of the label from the softmax of both, the same but for ties and shares, whose
    minimum is 0; ``uncertainty``: HPSv3's, on decided pairs.
    """
    first, second = both.score_B.chunk(2)
    if loss == "bt":
        target = labels_B.to(first.dtype)
        each = F.binary_cross_entropy_with_logits(first - second, target, reduction="none")
        return weighted_mean(each, weights_B)
    if loss == "kl":
        each = preference_kl_loss(torch.stack([first, second], dim=-1), torch.stack([labels_B, 1 - labels_B], dim=-1))
        return weighted_mean(each, weights_B)
    gaussian = torch.stack([both.score_B, both.outputs["uncertainty"].clamp(min=1e-6).log()], dim=-1)
    one, other = gaussian.chunk(2)
    better = labels_B > 0.5
    chosen, rejected = torch.where(better[:, None], one, other), torch.where(better[:, None], other, one)
    return weighted_mean(uncertainty_loss(chosen, rejected), weights_B * (labels_B != 0.5))


def _trainable(fittable: Fittable, config: FitConfig) -> tuple[list[nn.Parameter], Callable[[], None]]:
    """The parameters that are trained, and what to call when they are: adapters become plain weights."""
    module = fittable.module
    module.requires_grad_(False)

    def nothing() -> None:
        return None

    if config.train == "lora":
        return _with_adapters(module, fittable, config)
    chosen = [
        parameter
        for name, parameter in module.named_parameters()
        if not name.startswith(fittable.frozen or ("\0",)) and (config.train == "all" or name.startswith(fittable.head))
    ]
    if not chosen:
        raise FitProblem("the model has no such parameters")
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen, nothing


def _with_adapters(
    module: nn.Module, fittable: Fittable, config: FitConfig
) -> tuple[list[nn.Parameter], Callable[[], None]]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise FitProblem("LoRA needs peft: pip install 'reward-service[fit]'") from error
    targets = [
        name
        for name, layer in module.named_modules()
        # torch's own attention reads the weight of its output layer, not the layer.
        if isinstance(layer, nn.Linear)
        and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and not name.startswith(fittable.head)
    ]
    if not targets:
        raise FitProblem("the model has no linear layers beside its head to adapt")
    adapters = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
    wrapped: Any = get_peft_model(module, adapters)
    for name, parameter in module.named_parameters():
        if name.startswith(fittable.head):
            parameter.requires_grad_(True)
    return [p for p in module.parameters() if p.requires_grad], lambda: wrapped.merge_and_unload()


def _train(
    scorer: Scorer,
    trained: list[nn.Parameter],
    taught: Sequence[PreparedPair],
    held: Sequence[PreparedPair],
    config: FitConfig,
    report: Report,
    track: Callable[[Sequence[Any], str], Iterator[Any]],
) -> int:
    """Train; the parameters end as they were after the best epoch, whose number (0: before the first) is returned."""
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    rng = np.random.default_rng((config.seed, 2))
    steps = math.ceil(len(taught) / config.batch) * config.epochs
    best, best_epoch = agreement(scorer, held, config.batch).accuracy, 0
    kept = [parameter.detach().clone() for parameter in trained]
    done = 0
    for epoch in range(1, config.epochs + 1):
        order = rng.permutation(len(taught)).tolist()
        total = 0.0
        for start in track(range(0, len(order), config.batch), f"epoch {epoch}"):
            batch = [taught[i] for i in order[start : start + config.batch]]
            optimizer.param_groups[0]["lr"] = config.learning_rate * _schedule(done, steps, config.warm_up)
            loss = _batch_loss(scorer, batch, config)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            total, done = total + loss.item() * len(batch), done + 1
        found = agreement(scorer, held, config.batch).accuracy
        report(f"epoch {epoch}: loss {total / len(taught):.4f}, held-out accuracy {found:.4f}")
        if found > best:
            best, best_epoch = found, epoch
            kept = [parameter.detach().clone() for parameter in trained]
        elif epoch - best_epoch >= config.patience:
            break
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return best_epoch


def _batch_loss(scorer: Scorer, batch: Sequence[PreparedPair], config: FitConfig) -> Tensor:
    both = scorer([*(pair.first for pair in batch), *(pair.second for pair in batch)])
    labels = torch.tensor([pair.label for pair in batch], device=both.score_B.device)
    weights = torch.tensor([pair.weight for pair in batch], device=both.score_B.device)
    if config.loss == "uncertainty" and not bool((labels != 0.5).any()):
        return both.score_B.sum() * 0.0
    return pair_loss(both, labels, weights, config.loss)


def _schedule(step: int, steps: int, warm_up: float) -> float:
    rise = max(1.0, warm_up * steps)
    return min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _write_record(
    file: Path, name: str, source: str, fitted: str, config: FitConfig, result: FitResult, pairs: int
) -> None:
    record = {
        "model": name,
        "weights": {"source": source, "fitted": fitted},
        "settings": {"weights": result.options.weights, "options": dict(result.options.options)},
        "configuration": asdict(config),
        "pairs": pairs,
        "held_out": {"before": asdict(result.before), "after": asdict(result.after)},
        "temperature": result.temperature,
        "best_epoch": result.best_epoch,
        "trained_parameters": result.trained_parameters,
        "skipped_rows": result.skipped,
    }
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
