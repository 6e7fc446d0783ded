"""RewardDance (Wu et al. 2025, arXiv:2509.08826): the probability of "yes, the candidate is better than the reference".

``Comparison.first`` is the candidate and ``second`` the reference. The paper's pointwise variant asks about one image
and was trained with Bradley-Terry on its probability of "yes". No weights are published; the wording is our reading of
the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from models.base import (
    Calibration,
    Candidate,
    Context,
    LoadOptions,
    Output,
    RewardInfo,
    Sample,
    SampleError,
    UnsupportedInput,
)
from models.judge import Comparison, Place, Preference, Turn
from models.judging.chat_judge import (
    COMMON_OPTIONS,
    LOCAL_OPTIONS,
    WRITING_OPTIONS,
    YES_NO,
    ChatJudge,
    PreparedQuestions,
    Question,
    expect,
    images_of,
)
from models.judging.readings import Verdict, yes_no_reader
from models.judging.templates import Template, load_template
from models.judging.turns import lay_out
from models.judging.yes_no import parse_yes_no
from models.registry import register

TEMPLATES = {"none": "reward_dance_plain", "after": "reward_dance", "before": "reward_dance_reasons_first"}
INSTRUCTION = "Consider how well each image matches the prompt, and its visual quality."
POINT_INSTRUCTION = "Consider how well the image matches the prompt, and its visual quality."
PAIR_OPTIONS = ("reference_position", "asked", "reasons", "write_reasons")


@register("reward-dance")
class RewardDance(ChatJudge):
    """P(the first candidate of the comparison is better), from the first token of the answer.

    Options beside the common ones:

    - ``form``: "pairwise" (the default), or "pointwise" for weights of that variant: P(yes) of an image alone is its
      score, and a comparison is the sigmoid of the difference of two. It has no gradient.
    - ``reference_position``: whether image 1 (the default, as in the paper) or image 2 is the reference.
    - ``asked``: whether the question is if the "candidate" (the default) or the "reference" is better.
    - ``instruction``: the instruction of the task; ``context.criterion`` of an item takes its place.
    - ``reasons``: "none", "after" (the default: verdict first, still scored by its first token) or "before": the answer
      is written, and its last line read as 1 or 0.
    - ``write_reasons``: with "after", also write the reasons; they are in the details and cost a generation.
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        name="reward-dance",
        description="A vision-language model's probability that an image is better than a reference. No weights are "
        "published; the question's wording and the system text are our reading of the paper",
        kind="pairwise",
        inputs=("prompt", "image", "context"),
        range=(0.0, 1.0),
        citation="Wu et al., RewardDance, 2025 (arXiv:2509.08826)",
        license="that of the weights given: none are published",
        calibration=Calibration(0.25, "a convention: 1 against 0 is 98 %; comparisons are asked for instead"),
        differentiable=True,
        verified=False,
        outputs=("mass",),
        options=(
            "form", "reference_position", "asked", "instruction", "reasons", "write_reasons", *COMMON_OPTIONS,
            *WRITING_OPTIONS, *LOCAL_OPTIONS,
        ),
    )  # fmt: skip

    writes: ClassVar[bool] = False

    def __init__(self, options: LoadOptions) -> None:
        own = self.read_options(options)
        self.form = own.choice("form", "pairwise", ("pairwise", "pointwise"))
        if self.pointwise:
            self._refuse_options_of_pairs(options.options)
        self.reference_position = own.whole("reference_position", 1, 1, 2)
        self.asked_of_reference = own.choice("asked", "candidate", ("candidate", "reference")) == "reference"
        self.reasons = own.choice("reasons", "after", tuple(TEMPLATES))
        self.template = own.template("template", "reward_dance_point" if self.pointwise else TEMPLATES[self.reasons])
        self.instruction = own.text("instruction", POINT_INSTRUCTION if self.pointwise else INSTRUCTION)
        self.explains = own.flag("write_reasons", False)
        if self.explains and self.reasons != "after":
            raise ValueError('reward-dance writes reasons after its verdict with reasons "after" only')
        if self.reasons != "before":
            yes, no = YES_NO
            self.words = (no, yes) if self.asked_of_reference else (yes, no)
        parse = partial(parse_yes_no, verdict="last")
        self._read = yes_no_reader(parse, yes_is_first=not self.asked_of_reference)
        super().__init__(options)

    @property
    def pointwise(self) -> bool:  # type: ignore[override]
        return self.form == "pointwise"

    @property
    def gives_gradients(self) -> bool:
        return not self.pointwise and super().gives_gradients

    def _refuse_options_of_pairs(self, given: Mapping[str, Any]) -> None:
        idle = [name for name in PAIR_OPTIONS if name in given]
        if idle:
            raise ValueError(f"the option {idle[0]} of {self.info.name} is of pairs; the pointwise form asks about one")

    def default_system(self) -> str:
        """The paper's belongs to the forms with reasons."""
        return "" if self.pointwise or self.reasons == "none" else load_template("reward_dance_system").text

    @property
    def templates(self) -> tuple[Template, ...]:
        return (self.template,)

    def ask(self, comparison: Comparison) -> tuple[Question, ...]:
        candidate, reference = images_of(comparison, self.info.name)
        if self.pointwise:
            return tuple(self._about(image, comparison.prompt, comparison.context) for image in (candidate, reference))
        positions = str(3 - self.reference_position), str(self.reference_position)
        better, worse = reversed(positions) if self.asked_of_reference else positions
        parts = lay_out(
            self.template,
            (reference, candidate) if self.reference_position == 1 else (candidate, reference),
            prompt=comparison.prompt,
            instruction=self._instruction(comparison.context),
            candidate=better,
            reference=worse,
        )
        return (Question(Turn(parts, system=self.system), self._read),)

    def ask_about(self, sample: Sample) -> tuple[Question, ...]:
        if not self.pointwise:
            return super().ask_about(sample)
        image = expect(sample.candidate, "image", self.info.name)
        return (self._about(image, sample.prompt, sample.context),)

    def _about(self, image: Candidate, prompt: str, context: Context | None) -> Question:
        parts = lay_out(self.template, (image,), prompt=prompt, instruction=self._instruction(context))
        return Question(Turn(parts, system=self.system), self._read)

    def compare(self, batch: Sequence[PreparedQuestions]) -> list[Preference | SampleError]:
        """In the pointwise form sigmoid(P(yes) of the first - P(yes) of the second): its loss in training."""
        if not self.pointwise:
            return super().compare(batch)
        answers = iter(self._answers(batch))
        return [_preferred(next(answers), next(answers), entry.warnings) for entry in batch]

    def gradient(self, comparison: Comparison, pixels: Tensor, place: Place = "first") -> tuple[Output, Tensor]:
        if self.pointwise:
            raise UnsupportedInput(f"{self.info.name} gives no gradients in its pointwise form")
        return super().gradient(comparison, pixels, place)

    def _instruction(self, context: Context | None) -> str:
        return self.instruction if context is None or context.criterion is None else context.criterion


def _preferred(
    first: Verdict | SampleError, second: Verdict | SampleError, warnings: tuple[str, ...]
) -> Preference | SampleError:
    """Bradley-Terry of two scores; the first failure where one has none."""
    if isinstance(first, SampleError) or isinstance(second, SampleError):
        return first if isinstance(first, SampleError) else second  # type: ignore[return-value]
    mass = min(verdict.outputs["mass"] for verdict in (first, second))
    told = tuple(dict.fromkeys((*warnings, *first.warnings, *second.warnings)))
    return Preference(1.0 / (1.0 + math.exp(second.value - first.value)), {"mass": mass}, {}, told)
