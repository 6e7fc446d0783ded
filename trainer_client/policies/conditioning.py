"""What a policy is told about its prompts: encoded once, then indexed, repeated per group, moved and cached."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts of a batch.

    ``embeddings`` is [B, L, D], one row of token features per prompt; ``pooled`` [B, P] is the prompt as one vector,
    for families that have it; ``mask`` bool [B, L] is true for real tokens, for families whose prompts differ in
    length. ``negative`` holds what classifier-free guidance steers away from: B rows too, their L may differ.
    """

    embeddings: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    negative: Conditioning | None = None

    def __post_init__(self) -> None:
        sizes = {len(part) for part in (self.embeddings, self.pooled, self.mask, self.negative) if part is not None}
        if len(sizes) != 1:
            raise ValueError(f"the parts of a conditioning have different batch sizes: {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Conditioning:
        """The chosen rows, still as a batch; ``rows`` is a slice, indices, or a tensor of indices or booleans [B]."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows, device=self.embeddings.device)
        return self.map(lambda tensor: tensor[index])

    def repeat(self, times: int) -> Conditioning:
        """Every row ``times`` times in succession, as a group of candidates shares its prompt: [B * times, ...]."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """On another device, its features in another floating-point type; the mask stays boolean."""
        return self.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def trimmed(self) -> Conditioning:
        """Without the positions that are padding in every row; the same where there is no mask."""
        negative = None if self.negative is None else self.negative.trimmed()
        if self.mask is None:
            return replace(self, negative=negative)
        used = self.mask.any(dim=0).nonzero()
        length = int(used[-1]) + 1 if len(used) else 0
        return replace(self, embeddings=self.embeddings[:, :length], mask=self.mask[:, :length], negative=negative)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own = sum(part.nbytes for part in (self.embeddings, self.pooled, self.mask) if part is not None)
        return own + (0 if self.negative is None else self.negative.nbytes)

    @staticmethod
    def cat(parts: Iterable[Conditioning]) -> Conditioning:
        """All rows of ``parts`` in order; sequences with a mask are padded with zeros to the longest.

        Raises ValueError for no parts, for parts of which only some have a field, and for different lengths without a
        mask: zeros that nothing masks would be read as tokens.
        """
        listed = list(parts)
        if not listed:
            raise ValueError("no conditionings to concatenate")
        negatives = [part.negative for part in listed if part.negative is not None]
        masks = [part.mask for part in listed if part.mask is not None]
        pooled = [part.pooled for part in listed if part.pooled is not None]
        if any(len(found) not in (0, len(listed)) for found in (negatives, masks, pooled)):
            raise ValueError("only some of the conditionings have a negative, a mask or a pooled vector")
        lengths = [part.embeddings.shape[1] for part in listed]
        longest = max(lengths)
        if not masks and min(lengths) != longest:
            raise ValueError(f"sequences of {min(lengths)} and {longest} tokens, and no mask to tell padding")
        return Conditioning(
            torch.cat([F.pad(part.embeddings, (0, 0, 0, longest - part.embeddings.shape[1])) for part in listed]),
            torch.cat(pooled) if pooled else None,
            torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks]) if masks else None,
            Conditioning.cat(negatives) if negatives else None,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Every tensor, those of the negative too, by what ``change`` makes of it."""
        return Conditioning(
            change(self.embeddings),
            None if self.pooled is None else change(self.pooled),
            None if self.mask is None else change(self.mask),
            None if self.negative is None else self.negative.map(change),
        )


class EncodePrompts(Protocol):
    """The ``encode_prompts`` of a policy."""

    def __call__(self, prompts: Sequence[str], negative: str | None = None) -> Conditioning: ...


class PromptCache:
    """Encoded prompts, kept for the next time; the least recently used go when ``max_bytes`` are exceeded.

    ``encode`` is a policy's ``encode_prompts``. One ``negative`` prompt serves all rows. ``device`` is where rows are
    kept (None: where they are made); what :meth:`__call__` returns lies there too. Not for several threads.
    """

    def __init__(
        self,
        encode: EncodePrompts,
        *,
        negative: str | None = None,
        max_bytes: int = 2**30,
        device: torch.device | str | None = None,
    ) -> None:
        self._encode = encode
        self._device = device
        self._max_bytes = max_bytes
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()
        steered_from = None if negative is None else encode([negative], negative).negative
        self._negative = None if steered_from is None else self._kept(steered_from)
        self.nbytes = 0

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of ``prompts``, in order; encodes each prompt that it does not have once, in one batch."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        found = {prompt: self._rows[prompt] for prompt in prompts if prompt in self._rows}
        if missing:
            fresh = self._encode(missing)
            # A row that were a view would keep its whole batch in memory.
            found |= {prompt: self._kept(fresh[[i]]) for i, prompt in enumerate(missing)}
        conditioning = Conditioning.cat(found[prompt] for prompt in prompts)
        for prompt in dict.fromkeys(prompts):
            self._remember(prompt, found[prompt])
        if self._negative is None:
            return conditioning
        return replace(conditioning, negative=self._negative.repeat(len(prompts)))

    def _kept(self, row: Conditioning) -> Conditioning:
        return row.trimmed().to(self._device).map(Tensor.clone)

    def _remember(self, prompt: str, row: Conditioning) -> None:
        if prompt not in self._rows:
            self._rows[prompt] = row
            self.nbytes += row.nbytes
        self._rows.move_to_end(prompt)
        while self.nbytes > self._max_bytes:
            self.nbytes -= self._rows.popitem(last=False)[1].nbytes
