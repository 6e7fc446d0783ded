"""The order in which a run sees its prompts: shuffled every epoch from a seed, and resumable at any place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from trainer_client.distributed import derived_seed


class PromptOrder:
    """Indices into ``prompts``, each once an epoch, in a permutation that follows from (seed, epoch) alone.

    Every rank makes the same order and takes its share of each batch (:func:`trainer_client.distributed.own_share`).
    ``epoch`` and ``position`` say what comes next. Raises ValueError for no prompts.
    """

    def __init__(self, prompts: Sequence[str], seed: int, *, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("there are no prompts")
        self.size = len(prompts)
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0
        self._digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
        self._permutation = self._of_epoch(0)

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices; at the end of an epoch it goes on with the next. Raises ValueError if < 0."""
        if count < 0:
            raise ValueError(f"at least 0 prompts are taken, not {count}")
        taken: list[int] = []
        while len(taken) < count:
            part = self._permutation[self.position : self.position + count - len(taken)]
            taken += part
            self.position += len(part)
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._permutation = self._of_epoch(self.epoch)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position, and what the order follows from."""
        return {"epoch": self.epoch, "position": self.position, **self._origin()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken. Raises ValueError for other prompts, another seed or another shuffle."""
        wrong = [name for name, value in self._origin().items() if state[name] != value]
        if wrong:
            raise ValueError(f"the order of prompts is another: {', '.join(wrong)} differ")
        self.epoch, self.position = state["epoch"], state["position"]
        self._permutation = self._of_epoch(self.epoch)

    def _origin(self) -> dict[str, Any]:
        return {"seed": self.seed, "shuffle": self.shuffle, "size": self.size, "prompts_sha256": self._digest}

    def _of_epoch(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(derived_seed("prompt order", self.seed, epoch))
        return torch.randperm(self.size, generator=generator).tolist()
