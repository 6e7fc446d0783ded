from __future__ import annotations

import pytest
import torch

from service.engine.staging import Stager

CPU = torch.device("cpu")


def rows(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.full((3, 2), i + 1).to(dtype) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 4), (3, 4), (4, 4)])
def test_rows_keep_their_places_and_the_last_one_pads(count: int, size: int, dtype: torch.dtype) -> None:
    given = rows(count, dtype)
    batch = Stager(CPU).stage(given, size)
    assert batch.shape == (size, 3, 2)
    assert batch.dtype == dtype
    assert torch.equal(batch[:count], torch.stack(given))
    assert all(torch.equal(row, given[-1]) for row in batch[count:])


def test_a_batch_owns_its_memory() -> None:
    stager = Stager(CPU)
    given = rows(1)
    first = stager.stage(given, 1)
    second = stager.stage(rows(2)[1:], 1)
    first.zero_()
    assert torch.equal(given[0], torch.ones(3, 2))
    assert torch.equal(second[0], torch.full((3, 2), 2.0))


@pytest.mark.parametrize(("count", "size"), [(0, 4), (5, 4)])
def test_rows_that_do_not_fit_raise_and_name_both_numbers(count: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"{count} rows .* batch of {size}"):
        Stager(CPU).stage(rows(count), size)
