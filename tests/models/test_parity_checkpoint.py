"""The measures by which parity judges: the order in bfloat16, records of tensors, differences."""

from typing import Any

import pytest
import torch

from models.parity_checkpoint import bfloat16_order, difference, record_error


def test_the_order_in_bfloat16_counts_pairs_beyond_the_noise() -> None:
    exact = torch.tensor([[0.0, 1.0, 1.1, 10.0]], dtype=torch.float64)
    noise = torch.tensor([[0.1, -0.1, 0.1, -0.1]], dtype=torch.float64)
    fine = bfloat16_order(exact, exact + noise)
    assert (fine.cases, fine.error) == (5, 0)  # 1.0 and 1.1 are nearer than 4 * 0.1
    swapped = exact + noise
    swapped[0, [0, 3]] = swapped[0, [3, 0]]
    assert bfloat16_order(exact, swapped).cases == 0  # the swap itself is the noise
    many = torch.arange(400, dtype=torch.float64)[None] * 10
    moved = many.clone()
    moved[0, [0, 5]] = moved[0, [5, 0]]
    assert bfloat16_order(many, moved).error > 0
    tie = many.clone()
    tie[0, 1] = tie[0, 0]
    assert bfloat16_order(many, tie).error > 0
    lost = many.clone()
    lost[0, 7] = float("nan")
    assert not bfloat16_order(many, lost).ok


def test_rows_are_ordered_each_on_its_own() -> None:
    exact = torch.tensor([[0.0, 1.0], [100.0, 101.0]], dtype=torch.float64)
    assert bfloat16_order(exact, exact).cases == 2


def test_a_record_differs_by_its_worst_part() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    record: dict[str, Any] = {
        "shape": [3, 4],
        "mean": 5.5,
        "first8": [float(i) for i in range(8)],
        "probe": [[11, 11.0]],
    }
    record |= {"std": float(tensor.std(correction=0)), "min": 0.0, "max": 11.0, "l2": float(tensor.norm())}
    assert record_error(tensor, record) < 1e-6
    assert record_error(tensor.T, record) == float("inf")
    for part, value in (("mean", 5.7), ("max", 11.2), ("min", -0.2), ("first8", [0.2, *record["first8"][1:]])):
        assert record_error(tensor, record | {part: value}) == pytest.approx(0.2)
    assert record_error(tensor, record | {"probe": [[3, 3.5]]}) == pytest.approx(0.5)
    assert record_error(tensor, record | {"l2": record["l2"] * 2}) == pytest.approx(0.5)
    assert record_error(tensor * float("nan"), record) != record_error(tensor * float("nan"), record)


def test_an_input_without_a_score_counts_as_off() -> None:
    assert difference(None, 0.0) == float("inf")
    assert difference(0.5, 0.25) == 0.25
