"""UnifiedReward (Wang et al. 2025, arXiv:2503.05236): a vision-language model that scores one and ranks two.

The option ``task`` says what of: generated images (default) or videos, or answers to questions about them. ``version``
says which checkpoints' templates and forms of answer are used: "v2" (2.0 on Qwen, the default), "v1.5" and "v1-llava"
(LLaVA-OneVision), "v1-qwen". The templates of image generation, and 2.0's of video scores, are the published ones by
their hash; the others are our reading of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from PIL import Image as PILImage

from models.base import Calibration, Candidate, Context, LoadOptions, RewardInfo, Sample, WeightsError, WeightSource
from models.judge import ChatModel, Comparison, Turn
from models.judging.chat_judge import (
    CHAT_FILES,
    COMMON_OPTIONS,
    LOCAL_OPTIONS,
    WRITING_OPTIONS,
    ChatJudge,
    Question,
    expect,
)
from models.judging.pairs import parse_pair, parse_pair_scores, parse_understanding_pair
from models.judging.points import VIDEO_AXES, parse_axis_scores, parse_final_score
from models.judging.readings import Reader, pair_reader, point_reader
from models.judging.templates import MissingField, Template
from models.judging.turns import ContextPictures, lay_out, marked
from models.registry import register

WEIGHTS = WeightSource("hf:CodeGoat24/UnifiedReward-2.0-qwen-7b", files=CHAT_FILES)
VERSIONS = {
    "v2": "hf:CodeGoat24/UnifiedReward-2.0-qwen-7b",
    "v1.5": "hf:CodeGoat24/UnifiedReward-7b-v1.5",
    "v1-qwen": "hf:CodeGoat24/UnifiedReward-qwen-7b",
    "v1-llava": "hf:CodeGoat24/UnifiedReward-7b",
}
"""Where each version's checkpoint is published; those of LLaVA in the form of its authors' own program."""
LLAVA = ("v1.5", "v1-llava")
TASKS = ("image_generation", "video_generation", "image_understanding", "video_understanding")


@dataclass(frozen=True)
class Form:
    """A template's name and how an answer to it is read."""

    template: str
    read: Reader


_FINAL = point_reader(parse_final_score)
_AXES = point_reader(parse_axis_scores)
_PAIR = pair_reader(parse_pair)
_ANSWERS = pair_reader(parse_understanding_pair)

IMAGE_FORMS = {
    "v2": (Form("ur2_acs", _AXES), Form("ur2_pair", pair_reader(parse_pair_scores))),
    "v1.5": (Form("ur_acs_v15", _AXES), Form("ur_pair_llava", _PAIR)),
    "v1-qwen": (Form("ur_point_v1", _FINAL), Form("ur_pair_qwen", _PAIR)),
    "v1-llava": (Form("ur_point_v1", _FINAL), Form("ur_pair_llava", _PAIR)),
}
"""How one image is scored and how two are compared."""
VIDEO_AXES_FORM = Form("ur2_aps_video", point_reader(partial(parse_axis_scores, axes=VIDEO_AXES)))
VIDEO_PAIR = Form("ur_pair_video", pair_reader(partial(parse_pair, noun="Video")))


def forms(task: str, version: str) -> tuple[Form, Form]:
    """The forms in which one candidate is scored and in which two are compared."""
    if task == "image_generation":
        return IMAGE_FORMS[version]
    if task == "video_generation":
        return VIDEO_AXES_FORM if version == "v2" else Form("ur_point_video", _FINAL), VIDEO_PAIR
    medium = task.removesuffix("_understanding")
    return Form(f"understanding_{medium}_point", _FINAL), Form(f"understanding_{medium}_pair", _ANSWERS)


@register("unified-reward")
class UnifiedReward(ChatJudge):
    """Scores from 1 to 5 in words, and which of two is better, for four tasks.

    Candidates are images, videos, or answers to ``context.question`` about ``context.image`` or ``context.frames``.
    Version 2's scores are the mean of three axes, which are outputs; so are its shares of two images.
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        name="unified-reward",
        description="A vision-language model that scores images, videos or answers about them from 1 to 5, and says "
        "which of two is better. The templates of image generation and of video scores are the published ones by their "
        "hash; those of video pairs and of understanding are our reading of the paper, and how a checkpoint's chat "
        "template places them could not be checked",
        kind="pairwise",
        inputs=("prompt", "image", "video", "text", "context"),
        range=(1.0, 5.0),
        citation="Wang et al., 2025 (arXiv:2503.05236)",
        license="MIT (as the weights' pages state); base models: see theirs",
        calibration=Calibration(1.0, "a convention: one point of five is 73 %; comparisons are asked for instead"),
        weights=WEIGHTS.source,
        verified=False,
        outputs=("alignment", "coherence", "physics", "style"),
        sources=(WEIGHTS,),
        options=("task", "version", "point_template", "pair_tiles", *COMMON_OPTIONS, *WRITING_OPTIONS, *LOCAL_OPTIONS),
    )
    pointwise: ClassVar[bool] = True
    max_tokens: ClassVar[int] = 4096

    def __init__(self, options: LoadOptions) -> None:
        """``template`` replaces the text that compares, ``point_template`` the one that scores.

        With ``pair_tiles`` LLaVA sees both images of a pair in tiles, as in its authors' evaluation programs.
        """
        own = self.read_options(options)
        self.task = own.choice("task", "image_generation", TASKS)
        self.answer_version = own.choice("version", "v2", tuple(VERSIONS))
        point, pair = forms(self.task, self.answer_version)
        self.point_template = own.template("point_template", point.template)
        self.pair_template = own.template("template", pair.template)
        if self.answer_version in LLAVA and self.task == "image_generation":
            self.point_template = marked(self.point_template)
        if own.flag("pair_tiles", False):
            self._check_tiles(options)
        self._read_point, self._read_pair = point.read, pair.read
        self._pictures = ContextPictures()
        super().__init__(options)

    def _check_tiles(self, options: LoadOptions) -> None:
        if self.answer_version not in LLAVA or self.task != "image_generation" or options.chat is not None:
            raise ValueError(
                f"the option pair_tiles of {self.info.name} is of {', '.join(LLAVA)} on this machine, comparing images"
            )

    def local_chat(self, options: LoadOptions) -> ChatModel:
        """Raises :class:`WeightsError` too where another version is asked of the default weights."""
        if options.weights is None and self.answer_version != "v2":
            raise WeightsError(
                f"{WEIGHTS.source} is version v2 of {self.info.name}: give a checkpoint of {self.answer_version} in "
                f"models.{self.info.name}.weights (published: {VERSIONS[self.answer_version]})"
            )
        return super().local_chat(options)

    @property
    def templates(self) -> tuple[Template, ...]:
        return self.point_template, self.pair_template

    def ask(self, comparison: Comparison) -> tuple[Question, ...]:
        both = (comparison.first, comparison.second)
        for candidate in both:
            expect(candidate, self._kind, self.info.name)
        if self._kind == "text":
            answers = {"answer_1": both[0].text or "", "answer_2": both[1].text or ""}
            parts = lay_out(
                self.pair_template,
                [self._shown(comparison.context)],
                question=self._question(comparison.context),
                **answers,
            )
        else:
            parts = lay_out(self.pair_template, both, prompt=comparison.prompt)
        return (Question(Turn(parts, system=self.system), self._read_pair),)

    def ask_about(self, sample: Sample) -> tuple[Question, ...]:
        candidate = expect(sample.candidate, self._kind, self.info.name)
        if self._kind == "text":
            parts = lay_out(
                self.point_template,
                [self._shown(sample.context)],
                question=self._question(sample.context),
                answer=candidate.text or "",
            )
        else:
            parts = lay_out(self.point_template, [candidate], prompt=sample.prompt)
        return (Question(Turn(parts, system=self.system), self._read_point),)

    @property
    def _kind(self) -> str:
        return {"image_generation": "image", "video_generation": "video"}.get(self.task, "text")

    def _shown(self, context: Context | None) -> Candidate:
        if self.task == "image_understanding":
            return self._pictures.image(context, self.info.name)
        return self._pictures.frames(context, self.info.name)

    def _question(self, context: Context | None) -> str:
        if context is None or context.question is None:
            raise MissingField(f"{self.info.name} needs a question in the item's context (context.question)")
        return context.question

    def canary(self) -> Sample:
        gradient = PILImage.linear_gradient("L").resize((64, 64)).convert("RGB")
        frames = (gradient, gradient.transpose(PILImage.Transpose.FLIP_TOP_BOTTOM))
        if self.task == "image_generation":
            return super().canary()
        if self.task == "video_generation":
            return Sample("a sunrise", Candidate(frames=frames, fps=1.0))
        shown = Context(image=gradient) if self.task == "image_understanding" else Context(frames=frames)
        context = Context(shown.image, shown.frames, question="Is the top darker than the bottom?")
        return Sample("", Candidate(text="Yes."), context)
