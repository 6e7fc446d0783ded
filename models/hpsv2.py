"""HPSv2 and HPSv2.1 (Wu et al. 2023): CLIP ViT-H/14 fine-tuned on human choices; the two differ in weights only."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from torch import Tensor

from models.backbones.clip import VIT_H_14
from models.backbones.clip_reward import LARGE_CPU_BATCH, OPEN_CLIP_TEXT, ClipReward, cosine, random_clip
from models.backbones.shared import shared_clip
from models.base import Calibration, CheckpointSize, LoadOptions, RewardInfo, WeightSource
from models.preprocessing import ImagePreprocessing, fit_and_pad
from models.registry import register
from models.towers import HeadOutput

PARAMETERS = 986_109_441


def _info(name: str, version: str, file: str, usual: tuple[float, float]) -> RewardInfo:
    return RewardInfo(
        name=name,
        description=f"Human preference: CLIP ViT-H/14 fine-tuned on HPDv2, weights {version}, cosine without logit "
        "scale; the whole image with black bars. Verified: architecture and formula, on synthetic weights",
        kind="pointwise",
        inputs=("prompt", "image"),
        range=usual,
        citation="Wu et al., 2023 (arXiv:2306.09341)",
        license="Apache-2.0",
        calibration=Calibration(0.01, "training loss: softmax of 100 * cosine, the cap of its logit scale"),
        weights="hf:xswu/HPSv2",
        weights_bytes=PARAMETERS * 4,
        differentiable=True,
        sources=(WeightSource(f"hf:xswu/HPSv2/{file}"),),
    )


@register("hpsv2")
class HPSv2(ClipReward):
    """The cosine of image and text, without logit scale.

    Preprocessing is :func:`models.preprocessing.fit_and_pad` on floats. Nothing is rounded, so it is its own twin:
    /gradient sees the pixels that /score sees (difference 0 on the eight fixture images).
    """

    info: ClassVar[RewardInfo] = _info("hpsv2", "2.0", "HPS_v2_compressed.pt", (0.23, 0.29))
    cpu_batch: ClassVar[int | None] = LARGE_CPU_BATCH

    @classmethod
    def load(cls, options: LoadOptions) -> Self:
        loaded = shared_clip(cls.info.sources[0], options, VIT_H_14, cls.info.name)
        image = ImagePreprocessing.on_floats("fit-and-pad", fit_and_pad, loaded.towers.image_size)
        return cls(loaded, image, OPEN_CLIP_TEXT)

    @classmethod
    def random_checkpoint(cls, folder: Path, size: CheckpointSize = "tiny") -> LoadOptions:
        return LoadOptions(weights=str(random_clip(folder / "hps.pt", VIT_H_14, size, hugging_face=False)))

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        return HeadOutput(cosine(image_features_BD, text_features_BD))


@register("hpsv2.1")
class HPSv21(HPSv2):
    """The same with the newer weights; scores of the two are not comparable."""

    info: ClassVar[RewardInfo] = _info("hpsv2.1", "2.1", "HPS_v2.1_compressed.pt", (0.14, 0.36))
