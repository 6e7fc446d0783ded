"""Runs a judge: batches ordered so that what turns share is computed once, in stores that are bounded in bytes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from models.judge import FeatureStore, Judge
from models.judging.chat_judge import ChatJudge
from service.engine.batcher import Outcome

log = logging.getLogger(__name__)

PROBE_TOKENS = 4
"""Of a probe's answer: the steps after the first go another way through the network."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A prepared comparison that is asked to see whether the judge answers, not what."""

    prepared: Any


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
        self._prober = short_spoken(judge)
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
        """Preferences of prepared comparisons, in their order; those of a :class:`Probe` from a few tokens."""
        probed = [payload.prepared for payload in payloads if isinstance(payload, Probe)]
        asked = [payload for payload in payloads if not isinstance(payload, Probe)]
        probes = iter(self._in_order_of_prefixes(probed, self._prober.compare) if probed else [])
        answers = iter(self._in_order_of_prefixes(asked, self.judge.compare) if asked else [])
        return [next(probes if isinstance(payload, Probe) else answers) for payload in payloads]

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


def short_spoken(judge: Judge) -> Judge:
    """The same judge, on the same network, whose written answers end after :data:`PROBE_TOKENS` tokens.

    Such an answer rarely has a verdict: an :class:`models.judge.AnswerError` of it is no failure. Judges that are no
    :class:`ChatJudge` are probed by what they are always asked.
    """
    if not isinstance(judge, ChatJudge):
        return judge
    probe = copy.copy(judge)
    few = min(PROBE_TOKENS, judge.generation.max_tokens)
    probe.generation = replace(judge.generation, max_tokens=few, samples=1)
    return probe
