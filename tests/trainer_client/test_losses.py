"""Policy losses, KL and ReFL: against loops written from the formulas, gradients, and failed samples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_client.losses import (
    clipped_policy_loss,
    guard_log_ratio,
    kl_on_means,
    masked_mean,
    mean_squared_difference,
    policy_log_ratio,
    refl_loss,
)
from trainer_client.sampling import draw, log_prob, transition

SHAPE = (4, 3, 2, 2)
numbers = st.floats(-3.0, 3.0)
lists = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(-1.0, 1.0), min_size=n, max_size=n),
        st.lists(st.floats(-8.0, 8.0), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None)
@given(lists, st.floats(1e-4, 0.5), st.floats(1e-4, 0.5), st.floats(0.5, 5.0))
def test_the_policy_loss_is_the_formula(
    case: tuple[list[float], list[float], list[bool]], low: float, high: float, limit: float
) -> None:
    differences, advantages, ok = case
    found = clipped_policy_loss(
        torch.tensor(differences, dtype=torch.float64),
        torch.tensor(advantages, dtype=torch.float64),
        low,
        high,
        advantage_clip=(-limit, limit),
        ok_B=torch.tensor(ok),
    )
    losses, squares, above, below = [], [], 0, 0
    for difference, advantage, fine in zip(differences, advantages, ok, strict=True):
        if not fine:
            continue
        a, ratio = max(-limit, min(limit, advantage)), math.exp(difference)
        losses.append(max(-a * ratio, -a * max(1 - low, min(1 + high, ratio))))
        squares.append(difference**2 / 2)
        above += ratio - 1 > high
        below += 1 - ratio > low
    count = max(len(losses), 1)
    assert found.loss.item() == pytest.approx(sum(losses) / count, rel=1e-9, abs=1e-12)
    assert found.approx_kl.item() == pytest.approx(sum(squares) / count, rel=1e-9, abs=1e-12)
    assert found.clip_fraction_high.item() == pytest.approx(above / count)
    assert found.clip_fraction_low.item() == pytest.approx(below / count)
    assert found.clip_fraction.item() == pytest.approx((above + below) / count)


def test_on_policy_the_gradient_is_that_of_the_plain_policy_gradient() -> None:
    """d/d log_prob of -A ratio at ratio 1 is -A / B, and nothing is clipped."""
    log_probs, advantage = normal(0, 6).requires_grad_(), normal(1, 6)
    found = clipped_policy_loss(policy_log_ratio(log_probs, log_probs.clone()), advantage, 1e-4, 1e-4)
    (gradient,) = torch.autograd.grad(found.loss, log_probs)
    torch.testing.assert_close(gradient, -advantage / 6)
    assert found.loss.item() == pytest.approx(-advantage.mean().item())
    assert found.clip_fraction == 0
    assert found.approx_kl == 0


def test_beyond_the_clip_range_good_samples_stop_and_bad_ones_still_fall() -> None:
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss = clipped_policy_loss(log_ratio, advantage, 0.2, 0.2).loss
    (gradient,) = torch.autograd.grad(loss, log_ratio)
    expected = [0.0, math.exp(0.5) / 4, -math.exp(-0.5) / 4, 0.0]
    assert gradient.tolist() == pytest.approx(expected)


def test_a_failed_sample_and_a_zero_advantage_leave_no_gradient() -> None:
    log_ratio = torch.zeros(4, requires_grad=True)
    advantage, ok = torch.tensor([1.0, 0.0, -1.0, 2.0]), torch.tensor([True, True, True, False])
    loss = clipped_policy_loss(log_ratio, advantage, 0.1, 0.1, ok_B=ok).loss
    (gradient,) = torch.autograd.grad(loss, log_ratio)
    assert gradient.tolist() == pytest.approx([-1 / 3, 0.0, 1 / 3, 0.0])


def test_weights_multiply_each_samples_loss() -> None:
    log_ratio, advantage, weight = normal(0, 5) / 10, normal(1, 5), normal(2, 5).abs()
    whole = clipped_policy_loss(log_ratio, advantage, 0.1, 0.1, weight=weight).loss
    each = [
        float(w) * float(clipped_policy_loss(r[None], a[None], 0.1, 0.1).loss)
        for r, a, w in zip(log_ratio, advantage, weight, strict=True)
    ]
    assert whole.item() == pytest.approx(sum(each) / 5)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 2.0))
def test_guards_ratio_is_the_formula(seed: int, q: float) -> None:
    mean, old_mean = normal(seed, *SHAPE), normal(seed + 1, *SHAPE)
    new, old = normal(seed + 2, 4), normal(seed + 3, 4)
    found = guard_log_ratio(new, old, mean, old_mean, torch.tensor(q))
    for b in range(4):
        squares = [(float(x) - float(y)) ** 2 for x, y in zip(mean[b].flatten(), old_mean[b].flatten(), strict=True)]
        expected = (float(new[b]) - float(old[b])) * q + sum(squares) / len(squares) / (2 * q)
        assert found[b].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("level", [0.05, 0.7])
def test_guards_logarithm_has_expectation_0_where_the_plain_one_sinks(level: float) -> None:
    """Over samples of the old policy; at low noise the plain ratio lies below 1 nearly always."""
    x, v = normal(0, 1, 64).expand(4000, 64), normal(1, 1, 64).expand(4000, 64)
    old = transition("flow-sde", x, v, 0.5, 0.4, level)
    new = transition("flow-sde", x, v + 0.1 * normal(2, 1, 64), 0.5, 0.4, level)
    drawn = draw(old, normal(3, 4000, 64))
    values = log_prob(new, drawn), log_prob(old, drawn)
    plain = policy_log_ratio(*values)
    guarded = guard_log_ratio(*values, new.mean, old.mean, old.std)
    error = guarded.std().item() / math.sqrt(len(guarded))
    assert abs(guarded.mean().item()) < 4 * error
    bias = -(new.mean - old.mean).square().mean().item() / (2 * old.std[0].item() ** 2)
    assert plain.mean().item() == pytest.approx(bias, abs=4 * error / old.std[0].item())
    assert plain.mean().item() < -4 * error


def test_guards_ratio_on_policy_is_1_and_without_noise_too() -> None:
    mean, value = normal(0, *SHAPE), normal(1, 4)
    for q in (torch.tensor(0.3), torch.zeros(4, 1, 1, 1)):
        assert guard_log_ratio(value, value.clone(), mean, mean.clone(), q).tolist() == [0.0] * 4
    other = mean.clone().requires_grad_()
    loss = guard_log_ratio(value, value, other, mean + 1, torch.zeros(4)).sum()
    assert torch.autograd.grad(loss, other)[0].isfinite().all()


@settings(deadline=None)
@given(st.integers(0, 2**31), st.lists(st.booleans(), min_size=4, max_size=4))
def test_kl_on_means_is_the_gaussians_kl(seed: int, ok: list[bool]) -> None:
    mean, ref, std = normal(seed, *SHAPE), normal(seed + 1, *SHAPE), normal(seed + 2, 4, 1, 1, 1).abs() + 0.1
    found = kl_on_means(mean, ref, std, torch.tensor(ok))
    normals = [torch.distributions.Normal(centre, std.expand(SHAPE)) for centre in (mean, ref)]
    each = torch.distributions.kl_divergence(*normals).flatten(1).mean(1)
    kept = [float(value) for value, fine in zip(each, ok, strict=True) if fine]
    assert found.item() == pytest.approx(sum(kept) / max(len(kept), 1), rel=1e-9, abs=1e-12)


def test_both_forms_of_the_kl_differ_by_dt() -> None:
    x, v = normal(0, *SHAPE), normal(1, *SHAPE)
    step = transition("flow-sde", x, v, 0.8, 0.65, 0.7)
    ref = transition("flow-sde", x, v + 0.1, 0.8, 0.65, 0.7)
    true, authors = (kl_on_means(step.mean, ref.mean, std) for std in (step.std, step.diffusion))
    assert authors.item() == pytest.approx(0.15 * true.item())


def test_a_step_without_noise_costs_no_kl_and_gives_no_nan() -> None:
    mean = normal(0, *SHAPE).requires_grad_()
    std = torch.tensor([0.5, 0.0, 0.5, 0.0]).reshape(4, 1, 1, 1)
    loss = kl_on_means(mean, torch.zeros(SHAPE), std)
    (gradient,) = torch.autograd.grad(loss, mean)
    expected = mean.detach()[[0, 2]].square().flatten(1).mean(1) / (2 * 0.25)
    assert loss.item() == pytest.approx(expected.sum().item() / 4)
    assert not gradient[[1, 3]].any()
    assert gradient.isfinite().all()


def test_the_reference_and_the_old_policy_get_no_gradient() -> None:
    leaf = normal(0, *SHAPE).requires_grad_()
    old = normal(1, 4).requires_grad_()
    assert not kl_on_means(torch.zeros(SHAPE), leaf, torch.tensor(1.0)).requires_grad
    assert not mean_squared_difference(torch.zeros(SHAPE), leaf).requires_grad
    assert not policy_log_ratio(torch.zeros(4), old).requires_grad


@settings(deadline=None)
@given(lists, st.floats(1e-4, 2.0), st.floats(-1.0, 3.0))
def test_refls_loss_is_the_formula(
    case: tuple[list[float], list[float], list[bool]], scale: float, target: float
) -> None:
    _, rewards, ok = case
    leaf = torch.tensor(rewards, dtype=torch.float64, requires_grad=True)
    loss = refl_loss(leaf, grad_scale=scale, target=target, ok_B=torch.tensor(ok))
    (gradient,) = torch.autograd.grad(loss, leaf)
    count = max(sum(ok), 1)
    kept = [reward for reward, fine in zip(rewards, ok, strict=True) if fine]
    assert loss.item() == pytest.approx(scale * sum(max(0.0, target - r) for r in kept) / count, abs=1e-12)
    expected = [-scale / count if fine and r < target else 0.0 for r, fine in zip(rewards, ok, strict=True)]
    assert gradient.tolist() == pytest.approx(expected)


def test_a_mean_of_none_is_0_and_a_failed_nan_does_not_count() -> None:
    values = torch.tensor([1.0, math.nan, 3.0])
    assert masked_mean(values, torch.tensor([True, False, True])) == 2
    assert masked_mean(values, torch.zeros(3, dtype=torch.bool)) == 0


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        clipped_policy_loss(torch.zeros(3), torch.zeros(2), 0.1, 0.1)
    with pytest.raises(ValueError, match="different shapes"):
        masked_mean(torch.zeros(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="48 standard deviations for 4 samples"):
        kl_on_means(torch.zeros(SHAPE), torch.zeros(SHAPE), torch.ones(SHAPE))
