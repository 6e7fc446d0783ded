"""RewardDance (Wu et al. 2025, arXiv:2509.08826): the probability of "yes, the candidate is better than the reference".

``Comparison.first`` is the candidate and ``second`` the reference. No weights are published; the wording is our reading
of the paper.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from models.base import Calibration, Context, LoadOptions, RewardInfo
from models.judge import Comparison, Turn
from models.judging.chat_judge import (
    COMMON_OPTIONS,
    LOCAL_OPTIONS,
    WRITING_OPTIONS,
    YES_NO,
    ChatJudge,
    Question,
    images_of,
)
from models.judging.readings import yes_no_reader
from models.judging.templates import Template, load_template
from models.judging.turns import lay_out
from models.judging.yes_no import parse_yes_no
from models.registry import register

TEMPLATES = {"none": "reward_dance_plain", "after": "reward_dance", "before": "reward_dance_reasons_first"}
INSTRUCTION = "Consider how well each image matches the prompt, and its visual quality."


@register("reward-dance")
class RewardDance(ChatJudge):
    """P(the first candidate of the comparison is better), from the first token of the answer.

    Options beside the common ones:

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
            "reference_position", "asked", "instruction", "reasons", "write_reasons", *COMMON_OPTIONS,
            *WRITING_OPTIONS, *LOCAL_OPTIONS,
        ),
    )  # fmt: skip

    writes: ClassVar[bool] = False

    def __init__(self, options: LoadOptions) -> None:
        own = self.read_options(options)
        self.reference_position = own.whole("reference_position", 1, 1, 2)
        self.asked_of_reference = own.choice("asked", "candidate", ("candidate", "reference")) == "reference"
        self.reasons = own.choice("reasons", "after", tuple(TEMPLATES))
        self.template = own.template("template", TEMPLATES[self.reasons])
        self.instruction = own.text("instruction", INSTRUCTION)
        self.explains = own.flag("write_reasons", False)
        if self.explains and self.reasons != "after":
            raise ValueError('reward-dance writes reasons after its verdict with reasons "after" only')
        if self.reasons != "before":
            yes, no = YES_NO
            self.words = (no, yes) if self.asked_of_reference else (yes, no)
        parse = partial(parse_yes_no, verdict="last")
        self._read = yes_no_reader(parse, yes_is_first=not self.asked_of_reference)
        super().__init__(options)

    def default_system(self) -> str:
        """The paper's belongs to the forms with reasons."""
        return "" if self.reasons == "none" else load_template("reward_dance_system").text

    @property
    def templates(self) -> tuple[Template, ...]:
        return (self.template,)

    def ask(self, comparison: Comparison) -> tuple[Question, ...]:
        candidate, reference = images_of(comparison, self.info.name)
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

    def _instruction(self, context: Context | None) -> str:
        return self.instruction if context is None or context.criterion is None else context.criterion
