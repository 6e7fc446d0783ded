"""OneReward (Gong et al. 2025, arXiv:2508.21066): is the first of two edits better by one criterion? P("Yes").

No reward model is published (``bytedance-research/OneReward`` holds the policies); the wording of the question is our
reading of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from models.base import Calibration, Candidate, Context, InputError, LoadOptions, RewardInfo, Sample
from models.judge import Comparison, Part, Turn
from models.judging.chat_judge import COMMON_OPTIONS, LOCAL_OPTIONS, YES_NO, ChatJudge, Question, images_of
from models.judging.templates import MissingField, Template
from models.judging.turns import ContextPictures, lay_out
from models.registry import register

TASKS = {
    "fill": "image fill",
    "extend": "image extend",
    "remove": "object removal",
    "render_text": "text rendering",
}
"""``context.task`` -> how the question names it."""
CRITERIA = {
    "structure": "Structure",
    "consistency": "Consistency",
    "text_alignment": "Text Alignment",
    "aesthetic": "Aesthetic",
    "removal_quality": "Removal Quality",
}
"""``context.criterion`` -> how the question names it."""
_GENERAL = ("structure", "consistency", "text_alignment", "aesthetic")
TASK_CRITERIA = {"fill": _GENERAL, "extend": _GENERAL, "remove": ("removal_quality",), "render_text": _GENERAL}
"""The paper's for filling, extending and removing; for rendering text those of filling, which it is a kind of."""


@register("one-reward")
class OneReward(ChatJudge):
    """P(the first edit is better): the mean over criteria, each of which is an output.

    ``context.task`` is one of :data:`TASKS`; ``context.criterion`` one of the task's criteria, or several with commas
    between, or absent: all of them. The paper's model sees the two results and the question; with the option
    ``show_source`` the source image and, where there is one, the mask come before them.
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        name="one-reward",
        description="A vision-language model's probability that one of two edits of an image (fill, extend, remove, "
        "render text) is better by each criterion. No reward model is published; the question's wording is our "
        "reading of the paper",
        kind="pairwise",
        inputs=("prompt", "image", "context"),
        range=(0.0, 1.0),
        citation="Gong et al., OneReward, 2025 (arXiv:2508.21066)",
        license="that of the weights given: no reward model is published",
        calibration=Calibration(0.25, "a convention: 1 against 0 is 98 %; comparisons are asked for instead"),
        differentiable=True,
        verified=False,
        outputs=(*CRITERIA, "mass"),
        options=("show_source", "text_alignment_template", *COMMON_OPTIONS, *LOCAL_OPTIONS),
    )
    writes: ClassVar[bool] = False
    words = YES_NO

    def __init__(self, options: LoadOptions) -> None:
        """``text_alignment_template`` replaces the one text that holds the prompt, ``template`` the other."""
        own = self.read_options(options)
        self.template = own.template("template", "one_reward")
        self.text_template = own.template("text_alignment_template", "one_reward_text_alignment")
        self.show_source = own.flag("show_source", False)
        self._pictures = ContextPictures()
        super().__init__(options)

    @property
    def templates(self) -> tuple[Template, ...]:
        return self.template, self.text_template

    def ask(self, comparison: Comparison) -> tuple[Question, ...]:
        """Raises :class:`MissingField` without a task; InputError ("unknown_task", "unknown_criterion")."""
        images = images_of(comparison, self.info.name)
        task, criteria = task_of(comparison.context)
        before = self._source(comparison.context)
        questions = []
        for criterion in criteria:
            values = {"task": TASKS[task], "criterion": CRITERIA[criterion]}
            if criterion == "text_alignment":
                parts = lay_out(self.text_template, images, prompt=comparison.prompt, **values)
            else:
                parts = lay_out(self.template, images, **values)
            questions.append(Question(Turn((*before, *parts), system=self.system), name=criterion))
        return tuple(questions)

    def _source(self, context: Context | None) -> Sequence[Part]:
        if not self.show_source or context is None:
            return ()
        shown: list[Part] = ["The image before the edit:\n", self._pictures.image(context, self.info.name)]
        mask = self._pictures.mask(context)
        if mask is not None:
            shown += ["\nThe mask of the edit:\n", mask]
        return (*shown, "\nThe two results:\n")

    def canary(self) -> Sample:
        sample = super().canary()
        image = sample.image(self.info.name)
        return Sample(sample.prompt, Candidate(image=image), Context(image=image, task="remove"))


def task_of(context: Context | None) -> tuple[str, tuple[str, ...]]:
    """The task and criteria that a context asks for; case does not matter, and a blank or hyphen is an underscore."""
    if context is None or context.task is None:
        raise MissingField(f"one-reward needs a task in the item's context (context.task): {', '.join(TASKS)}")
    task = _name(context.task)
    if task not in TASKS:
        raise InputError(f"one-reward knows the tasks {', '.join(TASKS)}", code="unknown_task")
    if context.criterion is None:
        return task, TASK_CRITERIA[task]
    criteria = tuple(dict.fromkeys(_name(criterion) for criterion in context.criterion.split(",")))
    if not set(criteria) <= set(TASK_CRITERIA[task]):
        raise InputError(f"one-reward judges {task} by {', '.join(TASK_CRITERIA[task])}", code="unknown_criterion")
    return task, criteria


def _name(text: str) -> str:
    return "_".join(text.lower().replace("-", " ").replace("_", " ").split())
