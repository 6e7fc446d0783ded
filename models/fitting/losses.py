"""Losses for fitting a reward model to preferences: pure functions of scores.

Bradley and Terry (1952): P(i preferred to j) = sigmoid(s_i - s_j). The loss is the cross-entropy to the labels,
-[p log P + (1 - p) log(1 - P)], where p is 1 for "i is better", 0 for "j is better", 0.5 for a tie, or anything between
when raters disagree (Ouyang et al. 2022, eq. 1, is the case p = 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth_preference(preference: Tensor, label_smoothing: float) -> Tensor:
    """Pull labels towards a tie: p (1 - e) + e / 2. Raises ValueError for a smoothing outside [0, 1)."""
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is in [0, 1), not {label_smoothing}")
    return preference * (1.0 - label_smoothing) + 0.5 * label_smoothing


def bradley_terry_loss(
    score_i: Tensor, score_j: Tensor, preference: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """Mean Bradley-Terry loss of pairs, a scalar in nats.

    ``score_i`` and ``score_j`` have one shape [...]; ``preference`` has it too, in [0, 1]: the probability that i is
    better (None: i always is). Raises ValueError for shapes that differ and for no pairs at all.
    """
    if score_i.shape != score_j.shape:
        raise ValueError(f"scores of shapes {tuple(score_i.shape)} and {tuple(score_j.shape)} are not pairs")
    if score_i.numel() == 0:
        raise ValueError("the loss of no pairs is undefined")
    if preference is None:
        preference = torch.ones_like(score_i)
    if preference.shape != score_i.shape:
        raise ValueError(f"{tuple(preference.shape)} labels for {tuple(score_i.shape)} pairs")
    target = smooth_preference(preference.to(score_i.dtype), label_smoothing)
    return F.binary_cross_entropy_with_logits(score_i - score_j, target)


def all_pairs_bradley_terry_loss(
    scores_GN: Tensor, preference_GNN: Tensor, weight_GNN: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Weighted mean Bradley-Terry loss over the pairs of N candidates under each of G prompts, a scalar in nats.

    ``preference_GNN[g, i, j]`` is the probability that i is better than j, ``weight_GNN`` how much the pair counts
    (0 leaves it out, and its label may then be anything finite). Raises ValueError when shapes don't fit or all
    weights are zero.
    """
    groups, candidates = scores_GN.shape
    if not preference_GNN.shape == weight_GNN.shape == (groups, candidates, candidates):
        raise ValueError(
            f"labels {tuple(preference_GNN.shape)} and weights {tuple(weight_GNN.shape)} for {groups} groups of "
            f"{candidates} candidates"
        )
    total = weight_GNN.sum()
    if not bool(total > 0):
        raise ValueError("no pair has a positive weight")
    margin_GNN = scores_GN[:, :, None] - scores_GN[:, None, :]
    target_GNN = smooth_preference(preference_GNN.to(scores_GN.dtype), label_smoothing)
    loss_GNN = F.binary_cross_entropy_with_logits(margin_GNN, target_GNN, reduction="none")
    return (loss_GNN * weight_GNN).sum() / total
