"""The programmatic truth about pictures of coloured shapes: GenEval's six tasks, three scores and a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from models.base import Calibration, Candidate, InputError, LoadOptions, Output, RewardInfo, RewardModel, Sample
from models.registry import register
from models.shapes.oracle import examine
from models.shapes.prompts import parse
from models.shapes.rules import Found, Verdict
from models.shapes.world import Scene, SceneObject, render

MIN_SIDE = 16


@dataclass(frozen=True)
class _Examined:
    """A prepared sample: all the work is done in the thread pool."""

    verdict: Verdict
    found: tuple[Found, ...]


@register("shapes-oracle")
class ShapesOracle(RewardModel):
    """1.0 where the picture shows exactly what the prompt asks for, else 0.0; GenEval's lax rule and partial credit
    are further outputs."""

    info: ClassVar[RewardInfo] = RewardInfo(
        name="shapes-oracle",
        description="Whether a picture shows exactly the coloured shapes that the prompt asks for (no neural network)",
        kind="pointwise",
        inputs=("prompt", "image"),
        range=(0.0, 1.0),
        citation="tasks and lax rule: Ghosh et al., GenEval, 2023 (arXiv:2310.11513)",
        license="project",
        calibration=Calibration(0.25, "a convention: right against wrong is 98 %"),
        outputs=("exact", "geneval", "soft"),
    )

    @classmethod
    def load(cls, options: LoadOptions) -> ShapesOracle:
        return cls()

    def prepare(self, sample: Sample) -> _Examined:
        """Detects and judges; raises :class:`InputError` with the code ``prompt_not_understood`` for a prompt outside
        the grammar of the shapes world, and ``image_too_small`` under 16 pixels a side."""
        image = sample.image(self.info.name)
        prompt = parse(sample.prompt)
        if prompt is None:
            raise InputError(
                "shapes-oracle understands prompts like 'a red circle left of a blue square' only",
                code="prompt_not_understood",
            )
        if min(image.size) < MIN_SIDE:
            raise InputError(f"shapes-oracle needs at least {MIN_SIDE} pixels a side", code="image_too_small")
        return _Examined(*examine(prompt, image))

    def run(self, batch: Sequence[_Examined]) -> list[Output]:
        return [_output(entry) for entry in batch]

    def canary(self) -> Sample:
        objects = (SceneObject("circle", "red", (1, 0)), SceneObject("square", "blue", (1, 2)))
        return Sample("a red circle left of a blue square", Candidate(image=render(Scene(objects))))


def _output(entry: _Examined) -> Output:
    verdict = entry.verdict
    objects = [
        {
            "shape": thing.shape,
            "color": thing.color,
            "x": round(thing.x, 4),
            "y": round(thing.y, 4),
            "confidence": round(thing.confidence, 4),
        }
        for thing in entry.found
    ]
    return Output(
        verdict.exact,
        {"exact": verdict.exact, "geneval": verdict.geneval, "soft": verdict.soft},
        {"reason": verdict.reason, "objects": objects},
    )
