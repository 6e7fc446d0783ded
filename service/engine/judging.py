"""Runs a judge: batches ordered so that what turns share is computed once, in stores that are bounded in bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from models.judge import FeatureStore, Judge
from service.engine.batcher import Outcome

log = logging.getLogger(__name__)


class JudgeRunner:
    """One judge and its stores; lives on one lane's thread."""

    def __init__(
        self,
        judge: Judge,
        features: FeatureStore,
        prefixes: FeatureStore,
        *,
        rows: int,
        on_step: Callable[[], None],
    ) -> None:
        """``rows`` of one forward; ``on_step`` is called between the tokens of a long answer."""
        self.judge, self.rows = judge, rows
        self._stores = features, prefixes
        self._on_step = on_step
        self._attach()

    def _attach(self) -> None:
        features, prefixes = self._stores
        self.judge.chat.attach(features=features, prefixes=prefixes, rows=self.rows, on_step=self._on_step)

    @property
    def identity(self) -> str:
        """What beside weights and templates the answers depend on."""
        return self.judge.chat.identity

    def compare(self, payloads: Sequence[Any]) -> list[Outcome]:
        """Preferences of prepared comparisons, in their order."""
        return self._in_order_of_prefixes(payloads, self.judge.compare)

    def score(self, payloads: Sequence[Any]) -> list[Outcome]:
        """Scores of prepared samples, of a judge that gives them."""
        return self._in_order_of_prefixes(payloads, self.judge.run)

    @staticmethod
    def _in_order_of_prefixes(payloads: Sequence[Any], answer: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
        """Those whose turns begin alike run one after the other, wherever they stood."""
        groups: dict[Any, list[int]] = {}
        for place, payload in enumerate(payloads):
            groups.setdefault(getattr(payload, "prefix", place), []).append(place)
        order = [place for places in groups.values() for place in places]
        answers = answer([payloads[place] for place in order])
        if len(answers) != len(order):
            raise ValueError(f"the judge gave {len(answers)} answers to {len(order)} questions")
        found = dict(zip(order, answers, strict=True))
        return [found[place] for place in range(len(payloads))]

    def halve(self) -> bool:
        """After running out of memory: half the rows from now on. False when there is one already."""
        if self.rows == 1:
            return False
        self.rows //= 2
        self._attach()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory: halved", extra={"model": self.judge.info.name, "rows": self.rows})
        return True
