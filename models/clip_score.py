"""CLIPScore: how well an image fits its prompt by OpenAI's CLIP, as Flow-GRPO and DiffusionNFT compute it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from models.backbones.clip import ARCHITECTURES, VIT_L_14
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
from models.preprocessing import ImagePreprocessing, bilinear_crop
from models.registry import register
from models.towers import HeadOutput

PARAMETERS = 427_616_513
SOURCES = {
    "vit-l-14": WeightSource("hf:openai/clip-vit-large-patch14/model.safetensors"),
    "vit-h-14": WeightSource("hf:laion/CLIP-ViT-H-14-laion2B-s32B-b79K/model.safetensors"),
}


@register("clip-score")
class ClipScore(ClipReward):
    """CLIP's logit / 100. Options:

    - ``preprocessing``: ``flow_grpo`` (default), bilinear on floats, its own differentiable twin (difference 0 on the
      eight fixture images); ``hf``, that of the published image processor, with which features are shared with
      ``aesthetic`` and whose twin differs by at most 1.06, on average 0.26 to 0.30 levels of 255.
    - ``architecture``: ``vit-l-14`` (OpenAI, default), ``vit-h-14`` (LAION-2B).
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        name="clip-score",
        description="Text-image fit: OpenAI CLIP ViT-L/14, exp(logit_scale) * cosine / 100 (option architecture: "
        "vit-l-14 or vit-h-14). Verified: architecture and formula of ViT-L/14, on synthetic weights",
        kind="pointwise",
        inputs=("prompt", "image"),
        range=(0.15, 0.35),
        citation="Radford et al., 2021 (arXiv:2103.00020); Hessel et al., 2021 (arXiv:2104.08718); "
        "preprocessing: Liu et al., 2025 (arXiv:2505.05470)",
        license="MIT",
        calibration=Calibration(0.01, "CLIP's own softmax over logits, which are 100 times the score"),
        weights="hf:openai/clip-vit-large-patch14",
        weights_bytes=PARAMETERS * 4,
        differentiable=True,
        sources=(SOURCES["vit-l-14"],),
        options=("preprocessing", "architecture"),
    )
    cpu_batch: ClassVar[int | None] = LARGE_CPU_BATCH

    @classmethod
    def load(cls, options: LoadOptions) -> ClipScore:
        """Raises ValueError for an unknown option."""
        architecture = ARCHITECTURES[choice(options, "architecture", "vit-l-14", tuple(ARCHITECTURES))]
        kind = choice(options, "preprocessing", "flow_grpo", ("flow_grpo", "hf"))
        loaded = shared_clip(SOURCES[architecture.name], options, architecture, cls.info.name)
        size = loaded.towers.image_size
        if kind == "hf":
            image = ImagePreprocessing.bicubic_crop(size, "transformers")
        else:
            image = ImagePreprocessing.on_floats("bilinear-crop", bilinear_crop, size)
        return cls(loaded, image, HUGGING_FACE_TEXT)

    @classmethod
    def random_checkpoint(cls, folder: Path, size: CheckpointSize = "tiny") -> LoadOptions:
        return LoadOptions(weights=str(random_clip(folder / "model.safetensors", VIT_L_14, size, hugging_face=True)))

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        return HeadOutput(scaled_cosine(self.towers, image_features_BD, text_features_BD) / 100)
