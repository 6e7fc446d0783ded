"""LAION's improved aesthetic predictor: five linear layers on the image embedding of OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbones.clip import VIT_L_14
from models.backbones.clip_reward import LARGE_CPU_BATCH, ClipReward, random_clip
from models.backbones.mlp import ScoreMLP
from models.backbones.shared import LoadedClip, shared_clip
from models.base import Calibration, CheckpointSize, LoadOptions, RewardInfo, WeightSource
from models.fitting.fittable import Fittable, write_tensors
from models.parity_recipe import fill, write_checkpoint
from models.preprocessing import ImagePreprocessing, at_least_float32
from models.registry import register
from models.towers import HeadOutput
from models.weights import HASH_PREFIX, fit, hash_tensors, load_checkpoint, obtain

TOWER_PARAMETERS = 427_616_513
TOWER = WeightSource("hf:openai/clip-vit-large-patch14/model.safetensors")
HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
HEAD = WeightSource(
    f"https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/{HEAD_FILE}", 3_714_759, role="head"
)


@register("aesthetic")
class Aesthetic(ClipReward):
    """A rating of the image alone, about 1 to 10; the prompt is ignored.

    The tower is that of ``clip-score``: one process holds it once, and with clip-score's ``preprocessing: hf`` each
    image is encoded once for both. Images go the way of the published image processor (PIL, crop rounded down). Its
    differentiable twin, which /gradient uses, differs by at most 1.06 and on average 0.26 to 0.30 levels of 255 on the
    eight fixture images.
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        name="aesthetic",
        description="Aesthetic rating, about 1 to 10: linear layers on CLIP ViT-L/14, the prompt is ignored. "
        "Verified: architecture and formula, on synthetic weights",
        kind="pointwise",
        inputs=("image",),
        range=(4.5, 6.5),
        citation="Schuhmann, 2022 (github.com/christophschuhmann/improved-aesthetic-predictor); "
        "LAION-5B: Schuhmann et al., 2022 (arXiv:2210.08402)",
        license="head: Apache-2.0; tower: MIT",
        calibration=Calibration(1.0, "none published: a difference of one point counts as odds of e to 1"),
        weights="hf:openai/clip-vit-large-patch14 and github.com/christophschuhmann/improved-aesthetic-predictor",
        weights_bytes=TOWER_PARAMETERS * 4 + HEAD.bytes,
        differentiable=True,
        sources=(TOWER, HEAD),
    )
    cpu_batch: ClassVar[int | None] = LARGE_CPU_BATCH
    tower_source: str | None = None
    """Where the tower came from, if not from the published place."""

    def __init__(self, loaded: LoadedClip, mlp: ScoreMLP, mlp_hash: str) -> None:
        super().__init__(loaded, ImagePreprocessing.bicubic_crop(loaded.towers.image_size, "transformers"))
        self.mlp = mlp.eval().requires_grad_(False)
        self.weights_hash = HASH_PREFIX + hashlib.sha256(f"{loaded.weights_hash}|{mlp_hash}".encode()).hexdigest()
        self.text_key = "no text"

    @classmethod
    def load(cls, options: LoadOptions) -> Aesthetic:
        loaded = shared_clip(TOWER, options, VIT_L_14, cls.info.name)
        tensors = load_checkpoint(obtain(HEAD, options, cls.info.name))
        mlp = ScoreMLP(int(loaded.towers.clip.visual.output_dim))
        fit(mlp.state_dict(), tensors, f"{cls.info.name}'s head")
        mlp.load_state_dict(tensors)
        mlp.to(options.device, torch.promote_types(options.dtype, torch.float32))
        model = cls(loaded, mlp, hash_tensors(tensors))
        model.tower_source = options.weights
        return model

    @classmethod
    def random_checkpoint(cls, folder: Path, size: CheckpointSize = "tiny") -> LoadOptions:
        tower = random_clip(folder / "model.safetensors", VIT_L_14, size, hugging_face=True)
        shapes = ScoreMLP(VIT_L_14.published.embed_dim).state_dict()
        head = write_checkpoint({name: fill(name, t.shape, 0) for name, t in shapes.items()}, folder / HEAD_FILE)
        return LoadOptions(weights=str(tower), options={HEAD.role: str(head)})

    def fittable(self) -> Fittable:
        """The linear layers; the tower stays as it is."""

        def save(folder: Path) -> LoadOptions:
            head = write_tensors(self.mlp.state_dict(), folder / "head.safetensors")
            return LoadOptions(weights=self.tower_source, options={HEAD.role: head})

        return Fittable(self.mlp, ("",), save)

    def prepare_text(self, prompt: str) -> tuple[Tensor, tuple[str, ...]]:
        """One token that nobody reads, whatever the prompt."""
        return torch.zeros(1, dtype=torch.int64), ()

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """The tokens themselves: the text tower has no part in the score."""
        return tokens_BL

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        """In float32 whatever the towers' dtype."""
        return HeadOutput(self.mlp(F.normalize(at_least_float32(image_features_BD), dim=-1)))
