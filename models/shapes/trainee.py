"""The model while it is trained: CLIP with the compact vocabulary, the head, and probes that exist only then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image as PILImage
from torch import Tensor, nn

from models.backbones.clip import tokenize
from models.preprocessing import clip_preprocess, normalize
from models.shapes.clip_model import EMBED_DIM, IMAGE_SIZE, clip_config, compact_index, pack, unpack
from models.shapes.prompts import Prompt
from models.shapes.world import COLORS, GRID, SHAPES


def to_pixels(images: Sequence[PILImage.Image]) -> Tensor:
    """Exact preprocessing, as the service does it: float32 [B, 3, 64, 64], normalised."""
    return normalize(torch.stack([clip_preprocess(image, IMAGE_SIZE) for image in images]))


def to_tokens(prompts: Sequence[Prompt], rng: np.random.Generator | None = None, unknown_rate: float = 0.0) -> Tensor:
    """Rows of the compact embedding table, int64 [G, L]; padding is cut to the longest. With ``rng`` some words are
    replaced by the row that stands for every unknown token."""
    rows = [compact_index()[tokenize(prompt.text)[0]] for prompt in prompts]
    end = int(compact_index().max())
    length = max(int(row.argmax()) for row in rows) + 1
    tokens = torch.full((len(rows), length), int(compact_index()[0]), dtype=torch.int64)
    for i, row in enumerate(rows):
        count = min(length, len(row))
        tokens[i, :count] = row[:count]
    if rng is not None and unknown_rate > 0:
        drop = torch.from_numpy(rng.random(tokens.shape) < unknown_rate)
        drop[:, 0] = False
        tokens = torch.where(drop & (tokens != end), 0, tokens)
    return tokens


class PlainHead(nn.Module):
    """The head of stage 2: features, their plain product and their cosine, through an MLP.

    It trains the towers, and is then replaced: it learns which things are there, but hardly how they are arranged.
    """

    def __init__(self, dim: int = EMBED_DIM, hidden: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 * dim + 1, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )

    def forward(self, image_features_BD: Tensor, text_features_BD: Tensor) -> Tensor:
        """Features [..., D] of one shape -> scores [...]."""
        image = F.normalize(image_features_BD, dim=-1)
        text = F.normalize(text_features_BD, dim=-1)
        scale = image.shape[-1] ** 0.5
        cosine = (image * text).sum(-1, keepdim=True)
        joined = torch.cat([image * scale, text * scale, image * text * scale * scale, cosine * scale], dim=-1)
        return self.layers(joined).squeeze(-1)  # type: ignore[no-any-return]


class Trainee(nn.Module):
    """CLIP with the compact vocabulary, a head, and the probes that exist during training only."""

    head: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.clip = CLIP(**clip_config(compact=True))
        self.clip.visual.output_tokens = True
        width = 128
        self.head = PlainHead()
        self.cell_probe = nn.Linear(self.clip.text_projection.shape[1], GRID * GRID * (len(SHAPES) + len(COLORS) + 2))
        self.patch_probe = nn.Linear(width, len(SHAPES) + len(COLORS) + 2)

    def encode_image(self, pixels_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and patch tokens [B, T, W]."""
        features, tokens = self.clip.visual(pixels_B3SS)
        return features, tokens

    def encode_text(self, tokens_GL: Tensor) -> Tensor:
        """Features [G, D]; works on any length since attention is causal."""
        clip, length = self.clip, tokens_GL.shape[1]
        hidden = clip.token_embedding(tokens_GL) + clip.positional_embedding[:length]
        hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))
        pooled: Tensor = hidden[torch.arange(len(hidden)), tokens_GL.argmax(dim=-1)] @ clip.text_projection
        return pooled


def rounded(model: Trainee) -> Trainee:
    """The model as it is stored: weights rounded to float16, computing in float32."""
    clip, head = unpack(pack(model.clip, model.head), compact=True)
    model.clip.load_state_dict(clip)
    model.head.load_state_dict(head)
    return model


@torch.inference_mode()
def score_pictures(model: Trainee, prompts: Sequence[Prompt], images: Sequence[PILImage.Image]) -> list[float]:
    """One score for each (prompt, image), in chunks of 100."""
    scores: list[float] = []
    for i in range(0, len(prompts), 100):
        features, _ = model.encode_image(to_pixels(images[i : i + 100]))
        scores += model.head(features, model.encode_text(to_tokens(prompts[i : i + 100]))).tolist()
    return scores
