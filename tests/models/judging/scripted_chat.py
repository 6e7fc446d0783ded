"""A chat model that answers by a function of the turn: what is asked and how answers are read, without a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.base import Candidate, SampleError
from models.judge import Answer, FeatureStore, Generation, Turn, WordScores

Reply = str | Answer | Sequence[str] | SampleError
"""One text for all samples, a text with its end, a text for each sample, or a failure of the turn."""


@dataclass(frozen=True, eq=False)
class ScriptedTurn:
    turn: Turn
    tokens: int
    prefix: Hashable
    warnings: tuple[str, ...] = ()


@dataclass
class ScriptedChat:
    """``reply`` writes the answer to a turn; ``probabilities`` gives those of words, 0 for a word that is not named.

    ``asked`` keeps the turns in the order in which they were answered.
    """

    reply: Callable[[Turn], Reply] = lambda turn: ""
    probabilities: Callable[[Turn], Mapping[str, float] | SampleError] = lambda turn: {}
    warnings: tuple[str, ...] = ()
    weights_hash: str = "sha256:scripted"
    identity: str = "scripted"
    dtype: torch.dtype = torch.float32
    uses_device: bool = False
    asked: list[Turn] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)

    def prepare(self, turn: Turn) -> ScriptedTurn:
        pictures = [part.digest for part in turn.parts if isinstance(part, Candidate)]
        words = sum(len(part.split()) for part in turn.parts if isinstance(part, str))
        return ScriptedTurn(turn, words + 10 * len(pictures), tuple(pictures[:-1]), self.warnings)

    def score(self, turns: Sequence[ScriptedTurn], words: Sequence[str]) -> list[WordScores | SampleError]:
        self.asked += [turn.turn for turn in turns]
        return [self._score(turn.turn, words) for turn in turns]

    def _score(self, turn: Turn, words: Sequence[str]) -> WordScores | SampleError:
        given = self.probabilities(turn)
        if isinstance(given, SampleError):
            return given
        found = [given.get(word, 0.0) for word in words]
        return WordScores(tuple(math.log(value) if value else -math.inf for value in found))

    def generate(self, turns: Sequence[ScriptedTurn], how: Generation) -> list[list[Answer] | SampleError]:
        self.asked += [turn.turn for turn in turns]
        self.generations.append(how)
        return [self._answers(self.reply(turn.turn), how.samples) for turn in turns]

    @staticmethod
    def _answers(reply: Reply, samples: int) -> list[Answer] | SampleError:
        if isinstance(reply, SampleError):
            return reply
        if isinstance(reply, str | Answer):
            return [reply if isinstance(reply, Answer) else Answer(reply, True)] * samples
        assert len(reply) == samples
        return [Answer(text, True) for text in reply]

    def attach(self, *, features: FeatureStore, prefixes: FeatureStore, rows: int, on_step: Callable[[], None]) -> None:
        pass


class ScriptedGradientChat(ScriptedChat):
    """Also gives gradients: P(yes) is the mean of the pixels, P(no) the rest."""

    def score_gradient(self, turn: Turn, words: Sequence[str]) -> tuple[WordScores, Tensor]:
        self.asked.append(turn)
        (pixels,) = (part for part in turn.parts if isinstance(part, Tensor))
        yes = float(pixels.mean())
        sign = 1.0 if words[0] == "yes" else -1.0
        values = (yes, 1 - yes) if sign > 0 else (1 - yes, yes)
        gradient = torch.full_like(pixels, sign / pixels.numel())
        return WordScores(tuple(math.log(value) for value in values)), gradient
