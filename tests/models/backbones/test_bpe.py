"""The BPE here gives open_clip's ids for every text, and long words do not take quadratic time."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from models.backbones import bpe

REFERENCE = SimpleTokenizer()
EVERYTHING = 10**9


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text("abcderst'", max_size=80), st.text("a!.-_😀é 1٣", max_size=40)))
def test_ids_are_open_clips(prompt: str) -> None:
    assert bpe.encode(prompt, EVERYTHING) == REFERENCE.encode(prompt)


@pytest.mark.parametrize(
    "prompt", ["", "<start_of_text> hi <END_OF_TEXT>x", "don't we'll I'M", "&amp;amp; ﬁ", "\ud800 x"]
)
def test_ids_are_open_clips_for_odd_prompts(prompt: str) -> None:
    assert bpe.encode(prompt, EVERYTHING) == REFERENCE.encode(prompt)


def test_long_words_are_merged_as_open_clip_merges_them() -> None:
    generator = random.Random(0)
    for alphabet in ("ab", "aelst", "abcdefghijklmnopqrstuvwxyz"):
        word = "".join(generator.choices(alphabet, k=400))
        assert bpe.encode(word, EVERYTHING) == REFERENCE.encode(word)


@given(st.text("abc", min_size=1, max_size=30), st.permutations(["ab", "bc", "aa", "ca", "aab", "abc", "cab", "aabc"]))
def test_merging_follows_its_definition_for_any_ranking(word: str, products: list[str]) -> None:
    """Ranks in an order that no training would give: a merge may create a pair of a lower rank."""
    ranks: dict[tuple[str, str], int] = {}
    for rank, product in enumerate(products):
        for cut in range(1, len(product)):
            ranks.setdefault((product[:cut], product[cut:]), rank * 10 + cut)
    assert bpe.merge(list(word), ranks) == naive_merge(list(word), ranks)


def naive_merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while True:
        known = [pair for pair in pairwise(symbols) if pair in ranks]
        if not known:
            return symbols
        best = min(known, key=lambda pair: ranks[pair])
        merged: list[str] = []
        i = 0
        while i < len(symbols):
            if tuple(symbols[i : i + 2]) == best:
                merged.append(symbols[i] + symbols[i + 1])
                i += 2
            else:
                merged.append(symbols[i])
                i += 1
        symbols = merged


def test_reading_stops_when_there_are_enough_ids() -> None:
    prompt = "a small red house " * 1000
    some = bpe.encode(prompt, 75)
    assert 75 <= len(some) < 90
    assert some == REFERENCE.encode(prompt)[: len(some)]


def test_long_words_are_not_kept() -> None:
    """Thousands of them, each of the length of a prompt, would be gigabytes."""
    bpe._kept.cache_clear()
    bpe.encode("x" * bpe.LONGEST_KEPT + " " + "y" * (bpe.LONGEST_KEPT + 1), 10_000)
    assert bpe._kept.cache_info().currsize == 1
