"""Losses on preferences equal their definitions as naive loops, and are right where the published code is not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from models.fitting.losses import bradley_terry_loss
from models.fitting.preference_losses import (
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

FIXTURES = Path(__file__).parents[2] / "fixtures" / "rl" / "t8_preference_losses"
SCORES = st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=8)


def fixture(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as stored:
        return {key: torch.from_numpy(stored[key].copy()) for key in stored.files}


def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@given(SCORES, st.floats(-2, 2), st.floats(0.1, 1))
def test_margins_equal_the_naive_loop(rows: list[tuple[float, float]], margin: float, scale: float) -> None:
    chosen, rejected = (double(column) for column in zip(*rows, strict=True))
    naive = [-math.log(sigmoid(c - scale * r - margin)) for c, r in rows]
    assert margin_loss(chosen, rejected, margin, scale=scale).tolist() == pytest.approx(naive, rel=1e-9, abs=1e-9)
    own = torch.full_like(chosen, margin)
    assert torch.equal(margin_loss(chosen, rejected, own), margin_loss(chosen, rejected, margin))


def test_without_a_margin_it_is_bradley_terry() -> None:
    a, b = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert weighted_mean(margin_loss(a, b)).item() == pytest.approx(bradley_terry_loss(a, b).item())


@given(st.floats(-15, 15), st.floats(1.01, 20))
def test_win_loss_and_tie_of_rao_and_kupper_sum_to_one(difference: float, theta: float) -> None:
    a, b = double([difference]), double([0.0])
    no, yes = torch.tensor([False]), torch.tensor([True])
    won, lost = rao_kupper_loss(a, b, no, theta=theta), rao_kupper_loss(b, a, no, theta=theta)
    tied = rao_kupper_loss(a, b, yes, theta=theta)
    assert (torch.exp(-won) + torch.exp(-lost) + torch.exp(-tied)).item() == pytest.approx(1)
    # Their definition: the chosen one is theta times as strong.
    p, q = math.exp(difference), 1.0
    assert torch.exp(-won).item() == pytest.approx(p / (p + theta * q), rel=1e-6)
    assert torch.exp(-tied).item() == pytest.approx(
        (theta**2 - 1) * p * q / ((p + theta * q) * (q + theta * p)), rel=1e-6
    )


def test_hpsv3s_threshold_of_ties_is_of_each_pair_by_itself() -> None:
    """The reference's mask broadcasts to [B, B], which mixes the votes of one pair with the scores of another."""
    case = fixture("hpsv3_btt_tied_threshold")
    chosen, rejected, votes = case["logits_chosen"][:, 0], case["logits_rejected"][:, 0], case["choice_dist"]
    tied, naive = ~decided(votes, 0.4), []
    assert tied.tolist() == [abs(a - b) / (a + b) <= 0.4 for a, b in votes.tolist()]
    for c, r, (a, b) in zip(chosen.tolist(), rejected.tolist(), votes.tolist(), strict=True):
        loss = -math.log(sigmoid(c - r - math.log(5)))
        if abs(a - b) / (a + b) <= 0.4:
            loss -= math.log(sigmoid(r - c - math.log(5))) + math.log(24)
        naive.append(loss)
    assert 0 < tied.sum() < len(tied)
    assert rao_kupper_loss(chosen, rejected, tied).tolist() == pytest.approx(naive, rel=1e-5)
    assert abs(case["loss"].item() - sum(naive) / len(naive)) > 0.1


def test_pairs_that_are_left_out_do_not_lower_the_loss() -> None:
    """VideoAlign's reference averages their zeros in: the more ties, the smaller the step."""
    case = fixture("videoalign_bt")
    label = case["chosen_label"]
    first = label == 1
    chosen = torch.where(first, case["logits_A"], case["logits_B"])
    rejected = torch.where(first, case["logits_B"], case["logits_A"])
    rows = zip(chosen.flatten().tolist(), rejected.flatten().tolist(), label.flatten().tolist(), strict=True)
    naive = [-math.log(sigmoid(c - r)) for c, r, y in rows if abs(y) == 1]
    found = weighted_mean(margin_loss(chosen, rejected), (label.abs() == 1).float())
    assert found.item() == pytest.approx(sum(naive) / len(naive), rel=1e-5)
    assert found.item() == pytest.approx(case["loss"].item() * label.numel() / len(naive), rel=1e-5)
    assert len(naive) < label.numel()


def test_votes_that_are_none() -> None:
    assert decided(double([[0, 0], [3, 0], [2, 1]]), 0.4).tolist() == [False, True, False]


distributions = (
    st.lists(st.floats(0, 1), min_size=2, max_size=5)
    .filter(lambda row: sum(row) > 0.1)
    .map(lambda row: [value / sum(row) for value in row])
)


@given(distributions, st.data())
def test_kl_equals_the_naive_loop_and_is_least_at_the_label(label: list[float], data: st.DataObject) -> None:
    logits = data.draw(st.lists(st.floats(-20, 20), min_size=len(label), max_size=len(label)))
    total = math.log(sum(math.exp(x) for x in logits))
    naive = sum(y * (math.log(y) - (x - total)) for x, y in zip(logits, label, strict=True) if y > 1e-300)
    assert preference_kl_loss(double([logits]), double([label])).item() == pytest.approx(naive, abs=1e-9)
    assert naive > -1e-9
    at_label = preference_kl_loss(double([label]).clamp(min=1e-30).log(), double([label]))
    assert at_label.item() == pytest.approx(0, abs=1e-9)


def test_soft_labels_have_their_entropy_taken_off_too() -> None:
    """PickScore's reference does so for exact ties alone; its gradients are the same."""
    for y in (0.25, 0.5, 0.9):
        logits = double([[math.log(y), math.log(1 - y)]])
        assert preference_kl_loss(logits, double([[y, 1 - y]])).item() == pytest.approx(0, abs=1e-12)


def test_one_hot_labels_make_bradley_terry_of_kl() -> None:
    """And not of the softmax of a softmax, which HPSv3's "hpsv2" is."""
    case = fixture("hpsv3_hpsv2")
    logits = torch.cat([case["logits_chosen"], case["logits_rejected"]], dim=1)
    labels = torch.tensor([[1.0, 0.0]]).expand(len(logits), 2)
    found = weighted_mean(preference_kl_loss(logits, labels))
    assert found.item() == pytest.approx(bradley_terry_loss(logits[:, 0], logits[:, 1]).item(), rel=1e-6)
    assert abs(case["loss"].item() - len(logits) * found.item()) > 0.1


def test_every_prompt_counts_the_same() -> None:
    weight = prompt_weights(torch.tensor([2, 2, 1]))
    assert weighted_mean(double([1.0, 3.0, 10.0]), weight).item() == pytest.approx((2 + 10) / 2)
    with pytest.raises(ValueError, match="one of its prompt"):
        prompt_weights(torch.tensor([0]))


def test_the_batch_as_negatives_equals_the_naive_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    text, first, second = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64).unbind()
    labels, scale = double([[1, 0], [0, 1], [0.5, 0.5], [0.2, 0.8]]), 1.7
    images = [*first, *second]

    def cross(value: torch.Tensor, others: list[torch.Tensor]) -> float:
        return -(value.item() - math.log(sum(math.exp(other.item()) for other in others)))

    naive = []
    for i in range(4):
        to_images = [scale * text[i] @ image for image in images]
        loss = 0.0
        for k in (0, 1):
            y, own = labels[i, k].item(), i + 4 * k
            if y:
                loss += y * (math.log(y) + cross(to_images[own], to_images))
                loss += y * cross(to_images[own], [scale * images[own] @ t for t in text])
        naive.append(loss / 2)
    assert contrastive_kl_loss(text, first, second, labels, scale).tolist() == pytest.approx(naive)


def test_first_choices_of_lists() -> None:
    scores = double([[1.0, 2.0, 0.5], [0.3, -1.0, 9.0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    naive = [
        -math.log(math.exp(2.0) / (math.exp(1.0) + math.exp(2.0) + math.exp(0.5))),
        -math.log(math.exp(0.3) / (math.exp(0.3) + math.exp(-1.0))),
    ]
    assert best_of_list_loss(scores, torch.tensor([1, 0]), valid).tolist() == pytest.approx(naive)
    with pytest.raises(ValueError, match="not one of it"):
        best_of_list_loss(scores, torch.tensor([1, 2]), valid)


def test_rankings_count_real_pairs_alone() -> None:
    """HPSv2's reference counts the diagonal, padding and equal ranks: constants, and gradients towards padding."""
    scores = double([[0.4, -0.2, 1.0, 7.0], [0.0, 0.1, 0.2, 0.3]]).requires_grad_()
    ranks = torch.tensor([[0, 1, 1, 9], [3, 2, 1, 0]])
    valid = torch.tensor([[True, True, True, False], [True] * 4])
    naive = []
    for s, r, v in zip(scores.tolist(), ranks.tolist(), valid.tolist(), strict=True):
        for i in range(4):
            for j in range(i):
                if v[i] and v[j] and r[i] != r[j]:
                    loss = 0.5 - (s[i] - s[j]) * (r[j] - r[i])
                    naive.append(max(0.0, loss))
    losses, counts = ranking_hinge_loss(scores, ranks, valid, margin=0.5)
    assert counts.sum() == len(naive) == 8
    found = weighted_mean(losses, counts.double())
    assert found.item() == pytest.approx(sum(naive) / len(naive))
    found.backward()
    assert scores.grad is not None
    assert scores.grad[0, 3] == 0
    assert scores.grad[0, [0, 2]].abs().min() > 0


def test_padding_may_stand_anywhere() -> None:
    scores, ranks = double([[9.0, 0.4, -0.2]]), torch.tensor([[0, 1, 2]])
    _, counts = ranking_hinge_loss(scores, ranks, torch.tensor([[False, True, True]]))
    assert counts.tolist() == [[False, False, True]]


def exact_uncertainty(mean: float, std: float, *, bound: bool) -> float:
    def log_sigmoid(z: float) -> float:
        return -math.log1p(math.exp(-z)) if z > -30 else z

    def integrand(x: float) -> float:
        value = -log_sigmoid(mean + std * x) if bound else math.exp(log_sigmoid(mean + std * x))
        return value * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    edge = min(9.0, max(-9.0, -mean / std))
    value = (
        quad(integrand, -10, edge, limit=500, epsabs=1e-13)[0] + quad(integrand, edge, 10, limit=500, epsabs=1e-13)[0]
    )
    return value if bound else -math.log(value)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("std", [0.02, 0.5, 3.0, 10.0, 30.0])
@pytest.mark.parametrize("mean", [-20.0, -3.0, 0.0, 0.7, 12.0])
def test_uncertain_scores_equal_the_integral(mean: float, std: float, bound: bool) -> None:
    log_sigma = math.log(std / math.sqrt(2))
    found = uncertainty_loss(double([[mean, log_sigma]]), double([[0.0, log_sigma]]), bound=bound)
    assert found.item() == pytest.approx(exact_uncertainty(mean, std, bound=bound), rel=1e-8)


def test_sure_scores_are_bradley_terry() -> None:
    chosen, rejected = double([[1.3, -20.0], [-4.0, -20.0]]), double([[0.2, -20.0], [2.0, -20.0]])
    for bound in (False, True):
        found = weighted_mean(uncertainty_loss(chosen, rejected, bound=bound))
        assert found.item() == pytest.approx(bradley_terry_loss(chosen[:, 0], rejected[:, 0]).item(), rel=1e-8)


@given(st.floats(-5, 5), st.floats(-3, 2), st.floats(-3, 2))
def test_the_loss_of_hpsv3s_code_is_a_bound(mean: float, log_sigma_c: float, log_sigma_r: float) -> None:
    chosen, rejected = double([[mean, log_sigma_c]]), double([[0.0, log_sigma_r]])
    loss, bound = (uncertainty_loss(chosen, rejected, bound=b).item() for b in (False, True))
    assert bound >= loss - 1e-9
    # The label and its opposite are all that can happen.
    other = uncertainty_loss(rejected, chosen).item()
    assert math.exp(-loss) + math.exp(-other) == pytest.approx(1)


def test_samples_average_to_the_integral() -> None:
    noise = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen, rejected = double([[0.5, 0.3], [-1.0, 0.0]]), double([[0.0, -0.2], [0.4, 0.5]])
    for bound in (False, True):
        sampled = uncertainty_loss(chosen, rejected, bound=bound, noise_BS=noise)
        assert sampled.tolist() == pytest.approx(uncertainty_loss(chosen, rejected, bound=bound).tolist(), rel=0.02)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    tied = torch.tensor([[True, False], [False, True], [True, True]])
    labels = double([[1, 0], [0.5, 0.5], [0.25, 0.75]])
    for loss in (
        lambda x, y: rao_kupper_loss(x, y, tied),
        lambda x, y: margin_loss(x, y, 0.57, scale=0.9),
        lambda x, y: preference_kl_loss(x - y, labels),
        lambda x, y: uncertainty_loss(x, y),
        lambda x, y: uncertainty_loss(x, y, bound=True),
    ):
        assert torch.autograd.gradcheck(loss, (a, b))
    large = double([[500.0, 3.0], [-500.0, 3.0]]).requires_grad_()
    uncertainty_loss(large, large.flip(0).detach()).sum().backward()
    assert large.grad is not None
    assert bool(large.grad.isfinite().all())


def test_what_makes_no_sense_raises() -> None:
    one, two = torch.zeros(2), torch.zeros(2, 1)
    for call in (
        lambda: margin_loss(one, two),
        lambda: margin_loss(one, one, two),
        lambda: rao_kupper_loss(one, one, torch.zeros(2, 1, dtype=torch.bool)),
        lambda: preference_kl_loss(torch.zeros(2, 2), torch.zeros(2)),
        lambda: ranking_hinge_loss(torch.zeros(1, 3), torch.zeros(1, 2)),
        lambda: uncertainty_loss(torch.zeros(2, 2), torch.zeros(1, 2)),
    ):
        with pytest.raises(ValueError, match="differ"):
            call()
    with pytest.raises(ValueError, match="for losses"):
        weighted_mean(two, one)
    for weight in (torch.tensor([0.0, 0.0]), torch.tensor([-1.0, 2.0])):
        with pytest.raises(ValueError, match="not negative"):
            weighted_mean(one, weight)
    with pytest.raises(ValueError, match="above 1"):
        rao_kupper_loss(one, one, one.bool(), theta=1.0)
    with pytest.raises(ValueError, match="sum to 1"):
        preference_kl_loss(torch.zeros(1, 2), torch.tensor([[0.7, 0.7]]))
    with pytest.raises(ValueError, match="mean and log"):
        uncertainty_loss(torch.zeros(2, 3), torch.zeros(2, 3))


def test_a_loss_of_weight_zero_has_no_part_even_where_it_is_infinite() -> None:
    loss = torch.tensor([1.0, math.inf], requires_grad=True)
    found = weighted_mean(loss, torch.tensor([2.0, 0.0]))
    found.backward()
    assert found.item() == 1
    assert loss.grad is not None
    assert loss.grad.tolist() == [1, 0]


def test_every_fixture_is_compared() -> None:
    index = json.loads((FIXTURES / "index.json").read_text("utf-8"))
    assert {entry["file"] for entry in index.values()} == {path.name for path in FIXTURES.glob("*.npz")}
