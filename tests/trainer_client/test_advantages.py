"""Advantages: against loops written from the formulas, the laws of group statistics, failures, several rewards."""

import math
import re
import statistics
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer_client.advantages import (
    FLOW_FACTORY,
    FLOW_GRPO,
    PREF_GRPO,
    Scale,
    Spread,
    best_and_worst,
    best_of_group,
    blended,
    check_group_sizes,
    combined_advantages,
    group_advantages,
    group_statistics,
    mean_of_top,
    standardised,
    weighted_sum,
)

SPREADS = (FLOW_GRPO, PREF_GRPO, FLOW_FACTORY)
SCALES: tuple[Scale, ...] = ("group", "batch")
Batch = tuple[list[float], list[int], list[bool]]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Rewards on a grid (so that equal ones occur), groups of any size and order, some failed."""
    size = draw(st.integers(1, 24))
    rewards = draw(st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=size, max_size=size))
    groups = draw(st.lists(st.integers(-2, 3), min_size=size, max_size=size))
    ok = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return rewards, groups, ok


def tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rewards, groups, ok = batch
    values = [reward if fine else math.nan for reward, fine in zip(rewards, ok, strict=True)]
    return torch.tensor(values, dtype=torch.float32), torch.tensor(groups), torch.tensor(ok)


def naive(batch: Batch, scale: Scale, spread: Spread) -> list[float]:
    """The formula with Python's own statistics."""
    rows = [row for row in zip(*batch, strict=True) if row[2]]
    found = []
    for reward, group, fine in zip(*batch, strict=True):
        own = [r for r, g, _ in rows if g == group]
        reference = own if scale == "group" else [r for r, _, _ in rows]
        if not fine or len(set(own)) == 1:
            found.append(0.0)
            continue
        std = statistics.stdev(reference) if spread.ddof else statistics.pstdev(reference)
        divisor = max(std, spread.eps) if spread.floor else std + spread.eps
        found.append((reward - statistics.fmean(own)) / divisor)
    return found


@settings(deadline=None)
@given(batches(), st.sampled_from(SCALES), st.sampled_from(SPREADS))
def test_advantages_are_the_formula(batch: Batch, scale: Scale, spread: Spread) -> None:
    rewards, groups, ok = tensors(batch)
    found = group_advantages(rewards, groups, ok_B=ok, scale=scale, spread=spread)
    assert found.tolist() == pytest.approx(naive(batch, scale, spread), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(batches(), st.sampled_from(SCALES), st.sampled_from(SPREADS))
def test_every_groups_advantages_have_mean_0_and_failed_samples_exactly_0(
    batch: Batch, scale: Scale, spread: Spread
) -> None:
    rewards, groups, ok = tensors(batch)
    found = group_advantages(rewards, groups, ok_B=ok, scale=scale, spread=spread)
    assert (found[~ok] == 0).all()
    for group in groups.unique():
        assert found[groups == group].sum().item() == pytest.approx(0, abs=1e-9)


@settings(deadline=None)
@given(batches(), st.sampled_from(SCALES), st.randoms(use_true_random=False))
def test_the_order_and_the_names_of_groups_do_not_matter(batch: Batch, scale: Scale, random: Random) -> None:
    rewards, groups, ok = tensors(batch)
    order = list(range(len(rewards)))
    random.shuffle(order)
    found = group_advantages(rewards, groups, ok_B=ok, scale=scale)
    turned = group_advantages(rewards[order], 1000 - 7 * groups[order], ok_B=ok[order], scale=scale)
    torch.testing.assert_close(found[order], turned, rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(batches(), st.sampled_from(SCALES))
def test_failed_samples_might_as_well_not_be_there(batch: Batch, scale: Scale) -> None:
    rewards, groups, ok = tensors(batch)
    found = group_advantages(rewards, groups, ok_B=ok, scale=scale)
    alone = group_advantages(rewards[ok], groups[ok], scale=scale)
    torch.testing.assert_close(found[ok], alone, rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(batches(), st.floats(0.5, 4.0), st.floats(-4.0, 4.0), st.sampled_from(SCALES))
def test_shift_and_scale_of_rewards_cancel(batch: Batch, factor: float, shift: float, scale: Scale) -> None:
    rewards, groups, ok = (tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors(batch))
    exact = Spread(eps=1e-12)
    found = group_advantages(rewards, groups, ok_B=ok, scale=scale, spread=exact)
    moved = group_advantages(factor * rewards + shift, groups, ok_B=ok, scale=scale, spread=exact, resolution=1e-9)
    torch.testing.assert_close(found, moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("reward", [0.1, 0.333, 0.667, 4.2])
@pytest.mark.parametrize("size", [1, 5, 6, 8, 24])
def test_a_constant_group_teaches_exactly_nothing(spread: Spread, reward: float, size: int) -> None:
    """Pref-GRPO's code gives 8 rewards of 0.333 advantages of about 0.7: rounding divided by its own spread."""
    rewards, groups = torch.full((size,), reward), torch.zeros(size)
    assert group_advantages(rewards, groups, spread=spread).tolist() == [0.0] * size
    assert group_statistics(rewards, groups).zero_std_ratio == 1.0


def test_rewards_that_differ_by_rounding_are_equal_and_by_more_are_not() -> None:
    groups = torch.zeros(4)
    rounded = torch.tensor([0.333, 0.333, 0.333, 0.333]) + torch.tensor([0.0, 1.0, -1.0, 0.0]) * 2**-25
    assert len(set(rounded.tolist())) > 1
    assert not group_advantages(rounded, groups, spread=PREF_GRPO).any()
    small = torch.tensor([0.333, 0.333, 0.333, 0.334])
    assert group_advantages(small, groups, spread=PREF_GRPO)[3] > 1
    assert not group_advantages(small, groups, spread=PREF_GRPO, resolution=0.01).any()


def test_columns_have_their_own_statistics() -> None:
    rewards = torch.randn((9, 3), generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([0, 1, 2] * 3)
    ok = torch.tensor([True] * 8 + [False])
    for scale in SCALES:
        found = group_advantages(rewards, groups, ok_B=ok, scale=scale)
        for t in range(3):
            column = group_advantages(rewards[:, t], groups, ok_B=ok, scale=scale)
            torch.testing.assert_close(found[:, t], column, rtol=1e-12, atol=1e-12)


def test_a_batch_in_which_all_failed_gives_zeros() -> None:
    found = group_advantages(torch.full((3,), math.nan), torch.zeros(3), ok_B=torch.zeros(3, dtype=torch.bool))
    assert found.tolist() == [0.0] * 3
    assert math.isnan(mean_of_top(torch.ones(2), torch.zeros(2), 50, ok_B=torch.zeros(2, dtype=torch.bool)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused_unless_masked(bad: float) -> None:
    rewards, groups = torch.tensor([0.1, bad, 0.3]), torch.zeros(3)
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(rewards, groups)
    found = group_advantages(rewards, groups, ok_B=torch.tensor([True, False, True]))
    torch.testing.assert_close(found, torch.tensor([-1, 0, 1]).double() * 0.1 / (0.1 + 1e-4), rtol=1e-6, atol=0)


@settings(deadline=None)
@given(batches(), st.sampled_from([0, 1]))
def test_group_statistics_are_pythons(batch: Batch, ddof: int) -> None:
    rewards, groups, ok = tensors(batch)
    found = group_statistics(rewards, groups, ok_B=ok, ddof=1 if ddof else 0)
    kept = [(reward, group) for reward, group, fine in zip(*batch, strict=True) if fine]
    assert found.group_G.tolist() == sorted({group for _, group in kept})
    for i, group in enumerate(found.group_G.tolist()):
        own = [reward for reward, g in kept if g == group]
        assert found.size_G[i] == len(own)
        assert found.mean_G[i].item() == pytest.approx(statistics.fmean(own))
        std = statistics.pstdev(own) if not ddof else statistics.stdev(own) if len(own) > 1 else 0.0
        assert found.std_G[i].item() == pytest.approx(std)


def test_mean_of_top_counts_the_best_of_each_group() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0, 30.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    assert mean_of_top(rewards, groups, 100) == pytest.approx((2.5 + 20) / 2)
    assert mean_of_top(rewards, groups, 50) == pytest.approx((3.5 + 30) / 2)
    ok = torch.tensor([True, True, True, False, True, False])
    assert mean_of_top(rewards, groups, 1, ok_B=ok) == pytest.approx((3 + 10) / 2)


def test_lost_and_doubled_rows_of_a_group_are_noticed() -> None:
    check_group_sizes(torch.tensor([5, 7, 7, 5]), 2)
    with pytest.raises(ValueError, match=re.escape("by group: {5: 1, 7: 3}")):
        check_group_sizes(torch.tensor([5, 7, 7, 7]), 2)


def test_a_total_is_unknown_where_one_reward_is() -> None:
    rewards = {"a": torch.tensor([1.0, 2.0, math.nan]), "b": torch.tensor([4.0, math.nan, 5.0])}
    ok = {name: ~values.isnan() for name, values in rewards.items()}
    total, known = weighted_sum(rewards, {"a": 2.0, "b": -0.5}, ok)
    assert known.tolist() == [True, False, False]
    assert total[0] == 0.0
    assert total[1:].isnan().all()


two_rewards = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-8, 8), min_size=n, max_size=n),
        st.lists(st.integers(-8, 8), min_size=n, max_size=n),
        st.lists(st.integers(0, 2), min_size=n, max_size=n),
    )
)


@settings(deadline=None)
@example(([0, 5, 0, 0], [0, -6, 0, 0], [0, 0, 1, 1]), 1.0, 1.0, PREF_GRPO)
@given(two_rewards, st.floats(0.1, 2.0), st.floats(0.1, 2.0), st.sampled_from(SPREADS))
def test_gdpo_is_each_reward_normalised_summed_and_normalised(
    values: tuple[list[int], list[int], list[int]], first: float, second: float, spread: Spread
) -> None:
    groups = values[2]
    everything = [True] * len(groups)
    each = [naive(([float(v) for v in column], groups, everything), "group", spread) for column in values[:2]]
    summed = [first * a + second * b for a, b in zip(*each, strict=True)]
    rewards = {"a": torch.tensor(values[0]).float(), "b": torch.tensor(values[1]).float()}
    weights = {"a": first, "b": second}
    plain = combined_advantages(rewards, weights, torch.tensor(groups), spread=spread, standardise=False)
    assert plain.tolist() == pytest.approx(summed, rel=1e-9, abs=1e-12)
    found = combined_advantages(rewards, weights, torch.tensor(groups), spread=spread)
    std = statistics.stdev(summed) if spread.ddof else statistics.pstdev(summed)
    divisor = max(std, spread.eps) if spread.floor else std + spread.eps
    expected = [(value - statistics.fmean(summed)) / divisor for value in summed]
    # Rounding of the sum is divided too: by eps alone where its terms all but cancel.
    near = pytest.approx(expected, rel=1e-6, abs=1e-9 + 1e-15 / divisor)
    # What is left of such terms counts, or is taken for rounding.
    assert found.tolist() == near or (max(summed) - min(summed) < 1e-9 and found.abs().max() == 0)


def test_gdpo_does_not_care_for_the_scale_of_a_reward_and_the_sum_does() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = {name: torch.rand(12, generator=generator, dtype=torch.float64) for name in ("a", "b")}
    larger, weights, groups = rewards | {"a": 100 * rewards["a"]}, {"a": 1.0, "b": 1.0}, torch.arange(12) // 4
    torch.testing.assert_close(
        combined_advantages(rewards, weights, groups), combined_advantages(larger, weights, groups)
    )
    sums = [group_advantages(weighted_sum(each, weights)[0], groups) for each in (rewards, larger)]
    assert (sums[0] - sums[1]).abs().max() > 0.1


def test_opposite_rewards_cancel_to_nothing_and_not_to_rounding() -> None:
    reward = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = [0.1 * reward, 0.2 * reward, -0.3 * reward]
    assert not standardised(terms, spread=PREF_GRPO).any()
    assert torch.stack(terms).sum(0).any()  # rounding is left of the sum, and would have been blown up to 1


def test_a_sample_that_failed_one_reward_leaves_the_statistics_of_all() -> None:
    rewards = {"a": torch.tensor([1.0, 2.0, 4.0, 9.0]), "b": torch.tensor([3.0, math.nan, 1.0, 2.0])}
    ok = {"b": torch.tensor([True, False, True, True])}
    weights, groups, kept = {"a": 1.0, "b": 1.0}, torch.zeros(4), [0, 2, 3]
    found = combined_advantages(rewards, weights, groups, ok=ok)
    alone = combined_advantages({name: r[kept] for name, r in rewards.items()}, weights, groups[kept])
    assert found[1] == 0
    torch.testing.assert_close(found[kept], alone)


def test_blending_follows_the_mask_and_the_weights() -> None:
    first, second = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])
    mask = torch.tensor([True, False])
    assert blended(first, second, 3.0, 1.0, mask).tolist() == [1.5, 1.0]
    assert blended(first, second, 1.0, 1.0).tolist() == [2.0, 2.0]
    assert torch.equal(blended(first, second, 1.0, 0.0), first)
    with pytest.raises(ValueError, match="no positive sum"):
        blended(first, second, -2.0, 1.0)


@settings(deadline=None)
@given(batches())
def test_best_and_worst_of_a_group(batch: Batch) -> None:
    rewards, groups, ok = tensors(batch)
    best, sign = best_of_group(rewards, groups, ok_B=ok), best_and_worst(rewards, groups, ok_B=ok)
    for group in set(batch[1]):
        rows = [i for i, g in enumerate(batch[1]) if g == group and batch[2][i]]
        own = [batch[0][i] for i in rows]
        for i in rows:
            assert best[i] == (batch[0][i] == max(own))
        # A group of equals holds no preference; the reference would prefer its second sample to its first.
        pair = {rows[own.index(max(own))]: 1.0, rows[own.index(min(own))]: -1.0} if len(set(own)) > 1 else {}
        assert {i: sign[i].item() for i in rows if sign[i]} == pair
    assert not best[~ok].any()
    assert not sign[~ok].any()


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="don't fit"):
        group_advantages(torch.ones(3), torch.zeros(2))
    with pytest.raises(ValueError, match="pairs are made"):
        best_and_worst(torch.ones(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="percent"):
        mean_of_top(torch.ones(3), torch.zeros(3), 0)
    with pytest.raises(ValueError, match="scale is"):
        group_advantages(torch.ones(3), torch.zeros(3), scale="prompt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ"):
        weighted_sum({"a": torch.ones(2)}, {"b": 1.0})
    with pytest.raises(ValueError, match="differ in shape"):
        weighted_sum({"a": torch.ones(2), "b": torch.ones(3)}, {"a": 1.0, "b": 1.0})
