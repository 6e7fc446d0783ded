"""A CLIP ViT-B/32 with random weights: realistic compute for the benchmark, meaningless scores."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from models.backbones.clip import ClipTowers
from models.backbones.clip_reward import ClipReward, cosine
from models.backbones.shared import LoadedClip
from models.base import Calibration, LoadOptions, RewardInfo
from models.preprocessing import ImagePreprocessing
from models.registry import register
from models.towers import HeadOutput
from models.weights import hash_tensors

IMAGE_SIZE = 224
VIT_B_32 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
PARAMETERS = 151_277_313
DEFAULT_SEED = 0


@register("bench-clip")
class BenchClip(ClipReward):
    """100 * cosine of image and text features; the option ``seed`` chooses the weights."""

    info: ClassVar[RewardInfo] = RewardInfo(
        name="bench-clip",
        description="Benchmark only: CLIP ViT-B/32 with random weights, 100 * cosine; the scores mean nothing",
        kind="pointwise",
        inputs=("prompt", "image"),
        range=(-100.0, 100.0),
        citation="architecture: Radford et al., 2021 (arXiv:2103.00020)",
        license="none needed: random weights",
        calibration=Calibration(1.0, "none: the weights are random"),
        weights=f"random, seed {DEFAULT_SEED}",
        weights_bytes=PARAMETERS * 4,
        differentiable=True,
        hidden=True,
        options=("seed",),
    )

    @classmethod
    def load(cls, options: LoadOptions) -> BenchClip:
        towers = ClipTowers.from_config(VIT_B_32, seed=int(options.options.get("seed", DEFAULT_SEED)))
        weights_hash = hash_tensors(towers.clip.state_dict())  # before the cast: one hash for the weights in any dtype
        cast = ClipTowers(towers.clip, options.dtype, options.device)
        return cls(LoadedClip(cast, weights_hash, "vit-b-32"), ImagePreprocessing.bicubic_crop(IMAGE_SIZE))

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        return HeadOutput(100 * cosine(image_features_BD, text_features_BD))
