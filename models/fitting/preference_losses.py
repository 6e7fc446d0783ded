"""Further losses on preferences: ties, margins, soft labels, lists, and scores with an uncertainty. Pure functions.

Each returns the loss of every pair or list by itself, in nats; :func:`weighted_mean` makes one number of them. The
published training code of HPSv3, VideoAlign, PickScore and HPSv2 has mistakes that are not kept here: masks that
broadcast, a softmax of a softmax, an entropy left out, padding that counts, sums that grow with the batch. Their
fixtures are still reproduced, mistake by mistake, by ``benchmarks/parity/preference_losses.py`` out of these functions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TIE_FACTOR = 5.0
"""Rao-Kupper's theta in HPSv3 and VideoAlign: the odds below which a pair looks like a tie."""
CONSTANT_MARGIN = 0.57
"""Margin of HPSv3 and VideoAlign."""

_QUADRATURE_REACH, _QUADRATURE_NODES = 8.5, 513


def weighted_mean(loss: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum(weight * loss) / sum(weight), a scalar; ``weight`` has the shape of ``loss`` (None: all 1).

    A loss of weight 0 has no part in it, not even where it is not finite. Raises ValueError for another shape (it
    would broadcast), for a negative weight, and when nothing has a positive weight.
    """
    if weight is None:
        weight = torch.ones_like(loss)
    if weight.shape != loss.shape:
        raise ValueError(f"weights {tuple(weight.shape)} for losses {tuple(loss.shape)}")
    weight = weight.to(loss.dtype)
    if bool((weight < 0).any()) or not bool(weight.sum() > 0):
        raise ValueError("weights are not negative, and at least one is positive")
    return (torch.where(weight > 0, loss, 0.0) * weight).sum() / weight.sum()


def margin_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, *, scale: float = 1.0) -> Tensor:
    """-log sigmoid(chosen - scale * rejected - margin), of the scores' shape.

    Margin 0 is Bradley and Terry; :data:`CONSTANT_MARGIN` and the difference of two ratings are HPSv3's and
    VideoAlign's margins. ``scale`` below 1 is HPSv3's remedy for "likelihood displacement". Raises ValueError for
    scores or margins of different shapes.
    """
    _same_shape(chosen, rejected)
    if isinstance(margin, Tensor):
        _same_shape(chosen, margin)
    loss: Tensor = -F.logsigmoid(chosen - scale * rejected - margin)
    return loss


def rao_kupper_loss(chosen: Tensor, rejected: Tensor, tied: Tensor, *, theta: float = TIE_FACTOR) -> Tensor:
    """Bradley-Terry with ties (Rao and Kupper 1967), of the scores' shape; ``tied`` (bool) marks pairs without winner.

    With d = chosen - rejected, P(chosen) = sigmoid(d - ln theta) and P(tie) = (theta^2 - 1) sigmoid(d - ln theta)
    sigmoid(-d - ln theta): the three outcomes sum to 1. Raises ValueError for shapes that differ and theta <= 1.
    """
    if not theta > 1:
        raise ValueError(f"theta is above 1, not {theta}")
    _same_shape(chosen, rejected)
    _same_shape(chosen, tied)
    difference, log_theta = chosen - rejected, math.log(theta)
    won = -F.logsigmoid(difference - log_theta)
    lost = -F.logsigmoid(-difference - log_theta)
    return torch.where(tied.bool(), won + lost - math.log(theta**2 - 1), won)


def decided(votes: Tensor, threshold: float) -> Tensor:
    """Which pairs the raters decided: |n_1 - n_2| / (n_1 + n_2) > ``threshold``, bool [...] of ``votes`` [..., 2].

    HPSv3's ``tied_threshold``. Pairs without votes are not decided.
    """
    return (votes[..., 0] - votes[..., 1]).abs() > threshold * votes.sum(-1)


def preference_kl_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(labels || softmax(logits)) over the last dimension: [...] of logits and labels [..., N].

    PickScore (Kirstain et al. 2023, arXiv:2305.01569, eq. 2) and HPSv2, with logits = exp(logit_scale) * cosine. Its
    minimum is 0 for every label: one-hot ones, ties, and raters who disagree. Raises ValueError for shapes that
    differ, and for labels that are not distributions (within 1e-4).
    """
    _same_shape(logits, labels)
    labels = labels.to(logits.dtype)
    if bool((labels < 0).any()) or bool(((labels.sum(-1) - 1).abs() > 1e-4).any()):
        raise ValueError("labels are probabilities that sum to 1")
    negative_entropy: Tensor = torch.special.xlogy(labels, labels)
    return (negative_entropy - labels * F.log_softmax(logits, dim=-1)).sum(-1)


def prompt_weights(examples_per_prompt: Tensor) -> Tensor:
    """1 / n for the examples of a prompt that has n of them, so that every prompt counts the same (PickScore)."""
    if bool((examples_per_prompt < 1).any()):
        raise ValueError("every example is one of its prompt")
    return examples_per_prompt.double().reciprocal()


def contrastive_kl_loss(
    text_BD: Tensor, first_BD: Tensor, second_BD: Tensor, labels_B2: Tensor, logit_scale: Tensor | float
) -> Tensor:
    """PickScore's loss with the batch's other images as negatives: [B].

    Half of it is KL from ``labels_B2`` to each prompt's softmax over all 2B images, half the cross-entropy of each
    image's softmax over the B prompts, weighted by the image's label. Features are normalised, prompts distinct.
    Raises ValueError as :func:`preference_kl_loss`.
    """
    images_CD = torch.cat([first_BD, second_BD])
    labels_BC = torch.cat([labels_B2[:, 0].diag(), labels_B2[:, 1].diag()], dim=1)
    to_image_B = preference_kl_loss(logit_scale * text_BD @ images_CD.T, labels_BC)
    to_text_CB = F.log_softmax(logit_scale * images_CD @ text_BD.T, dim=1)
    own_B2 = torch.stack([half.diag() for half in to_text_CB.chunk(2)], dim=1)
    return (to_image_B - (labels_B2 * own_B2).sum(1)) / 2


def best_of_list_loss(scores_BN: Tensor, best_B: Tensor, valid_BN: Tensor | None = None) -> Tensor:
    """-log softmax(scores)[best]: [B], the first choice of Plackett (1975) and Luce (1959) among up to N candidates.

    ``valid_BN`` is False for padding. Raises ValueError when a best candidate is padding.
    """
    if valid_BN is not None:
        if not bool(valid_BN.gather(1, best_B[:, None]).all()):
            raise ValueError("the best candidate of a list is not one of it")
        scores_BN = scores_BN.masked_fill(~valid_BN, -torch.inf)
    return F.cross_entropy(scores_BN, best_B, reduction="none")


def ranking_hinge_loss(
    scores_BN: Tensor, ranks_BN: Tensor, valid_BN: Tensor | None = None, *, margin: float = 1.0
) -> tuple[Tensor, Tensor]:
    """max(0, margin - (s_i - s_j)(rank_j - rank_i)) of every pair i > j of a list: ([B, P], which count bool [B, P]).

    HPSv2's ranking loss, P = N(N - 1) / 2; a lower rank is better. Padding does not count, nor do equal ranks: they
    hold no preference, and their loss would be the margin whatever the scores. Raises ValueError for shapes that
    differ.
    """
    _same_shape(scores_BN, ranks_BN)
    i, j = torch.tril_indices(scores_BN.shape[1], scores_BN.shape[1], -1)
    difference_BP = scores_BN[:, i] - scores_BN[:, j]
    ahead_BP = (ranks_BN[:, j] - ranks_BN[:, i]).to(scores_BN.dtype)
    counts_BP = ahead_BP != 0
    if valid_BN is not None:
        _same_shape(scores_BN, valid_BN)
        counts_BP = counts_BP & valid_BN[:, i] & valid_BN[:, j]
    return (margin - difference_BP * ahead_BP).clamp(min=0), counts_BP


def uncertainty_loss(
    chosen_B2: Tensor, rejected_B2: Tensor, *, bound: bool = False, noise_BS: Tensor | None = None
) -> Tensor:
    """Bradley-Terry of scores that are Gaussian: [B] (HPSv3, arXiv:2508.03789).

    The columns of ``chosen_B2`` and ``rejected_B2`` are mean and log standard deviation. With z ~ N(mu_c - mu_r,
    sigma_c^2 + sigma_r^2) the loss is -log E[sigmoid(z)]: the probability of the label is the expected one. With
    ``bound`` it is E[-log sigmoid(z)], which HPSv3's code minimises: by Jensen's inequality never below the other, and
    it charges uncertainty even where the label is right. The expectation is a trapezoidal sum over 513 points: in
    float64 within 1e-8 (relative) of the integral up to a standard deviation of 30. ``noise_BS`` (standard normal)
    takes samples in its place, as that code does.
    Raises ValueError for shapes that differ.
    """
    _same_shape(chosen_B2, rejected_B2)
    if chosen_B2.ndim != 2 or chosen_B2.shape[1] != 2:
        raise ValueError(f"scores are [B, 2], mean and log standard deviation, not {tuple(chosen_B2.shape)}")
    mean_B = chosen_B2[:, 0] - rejected_B2[:, 0]
    # hypot by logarithms: sigma^2 overflows where sigma does not.
    std_B = torch.exp(torch.logaddexp(2 * chosen_B2[:, 1], 2 * rejected_B2[:, 1]) / 2)
    if noise_BS is None:
        node_S, log_weight_S = _standard_normal(chosen_B2)
    else:
        node_S = noise_BS.to(chosen_B2.dtype)
        log_weight_S = torch.full_like(node_S[0], -math.log(node_S.shape[1]))
    log_sigmoid_BS = F.logsigmoid(mean_B[:, None] + std_B[:, None] * node_S)
    if bound:
        return -(log_sigmoid_BS * log_weight_S.exp()).sum(1)
    return -torch.logsumexp(log_sigmoid_BS + log_weight_S, dim=1)


def _standard_normal(like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes [S] and log weights [S] of the trapezoidal rule, which converges exponentially for analytic functions."""
    nodes = torch.linspace(-_QUADRATURE_REACH, _QUADRATURE_REACH, _QUADRATURE_NODES, dtype=torch.float64)
    log_weights = torch.log_softmax(-nodes.square() / 2, dim=0)
    return nodes.to(like), log_weights.to(like)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
