"""PickScore (Kirstain et al. 2023): a CLIP ViT-H/14 that was fine-tuned on choices between generated images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from models.backbones.clip import VIT_H_14
from models.backbones.clip_reward import (
    HUGGING_FACE_TEXT,
    LARGE_CPU_BATCH,
    ClipReward,
    choice,
    random_clip,
    scaled_cosine,
)
from models.backbones.shared import shared_clip
from models.base import Calibration, CheckpointSize, LoadOptions, RewardInfo, WeightSource
from models.preprocessing import ImagePreprocessing
from models.registry import register
from models.towers import HeadOutput

PARAMETERS = 986_109_441
WEIGHTS = WeightSource("hf:yuvalkirstain/PickScore_v1/model.safetensors")
FLOW_GRPO_DIVISOR = 26.0


@register("pickscore")
class PickScore(ClipReward):
    """exp(logit_scale) * cosine / 26, as Flow-GRPO uses it; the option ``scale: "raw"`` leaves out the 26.

    Images go the way of the published image processor (PIL, crop rounded down). Its differentiable twin, which
    /gradient uses, differs by at most 1.06 and on average 0.26 to 0.30 levels of 255 on the eight fixture images.
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        name="pickscore",
        description="Human preference: CLIP ViT-H/14 fine-tuned on Pick-a-Pic, exp(logit_scale) * cosine / 26 "
        "(option scale: flow_grpo, or raw without the 26). Verified: architecture and formula, on synthetic weights",
        kind="pointwise",
        inputs=("prompt", "image"),
        range=(0.65, 0.95),
        citation="Kirstain et al., 2023 (arXiv:2305.01569); the divisor: Liu et al., 2025 (arXiv:2505.05470)",
        license="MIT",
        calibration=Calibration(
            1 / FLOW_GRPO_DIVISOR, "softmax over the scores before the division by 26 (arXiv:2305.01569, section 3)"
        ),
        weights="hf:yuvalkirstain/PickScore_v1",
        weights_bytes=PARAMETERS * 4,
        differentiable=True,
        sources=(WEIGHTS,),
        options=("scale",),
    )
    cpu_batch: ClassVar[int | None] = LARGE_CPU_BATCH
    divisor: ClassVar[float] = FLOW_GRPO_DIVISOR

    @classmethod
    def load(cls, options: LoadOptions) -> PickScore:
        """Raises ValueError for an unknown ``scale``."""
        scale = choice(options, "scale", "flow_grpo", ("flow_grpo", "raw"))
        loaded = shared_clip(WEIGHTS, options, VIT_H_14, cls.info.name)
        image = ImagePreprocessing.bicubic_crop(loaded.towers.image_size, "transformers")
        model = RawPickScore if scale == "raw" else PickScore
        return model(loaded, image, HUGGING_FACE_TEXT)

    @classmethod
    def random_checkpoint(cls, folder: Path, size: CheckpointSize = "tiny") -> LoadOptions:
        return LoadOptions(weights=str(random_clip(folder / "model.safetensors", VIT_H_14, size, hugging_face=True)))

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        return HeadOutput(scaled_cosine(self.towers, image_features_BD, text_features_BD) / self.divisor)


class RawPickScore(PickScore):
    """The scale of the paper: preferences are the softmax of these scores."""

    info: ClassVar[RewardInfo] = replace(
        PickScore.info,
        range=(17.0, 25.0),
        calibration=Calibration(1.0, "softmax over the scores (arXiv:2305.01569, section 3)"),
    )
    divisor: ClassVar[float] = 1.0
