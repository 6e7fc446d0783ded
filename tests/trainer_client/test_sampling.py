"""Steps of the samplers: against loops written from the formulas, and the laws that they keep."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_client.sampling import (
    Dynamics,
    check_sigmas,
    draw,
    flow_match_sigmas,
    linspace_sigmas,
    log_prob,
    predict_noise,
    predict_x0,
    shift_sigmas,
    transition,
)

NOISY: tuple[Dynamics, ...] = ("flow-sde", "dance-sde", "cps")
EVERY: tuple[Dynamics, ...] = ("ode", *NOISY)
SHAPE = (3, 2, 4, 4)
dynamics_of = st.sampled_from(EVERY)
sigma_pairs = st.tuples(st.floats(0.02, 1.0), st.floats(0.0, 0.95)).map(lambda pair: (pair[0], pair[0] * pair[1]))
levels = st.floats(0.0, 1.0)
seeds = st.integers(0, 2**31)


def latents(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, v, noise = torch.randn((3, *SHAPE), generator=generator, dtype=torch.float64).to(dtype)
    return x, v, noise


def naive_step(dynamics: str, x: float, v: float, s: float, following: float, a: float) -> tuple[float, float]:
    """Mean and standard deviation of one element, as the papers write them."""
    dt, x0, eps = following - s, x - s * v, x + (1 - s) * v
    if dynamics == "flow-sde":
        g = a * math.sqrt(s / (1 - (following if s == 1 else s)))
        return x + (v + g**2 / (2 * s) * eps) * dt, g * math.sqrt(-dt)
    if dynamics == "dance-sde":
        score = -(x - (1 - s) * x0) / s**2
        return x + (v - a**2 / 2 * score) * dt, a * math.sqrt(-dt)
    if dynamics == "cps":
        std = following * math.sin(a * math.pi / 2)
        return (1 - following) * x0 + math.sqrt(max(following**2 - std**2, 0)) * eps, std
    return x + v * dt, 0.0


@pytest.mark.parametrize("dynamics", EVERY)
@pytest.mark.parametrize(("s", "following"), [(1.0, 0.9), (1.0, 0.0), (0.7, 0.5), (0.05, 0.0)])
@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_a_step_is_the_formula_element_by_element(dynamics: Dynamics, s: float, following: float, a: float) -> None:
    x, v, noise = latents()
    step = transition(dynamics, x, v, s, following, a)
    drawn = draw(step, noise)
    densities = log_prob(step, drawn + 0.1)
    for b in range(len(x)):
        summed = 0.0
        for i, (xi, vi, ni) in enumerate(zip(x[b].flatten(), v[b].flatten(), noise[b].flatten(), strict=True)):
            mean, std = naive_step(dynamics, float(xi), float(vi), s, following, a)
            assert float(step.mean[b].flatten()[i]) == pytest.approx(mean, rel=1e-9, abs=1e-9)
            assert float(step.std[b]) == pytest.approx(std, abs=1e-12)
            value = mean + std * float(ni)
            assert float(drawn[b].flatten()[i]) == pytest.approx(value, rel=1e-9, abs=1e-9)
            away = value + 0.1 - mean
            if dynamics == "cps":
                summed -= away**2
            elif std > 0:
                summed += -(away**2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
        assert float(densities[b]) == pytest.approx(summed / x[b].numel(), rel=1e-7, abs=1e-12)


def test_the_log_probability_is_that_of_torch_normal() -> None:
    x, v, noise = latents()
    step = transition("flow-sde", x, v, 0.8, 0.7, 0.7)
    drawn = draw(step, noise)
    expected = torch.distributions.Normal(step.mean, step.std.expand_as(step.mean)).log_prob(drawn)
    torch.testing.assert_close(log_prob(step, drawn), expected.flatten(1).mean(1), rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(dynamics_of, sigma_pairs, seeds)
def test_without_noise_every_dynamics_is_eulers_step(dynamics: Dynamics, pair: tuple[float, float], seed: int) -> None:
    x, v, _ = latents(seed)
    step = transition(dynamics, x, v, *pair, 0.0)
    torch.testing.assert_close(step.mean, x + v * (pair[1] - pair[0]), rtol=1e-9, atol=1e-9)
    assert not step.std.any()


@pytest.mark.parametrize("dynamics", ["ode", "flow-sde", "dance-sde"])
def test_a_step_without_noise_has_log_probability_0_and_no_gradient(dynamics: Dynamics) -> None:
    """The references' formula divides 0 by 0 there: NaN, and NaN gradients for every weight of the policy."""
    x, v, noise = latents()
    v.requires_grad_()
    step = transition(dynamics, x, v, 0.8, 0.7, 0.0)
    value = log_prob(step, draw(step, noise))
    assert value.tolist() == [0.0] * len(x)
    (gradient,) = torch.autograd.grad(value.sum(), v)
    assert not gradient.any()


def test_a_window_within_a_batch_leaves_no_nan_in_the_others() -> None:
    x, v, noise = latents()
    v.requires_grad_()
    step = transition("flow-sde", x, v, 0.8, 0.7, torch.tensor([0.7, 0.0, 0.7]))
    value = log_prob(step, draw(step, noise) + 0.1)
    (gradient,) = torch.autograd.grad(value.sum(), v)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert value[1] == 0
    assert gradient[[0, 2]].abs().sum() > 0


@settings(deadline=None)
@given(st.sampled_from(NOISY), sigma_pairs, st.floats(0.1, 1.0), seeds)
def test_the_ratio_on_policy_is_exactly_1(dynamics: Dynamics, pair: tuple[float, float], a: float, seed: int) -> None:
    x, v, noise = latents(seed, torch.float32)
    drawn = draw(transition(dynamics, x, v, *pair, a), noise)
    values = [log_prob(transition(dynamics, x, v.clone(), *pair, a), drawn) for _ in range(2)]
    assert ((values[1] - values[0]).exp() == 1).all()


@settings(deadline=None)
@given(st.sampled_from(NOISY), st.floats(0.1, 1.0), seeds)
def test_the_mean_is_the_most_probable_next_latent(dynamics: Dynamics, a: float, seed: int) -> None:
    x, v, noise = latents(seed)
    step = transition(dynamics, x, v, 0.8, 0.6, a)
    assert (log_prob(step, step.mean) > log_prob(step, step.mean + 0.1 * noise)).all()


@settings(deadline=None)
@given(st.sampled_from(NOISY), seeds, st.permutations(range(SHAPE[0])))
def test_samples_do_not_see_each_other(dynamics: Dynamics, seed: int, order: list[int]) -> None:
    x, v, noise = latents(seed)
    sigmas, following = torch.tensor([1.0, 0.6, 0.3]), torch.tensor([0.9, 0.5, 0.0])
    whole = transition(dynamics, x, v, sigmas, following, 0.7)
    turned = transition(dynamics, x[order], v[order], sigmas[order], following[order], 0.7)
    assert torch.equal(whole.mean[order], turned.mean)
    values = log_prob(whole, draw(whole, noise))
    torch.testing.assert_close(values[order], log_prob(turned, draw(turned, noise[order])), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamics", ["ode", "flow-sde", "dance-sde"])
def test_the_sde_keeps_the_marginals_of_the_ode(dynamics: Dynamics) -> None:
    """Data N(2, 0.5^2): at the end of many steps with the true velocity, mean and spread are those of the data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((40_000, 1), generator=generator, dtype=torch.float64)
    sigmas = linspace_sigmas(400).double()
    for s, following in itertools.pairwise(sigmas):
        variance = ((1 - s) * 0.5) ** 2 + s**2
        centred = x - (1 - s) * 2.0
        x0 = 2.0 + (1 - s) * 0.25 / variance * centred
        velocity = (x - x0) / s
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        # Above a small sigma only: DanceGRPO's correction grows as 1 / s and needs ever shorter steps.
        a = 0.5 if float(following) > 0.1 else 0.0
        x = draw(transition(dynamics, x, velocity, s, following, a), noise)
    assert x.mean().item() == pytest.approx(2.0, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


@settings(deadline=None)
@given(sigma_pairs, levels, seeds)
def test_cps_keeps_the_schedules_shares_of_signal_and_noise(pair: tuple[float, float], a: float, seed: int) -> None:
    s, following = pair
    x0, _, noise = latents(seed)
    step = transition("cps", (1 - s) * x0 + s * noise, noise - x0, s, following, a)
    kept = step.mean - (1 - following) * x0
    share = torch.tensor(following**2, dtype=torch.float64) - step.std.square()
    torch.testing.assert_close(kept.square(), share * noise.square(), rtol=1e-6, atol=1e-9)


def test_a_first_sigma_that_rounding_moved_is_guarded_too() -> None:
    x, v, _ = latents(dtype=torch.float32)
    for first in (1 - 2**-24, 1 + 2**-23):
        step = transition("flow-sde", x, v, torch.tensor([first]), 0.9, 0.7)
        assert step.diffusion[0].item() == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)), rel=1e-6)


def test_the_guard_holds_only_where_sigma_is_1() -> None:
    x, v, _ = latents()
    at_one = transition("flow-sde", x, v, 1.0, 0.9, 0.7)
    assert at_one.diffusion[0].item() == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)))
    below = transition("flow-sde", x, v, 0.999, 0.9, 0.7)
    assert below.diffusion[0].item() == pytest.approx(0.7 * math.sqrt(0.999 / 0.001))


@settings(deadline=None)
@given(st.floats(0.01, 1.0), seeds)
def test_predictions_invert_the_forward_process(s: float, seed: int) -> None:
    x0, _, noise = latents(seed)
    x_t = (1 - s) * x0 + s * noise
    torch.testing.assert_close(predict_x0(x_t, noise - x0, s), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(predict_noise(x_t, noise - x0, s), noise, rtol=1e-9, atol=1e-9)


def test_half_precision_is_computed_in_float32_and_kept_as_asked() -> None:
    x, v, noise = latents(dtype=torch.bfloat16)
    step = transition("flow-sde", x, v, 0.8, 0.7, 0.7)
    assert step.mean.dtype == torch.float32
    kept = draw(step, noise, torch.bfloat16)
    assert kept.dtype == torch.bfloat16
    unrounded = log_prob(step, draw(step, noise))
    assert not torch.equal(log_prob(step, kept), unrounded)  # why the kept latent is the one to take it of
    expected = torch.distributions.Normal(step.mean, step.std.expand_as(step.mean)).log_prob(kept.float())
    torch.testing.assert_close(log_prob(step, kept), expected.flatten(1).mean(1))


def test_gradients_reach_the_velocity_through_the_mean_alone() -> None:
    x, v, noise = latents()
    v.requires_grad_()
    step = transition("flow-sde", x, v, 0.8, 0.7, 0.7)
    (fresh,) = torch.autograd.grad(log_prob(step, draw(step, noise)).sum(), v, retain_graph=True)
    (given_one,) = torch.autograd.grad(log_prob(step, draw(step, noise).detach()).sum(), v)
    assert torch.equal(fresh, given_one)
    assert fresh.any()


@settings(deadline=None)
@given(st.floats(1.0, 10.0), st.floats(1.0, 10.0), st.lists(st.floats(0.0, 1.0), min_size=1))
def test_shifts_compose_by_multiplication(first: float, second: float, values: list[float]) -> None:
    sigmas = torch.tensor(values, dtype=torch.float64)
    twice = shift_sigmas(shift_sigmas(sigmas, first), second)
    torch.testing.assert_close(twice, shift_sigmas(sigmas, first * second), rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(1.0, 8.0))
def test_schedules_fall_from_1_to_0(steps: int, shift: float) -> None:
    for sigmas in (flow_match_sigmas(steps, shift), linspace_sigmas(steps, shift)):
        assert len(check_sigmas(sigmas)) == steps + 1
        assert sigmas[0] == 1
        assert sigmas[-1] == 0


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_schedule_is_that_of_diffusers(steps: int, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(flow_match_sigmas(steps, shift), scheduler.sigmas, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sigmas", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.5, 0.0], [1.0, -0.1], [1.0, math.nan]])
def test_other_schedules_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="fall strictly"):
        check_sigmas(torch.tensor(sigmas))


def test_misuse_is_refused() -> None:
    x, v, _ = latents()
    with pytest.raises(ValueError, match="dynamics is"):
        transition("sde", x, v, 0.8, 0.7, 0.7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="different shapes"):
        transition("cps", x, v[:1], 0.8, 0.7, 0.7)
    with pytest.raises(ValueError, match="2 levels for 3 samples"):
        transition("cps", x, v, torch.tensor([0.8, 0.7]), 0.1, 0.7)
