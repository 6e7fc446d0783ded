"""Fit a reward model to preferences: its head, low-rank adapters of its layers, or all of it.

The prompts are in three parts: pairs to learn from, pairs that choose the epoch, and pairs that neither of both has
seen, which give the accuracy and the temperature. What is saved is the best epoch, in the model's own checkpoint form;
both numbers are those of the checkpoint read back, not of the network in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import LoadOptions
from models.fitting.config import FitConfig, FitProblem, Loss
from models.fitting.fittable import Fittable
from models.fitting.optimise import Descent, cosine, descend
from models.fitting.pair_scores import Agreement, PreparedPair, Scorer, agreement, temperature
from models.fitting.preference_data import PreferenceRow
from models.fitting.preference_losses import preference_kl_loss, uncertainty_loss, weighted_mean
from models.fitting.prepare import DataRead, Track, prepare, split, split_with
from models.fitting.trainable import steady_towers, trainable
from models.registry import load_model
from models.towers import HeadOutput, TowerReward

RECORD = "fit.json"


@dataclass(frozen=True)
class FitResult:
    """Agreement before and after, on pairs that neither taught nor chose the epoch, and ``choosing`` on those that did.

    ``temperature`` calibrates P = sigmoid(difference / temperature); None where the measured pairs leave it open: all
    of them right, or none. ``data`` and ``validation``: what was read of the rows.
    """

    before: Agreement
    after: Agreement
    choosing: Agreement
    temperature: float | None
    best_epoch: int
    trained_parameters: int
    taught_pairs: int
    data: DataRead
    validation: DataRead | None
    options: LoadOptions

    @property
    def skipped(self) -> int:
        """Rows that could not be read, or that the model refuses."""
        return self.data.skipped + (0 if self.validation is None else self.validation.skipped)


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
    track: Track = lambda items, _: iter(items),
) -> FitResult:
    """Fit the model ``name`` to ``rows`` and write it to the new folder ``out``.

    ``validation`` is held out in place of a share of the rows. Raises :class:`FitProblem` for a model that cannot be
    fitted so, too few prompts, or nothing but ties; WeightsError as the model's loading does.
    """
    torch.manual_seed(config.seed)
    model, fittable = _load(name, options)
    if config.loss == "uncertainty" and "uncertainty" not in model.info.outputs:
        raise FitProblem(f"the uncertainty loss wants a model with an uncertainty (hpsv3); {name} has none")
    if any(row.context is not None for row in (*rows, *validation)):
        report(f"{name} does not look at the context that rows have")
    data = prepare(model, rows, track)
    other = prepare(model, validation, track) if validation else None
    parts = split(data.pairs, config) if other is None else split_with(data.pairs, other.pairs, config)
    trained = trainable(fittable, config)
    steady = steady_towers(model, parts.taught[0].first)
    scorer = Scorer(model, steady)
    before = agreement(scorer, parts.measuring, config.batch)
    report(f"before: {before.accuracy:.4f} [{before.low:.4f}, {before.high:.4f}] of {before.pairs} held-out pairs")
    best_epoch = _train(scorer, trained.parameters, parts.taught, parts.choosing, config, report, track)
    trained.merge()
    out.mkdir(parents=True, exist_ok=True)
    saved = fittable.save(out)
    again_options = {**options.options, **saved.options}
    saved = LoadOptions(options.device, torch.float32, saved.weights, again_options, options.weights_dir)
    again, _ = _load(name, saved)
    reloaded = Scorer(again, steady)
    result = FitResult(
        before=before,
        after=agreement(reloaded, parts.measuring, config.batch),
        choosing=agreement(reloaded, parts.choosing, config.batch),
        temperature=temperature(reloaded, parts.measuring, config.batch),
        best_epoch=best_epoch,
        trained_parameters=sum(parameter.numel() for parameter in trained.parameters),
        taught_pairs=len(parts.taught),
        data=data.read,
        validation=None if other is None else other.read,
        options=saved,
    )
    _write_record(out / RECORD, name, model.weights_hash, again.weights_hash, config, result)
    return result


def _load(name: str, options: LoadOptions) -> tuple[TowerReward, Fittable]:
    model = load_model(name, options)
    if not isinstance(model, TowerReward) or model.dtype != torch.float32:
        raise FitProblem(f"{name} is no reward model on towers: it has nothing that can be fitted here")
    try:
        return model, model.fittable()
    except NotImplementedError as error:
        raise FitProblem(f"{name} cannot be fitted") from error


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


def _train(
    scorer: Scorer,
    trained: list[nn.Parameter],
    taught: Sequence[PreparedPair],
    choosing: Sequence[PreparedPair],
    config: FitConfig,
    report: Report,
    track: Track,
) -> int:
    """Train; the parameters end as they were after the best epoch, whose number (0: before the first) is returned."""
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    rng = np.random.default_rng((config.seed, 2))
    size = config.batch * config.accumulate
    steps = math.ceil(len(taught) / size) * config.epochs
    schedule = partial(cosine, steps=steps, warm_up=config.warm_up)
    descent = Descent([optimizer], trained, schedule, config.max_grad_norm)
    best, best_epoch = agreement(scorer, choosing, config.batch).accuracy, 0
    kept = [parameter.detach().clone() for parameter in trained]
    for epoch in range(1, config.epochs + 1):
        order = rng.permutation(len(taught)).tolist()
        batches = [[taught[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
        losses = list(descend(descent, track(batches, f"epoch {epoch}"), partial(batch_losses, scorer, config=config)))
        mean = sum(loss * len(batch) for loss, batch in zip(losses, batches, strict=True)) / len(taught)
        found = agreement(scorer, choosing, config.batch).accuracy
        report(f"epoch {epoch}: loss {mean:.4f}, accuracy {found:.4f} on the pairs that choose the epoch")
        if found > best:
            best, best_epoch = found, epoch
            kept = [parameter.detach().clone() for parameter in trained]
        elif epoch - best_epoch >= config.patience:
            break
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return best_epoch


def batch_losses(scorer: Scorer, batch: Sequence[PreparedPair], config: FitConfig) -> Iterator[Tensor]:
    """Losses of the batch's parts of ``config.batch`` pairs, by their shares of its weight: their sum is its loss."""
    weights = [_weight(pair, config.loss) for pair in batch]
    whole = sum(weights)
    for start in range(0, len(batch), config.batch):
        part, share = batch[start : start + config.batch], sum(weights[start : start + config.batch])
        if share > 0:
            yield _part_loss(scorer, part, config.loss) * (share / whole)


def _weight(pair: PreparedPair, loss: Loss) -> float:
    """What a pair counts in the loss: HPSv3's has none of ties."""
    return 0.0 if loss == "uncertainty" and pair.label == 0.5 else pair.weight


def _part_loss(scorer: Scorer, part: Sequence[PreparedPair], loss: Loss) -> Tensor:
    both = scorer([*(pair.first for pair in part), *(pair.second for pair in part)])
    labels = torch.tensor([pair.label for pair in part], device=both.score_B.device)
    weights = torch.tensor([pair.weight for pair in part], device=both.score_B.device)
    return pair_loss(both, labels, weights, loss)


def _write_record(file: Path, name: str, source: str, fitted: str, config: FitConfig, result: FitResult) -> None:
    record = {
        "model": name,
        "weights": {"source": source, "fitted": fitted},
        "settings": {"weights": result.options.weights, "options": dict(result.options.options)},
        "configuration": asdict(config),
        "data": asdict(result.data),
        "validation": None if result.validation is None else asdict(result.validation),
        "pairs": result.taught_pairs,
        "choosing": asdict(result.choosing),
        "held_out": {"before": asdict(result.before), "after": asdict(result.after)},
        "temperature": result.temperature,
        "best_epoch": result.best_epoch,
        "trained_parameters": result.trained_parameters,
        "skipped_rows": result.skipped,
    }
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
