"""Deterministic solvers: against the formulas as written, an exact solution, and diffusers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_client.sampling import flow_match_sigmas, linspace_sigmas, transition
from trainer_client.solvers import Solver, ddim_step, dpm1_step, dpm2_step, solve

SOLVERS: tuple[Solver, ...] = ("euler", "ddim", "dpm1", "dpm2")
MEAN, SPREAD = 0.7, 0.4


def gaussian_velocity(x: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
    """The true velocity for data N(MEAN, SPREAD^2)."""
    s = sigma_B[:, None]
    variance = ((1 - s) * SPREAD) ** 2 + s**2
    centred = x - (1 - s) * MEAN
    x0, eps = MEAN + (1 - s) * SPREAD**2 / variance * centred, s / variance * centred
    return eps - x0


def exact(x: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """The flow of a Gaussian keeps each point's distance from the mean in standard deviations."""
    spread = [math.hypot((1 - s) * SPREAD, s) for s in (start, end)]
    return (x - (1 - start) * MEAN) / spread[0] * spread[1] + (1 - end) * MEAN


def error(solver: Solver, steps: int) -> float:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    # Between ends where lambda is finite: the order is a statement about short steps.
    sigmas = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
    return float((solve(gaussian_velocity, x, sigmas, solver) - exact(x, 0.95, 0.05)).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("dpm1", 1), ("dpm2", 2)])
def test_the_error_falls_with_the_order_of_the_solver(solver: Solver, order: int) -> None:
    measured = math.log2(error(solver, 320) / error(solver, 640))
    assert measured == pytest.approx(order, abs=0.1)
    assert error(solver, 640) < 0.002


@settings(deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_first_order_solvers_are_one_step_on_a_rectified_flow(s: float, share: float, seed: int) -> None:
    x, v = torch.randn((2, 3, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    now, following = torch.tensor(s, dtype=torch.float64), torch.tensor(s * share, dtype=torch.float64)
    euler = transition("ode", x, v, s, s * share).mean
    torch.testing.assert_close(ddim_step(x, v, now, following), euler, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dpm1_step(x, x - s * v, now, following), euler, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(
    st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3, unique=True).filter(
        lambda values: min(abs(a - b) for a, b in zip(sorted(values), sorted(values)[1:], strict=False)) > 1e-3
    ),
    st.integers(0, 2**31),
)
def test_dpm2_is_the_formula_with_its_logarithms(sigmas: list[float], seed: int) -> None:
    before, now, following = sorted(sigmas, reverse=True)
    x, x0, x0_before = torch.randn((3, 7), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = dpm2_step(x, x0, x0_before, *torch.tensor([before, now, following], dtype=torch.float64))
    lam = [math.log((1 - s) / s) for s in (before, now, following)]
    h = lam[2] - lam[1]
    q = (lam[1] - lam[0]) / h
    for xi, a, b, y in zip(x.tolist(), x0.tolist(), x0_before.tolist(), found.tolist(), strict=True):
        mixed = (1 + 1 / (2 * q)) * a - b / (2 * q)
        expected = following / now * xi - (1 - following) * (math.exp(-h) - 1) * mixed
        assert y == pytest.approx(expected, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_schedule_with_both_ends_gives_no_nan(solver: Solver, steps: int) -> None:
    x = torch.linspace(-2, 2, 9)[:, None]
    assert solve(gaussian_velocity, x, flow_match_sigmas(steps, 3.0), solver).isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_fine_schedule_with_both_ends_reaches_the_data(solver: Solver) -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    found = solve(gaussian_velocity, x, flow_match_sigmas(200, 3.0).double(), solver)
    torch.testing.assert_close(found, exact(x, 1.0, 0.0), rtol=0, atol=0.03)


def test_a_point_mass_is_reached_exactly_in_any_number_of_steps() -> None:
    """x_0 is then the same everywhere, and every solver's step is exact."""

    def to_point(x: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        return (x - MEAN) / sigma_B[:, None]

    x = torch.randn((5, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for solver in SOLVERS:
        for steps in (1, 4):
            found = solve(to_point, x, linspace_sigmas(steps), solver)
            torch.testing.assert_close(found, torch.full_like(x, MEAN), rtol=1e-9, atol=1e-9)


def test_dpm2_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    sigmas = torch.linspace(0.95, 0.05, 9, dtype=torch.float64)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, final_sigmas_type="zero"
    )
    scheduler.sigmas = sigmas
    x = torch.randn((4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = solve(gaussian_velocity, x, sigmas[:-1], "dpm2")
    # Theirs of second order to the end as well: the last step is left out of both.
    for i in range(len(sigmas) - 2):
        scheduler._step_index = i
        v = gaussian_velocity(x, sigmas[i].expand(len(x)))
        scheduler.model_outputs = [*scheduler.model_outputs[1:], scheduler.convert_model_output(v, sample=x)]
        first = i in (0, len(sigmas) - 3)
        if first:
            x = scheduler.dpm_solver_first_order_update(scheduler.model_outputs[-1], sample=x)
        else:
            x = scheduler.multistep_dpm_solver_second_order_update(scheduler.model_outputs, sample=x)
    torch.testing.assert_close(mine, x, rtol=1e-6, atol=1e-6)


def test_each_step_calls_the_policy_once_in_the_callers_dtype() -> None:
    seen: list[tuple[torch.dtype, tuple[int, ...], float]] = []

    def policy(x: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        seen.append((x.dtype, tuple(sigma_B.shape), sigma_B[0].item()))
        return torch.zeros_like(x)

    x = torch.ones((2, 3), dtype=torch.bfloat16)
    assert torch.equal(solve(policy, x, linspace_sigmas(4), "dpm2"), x)
    assert seen == [(torch.bfloat16, (2,), s) for s in (1.0, 0.75, 0.5, 0.25)]


def test_misuse_is_refused() -> None:
    x = torch.ones((2, 3))
    with pytest.raises(ValueError, match="solver is"):
        solve(gaussian_velocity, x, linspace_sigmas(4), "heun")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fall strictly"):
        solve(gaussian_velocity, x, linspace_sigmas(4).flip(0))
