"""Judges that fail on demand, loaded into a real service through ``settings.plugins``.

They prefer the brighter image: P(first) = sigmoid(SHARPNESS * (difference of mean brightness) + the option ``bias``).
What goes wrong with an answer is asked for in the prompt, by a status of :mod:`models.judging.answers`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.base import Calibration, LoadOptions, Output, RewardInfo, Sample, SampleError, UnsupportedInput
from models.judge import (
    Answer,
    AnswerError,
    Comparison,
    FeatureStore,
    Generation,
    Judge,
    Place,
    Preference,
    Turn,
    WordScores,
)
from models.judging.templates import MissingField
from models.registry import register
from tests.service.bodies import INNER_TEXT

SHARPNESS = 8.0
FAULTS = ("empty", "truncated", "contradictory", "refused")
TOKENS = 50


def info(name: str, *, differentiable: bool = False) -> RewardInfo:
    return RewardInfo(
        name=name,
        description="for tests",
        kind="pairwise",
        inputs=("prompt", "image", "context"),
        range=(0.0, 1.0),
        citation="none",
        license="MIT",
        calibration=Calibration(0.25, "for tests"),
        differentiable=differentiable,
        options=("bias", "steps", "step_s", "batch_s"),
    )


@dataclass(frozen=True, eq=False)
class Question:
    prompt: str
    first: float
    second: float
    prefix: Hashable
    tokens: int = TOKENS
    warnings: tuple[str, ...] = ()


class BrightChat:
    """Tells brightness apart; ``steps`` tokens of ``step_s`` seconds each make an answer in words."""

    weights_hash = "sha256:bright"
    identity = "bright"
    dtype = torch.float32
    uses_device = True

    def __init__(self, bias: float, steps: int, step_s: float) -> None:
        self.bias, self.steps, self.step_s = bias, steps, step_s
        self._on_step: Callable[[], None] = lambda: None

    def attach(self, *, features: FeatureStore, prefixes: FeatureStore, rows: int, on_step: Callable[[], None]) -> None:
        self._on_step = on_step

    def prepare(self, turn: Turn) -> Question:
        raise NotImplementedError("these judges prepare their questions themselves")

    def score(self, turns: Sequence[Any], words: Sequence[str]) -> list[WordScores | SampleError]:
        logits = [SHARPNESS * (turn.first - turn.second) + self.bias for turn in turns]
        return [WordScores((-math.log1p(math.exp(-logit)), -math.log1p(math.exp(logit)))) for logit in logits]

    @torch.inference_mode()
    def generate(self, turns: Sequence[Any], how: Generation) -> list[list[Answer] | SampleError]:
        for _ in range(self.steps):
            time.sleep(self.step_s)
            self._on_step()
        return [[self._answer(turn)] for turn in turns]

    def _answer(self, turn: Question) -> Answer:
        fault = next((fault for fault in FAULTS if fault in turn.prompt), "")
        if fault == "empty":
            return Answer("", True)
        verdict = "first" if SHARPNESS * (turn.first - turn.second) + self.bias >= 0 else "second"
        return Answer(f"The {verdict} image is brighter.", fault != "truncated")


class _Bright(Judge):
    def __init__(self, options: LoadOptions) -> None:
        own = options.options
        self.batch_s = float(own.get("batch_s", 0))
        self.chat: BrightChat = BrightChat(
            float(own.get("bias", 0)), int(own.get("steps", 3)), float(own.get("step_s", 0))
        )
        self.weights_hash = self.chat.weights_hash

    @classmethod
    def load(cls, options: LoadOptions) -> _Bright:
        return cls(options)

    uses_device = True

    def prepare_comparison(self, comparison: Comparison) -> Question:
        if "inpaint" in comparison.prompt and (comparison.context is None or comparison.context.mask is None):
            raise MissingField(f"{self.info.name} asks about a mask, and the item has none")
        images = [candidate.image for candidate in (comparison.first, comparison.second)]
        if any(image is None for image in images):
            raise UnsupportedInput(f"{self.info.name} judges images")
        first, second = (float(np.asarray(image).mean() / 255) for image in images)
        return Question(comparison.prompt, first, second, (comparison.prompt, comparison.first.digest))


@register("bright-judge")
class BrightJudge(_Bright):
    """Scored: one forward, a graded probability, a gradient. Raises for a whole batch with a prompt that says "red"."""

    info: ClassVar[RewardInfo] = info("bright-judge", differentiable=True)

    @property
    def gives_gradients(self) -> bool:
        return True

    def compare(self, batch: Sequence[Question]) -> list[Preference | SampleError]:
        time.sleep(self.batch_s)
        if any("red" in question.prompt for question in batch):
            raise RuntimeError(INNER_TEXT)
        answers: list[Preference | SampleError] = []
        for question, scores in zip(batch, self.chat.score(batch, ("yes", "no")), strict=True):
            if isinstance(scores, SampleError):
                answers.append(scores)
                continue
            probability = math.exp(scores.log_probs[0])
            answers.append(Preference(2.0 if "impossible" in question.prompt else probability, {"mass": 1.0}))
        return answers

    def gradient(self, comparison: Comparison, pixels: Tensor, place: Place = "first") -> tuple[Output, Tensor]:
        if "lopsided" in comparison.prompt and place == "second":
            raise AnswerError("unparseable", "the judge has nothing to say about the second image")
        other = comparison.second if place == "first" else comparison.first
        sign = 1 if place == "first" else -1
        darker = float(np.asarray(other.image).mean() / 255)
        logit = sign * SHARPNESS * (float(pixels.mean()) - darker) + self.chat.bias
        probability = 1 / (1 + math.exp(-logit))
        slope = sign * SHARPNESS * probability * (1 - probability) / pixels.numel()
        return Output(probability, {"mass": 1.0}), torch.full_like(pixels, slope)


@register("bright-writer")
class BrightWriter(_Bright):
    """Written: its answers take several steps, and may have no verdict."""

    info: ClassVar[RewardInfo] = info("bright-writer")

    def compare(self, batch: Sequence[Question]) -> list[Preference | SampleError]:
        answers: list[Preference | SampleError] = []
        for question, written in zip(batch, self.chat.generate(batch, Generation(self.chat.steps)), strict=True):
            if isinstance(written, SampleError):
                answers.append(written)
                continue
            texts = [answer.text for answer in written]
            fault = next((fault for fault in FAULTS if fault in question.prompt), None)
            if "lopsided" in question.prompt and question.first < question.second:
                fault = "truncated"
            if fault is not None:
                answers.append(AnswerError(fault, f"the judge's answer has no verdict: it is {fault}", texts))
            else:
                first = 1.0 if "first" in texts[0] else 0.0
                answers.append(Preference(first, {}, {"texts": texts, "statuses": ["ok"], "reasons": texts}))
        return answers


@register("bright-pointwise")
class BrightPointwise(BrightJudge):
    """A judge that also scores single images, by their brightness."""

    info: ClassVar[RewardInfo] = info("bright-pointwise")
    pointwise: ClassVar[bool] = True

    def prepare(self, sample: Sample) -> Question:
        image = np.asarray(sample.image(self.info.name))
        return Question(sample.prompt, float(image.mean() / 255), 0.0, sample.candidate.digest)

    def run(self, batch: Sequence[Question]) -> list[Output | SampleError]:
        return [Output(question.first) for question in batch]
