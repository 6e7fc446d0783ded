"""DiffusionNFT's loss: against a loop written from the formula, and what the paper says of its minimum."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_client.nft_losses import (
    AdvantageMode,
    adaptive_error,
    forward_noising,
    negative_prediction,
    nft_loss,
    nft_probability,
    positive_prediction,
)

SHAPE = (3, 2, 2)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(
    x0: torch.Tensor, noise: torch.Tensor, t: float, v: torch.Tensor, old: torch.Tensor, r: float, beta: float
) -> float:
    """Loss of one sample, element by element."""
    sides = []
    for sign in (1, -1):
        errors = []
        for a, eps, new, before in zip(x0.flatten(), noise.flatten(), v.flatten(), old.flatten(), strict=True):
            mixed = (1 - sign * beta) * float(before) + sign * beta * float(new)
            x_t = (1 - t) * float(a) + t * float(eps)
            errors.append(x_t - t * mixed - float(a))
        weight = max(sum(map(abs, errors)) / len(errors), 1e-5)
        sides.append(sum(error**2 for error in errors) / len(errors) / weight)
    return (r * sides[0] + (1 - r) * sides[1]) / beta


@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3),
    st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.floats(0.05, 2.0),
    st.floats(0.5, 5.0),
)
def test_the_loss_is_the_formula(
    seed: int, t: list[float], r: list[float], ok: list[bool], beta: float, scale: float
) -> None:
    x0, noise, v, old = normal(seed, 4, *SHAPE)
    t_B, r_B = torch.tensor(t, dtype=torch.float64), torch.tensor(r, dtype=torch.float64)
    x_t = forward_noising(x0, noise, t_B)
    found = nft_loss(x0, x_t, t_B, v, old, r_B, beta=beta, scale=scale, ok_B=torch.tensor(ok))
    each = [naive(x0[b], noise[b], t[b], v[b], old[b], r[b], beta) for b in range(3)]
    kept = [value for value, fine in zip(each, ok, strict=True) if fine]
    assert found.loss.item() == pytest.approx(scale * sum(kept) / max(len(kept), 1), rel=1e-8, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(-9.0, 9.0), min_size=1, max_size=8), st.floats(-5.0, 0.0), st.floats(0.5, 5.0))
def test_probabilities_are_the_formula_in_every_mode(advantages: list[float], low: float, high: float) -> None:
    shaped = {
        "all": lambda a: a,
        "positive_only": lambda a: max(a, 0.0),
        "negative_only": lambda a: min(a, 0.0),
        "one_only": lambda a: float(a > 0),
        "binary": lambda a: float((a > 0) - (a < 0)),
    }
    modes: tuple[AdvantageMode, ...] = ("all", "positive_only", "negative_only", "one_only", "binary")
    for mode in modes:
        found = nft_probability(torch.tensor(advantages, dtype=torch.float64), clip=(low, high), mode=mode)
        divisor = max(low, high)
        clipped = [max(low, min(high, a)) for a in advantages]
        expected = [max(0.0, min(1.0, shaped[mode](a) / divisor / 2 + 0.5)) for a in clipped]
        assert found.tolist() == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.floats(-6.0, 6.0), min_size=2, max_size=6))
def test_probabilities_rise_with_the_advantage_and_mirror_with_its_sign(advantages: list[float]) -> None:
    values = torch.tensor(sorted(advantages), dtype=torch.float64)
    r = nft_probability(values)
    assert (r.diff() >= 0).all()
    torch.testing.assert_close(nft_probability(-values), 1 - r)
    assert nft_probability(torch.zeros(1)).item() == 0.5


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 3.0))
def test_predictions_mirror_each_other_about_the_old_policy(seed: int, beta: float) -> None:
    v, old = normal(seed, 2, *SHAPE)
    positive, negative = positive_prediction(v, old, beta), negative_prediction(v, old, beta)
    torch.testing.assert_close((positive + negative) / 2, old)
    torch.testing.assert_close(positive - old, beta * (v - old))
    assert torch.equal(positive_prediction(v, v, 1.0), v)


def gradient(r: float, v: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    leaf, t_B = v.clone().requires_grad_(), torch.full((len(x0),), 0.5, dtype=torch.float64)
    loss = nft_loss(
        x0, forward_noising(x0, noise, t_B), t_B, leaf, old, torch.full_like(t_B, r), beta=0.5, scale=1.0
    ).loss
    return torch.autograd.grad(loss, leaf)[0]


def test_on_policy_good_samples_pull_and_bad_ones_push_by_as_much() -> None:
    """At v = v_old both predictions are v_old: the gradient is odd in r - 1/2, and points to the sample's velocity."""
    x0, noise, old = normal(0, 3, *SHAPE)
    good, none, bad = (gradient(r, old, x0, noise, old) for r in (1.0, 0.5, 0.0))
    torch.testing.assert_close(good, -bad)
    assert none.abs().max() < 1e-12
    towards = (noise - x0) - old
    cosines = torch.nn.functional.cosine_similarity(-good.flatten(1), towards.flatten(1))
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64))


def test_the_minimum_is_where_the_paper_puts_it() -> None:
    """v_old + (2 / beta) Delta, Delta = alpha (v+ - v_old): without weights, at one x_t that many samples share.

    alpha is the mean probability, v+ the mean velocity of the good samples, v_old that of all.
    """
    beta, targets = 0.4, normal(0, 64, 5)
    r = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    old, alpha, good = targets.mean(0), r.mean(), (r[:, None] * targets).sum(0) / r.sum()
    v = (old + 2 / beta * alpha * (good - old)).requires_grad_()
    sides = positive_prediction(v, old, beta), negative_prediction(v, old, beta)
    positive, negative = ((side - targets).square().mean(1) for side in sides)
    (gradient,) = torch.autograd.grad((r * positive + (1 - r) * negative).mean(), v)
    torch.testing.assert_close(gradient, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_weight_is_a_constant_and_has_a_floor() -> None:
    x0, noise = normal(0, 2, *SHAPE)
    t_B = torch.full((3,), 0.5, dtype=torch.float64)
    x_t, exact = forward_noising(x0, noise, t_B), noise - x0
    v = (exact + 1e-7).requires_grad_()
    found = adaptive_error(x0, x_t, t_B, v)
    assert found.max().item() == pytest.approx((0.5e-7) ** 2 / 1e-5, rel=1e-5)
    leaf = (exact + 1.0).requires_grad_()
    (by_v,) = torch.autograd.grad(adaptive_error(x0, x_t, t_B, leaf).sum(), leaf)
    # mean(e^2) / w with e = -t everywhere and w = t held: d/dv is 2 t^2 / D / w.
    torch.testing.assert_close(by_v, torch.full_like(by_v, 2 * 0.25 / math.prod(SHAPE[1:]) / 0.5))


def test_only_the_new_velocity_gets_a_gradient() -> None:
    x0, noise, v, old = normal(0, 4, *SHAPE)
    old.requires_grad_()
    r = torch.rand(3, dtype=torch.float64, requires_grad=True)
    t_B = torch.full((3,), 0.5)
    assert not nft_loss(x0, forward_noising(x0, noise, t_B), t_B, v, old, r, beta=1.0).loss.requires_grad


def test_half_precision_is_computed_in_float64() -> None:
    x0, noise, v, old = (tensor.bfloat16() for tensor in normal(0, 4, *SHAPE))
    t_B, r = torch.full((3,), 0.5), torch.full((3,), 0.7)
    found = nft_loss(x0, forward_noising(x0, noise, t_B), t_B, v, old, r, beta=1.0)
    assert found.loss.dtype == found.positive_B.dtype == torch.float64


def test_misuse_is_refused() -> None:
    x0, t_B = normal(0, *SHAPE), torch.full((3,), 0.5)
    with pytest.raises(ValueError, match="beta is positive"):
        nft_loss(x0, x0, t_B, x0, x0, t_B, beta=0.0)
    with pytest.raises(ValueError, match="unknown mode"):
        nft_probability(t_B, mode="sign")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive end"):
        nft_probability(t_B, clip=(-1.0, 0.0))
