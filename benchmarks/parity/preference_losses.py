"""t8_preference_losses: losses on preferences and their gradients.

Where a reference makes a mistake, its number is made here out of our own functions and that mistake, which the note of
the topic names; the product has the correct form alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity.comparing import (
    FLOAT32,
    FLOAT64,
    Case,
    Comparisons,
    Tolerance,
    case_kind,
    register_folder,
)
from models.fitting.agreement import inversion_score, pair_accuracy, pairs_of_ranking
from models.fitting.losses import bradley_terry_loss
from models.fitting.preference_losses import (
    CONSTANT_MARGIN,
    best_of_list_loss,
    contrastive_kl_loss,
    decided,
    margin_loss,
    preference_kl_loss,
    prompt_weights,
    ranking_hinge_loss,
    rao_kupper_loss,
    uncertainty_loss,
    weighted_mean,
)
from models.parity import Topic, parity_kind

_TIED = 22
"""VideoAlign's label of a tie; it leaves those pairs out of its loss with ties."""
_MEAN_OF_ALL = "the reference divides by all pairs, also by those that it leaves out"

register_folder("t8_preference_losses")


def _tolerance(values: Tensor) -> Tolerance:
    return FLOAT64 if values.dtype == torch.float64 else FLOAT32


def _close(topic: str, case: Case, compare: Comparisons, loss: Tensor, note: str = "", **inputs: Tensor) -> None:
    """The loss, and its gradients by ``inputs``, given by the name of their gradient in the case."""
    close = _tolerance(case["loss"])
    compare.add(topic, loss, case["loss"], close, note)
    for (name, _), gradient in zip(inputs.items(), torch.autograd.grad(loss, [*inputs.values()]), strict=True):
        compare.add(f"{topic}, gradient", gradient, case[name], close, note)


@case_kind("hpsv3_loss")
def hpsv3_loss(case: Case, compare: Comparisons) -> None:
    chosen, rejected = (case[f"logits_{name}"].clone().requires_grad_() for name in ("chosen", "rejected"))
    kind, threshold, note = case.cfg["loss_type"], case.cfg["tied_threshold"], ""
    if kind == "bt":
        loss = bradley_terry_loss(chosen, rejected)
        if threshold is not None:
            # [B] against [B, 1]: every pair is weighted by the share of decided ones.
            loss = loss * decided(case["choice_dist"], threshold).to(loss.dtype).mean()
            note = "the reference's mask broadcasts"
    elif kind == "btt":
        loss, note = _hpsv3_ties(case, chosen, rejected)
    elif kind == "constant_margin":
        loss = weighted_mean(margin_loss(chosen, rejected, CONSTANT_MARGIN))
    elif kind == "likelihood_displacement":
        loss = weighted_mean(margin_loss(chosen, rejected, scale=case.cfg["loss_hyperparameters"]["tau"]))
    elif kind == "hpsv2":
        p = torch.sigmoid(chosen - rejected)
        loss, note = len(p) * bradley_terry_loss(p, 1 - p), "the reference's softmax of a softmax, and its sum"
    elif kind == "uncertainty":
        loss = weighted_mean(uncertainty_loss(chosen, rejected, bound=True, noise_BS=case["z_float16"]))
        note = "the reference's samples; here quadrature, and by default no bound"
    else:
        raise ValueError(f"an unknown loss of HPSv3: {kind}")
    topic = kind if threshold is None else f"{kind}, with a threshold of ties"
    _close(topic, case, compare, loss, note, grad_chosen=chosen, grad_rejected=rejected)


def _hpsv3_ties(case: Case, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, str]:
    no, yes = torch.zeros_like(chosen, dtype=torch.bool), torch.ones_like(chosen, dtype=torch.bool)
    won = rao_kupper_loss(chosen, rejected, no).mean()
    if case.cfg["tied_threshold"] is None:
        return won, ""
    share = decided(case["choice_dist"], case.cfg["tied_threshold"]).to(chosen.dtype).mean()
    return share * won + (1 - share) * rao_kupper_loss(chosen, rejected, yes).mean(), "the reference's mask broadcasts"


@case_kind("videoalign_loss")
def videoalign_loss(case: Case, compare: Comparisons) -> None:
    a, b = (case[f"logits_{name}"].clone().requires_grad_() for name in "AB")
    label, kind, note = case["chosen_label"], case.cfg["loss_type"], _MEAN_OF_ALL
    first, labelled = label == 1, label.abs() == 1
    chosen, rejected = torch.where(first, a, b), torch.where(first, b, a)
    ratings = case["scores_A"] - case["scores_B"]
    margin = torch.where(first, ratings, -ratings)
    counts = labelled
    if kind == "bt":
        losses = margin_loss(chosen, rejected)
    elif kind == "margin":
        losses = margin_loss(chosen, rejected, margin)
    elif kind == "constant_margin":
        losses = margin_loss(chosen, rejected, CONSTANT_MARGIN)
    elif kind == "scaled":
        losses, note = margin_loss(chosen, rejected) * margin, "the reference: also weights below 0"
    elif kind == "btt":
        # Everything that is not won by one of the two counts as a tie, except what is labelled as one.
        losses, counts = rao_kupper_loss(chosen, rejected, ~labelled), label != _TIED
        note = "the reference leaves ties out and takes pairs without a label for ties"
    elif kind == "reg":
        _regression(case, compare, a, b)
        return
    else:
        raise ValueError(f"an unknown loss of VideoAlign: {kind}")
    loss = weighted_mean(losses, counts.to(losses.dtype)) * counts.to(losses.dtype).mean()
    _close(kind, case, compare, loss, note, grad_A=a, grad_B=b)


def _regression(case: Case, compare: Comparisons, a: Tensor, b: Tensor) -> None:
    """Squared errors to the ratings around 3: PyTorch's own loss, and a rating of 0 is none."""
    ratings = torch.cat([case["scores_A"], case["scores_B"]])
    rated = ratings != 0
    errors = F.mse_loss(torch.cat([a, b]), ratings - 3, reduction="none")
    # The sum over A and B of means over all, rated or not.
    loss = weighted_mean(errors, rated.to(errors.dtype)) * rated.to(errors.dtype).mean()
    _close("reg", case, compare, loss, _MEAN_OF_ALL, grad_A=a, grad_B=b)


@case_kind("pickscore_loss")
def pickscore_loss(case: Case, compare: Comparisons) -> None:
    names = ("text", "image_0", "image_1")
    text, first, second = (case[f"{name}_features"].clone().requires_grad_() for name in names)
    scale = case["logit_scale"].clone().requires_grad_()
    labels = torch.stack([case["label_0"], case["label_1"]], dim=1)
    weight = prompt_weights(case["num_examples_per_prompt"]).to(text.dtype)
    in_batch = case.cfg["in_batch_negatives"]
    if in_batch:
        losses = contrastive_kl_loss(text, first, second, labels, scale)
    else:
        logits = scale * torch.stack([(text * first).sum(1), (text * second).sum(1)], dim=1)
        losses = preference_kl_loss(logits, labels)
    loss = weighted_mean(losses, weight)
    # A constant: entropies of soft labels that the reference takes off for exact ties alone.
    entropy = -torch.special.xlogy(labels, labels).sum(1)
    missing = torch.where(labels[:, 0] == labels[:, 1], 0.0, entropy)
    loss = loss + weighted_mean(missing / 2 if in_batch else missing, weight)
    gradients = {"grad_text": text, "grad_image_0": first, "grad_image_1": second, "grad_logit_scale": scale}
    topic = "with the batch as negatives" if in_batch else "pairs"
    _close(topic, case, compare, loss, "the reference keeps entropies of soft labels", **gradients)


@case_kind("hpsv2_hps_loss")
def hpsv2_hps_loss(case: Case, compare: Comparisons) -> None:
    logits = case["logits_per_text"].clone().requires_grad_()
    both = torch.stack([half.diag() for half in logits.chunk(2, dim=1)], dim=1)
    labels = torch.stack(case["labels"].chunk(2), dim=1)
    loss = preference_kl_loss(both, labels).sum()
    _close("pairs", case, compare, loss, "the reference sums over the batch", grad_logits=logits)


def _lists(case: Case, logits: Tensor, pad: float) -> tuple[Tensor, Tensor]:
    """Each prompt's own column of its images: scores [B, N] filled up with ``pad``, and which are images."""
    columns = [rows[:, i] for i, rows in enumerate(torch.split(logits, case["num_images"].tolist()))]
    scores = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=pad)
    return scores, torch.arange(scores.shape[1]) < case["num_images"][:, None]


@case_kind("hpsv2_preference_loss")
def hpsv2_preference_loss(case: Case, compare: Comparisons) -> None:
    logits = case["logits_per_image"].clone().requires_grad_()
    scores, valid = _lists(case, logits, 0.0)
    loss = weighted_mean(best_of_list_loss(scores, case["labels"], valid))
    _close("lists", case, compare, loss, grad_logits=logits)


@case_kind("hpsv2_ranking_loss")
def hpsv2_ranking_loss(case: Case, compare: Comparisons) -> None:
    logits, margin = case["logits_per_image"].clone().requires_grad_(), case.cfg["margin"]
    scores, _ = _lists(case, logits, -1.0)
    rows = torch.split(case["rank_labels"], case["num_images"].tolist())
    ranks = torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True, padding_value=10)
    losses, _ = ranking_hinge_loss(scores, ranks, margin=margin)  # padding and equal ranks as the reference has them
    groups, candidates = scores.shape
    # The diagonal adds the margin once for every candidate.
    loss = (losses.sum() + groups * candidates * margin) / (groups * candidates * (candidates + 1) / 2)
    note = "the reference counts diagonal, padding and equal ranks"
    _close("rankings", case, compare, loss, note, grad_logits=logits)


@case_kind("imagereward_loss")
def imagereward_loss(case: Case, compare: Comparisons) -> None:
    rewards = case["rewards_better_worse"].clone().requires_grad_()
    better, worse = rewards.unbind(1)
    compare.add("loss of each pair", margin_loss(better, worse), case["loss_list"], _tolerance(rewards))
    accuracy = sum(pair_accuracy(pair, (0, 1)) for pair in rewards.tolist()) / len(rewards)
    compare.add("accuracy", accuracy, case["accuracy"], FLOAT32)
    _close("pairs", case, compare, bradley_terry_loss(better, worse), grad_rewards=rewards)


@parity_kind("t8_preference_losses/imagereward_rank_to_pairs.json")
def rank_to_pairs(file: Path) -> Sequence[Topic]:
    """Pairs of rankings with ties."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        found = [list(pair) for pair in pairs_of_ranking(case["ranking"])]
        compare.require("pairs of a ranking", found == case["pairs_better_worse"])
    return compare.topics()


@parity_kind("t8_preference_losses/hpsv2_rank_metrics.json")
def rank_metrics(file: Path) -> Sequence[Topic]:
    """Inversions of rankings, and pair accuracy against rankings with ties."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        found = inversion_score(case["rank_pred"], case["rank_gt"])
        compare.add("inversions", found, case["inversion_score"], FLOAT64)
        accuracy = pair_accuracy(case["scores"], case["gt_rank_with_ties"])
        compare.add("pair accuracy", accuracy, case["pair_accuracy"], FLOAT64)
        compare.require("ranges", math.isfinite(found) and 0 <= accuracy <= 1)
    return compare.topics()
