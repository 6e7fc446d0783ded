"""A CLIP ViT-B/32 with random weights: realistic compute for the benchmark, meaningless scores."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor

from models.backbones.clip import ClipTowers, tokenize
from models.base import Calibration, HeadOutput, LoadOptions, RewardInfo, TowerReward
from models.preprocessing import clip_preprocess, clip_preprocess_tensor, normalize
from models.registry import register
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
class BenchClip(TowerReward):
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
    )

    def __init__(self, towers: ClipTowers, weights_hash: str) -> None:
        self.towers = towers
        self.weights_hash = weights_hash
        self.dtype = towers.dtype
        self.device = towers.logit_scale.device
        self.image_key = self.text_key = f"{weights_hash}/clip{IMAGE_SIZE}/{self.preprocessing}"

    @classmethod
    def load(cls, options: LoadOptions) -> BenchClip:
        towers = ClipTowers.from_config(VIT_B_32, seed=int(options.options.get("seed", DEFAULT_SEED)))
        weights_hash = hash_tensors(towers.clip.state_dict())  # before the cast: one hash for the weights in any dtype
        return cls(ClipTowers(towers.clip, options.dtype, options.device), weights_hash)

    def prepare_image(self, image: PILImage.Image) -> Tensor:
        return clip_preprocess(image, IMAGE_SIZE)

    def prepare_text(self, prompt: str) -> tuple[Tensor, tuple[str, ...]]:
        tokens, truncated = tokenize(prompt)
        return tokens, ("prompt_truncated",) if truncated else ()

    def normalize(self, pixels_B3SS: Tensor) -> Tensor:
        return normalize(pixels_B3SS, dtype=self.dtype)

    def encode_image(self, pixels_B3SS: Tensor) -> Tensor:
        return self.towers.encode_image(pixels_B3SS)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        return self.towers.encode_text(tokens_BL)

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        # In float32: a bfloat16 cosine has steps of 0.4 %.
        return HeadOutput(100 * F.cosine_similarity(image_features_BD.float(), text_features_BD.float(), dim=-1))

    def preprocess_tensor(self, pixels_B3HW: Tensor) -> Tensor:
        return self.normalize(clip_preprocess_tensor(pixels_B3HW, IMAGE_SIZE))
