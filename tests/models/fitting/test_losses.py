"""The Bradley-Terry losses equal their definition, written as naive loops, and so do their gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.fitting.losses import all_pairs_bradley_terry_loss, bradley_terry_loss, smooth_preference

SCORES = st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 1)), min_size=1, max_size=8)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive_pair(score_i: float, score_j: float, preference: float) -> float:
    """-[p log P + (1 - p) log(1 - P)], with the terms of weight zero left out."""
    loss = 0.0
    if preference > 0:
        loss -= preference * math.log(sigmoid(score_i - score_j))
    if preference < 1:
        loss -= (1 - preference) * math.log(sigmoid(score_j - score_i))
    return loss


def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(SCORES, st.sampled_from((0.0, 0.1, 0.3)))
def test_pairs_equal_the_naive_loop(rows: list[tuple[float, float, float]], smoothing: float) -> None:
    score_i, score_j, preference = (double(column) for column in zip(*rows, strict=True))
    smoothed = [(1 - smoothing) * p + smoothing / 2 for _, _, p in rows]
    naive = sum(naive_pair(i, j, p) for (i, j, _), p in zip(rows, smoothed, strict=True)) / len(rows)
    loss = bradley_terry_loss(score_i, score_j, preference, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(naive, rel=1e-9, abs=1e-9)


@given(st.floats(-300, 300), st.floats(-300, 300), st.floats(0, 1))
def test_swapping_the_two_and_their_label_changes_nothing(i: float, j: float, preference: float) -> None:
    forward = bradley_terry_loss(double([i]), double([j]), double([preference]))
    backward = bradley_terry_loss(double([j]), double([i]), double([1 - preference]))
    assert torch.isfinite(forward)
    assert forward.item() == pytest.approx(backward.item(), rel=1e-6, abs=1e-9)


def test_without_labels_the_first_is_the_better() -> None:
    loss = bradley_terry_loss(double([2.0, 0.5]), double([1.0, 0.5]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)


def test_a_tie_is_least_for_equal_scores() -> None:
    margins = torch.linspace(-2, 2, 9, dtype=torch.float64)
    losses = [bradley_terry_loss(m[None], double([0.0]), double([0.5])).item() for m in margins]
    assert min(range(9), key=losses.__getitem__) == 4
    assert losses[4] == pytest.approx(math.log(2))


def test_gradient_is_probability_minus_label() -> None:
    score_i = double([0.3, -1.0]).requires_grad_()
    score_j = double([1.1, 0.4]).requires_grad_()
    preference = double([1.0, 0.25])
    bradley_terry_loss(score_i, score_j, preference).backward()
    expected = (torch.sigmoid(score_i - score_j) - preference).detach() / 2
    assert torch.allclose(score_i.grad, expected)
    assert torch.allclose(score_j.grad, -expected)
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry_loss(a, b, preference), (score_i, score_j))


def random_groups(seed: int, groups: int = 3, candidates: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(groups, candidates, generator=generator, dtype=torch.float64)
    preference = torch.rand(groups, candidates, candidates, generator=generator, dtype=torch.float64)
    weight = torch.rand(groups, candidates, candidates, generator=generator, dtype=torch.float64)
    return scores, preference, weight * (weight > 0.4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_all_pairs_equal_the_naive_loop(seed: int, smoothing: float) -> None:
    scores, preference, weight = random_groups(seed)
    total, loss = 0.0, 0.0
    for g in range(3):
        for i in range(5):
            for j in range(5):
                label = (1 - smoothing) * preference[g, i, j].item() + smoothing / 2
                pair = naive_pair(scores[g, i].item(), scores[g, j].item(), label)
                loss += weight[g, i, j].item() * pair
                total += weight[g, i, j].item()
    found = all_pairs_bradley_terry_loss(scores, preference, weight, label_smoothing=smoothing)
    assert found.item() == pytest.approx(loss / total, rel=1e-9)


def test_all_pairs_gradient_and_left_out_pairs() -> None:
    scores, preference, weight = random_groups(9)
    weight[1] = 0
    scores.requires_grad_()
    all_pairs_bradley_terry_loss(scores, preference, weight).backward()
    assert torch.equal(scores.grad[1], torch.zeros(5, dtype=torch.float64))
    assert scores.grad[0].abs().min() > 0
    assert scores.grad.sum().item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.gradcheck(lambda s: all_pairs_bradley_terry_loss(s, preference, weight), (scores,))


def test_what_makes_no_sense_raises() -> None:
    with pytest.raises(ValueError, match="not pairs"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="no pairs"):
        bradley_terry_loss(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="labels"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), torch.ones(1))
    with pytest.raises(ValueError, match="label_smoothing"):
        smooth_preference(torch.ones(1), 1.0)
    scores, preference, weight = random_groups(1)
    with pytest.raises(ValueError, match="positive weight"):
        all_pairs_bradley_terry_loss(scores, preference, torch.zeros_like(weight))
    with pytest.raises(ValueError, match="groups of"):
        all_pairs_bradley_terry_loss(scores, preference[:2], weight)
