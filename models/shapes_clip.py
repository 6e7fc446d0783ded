"""A small CLIP with an MLP head that was trained on preferences between pictures of coloured shapes.

The same parts as PickScore or ImageReward in small: open_clip's towers and tokenizer, CLIP's preprocessing (at 64
pixels), a Bradley-Terry score. ``python -m models.shapes.train_clip`` rebuilds the weights; their measured accuracy is
in the JSON file beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image as PILImage
from torch import Tensor

from models.backbones.clip import ClipTowers, tokenize
from models.base import Calibration, Candidate, HeadOutput, LoadOptions, RewardInfo, Sample, TowerReward, WeightsError
from models.preprocessing import clip_preprocess, clip_preprocess_tensor, normalize
from models.registry import register
from models.shapes.clip_model import (
    IMAGE_SIZE,
    TEXT_LENGTHS,
    WEIGHTS,
    PreferenceHead,
    clip_config,
    compact_index,
    unpack,
)
from models.shapes.world import Scene, SceneObject, render
from models.weights import hash_tensors, load_safetensors

PARAMETERS = 8_364_546


@register("shapes-clip")
class ShapesClip(TowerReward):
    """The head's score: how well a picture of coloured shapes shows what the prompt asks for."""

    info: ClassVar[RewardInfo] = RewardInfo(
        name="shapes-clip",
        description="Learned preference between pictures of coloured shapes: a small CLIP with an MLP head",
        kind="pointwise",
        inputs=("prompt", "image"),
        range=(-28.0, 28.0),  # 1st to 99th percentile on held-out pairs: shapes_clip.json
        citation="this project; architecture: Radford et al., 2021 (arXiv:2103.00020); "
        "loss: Bradley and Terry, 1952 (Biometrika 39)",
        license="project",
        calibration=Calibration(1.0, "Bradley-Terry training loss"),
        weights="models/shapes/weights/shapes_clip.safetensors",
        weights_bytes=PARAMETERS * 4,
        differentiable=True,
    )

    def __init__(self, towers: ClipTowers, head: PreferenceHead, weights_hash: str) -> None:
        self.towers = towers
        self.preference_head = head.eval().requires_grad_(False)
        self.weights_hash = weights_hash
        self.dtype = towers.dtype
        self.device = towers.logit_scale.device
        self.image_key = self.text_key = f"{weights_hash}/clip{IMAGE_SIZE}/{self.preprocessing}"

    @classmethod
    def load(cls, options: LoadOptions) -> ShapesClip:
        """The weights in the package, or those of the file ``options.weights``."""
        tensors = load_safetensors(Path(options.weights) if options.weights else WEIGHTS)
        clip, head_tensors = unpack(tensors)
        towers = ClipTowers.from_config(
            clip_config(compact=False), tensors=clip, dtype=options.dtype, device=options.device
        )
        head = PreferenceHead()
        try:
            head.load_state_dict(head_tensors)
        except RuntimeError as exc:
            raise WeightsError("the weights are not those of shapes-clip: the head's tensors do not fit") from exc
        return cls(towers, head.to(options.device), hash_tensors(tensors))

    def prepare_image(self, image: PILImage.Image) -> Tensor:
        return clip_preprocess(image, IMAGE_SIZE)

    def prepare_text(self, prompt: str) -> tuple[Tensor, tuple[str, ...]]:
        """Warns of a truncated prompt, and of words that the model has never seen."""
        tokens, truncated = tokenize(prompt, TEXT_LENGTHS)
        unknown = bool((compact_index()[tokens] == 0).any())
        return tokens, ("prompt_truncated",) * truncated + ("unknown_words",) * unknown

    def normalize(self, pixels_B3SS: Tensor) -> Tensor:
        return normalize(pixels_B3SS, dtype=self.dtype)

    def encode_image(self, pixels_B3SS: Tensor) -> Tensor:
        return self.towers.encode_image(pixels_B3SS)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        return self.towers.encode_text(tokens_BL)

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        """In float32 whatever the towers' dtype: a bfloat16 score has too few digits to rank a group."""
        with torch.autocast(self.device.type, enabled=False):
            return HeadOutput(self.preference_head(image_features_BD, text_features_BD))

    def preprocess_tensor(self, pixels_B3HW: Tensor) -> Tensor:
        return self.normalize(clip_preprocess_tensor(pixels_B3HW, IMAGE_SIZE))

    def canary(self) -> Sample:
        objects = (SceneObject("circle", "red", (1, 0)), SceneObject("square", "blue", (1, 2)))
        return Sample("a red circle left of a blue square", Candidate(image=render(Scene(objects))))
