"""UnifiedReward-Think (Wang et al. 2025, arXiv:2505.03318): reasons about two images, then the verdict.

The option ``version`` is "qwen3vl" (the default: the checkpoints on Qwen3-VL) or "v1" (those on Qwen2.5-VL and LLaVA).
Pref-GRPO (arXiv:2508.20751) makes its win rates of this judge.
"""

from __future__ import annotations

from typing import ClassVar

from models.base import Calibration, LoadOptions, RewardInfo, WeightsError, WeightSource
from models.judge import ChatModel
from models.judging.chat_judge import (
    CHAT_FILES,
    COMMON_OPTIONS,
    LOCAL_OPTIONS,
    WRITING_OPTIONS,
)
from models.judging.image_pair import ImagePairJudge
from models.judging.pairs import parse_think
from models.judging.readings import pair_reader
from models.registry import register

WEIGHTS = WeightSource("hf:CodeGoat24/UnifiedReward-Think-qwen3vl-8b", files=CHAT_FILES)
TEMPLATES = {"qwen3vl": "think_qwen3vl", "v1": "think_v1"}


@register("unified-reward-think")
class UnifiedRewardThink(ImagePairJudge):
    """Which of two images is better, 1 or 0, after reasons, which are in the details."""

    info: ClassVar[RewardInfo] = RewardInfo(
        name="unified-reward-think",
        description="A vision-language model that reasons about two images before it says which is better. The "
        "templates are the published ones by their hash; how a checkpoint's chat template places them could not be "
        "checked",
        kind="pairwise",
        inputs=("prompt", "image"),
        range=(0.0, 1.0),
        citation="Wang et al., 2025 (arXiv:2505.03318); win rates: Wang et al., 2025 (arXiv:2508.20751)",
        license="MIT (as the weights' pages state); base models: see theirs",
        calibration=Calibration(0.25, "a convention: a win rate of 1 against 0 is 98 %; comparisons are asked for"),
        weights=WEIGHTS.source,
        verified=False,
        sources=(WEIGHTS,),
        options=("version", *COMMON_OPTIONS, *WRITING_OPTIONS, *LOCAL_OPTIONS),
    )
    max_tokens: ClassVar[int] = 4096
    _read = staticmethod(pair_reader(parse_think))

    def __init__(self, options: LoadOptions) -> None:
        own = self.read_options(options)
        self.answer_version = own.choice("version", "qwen3vl", tuple(TEMPLATES))
        self.template = own.template("template", TEMPLATES[self.answer_version])
        super().__init__(options)

    def local_chat(self, options: LoadOptions) -> ChatModel:
        """Raises :class:`WeightsError` too where version v1 is asked of the default weights."""
        if options.weights is None and self.answer_version == "v1":
            raise WeightsError(
                f"{WEIGHTS.source} is version qwen3vl of {self.info.name}: give a checkpoint of v1 in "
                f"models.{self.info.name}.weights (published: hf:CodeGoat24/UnifiedReward-Think-qwen-7b)"
            )
        return super().local_chat(options)
