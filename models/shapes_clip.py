"""A small CLIP with an MLP head that was trained on preferences between pictures of coloured shapes.

The same parts as PickScore or ImageReward in small: open_clip's towers and tokenizer, CLIP's preprocessing (at 64
pixels), a Bradley-Terry score. ``python -m models.shapes.train_clip`` rebuilds the weights; their measured accuracy is
in the JSON file beside them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.backbones.clip import ClipTowers, tokenize
from models.backbones.clip_reward import ClipReward, TextPreprocessing
from models.backbones.shared import LoadedClip
from models.base import Calibration, Candidate, LoadOptions, RewardInfo, Sample
from models.fitting.fittable import Fittable, write_tensors
from models.preprocessing import ImagePreprocessing
from models.registry import register
from models.shapes.clip_model import (
    IMAGE_SIZE,
    TEXT_LENGTHS,
    WEIGHTS,
    PreferenceHead,
    clip_config,
    compact_index,
    pack_expanded,
    unpack,
)
from models.shapes.world import Scene, SceneObject, render
from models.towers import HeadOutput
from models.weights import fit, hash_tensors, load_safetensors

PARAMETERS = 8_364_546


@register("shapes-clip")
class ShapesClip(ClipReward):
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

    def __init__(self, loaded: LoadedClip, head: PreferenceHead) -> None:
        super().__init__(
            loaded,
            ImagePreprocessing.bicubic_crop(IMAGE_SIZE),
            TextPreprocessing("open-clip", partial(tokenize, lengths=TEXT_LENGTHS)),
        )
        self.preference_head = head.eval().requires_grad_(False)

    @classmethod
    def load(cls, options: LoadOptions) -> ShapesClip:
        """The weights in the package, or those of the file ``options.weights``."""
        tensors = load_safetensors(Path(options.weights) if options.weights else WEIGHTS)
        clip, head_tensors = unpack(tensors)
        towers = ClipTowers.from_config(
            clip_config(compact=False), tensors=clip, dtype=options.dtype, device=options.device
        )
        head = PreferenceHead()
        fit(head.state_dict(), head_tensors, "shapes-clip's head")
        head.load_state_dict(head_tensors)
        return cls(LoadedClip(towers, hash_tensors(tensors), "shapes"), head.to(options.device))

    def prepare_text(self, prompt: str) -> tuple[Tensor, tuple[str, ...]]:
        """Warns of a truncated prompt, and of words that the model has never seen."""
        tokens, warnings = super().prepare_text(prompt)
        unknown = bool((compact_index()[tokens] == 0).any())
        return tokens, warnings + ("unknown_words",) * unknown

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        """In float32 whatever the towers' dtype: a bfloat16 score has too few digits to rank a group."""
        with torch.autocast(self.device.type, enabled=False):
            return HeadOutput(self.preference_head(image_features_BD, text_features_BD))

    def fittable(self) -> Fittable:
        clip, head = self.towers.clip, self.preference_head

        def save(folder: Path) -> LoadOptions:
            return LoadOptions(weights=write_tensors(pack_expanded(clip, head), folder / "model.safetensors"))

        # The rows of unknown tokens are one: they are stored once and must stay alike.
        module = nn.ModuleDict({"clip": clip, "head": head})
        return Fittable(module, ("head.",), save, frozen=("clip.token_embedding",))

    def canary(self) -> Sample:
        objects = (SceneObject("circle", "red", (1, 0)), SceneObject("square", "blue", (1, 2)))
        return Sample("a red circle left of a blue square", Candidate(image=render(Scene(objects))))
