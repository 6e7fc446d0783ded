"""What rewards on a CLIP have in common: everything but the head's formula."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor

from models.backbones import clip, clip_hf, clip_tokenizer
from models.backbones.clip import ClipArchitecture, ClipSize, empty_clip
from models.backbones.shared import LoadedClip
from models.base import CheckpointSize, LoadOptions
from models.fitting.fittable import Fittable, write_tensors
from models.parity_recipe import fill, write_checkpoint
from models.preprocessing import ImagePreprocessing, at_least_float32, normalize
from models.towers import HeadOutput, TowerReward

PROJECTIONS = ("visual.proj", "text_projection", "text.text_projection", "logit_scale")
"""Names in open_clip's CLIP of what turns the towers' last states into a logit."""
LARGE_CPU_BATCH = 8
"""Most samples at once on a CPU for towers of ViT-L/14 and up."""


@dataclass(frozen=True)
class TextPreprocessing:
    """A tokenizer and its name, which is part of the features' key: prompt -> token ids int64 [L], truncated or not."""

    name: str
    tokenize: Callable[[str], tuple[Tensor, bool]]


OPEN_CLIP_TEXT = TextPreprocessing("open-clip", clip.tokenize)
HUGGING_FACE_TEXT = TextPreprocessing("hf-clip", clip_tokenizer.tokenize)


class ClipReward(TowerReward):
    """A reward on the two towers of a CLIP; a model adds ``load`` and ``head``.

    Features are the projected embeddings [B, D] before normalisation to unit length, in the towers' dtype.
    """

    def __init__(self, loaded: LoadedClip, image: ImagePreprocessing, text: TextPreprocessing = OPEN_CLIP_TEXT) -> None:
        self.loaded = loaded
        self.towers = loaded.towers
        self.image_preprocessing, self.text_preprocessing = image, text
        self.weights_hash = loaded.weights_hash
        self.dtype = loaded.towers.dtype
        self.device = loaded.towers.logit_scale.device
        # The architecture counts: the same tensors with another activation are another tower.
        tower = f"{loaded.weights_hash}/{loaded.name}"
        self.image_key, self.text_key = f"{tower}/{image.name}", f"{tower}/{text.name}"

    def prepare_image(self, image: PILImage.Image) -> Tensor:
        return self.image_preprocessing.exact(image)

    def prepare_text(self, prompt: str) -> tuple[Tensor, tuple[str, ...]]:
        tokens, truncated = self.text_preprocessing.tokenize(prompt)
        return tokens, ("prompt_truncated",) if truncated else ()

    def normalize(self, pixels_B3SS: Tensor) -> Tensor:
        return normalize(pixels_B3SS, dtype=self.dtype)

    def encode_image(self, pixels_B3SS: Tensor) -> Tensor:
        return self.towers.encode_image(pixels_B3SS)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        return self.towers.encode_text(tokens_BL)

    @abstractmethod
    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput: ...

    def preprocess_tensor(self, pixels_B3HW: Tensor) -> Tensor:
        return self.normalize(self.image_preprocessing.twin(pixels_B3HW))

    def fittable(self) -> Fittable:
        """The head: both projections and the scale."""
        clip = self.towers.clip

        def save(folder: Path) -> LoadOptions:
            return LoadOptions(weights=write_tensors(clip.state_dict(), folder / "model.safetensors"))

        return Fittable(clip, PROJECTIONS, save)


def cosine(image_features_BD: Tensor, text_features_BD: Tensor) -> Tensor:
    """Cosines [B] in float32 whatever the towers' dtype (a bfloat16 one has steps of 0.4 %); float64 stays."""
    return F.cosine_similarity(at_least_float32(image_features_BD), at_least_float32(text_features_BD), dim=-1)


def scaled_cosine(towers: clip.ClipTowers, image_features_BD: Tensor, text_features_BD: Tensor) -> Tensor:
    """CLIP's logits [B]: exp(logit_scale) * cosine."""
    return towers.logit_scale.exp() * cosine(image_features_BD, text_features_BD)


def choice(options: LoadOptions, name: str, default: str, known: tuple[str, ...]) -> str:
    """The option ``name``; raises ValueError naming the ``known`` ones for another value."""
    value = options.options.get(name, default)
    if value not in known:
        raise ValueError(f"the option {name} is one of {', '.join(known)}; not {value!r}")
    return str(value)


def random_clip(
    file: Path, architecture: ClipArchitecture, size: CheckpointSize, *, hugging_face: bool, seed: int = 0
) -> Path:
    """Write a CLIP with random weights in a published form: Hugging Face's names flat, or open_clip's under a key.

    ``tiny``: two layers a tower, two heads or one wide, with the image size, patches, vocabulary and embedding of
    the published model, some 15 MB.
    """
    published = architecture.published
    tiny = ClipSize(
        embed_dim=published.embed_dim,
        vision_width=2 * architecture.vision_head_width,
        vision_layers=2,
        text_width=architecture.text_head_width,
        text_layers=2,
    )
    expected = empty_clip(architecture.config(published if size == "full" else tiny)).state_dict()
    if hugging_face:
        expected = clip_hf.from_open_clip(expected)
    tensors = {name: fill(name, tensor.shape, seed) for name, tensor in expected.items()}
    return write_checkpoint(tensors, file, nested=None if hugging_face else "state_dict")
