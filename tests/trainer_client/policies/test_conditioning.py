"""Conditionings are batches: rows keep their values through indexing, repeating, padding and caching."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer_client.policies import Conditioning, PromptCache


def conditioning(rows: int, length: int = 3, seed: int = 0, *, negative: bool = True) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1), generator=generator)
    return Conditioning(
        torch.randn(rows, length, 4, generator=generator) * mask[..., None],
        torch.randn(rows, 5, generator=generator),
        mask,
        conditioning(rows, 2, seed + 1, negative=False) if negative else None,
    )


def equal(left: Conditioning | None, right: Conditioning | None) -> bool:
    if left is None or right is None:
        return left is right
    pairs = [(left.embeddings, right.embeddings), (left.pooled, right.pooled), (left.mask, right.mask)]
    same = all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
    return same and equal(left.negative, right.negative)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4))
def test_concatenated_rows_come_back_apart(sizes: list[tuple[int, int]]) -> None:
    parts = [conditioning(rows, length, seed=i) for i, (rows, length) in enumerate(sizes)]
    joined = Conditioning.cat(parts)
    assert len(joined) == sum(rows for rows, _ in sizes)
    start = 0
    for part in parts:
        row = joined[start : start + len(part)]
        assert equal(row.trimmed(), part.trimmed())
        start += len(part)


@given(st.integers(1, 4), st.integers(1, 4))
def test_repeating_is_indexing_each_row_several_times(rows: int, times: int) -> None:
    whole = conditioning(rows)
    assert equal(whole.repeat(times), whole[[row for row in range(rows) for _ in range(times)]])


def test_rows_are_chosen_by_slices_indices_and_booleans() -> None:
    whole = conditioning(4)
    assert torch.equal(whole[1:3].embeddings, whole.embeddings[1:3])
    assert equal(whole[torch.tensor([3, 0])], whole[[3, 0]])
    assert equal(whole[torch.tensor([True, False, True, False])], whole[[0, 2]])
    chosen = whole[[2]]
    assert chosen.negative is not None
    assert whole.negative is not None
    assert torch.equal(chosen.negative.embeddings, whole.negative.embeddings[2:3])


def test_moving_changes_features_and_not_the_mask() -> None:
    moved = conditioning(2).to("cpu", torch.bfloat16)
    assert moved.pooled is not None
    assert moved.mask is not None
    assert [part.dtype for part in (moved.embeddings, moved.pooled)] == [torch.bfloat16] * 2
    assert moved.mask.dtype == torch.bool
    assert moved.negative is not None
    assert moved.negative.embeddings.dtype == torch.bfloat16


def test_padding_is_masked_zeros() -> None:
    joined = Conditioning.cat([conditioning(1, 2), conditioning(1, 5, seed=7)])
    assert joined.mask is not None
    assert joined.embeddings.shape == (2, 5, 4)
    assert not joined.mask[0, 2:].any()
    assert (joined.embeddings[0, 2:] == 0).all()


def test_what_cannot_be_one_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3 tokens"):
        Conditioning.cat([Conditioning(torch.zeros(1, 2, 4)), Conditioning(torch.zeros(1, 3, 4))])
    with pytest.raises(ValueError, match="only some"):
        Conditioning.cat([conditioning(1), conditioning(1, negative=False)])
    with pytest.raises(ValueError, match="no conditionings"):
        Conditioning.cat([])
    with pytest.raises(ValueError, match="batch sizes"):
        Conditioning(torch.zeros(2, 3, 4), torch.zeros(1, 5))


class Encoder:
    """Encodes a prompt as its bytes, and writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, prompts: Sequence[str], negative: str | None = None) -> Conditioning:
        self.asked.append(list(prompts))
        rows = []
        for prompt in prompts:
            values = torch.tensor([float(byte) for byte in prompt.encode()] or [0.0])
            rows.append(Conditioning(values[None, :, None], mask=torch.ones(1, len(values), dtype=torch.bool)))
        told = Conditioning.cat(rows)
        steered_from = None if negative is None else Encoder()([f"not {negative}"] * len(prompts))
        return Conditioning(told.embeddings, mask=told.mask, negative=steered_from)


@given(st.lists(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=1, max_size=5), min_size=1, max_size=6))
def test_the_cache_answers_like_the_encoder_and_asks_each_prompt_once(batches: list[list[str]]) -> None:
    encoder = Encoder()
    cached = PromptCache(encoder)
    for prompts in batches:
        assert equal(cached(prompts), Encoder()(prompts))
    asked = [prompt for batch in encoder.asked for prompt in batch]
    assert sorted(asked) == sorted(set(asked))
    assert set(asked) == {prompt for prompts in batches for prompt in prompts}


def test_the_cache_encodes_a_negative_in_its_own_role() -> None:
    cached = PromptCache(Encoder(), negative="blurry")
    assert equal(cached(["a", "bb"]), Encoder()(["a", "bb"], "blurry"))


def test_the_cache_stays_within_its_bytes_and_forgets_the_oldest() -> None:
    row = Encoder()(["aaaa"]).nbytes
    encoder = Encoder()
    cached = PromptCache(encoder, max_bytes=2 * row)
    for prompts in (["aaaa"], ["bbbb"], ["aaaa"], ["cccc"], ["aaaa"], ["bbbb"]):
        assert equal(cached(prompts), Encoder()(prompts))
        assert cached.nbytes <= 2 * row
    assert encoder.asked == [["aaaa"], ["bbbb"], ["cccc"], ["bbbb"]]


def test_a_batch_larger_than_the_cache_is_answered() -> None:
    cached = PromptCache(Encoder(), max_bytes=1)
    assert equal(cached(["aa", "bb", "aa"]), Encoder()(["aa", "bb", "aa"]))
    assert cached.nbytes == 0
