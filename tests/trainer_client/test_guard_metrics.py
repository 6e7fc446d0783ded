"""The guard's metrics and tests: against loops, scipy, laws of order, failures."""

import itertools
import math
from random import Random

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_client.guard_metrics import (
    Change,
    TrainingMetrics,
    fall_beyond,
    group_diversity,
    group_rank_correlations,
    mean_above,
    paired_change,
    pooled_std,
    rank_correlations,
    training_metrics,
    with_wobble,
)

Rows = list[tuple[float, float, int, bool]]
rows_of_groups = st.lists(
    st.tuples(
        st.integers(-4, 4).map(lambda i: i / 4),
        st.integers(-4, 4).map(lambda i: i / 4),
        st.integers(-1, 2),
        st.booleans(),
    ),
    min_size=1,
    max_size=30,
)


def columns(rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Failed rows hold NaN."""
    first = torch.tensor([a if fine else math.nan for a, _, _, fine in rows])
    second = torch.tensor([b if fine else math.nan for _, b, _, fine in rows])
    return first, second, torch.tensor([g for _, _, g, _ in rows]), torch.tensor([fine for *_, fine in rows])


def naive_tau(pairs: list[tuple[float, float]]) -> float:
    concordant = untied_a = untied_b = 0
    for (a1, b1), (a2, b2) in itertools.combinations(pairs, 2):
        sign_a, sign_b = (a1 > a2) - (a1 < a2), (b1 > b2) - (b1 < b2)
        concordant += sign_a * sign_b
        untied_a += sign_a != 0
        untied_b += sign_b != 0
    return concordant / math.sqrt(untied_a * untied_b) if len(pairs) >= 3 and untied_a * untied_b else math.nan


@settings(deadline=None)
@given(rows_of_groups)
def test_rank_correlations_are_kendalls_loop_in_each_group(rows: Rows) -> None:
    first, second, group, ok = columns(rows)
    expected = [
        naive_tau([(a, b) for a, b, g, fine in rows if fine and g == wanted])
        for wanted in sorted({g for _, _, g, _ in rows})
    ]
    found = group_rank_correlations(first, second, group, ok_B=ok)
    assert found.tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_rank_correlations_are_scipys_and_change_sign_with_one_reward() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 6, (2, 20, 9)).astype(float)
    expected = [scipy.stats.kendalltau(a, b).statistic for a, b in zip(first, second, strict=True)]
    found = rank_correlations(torch.tensor(first), torch.tensor(second))
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(rank_correlations(torch.tensor(-first), torch.tensor(second)), -found)
    assert torch.equal(rank_correlations(torch.tensor(first) ** 3, torch.tensor(second)), found)


def test_two_samples_and_constant_rewards_have_no_ranks() -> None:
    increasing = torch.tensor([[1.0, 2.0, 3.0]])
    assert rank_correlations(increasing, increasing).tolist() == [1.0]
    assert rank_correlations(increasing, torch.ones(1, 3)).isnan().all()
    assert rank_correlations(increasing, increasing, torch.tensor([[True, True, False]])).isnan().all()


def naive_diversity(images: torch.Tensor, size: int) -> float:
    _, channels, height, width = images.shape
    distances = []
    for a, b in itertools.combinations(images.double().tolist(), 2):
        squares = []
        for channel, top, left in itertools.product(
            range(channels), range(0, height, height // size), range(0, width, width // size)
        ):
            area = list(itertools.product(range(top, top + height // size), range(left, left + width // size)))
            mean_a = sum(a[channel][y][x] for y, x in area) / len(area)
            mean_b = sum(b[channel][y][x] for y, x in area) / len(area)
            squares.append((mean_a - mean_b) ** 2)
        distances.append(math.sqrt(sum(squares) / len(squares)))
    return sum(distances) / len(distances)


def test_diversity_is_the_loop_and_leaves_failed_images_out() -> None:
    images = torch.rand(6, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    group = torch.tensor([7, 2, 7, 2, 7, 5])
    ok = torch.tensor([True, True, True, True, False, True])
    images[4] = math.nan
    found = group_diversity(images, group, ok_B=ok, size=4)
    expected = [naive_diversity(images[[1, 3]], 4), naive_diversity(images[[0, 2]], 4)]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_diversity_goes_from_0_for_equal_images_to_1_for_black_and_white() -> None:
    photo = torch.rand(1, 3, 40, 24, generator=torch.Generator().manual_seed(2)).expand(3, -1, -1, -1)
    opposite = torch.stack([torch.zeros(3, 40, 24), torch.ones(3, 40, 24)])
    group = torch.tensor([0, 0, 0, 1, 1])
    assert group_diversity(torch.cat([photo, opposite]), group).tolist() == [0.0, pytest.approx(1.0)]
    bytes_ = (torch.cat([photo, opposite]) * 255).round().to(torch.uint8)
    assert group_diversity(bytes_, group).tolist() == [0.0, pytest.approx(1.0)]


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_samples_changes_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, other = torch.randn(2, 12, generator=generator)
    images = torch.rand(12, 3, 8, 8, generator=generator)
    group = torch.randint(3, (12,), generator=generator)
    ok = torch.rand(12, generator=generator) < 0.8
    order = torch.randperm(12, generator=generator)
    before = training_metrics(rewards, group, ok_B=ok, images_BCHW=images)
    after = training_metrics(rewards[order], group[order], ok_B=ok[order], images_BCHW=images[order])
    for name in ("reward_mean", "group_std", "zero_std_ratio", "failed_ratio", "diversity"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-9, nan_ok=True)
    assert torch.equal(
        group_rank_correlations(rewards, other, group, ok_B=ok).nan_to_num(9),
        group_rank_correlations(rewards[order], other[order], group[order], ok_B=ok[order]).nan_to_num(9),
    )


def test_training_metrics_leave_failed_samples_and_lone_survivors_out() -> None:
    rewards = torch.tensor([1.0, 3.0, math.nan, 5.0, math.nan, 2.0, 2.0])
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    found = training_metrics(rewards, group, ok_B=~rewards.isnan(), drift=0.5)
    assert found.reward_mean == pytest.approx(13 / 5)
    assert found.group_std == pytest.approx(math.sqrt(2) / 2)  # of groups 0 and 2; group 1 has one sample left
    assert (found.zero_std_ratio, found.drift, found.diversity) == (0.5, 0.5, None)
    assert found.failed_ratio == pytest.approx(2 / 7)


def test_a_batch_that_failed_has_no_metrics() -> None:
    images = torch.full((4, 3, 8, 8), math.nan)
    found = training_metrics(
        torch.full((4,), math.nan),
        torch.tensor([0, 0, 1, 1]),
        ok_B=torch.zeros(4, dtype=torch.bool),
        images_BCHW=images,
    )
    assert math.isnan(found.reward_mean)
    assert math.isnan(found.group_std)
    assert found.diversity is not None
    assert math.isnan(found.diversity)
    assert found.failed_ratio == 1


def test_what_is_no_number_is_refused_unless_it_failed() -> None:
    group = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="not finite"):
        training_metrics(torch.tensor([1.0, math.nan]), group)
    with pytest.raises(ValueError, match="not finite"):
        rank_correlations(torch.tensor([[1.0, math.inf, 2.0]]), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        group_diversity(torch.full((2, 3, 4, 4), math.nan), group)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        group_diversity(torch.full((2, 3, 4, 4), 1.5), group)
    with pytest.raises(ValueError, match="at least 0"):
        TrainingMetrics(0.0, 1.0, 0.0, 0.0, drift=-0.1)


def test_a_paired_change_is_scipys_paired_test_over_prompts() -> None:
    generator = np.random.default_rng(3)
    before, after = generator.normal(size=(2, 20, 4))
    expected = scipy.stats.ttest_rel(after.mean(1), before.mean(1), alternative="less")
    found = paired_change(torch.tensor(before), torch.tensor(after))
    assert found.mean == pytest.approx((after - before).mean())
    assert found.p_fall == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.p_rise == pytest.approx(1 - expected.pvalue, rel=1e-9)
    assert (found.count, found.degrees) == (20, 19)


def test_a_pair_of_which_one_failed_is_no_pair() -> None:
    before = torch.tensor([[1.0, 2.0], [math.nan, 4.0], [5.0, math.nan], [0.0, 0.0]])
    after = torch.tensor([[2.0, math.nan], [7.0, 6.0], [math.nan, 1.0], [4.0, 2.0]])
    found = paired_change(before, after)  # differences of the prompts: 1, 2, none, 3
    assert (found.count, found.mean) == (3, pytest.approx(2.0))
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))


def test_seeds_of_one_prompt_are_no_independent_witnesses() -> None:
    before = torch.zeros(10, 1)
    after = torch.randn(10, 1, generator=torch.Generator().manual_seed(4))
    once, copied = paired_change(before, after), paired_change(before.expand(10, 8), after.expand(10, 8))
    assert copied.p_fall == pytest.approx(once.p_fall)


def test_unpaired_evaluations_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_change(torch.zeros(3, 2), torch.zeros(2, 2))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.25, 0.5, 0.75]))
def test_a_relative_fall_is_scipys_welch_test(seed: int, limit: float) -> None:
    random = Random(seed)
    baseline = [random.gauss(2, 0.3) for _ in range(random.randint(3, 12))]
    recent = [random.gauss(1, 0.2) for _ in range(random.randint(3, 12))]
    scaled = [(1 - limit) * value for value in baseline]
    expected = scipy.stats.ttest_ind(recent, scaled, equal_var=False, alternative="less").pvalue
    assert fall_beyond(baseline, recent, limit).p_fall == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_a_mean_above_a_limit_is_scipys_test() -> None:
    values = [1.2, 0.9, 1.4, math.nan, 1.1]
    expected = scipy.stats.ttest_1samp([1.2, 0.9, 1.4, 1.1], 1.0, alternative="greater").pvalue
    found = mean_above(values, 1.0)
    assert (found.p_rise, found.count) == (pytest.approx(expected, rel=1e-9), 4)


def test_changes_without_spread_are_certain_and_too_few_values_unknown() -> None:
    assert mean_above([2.0, 2.0], 1.0).p_rise == 0.0
    assert mean_above([1.0, 1.0], 1.0).p_rise == 1.0
    assert fall_beyond([1.0, 1.0], [0.2, 0.2], 0.5).p_fall == 0.0
    assert math.isnan(mean_above([2.0], 1.0).p_rise)
    assert math.isnan(fall_beyond([1.0, 1.0], [0.2], 0.5).p_fall)


def test_the_unit_of_a_fall_pools_both_evaluations() -> None:
    before, after = torch.tensor([[0.0, 2.0, math.nan]]), torch.tensor([[1.0, 1.0, 1.0]])
    assert pooled_std(before, after) == pytest.approx(1.0)  # variances 2 and 0
    assert math.isnan(pooled_std(before, torch.tensor([[1.0, math.nan, math.nan]])))


PRECISE = Change(mean=-0.3, standard_error=0.02, count=100, degrees=99)


def test_a_steady_fall_is_no_wobble() -> None:
    jumps = [-0.05, -0.05, -0.05, -0.05]
    found = with_wobble(PRECISE, jumps, [0.01] * 4)
    assert found.standard_error == pytest.approx(PRECISE.standard_error, abs=1e-12)
    assert found.degrees == pytest.approx(PRECISE.degrees)
    assert found.p_fall == pytest.approx(PRECISE.p_fall, rel=1e-6)


def test_one_sudden_fall_is_no_wobble() -> None:
    before = with_wobble(PRECISE, [0.01, -0.01] * 4, [0.0] * 8)
    after = with_wobble(PRECISE, [*[0.01, -0.01] * 4, -0.8, 0.01], [0.0] * 10)
    assert after.standard_error == pytest.approx(before.standard_error, rel=0.01)


def test_the_wobble_is_that_of_a_random_walk_and_larger_for_independent_noise() -> None:
    rng = np.random.default_rng(0)
    exact = Change(-0.3, 0.0, 100, 99)
    walk = rng.normal(size=4000)
    assert with_wobble(exact, walk.tolist(), [0.0] * 4000).standard_error == pytest.approx(1.0, rel=0.05)
    noise = np.diff(rng.normal(size=4001))  # the difference of two has a standard deviation of sqrt(2)
    expected = pytest.approx(math.sqrt(2) * math.sqrt(1.5), rel=0.05)
    assert with_wobble(exact, noise.tolist(), [0.0] * 4000).standard_error == expected


def test_what_the_prompts_explain_of_the_bends_is_not_counted_twice() -> None:
    jumps = np.random.default_rng(1).normal(size=4000) * 0.05  # as large as their standard error says
    alone = with_wobble(PRECISE, jumps.tolist(), [0.05] * 4000)
    assert alone.standard_error == pytest.approx(PRECISE.standard_error, rel=0.1)
    assert with_wobble(PRECISE, jumps.tolist(), [0.03] * 4000).standard_error == pytest.approx(
        math.hypot(0.02, 0.04), rel=0.05
    )


def test_few_bends_make_a_wobble_unsure() -> None:
    few = with_wobble(PRECISE, [0.1, -0.1, 0.1], [0.0] * 3)
    many = with_wobble(PRECISE, [0.1, -0.1] * 20, [0.0] * 40)
    assert few.standard_error == pytest.approx(many.standard_error)
    assert few.degrees < 2.1 < 38 < many.degrees < 41
    assert few.p_fall > 1.5 * many.p_fall
    assert with_wobble(PRECISE, [0.1], [0.0]) == PRECISE
