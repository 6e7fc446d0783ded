"""Byte-pair merges that make each word of a small language one token."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.models import BPE


def word_merges(
    words: Sequence[str], letters: Sequence[str], end_of_word_suffix: str | None = None
) -> list[tuple[str, str]]:
    """A word's pieces under the merges so far are joined from the left, until it is one.

    Later merges have a lower rank, so they never undo an earlier word; unlike a trainer that breaks ties at random, the
    same words give the same merges.
    """
    suffix = {} if end_of_word_suffix is None else {"end_of_word_suffix": end_of_word_suffix}
    merges: list[tuple[str, str]] = []
    for word in words:
        while True:
            known = dict.fromkeys([*letters, *map("".join, merges)])
            model = BPE({piece: i for i, piece in enumerate(known)}, merges, **suffix)
            pieces = [token.value for token in model.tokenize(word)]
            if len(pieces) == 1:
                break
            merges.append((pieces[0], pieces[1]))
    return merges
