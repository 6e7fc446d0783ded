"""Turns whose pictures do not see each other: each is read by itself, after the text that all pictures see.

The head of such a turn is all before its first picture. A picture's *block* reaches from the end of the block before it
(the first one's: from its first token) to its last token; it sees the head and itself. What follows the last picture
sees everything. Blocks stand beside each other: the rotary positions of each go on from the head, so that what is
computed of a block depends on the head and its own picture alone, and N pictures cost 2 N blocks, not N (N - 1). A
checkpoint must be trained so: :class:`models.judge.Turn` says ``independent``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Place = Callable[[Tensor, int], Tensor]
"""Ids of a head and the block of the k-th picture -> their rotary positions [axes, L], as of a turn of that alone."""


@dataclass(frozen=True)
class Block:
    """Tokens ``start`` to ``stop`` of a turn. ``head`` names the tokens before the first block, ``name`` this block:
    equal where head, tokens and picture are."""

    start: int
    stop: int
    head: Hashable = None
    name: Hashable = None


def split_blocks(places: Sequence[int], counts: Sequence[int]) -> tuple[Block, ...]:
    """Blocks of pictures that have ``counts`` tokens, all together at ``places``, in order."""
    blocks: list[Block] = []
    seen = 0
    for count in counts:
        start = blocks[-1].stop if blocks else places[0]
        seen += count
        blocks.append(Block(start, places[seen - 1] + 1))
    return tuple(blocks)


def place_blocks(ids_L: Tensor, blocks: Sequence[Block], place: Place) -> Tensor:
    """Rotary positions int64 [axes, L]: every block goes on from the head, the tail from the largest of all."""
    head, end = blocks[0].start, blocks[-1].stop
    placed = [place(torch.cat([ids_L[:head], ids_L[b.start : b.stop]]), k) for k, b in enumerate(blocks)]
    front = torch.cat([placed[0][:, :head], *(each[:, head:] for each in placed)], dim=1)
    tail = front.max() + 1 + torch.arange(len(ids_L) - end)
    return torch.cat([front, tail.expand(len(front), -1)], dim=1)


def visible(length: int, blocks: Sequence[Block]) -> Tensor:
    """Which tokens (columns) each token (rows) sees, bool [length, length]: those before it, but no other block's."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    for k, block in enumerate(blocks):
        for other in blocks[:k]:
            seen[block.start : block.stop, other.start : other.stop] = False
    return seen


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in the form that every implementation of attention reads: 0 where ``seen``, else the least number."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
