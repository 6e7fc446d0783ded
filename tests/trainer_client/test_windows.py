"""Windows of SDE steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_client.windows import (
    eligible_steps,
    flow_grpo_fast_window,
    mix_grpo_window,
    random_steps,
    window_noise_levels,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None)
@given(st.integers(2, 40), st.data())
def test_random_steps_are_different_and_eligible(steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, steps))
    drawn = random_steps(steps, count, generator(data.draw(st.integers(0, 1000))))
    assert len(drawn) == len(set(drawn)) == min(count, steps - 1)
    assert set(drawn) <= set(range(steps - 1))


def test_a_seed_draws_the_same_window_again_and_every_step_has_its_turn() -> None:
    assert random_steps(10, 3, generator(7)) == random_steps(10, 3, generator(7))
    one = generator()
    assert {step for _ in range(100) for step in random_steps(10, 2, one)} == set(range(9))


def test_nothing_is_drawn_from_the_generator_where_nothing_is_chosen() -> None:
    used = generator()
    assert random_steps(4, None, used) == [0, 1, 2]
    assert torch.equal(used.get_state(), generator().get_state())


@settings(deadline=None)
@given(st.integers(2, 40), st.data())
def test_the_fast_window_is_consecutive_and_early(steps: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, max(steps // 2, 1)))
    window = flow_grpo_fast_window(steps, size, generator(data.draw(st.integers(0, 1000))))
    assert window == list(range(window[0], window[0] + size))
    assert window[-1] < steps // 2


def test_the_fast_window_starts_everywhere_it_may() -> None:
    one = generator()
    assert {flow_grpo_fast_window(10, 2, one)[0] for _ in range(200)} == {0, 1, 2, 3}
    assert {flow_grpo_fast_window(10, 2, one, stop=9)[0] for _ in range(300)} == set(range(8))


def test_the_mix_window_slides_from_noise_to_image_and_rolls_back() -> None:
    starts = [mix_grpo_window(i, 8, 3, every=2)[0] for i in range(12)]
    assert starts == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0]
    assert mix_grpo_window(0, 8, 3) == [0, 1, 2]
    assert [mix_grpo_window(i, 8, 3, roll_back=False)[0] for i in range(7)] == [0, 1, 2, 3, 4, 4, 4]


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(1, 5), st.integers(1, 6), st.data())
def test_the_mix_window_visits_every_eligible_step(steps: int, stride: int, every: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(min(stride, steps - 1), steps - 1))
    seen = {step for i in range(every * steps) for step in mix_grpo_window(i, steps, size, every=every, stride=stride)}
    assert seen == set(range(steps - 1))


@settings(deadline=None)
@given(st.integers(1, 30), st.data())
def test_noise_levels_are_the_window_and_nothing_else(steps: int, data: st.DataObject) -> None:
    window = data.draw(st.sets(st.integers(0, steps - 1)))
    levels = window_noise_levels(steps, sorted(window), 0.5)
    assert levels.tolist() == [0.5 if step in window else 0.0 for step in range(steps)]


@pytest.mark.parametrize("given_steps", [[0, 0], [-1], [5]])
def test_impossible_steps_are_refused(given_steps: list[int]) -> None:
    with pytest.raises(ValueError, match="different steps"):
        eligible_steps(5, given_steps)
    with pytest.raises(ValueError, match="different steps"):
        window_noise_levels(5, given_steps, 0.7)


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="doesn't fit"):
        flow_grpo_fast_window(10, 6, generator())
    with pytest.raises(ValueError, match="no window"):
        mix_grpo_window(0, 4, 4)
    with pytest.raises(ValueError, match="no window"):
        mix_grpo_window(0, 4, 2, every=0)
    with pytest.raises(ValueError, match="at least no steps"):
        random_steps(5, -1, generator())
