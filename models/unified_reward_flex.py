"""UnifiedReward-Flex (Wang et al. 2026, arXiv:2602.02380): a JSON of categories, each with its winner, and a winner."""

from __future__ import annotations

from typing import ClassVar

from models.base import Calibration, LoadOptions, RewardInfo, WeightSource
from models.judging.chat_judge import (
    CHAT_FILES,
    COMMON_OPTIONS,
    LOCAL_OPTIONS,
    WRITING_OPTIONS,
)
from models.judging.flex import parse_flex
from models.judging.image_pair import ImagePairJudge
from models.judging.readings import CATEGORY_OUTPUTS, flex_reader
from models.registry import register

WEIGHTS = WeightSource("hf:CodeGoat24/UnifiedReward-Flex-qwen3vl-8b", files=CHAT_FILES)


@register("unified-reward-flex")
class UnifiedRewardFlex(ImagePairJudge):
    """Which of two images is better overall; the outputs are the same of its first three categories, by place.

    A category that names no winner has no output. ``details``: ``categories`` under the names that the judge gave them,
    and ``reasons``.
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        name="unified-reward-flex",
        description="A vision-language model that compares two images in categories of its own making and overall. "
        "The template is the published one by its hash; how a checkpoint's chat template places it could not be "
        "checked",
        kind="pairwise",
        inputs=("prompt", "image"),
        range=(0.0, 1.0),
        citation="Wang et al., 2026 (arXiv:2602.02380)",
        license="unknown: the weights' page was not seen",
        calibration=Calibration(0.25, "a convention: a win rate of 1 against 0 is 98 %; comparisons are asked for"),
        weights=WEIGHTS.source,
        verified=False,
        outputs=CATEGORY_OUTPUTS,
        sources=(WEIGHTS,),
        options=(*COMMON_OPTIONS, *WRITING_OPTIONS, *LOCAL_OPTIONS),
    )
    max_tokens: ClassVar[int] = 4096
    _read = staticmethod(flex_reader(parse_flex))

    def __init__(self, options: LoadOptions) -> None:
        self.template = self.read_options(options).template("template", "flex_pair")
        super().__init__(options)
