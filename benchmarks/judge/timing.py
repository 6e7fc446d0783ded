"""One judge on a random Qwen2-VL of about 100 million parameters, timed with its caches and without."""

from __future__ import annotations

import copy
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from benchmarks import samples
from models.backbones.vlm import LocalChat
from models.backbones.vlm_inputs import LocalTurn
from models.base import Candidate, LoadOptions, SampleError
from models.judge import Comparison, Judge
from models.registry import get_model
from service.adaptive import Adaptive
from service.engine.features import FeatureCache
from service.telemetry import Telemetry
from service.tournament import JudgedComparison, Pair

SIDES = {64: 224, 256: 448}
"""Tokens of an image to its side in pixels: patches of 14, merged two by two."""
JUDGE = "shapes-judge"
"""Its question: both images, then a short text (reads the first token of the answer), as published judges lay it out.
The random network's small tokenizer would make several times as many tokens of a longer text as a true one does."""
IMAGES_FIRST, TEXT_FIRST = "images first", "text first"
MODES = {IMAGES_FIRST: "yes_no", TEXT_FIRST: "text_first"}
"""Modes of the judge by what stands first in its question; with the text first the images do not see each other."""
CAPTION = "a photo of a red circle left of a blue square"
ROWS = 8
_ROOM = 8 << 30


class TimedChat(LocalChat):
    """A chat model that knows how long its parts took; ``seconds`` by part."""

    def __init__(self, model: Any, processor: Any, **options: Any) -> None:
        super().__init__(model, processor, **options)
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def encode(self, picture: Any) -> Tensor:
        with self._part("vision"):
            return super().encode(picture)

    def _prefix(self, turn: LocalTurn, features: dict[str, Tensor]) -> Tensor:
        with self._part("prefixes"):
            return super()._prefix(turn, features)

    def read(self, *arguments: Any, **options: Any) -> tuple[Tensor, Any, int]:
        with self._part("ends"):
            return super().read(*arguments, **options)


@dataclass
class Group:
    """N candidates of one prompt with a judge; asking is by ordered pairs."""

    judge: Judge
    chat: TimedChat
    candidates: list[Candidate]
    prompt: str
    prepared: dict[Pair, Any] = field(default_factory=dict)

    def prepare(self, pairs: Sequence[Pair]) -> None:
        """On the CPU, in advance: the same work with caches and without, and no part of either time."""
        for first, second in pairs:
            if (first, second) not in self.prepared:
                comparison = Comparison(self.prompt, self.candidates[first], self.candidates[second])
                self.prepared[first, second] = self.judge.prepare_comparison(comparison)

    def ask(self, pairs: Sequence[Pair]) -> list[float]:
        """P(first preferred) of prepared pairs, in one batch, in which equal beginnings come together."""
        order: dict[Any, list[Pair]] = {}
        for pair in pairs:
            order.setdefault(self.prepared[pair].prefix, []).append(pair)
        together = [pair for same in order.values() for pair in same]
        found = self.judge.compare([self.prepared[pair] for pair in together])
        answers: dict[Pair, float] = {}
        for pair, answer in zip(together, found, strict=True):
            if isinstance(answer, SampleError):
                raise answer
            answers[pair] = answer.probability
        return [answers[pair] for pair in pairs]


@dataclass(frozen=True)
class Timing:
    """Of one tournament: seconds, P(first preferred) of what was asked, ``parts`` in seconds.

    ``tokens``: of one comparison, both images and the text.
    """

    seconds: float
    probabilities: dict[Pair, float]
    parts: dict[str, float]
    tokens: int

    @property
    def each(self) -> float:
        """Seconds of one comparison."""
        return self.seconds / len(self.probabilities)


def group_of(model: Any, processor: Any, count: int, tokens: int, *, shared: bool, layout: str = IMAGES_FIRST) -> Group:
    """``count`` crops of photographs of ``tokens`` tokens each; not ``shared``: the same chat with its caches off."""
    chat = TimedChat(model, processor, share_features=shared, share_prefixes=shared, rows=ROWS if shared else 1)
    judge = get_model(JUDGE).load(LoadOptions(chat=chat, options={"mode": MODES[layout]}))
    assert isinstance(judge, Judge)
    images = [PILImage.fromarray(crop) for crop in samples.crops(count, SIDES[tokens], seed=tokens)]
    candidates = [Candidate(image=image, digest=f"{tokens}/{i}") for i, image in enumerate(images)]
    return Group(judge, chat, candidates, CAPTION)


def orders(count: int) -> list[Pair]:
    """All ordered pairs."""
    return [(i, j) for i in range(count) for j in range(count) if i != j]


def some_orders(count: int, size: int, seed: int) -> list[Pair]:
    """``size`` different ordered pairs by chance."""
    return random.Random(seed).sample(orders(count), size)


def fresh(chat: LocalChat) -> None:
    """Empty stores, as at the start of a request whose images nobody has seen."""
    telemetry = Telemetry()
    chat.attach(
        features=FeatureCache("features", _ROOM, telemetry),
        prefixes=FeatureCache("prefixes", _ROOM, telemetry),
        rows=chat.rows,
        on_step=lambda: None,
    )


def _timed(group: Group, play: Callable[[], dict[Pair, float]]) -> Timing:
    fresh(group.chat)
    group.chat.seconds.clear()
    start = time.perf_counter()
    probabilities = play()
    seconds = time.perf_counter() - start
    parts = dict(group.chat.seconds)
    parts["head and Python"] = seconds - sum(parts.values())
    tokens = max(prepared.tokens for prepared in group.prepared.values())
    return Timing(seconds, probabilities, parts, tokens)


def all_pairs_of(group: Group, count: int) -> Timing:
    """All pairs in both orders, in one batch."""
    pairs = orders(count)
    group.prepare(pairs)
    return _timed(group, lambda: dict(zip(pairs, group.ask(pairs), strict=True)))


def one_by_one(group: Group, pairs: Sequence[Pair]) -> Timing:
    """These pairs, each in a batch of its own."""
    group.prepare(pairs)
    return _timed(group, lambda: {pair: group.ask([pair])[0] for pair in pairs})


def adaptive(group: Group, count: int) -> Timing:
    """An adaptive tournament in its rounds, the choosing of pairs included."""
    group.prepare(orders(count))

    def play() -> dict[Pair, float]:
        schedule, judged = Adaptive(count), list[JudgedComparison]()
        while pairs := schedule.next_pairs(judged):
            answers = group.ask(pairs)
            judged += [JudgedComparison(i, j, p) for (i, j), p in zip(pairs, answers, strict=True)]
        return {(each.first, each.second): each.probability or 0.0 for each in judged}

    return _timed(group, play)


def random_model(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Network and processor of a random checkpoint of the benchmark's size."""
    chat = LocalChat.load(folder, LoadOptions(dtype=dtype))
    return chat.model, copy.copy(chat.processor)
