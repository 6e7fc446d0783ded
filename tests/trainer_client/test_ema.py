"""Averages of weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_client.ema import (
    cosine_decay,
    ema_update_,
    linear_decay,
    old_policy_decay,
    piecewise_linear_decay,
    power_decay,
    warmup_cosine_decay,
)


@pytest.mark.parametrize("step", [0, 1, 74, 75, 76, 100, 207, 208, 209, 499, 500, 501, 5000])
def test_old_policy_decays_are_the_papers(step: int) -> None:
    assert old_policy_decay(step, 0) == 0
    assert old_policy_decay(step, 1) == pytest.approx(min(0.001 * step, 0.5))
    assert old_policy_decay(step, 2) == pytest.approx(0 if step < 75 else min(0.0075 * (step - 75), 0.999))


def test_another_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule is 0, 1 or 2"):
        old_policy_decay(1, 3)


@settings(deadline=None)
@given(st.integers(0, 3000), st.floats(0.5, 0.999), st.floats(0.0, 0.5), st.integers(1, 1000), st.integers(1001, 2000))
def test_decays_rise_to_their_end_and_stay(step: int, end: float, start: float, warmup: int, total: int) -> None:
    schedules = [
        lambda s: power_decay(s, end, warmup_steps=warmup + 1),
        lambda s: piecewise_linear_decay(s, end, flat_steps=warmup, ramp_rate=0.01),
        lambda s: linear_decay(s, end, initial_decay=start, warmup_steps=warmup),
        lambda s: cosine_decay(s, end, initial_decay=start, total_steps=total),
        lambda s: warmup_cosine_decay(s, end, initial_decay=start, warmup_steps=warmup, total_steps=total),
    ]
    for schedule in schedules:
        assert 0 <= schedule(step) <= schedule(step + 1) + 1e-12 <= end + 2e-12
    assert [schedule(10_000_000) for schedule in schedules] == pytest.approx([end] * 5)


def test_halfway_through_a_cosine_is_halfway_between_its_ends() -> None:
    assert cosine_decay(500, 0.9, initial_decay=0.1, total_steps=1000) == pytest.approx(0.5)
    assert warmup_cosine_decay(700, 0.9, initial_decay=0.1, warmup_steps=400, total_steps=1000) == pytest.approx(0.5)


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8), st.integers(0, 2**31))
def test_updates_are_the_weighted_sum_of_all_weights_seen(decays: list[float], seed: int) -> None:
    seen = torch.randn((len(decays) + 1, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    average, weights = seen[0].clone(), [1.0]
    for decay, current in zip(decays, seen[1:], strict=True):
        ema_update_([average], [current], decay)
        weights = [decay * weight for weight in weights] + [1 - decay]
    assert sum(weights) == pytest.approx(1)
    expected = [sum(w * row[i].item() for w, row in zip(weights, seen, strict=True)) for i in range(3)]
    assert average.tolist() == pytest.approx(expected, abs=1e-9)


def test_an_average_in_float32_keeps_what_half_precision_loses() -> None:
    average, current = torch.zeros(1), torch.ones(1, dtype=torch.bfloat16)
    for _ in range(1000):
        ema_update_([average], [current], 0.999)
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(1 - 0.999**1000, rel=1e-3)


def test_parameters_are_updated_in_place_outside_the_graph() -> None:
    average, current = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in average.named_parameters()}
    ema_update_(average.parameters(), current.parameters(), 0.25)
    for name, p in average.named_parameters():
        torch.testing.assert_close(p.detach(), 0.25 * before[name] + 0.75 * current.get_parameter(name).detach())
        assert p.grad_fn is None


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="decay lies in"):
        ema_update_([torch.ones(1)], [torch.ones(1)], 1.5)
    with pytest.raises(ValueError, match="shorter"):
        ema_update_([torch.ones(1)], [], 0.5)
