"""Batches of a rollout: in which pieces they are drawn."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer_client.prompts import Prompt
from trainer_client.run_batch import Batch, halved


def batch(count: int, chunks: int = 1) -> Batch:
    prompts = [Prompt("a red circle")] * count
    chunk_B = torch.arange(count) * chunks // max(count, 1)
    return Batch(0, 0, range(count), prompts, torch.zeros(count, dtype=torch.int64), chunk_B, [])


def sizes(count: int, size: int, smallest: int | None) -> list[int]:
    return [len(rows) for rows in batch(count).pieces(size, smallest=smallest)]


def test_only_the_last_batch_comes_in_halves() -> None:
    assert sizes(48, 16, 4) == [16, 16, 8, 4, 4]
    assert sizes(48, 16, None) == [16, 16, 16]
    assert sizes(40, 16, 4) == [16, 16, 4, 4]
    assert sizes(7, 16, 2) == [4, 3]
    assert sizes(16, 16, 16) == [16]


@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 20), st.integers(1, 3))
def test_every_row_is_drawn_once_in_order_and_no_piece_is_too_large_or_small(
    count: int, size: int, smallest: int, chunks: int
) -> None:
    whole = batch(count, chunks)
    for chunk in range(chunks):
        plain = list(whole.pieces(size, chunk))
        rows = list(whole.pieces(size, chunk, smallest))
        assert [row for piece in rows for row in piece] == [row for piece in plain for row in piece]
        assert all(len(piece) <= size for piece in rows)
        if chunk < chunks - 1 and count >= chunks:
            assert rows == plain
        elif size > smallest and plain and len(plain[-1]) >= smallest:
            assert all(len(piece) >= min(smallest, len(plain[-1])) for piece in rows)


@given(st.integers(1, 1000), st.integers(1, 50))
def test_halves_are_never_smaller_than_allowed(left: int, smallest: int) -> None:
    taken = halved(left, smallest)
    assert 1 <= taken <= left
    assert taken == left or (taken >= smallest and 2 * taken - left in (0, 1))
