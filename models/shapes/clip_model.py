"""The architecture of shapes-clip: a small open_clip CLIP, a head that turns features into a score, and its files.

Tokens are those of open_clip's own tokenizer (49,408 entries), but only the embedding rows of the tokens that the
grammar can produce are trained and stored, with one shared row for every other token; ``expand`` copies the rows to the
full table when the model is loaded. That keeps 6 million unused parameters out of the optimizer and of git.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.clip import CONTEXT_LENGTH, tokenize
from models.base import WeightsError
from models.shapes.prompts import COUNTS, Include
from models.shapes.world import COLORS, SHAPES

WEIGHTS = Path(__file__).parent / "weights" / "shapes_clip.safetensors"
IMAGE_SIZE = 64
EMBED_DIM = 128
FULL_VOCABULARY = 49408
TEXT_LENGTHS = (16, 32, CONTEXT_LENGTH)
_EMBEDDING = "token_embedding.weight"
_WORDS = (
    *COLORS,
    *(Include(shape).noun(count) for shape in SHAPES for count in (1, 2)),
    *COUNTS,
    *("a", "an", "the", "one", "single", "exactly", "2", "3", "4", "-", "colored", "coloured", "that", "is", "are"),
    *("photo", "picture", "image", "drawing", "of", "showing", "and", "also", "with", "together", "."),
    *("to", "on", "left", "right", "above", "over", "below", "under", "beneath"),
)


@lru_cache(maxsize=1)
def known_tokens() -> tuple[int, ...]:
    """Token ids of every word of the grammar, with padding, start and end, ascending."""
    ids: set[int] = set()
    for word in _WORDS:
        ids.update(tokenize(word)[0].tolist())
    return tuple(sorted(ids))


@lru_cache(maxsize=1)
def compact_index() -> Tensor:
    """int64 [49408]: each token's row in the compact table. Row 0 is shared by all tokens outside the grammar; the end
    token keeps the largest row, since CLIP pools where the id is largest."""
    index = torch.zeros(FULL_VOCABULARY, dtype=torch.int64)
    known = torch.tensor(known_tokens(), dtype=torch.int64)
    index[known] = torch.arange(1, len(known) + 1)
    return index


def clip_config(*, compact: bool) -> dict[str, Any]:
    """Arguments of open_clip's CLIP; ``compact`` with the table of known tokens only, as it is trained and stored."""
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": 4,
            "width": 128,
            "head_width": 32,
            "patch_size": 8,
            "pool_type": "avg",
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": len(known_tokens()) + 1 if compact else FULL_VOCABULARY,
            "width": 128,
            "heads": 4,
            "layers": 3,
        },
    }


class PreferenceHead(nn.Module):
    """Score from both features, their cosine and products of their projections; its weights stay float32 whatever the
    towers' are.

    A product of projections tells where picture and prompt agree on one thing (this colour in that cell); what is
    asked for together, and in which relation, is then left to the layers.
    """

    def __init__(self, dim: int = EMBED_DIM, products: int = 512, hidden: int = 384) -> None:
        super().__init__()
        self.image_projection = nn.Linear(dim, products)
        self.text_projection = nn.Linear(dim, products)
        self.layers = nn.Sequential(
            nn.Linear(products + 2 * dim + 1, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, image_features_BD: Tensor, text_features_BD: Tensor) -> Tensor:
        """Features [..., D] of one shape, any dtype -> scores [...] in the dtype of the head's weights."""
        dtype = next(self.parameters()).dtype
        image = F.normalize(image_features_BD.to(dtype), dim=-1)
        text = F.normalize(text_features_BD.to(dtype), dim=-1)
        # Entries of about one are a better input to a linear layer than those of a unit vector.
        scale = image.shape[-1] ** 0.5
        cosine = (image * text).sum(-1, keepdim=True)
        products = self.image_projection(image * scale) * self.text_projection(text * scale)
        joined = torch.cat([products, image * scale, text * scale, cosine * scale], dim=-1)
        return self.layers(joined).squeeze(-1)  # type: ignore[no-any-return]


def pack(clip: nn.Module, head: nn.Module) -> dict[str, Tensor]:
    """What is stored: float16 tensors "clip.*" (with the compact embedding table) and "head.*"."""
    named = [(f"clip.{name}", value) for name, value in clip.state_dict().items()]
    named += [(f"head.{name}", value) for name, value in head.state_dict().items()]
    return {name: value.detach().to(torch.float16).contiguous() for name, value in named}


def pack_expanded(clip: nn.Module, head: nn.Module) -> dict[str, Tensor]:
    """As :func:`pack`, of a CLIP whose embedding table has a row for every token of the vocabulary."""
    packed = pack(clip, head)
    rows = torch.zeros(len(known_tokens()) + 1, dtype=torch.int64)
    rows[compact_index()] = torch.arange(len(compact_index()))
    name = f"clip.{_EMBEDDING}"
    packed[name] = packed[name][rows].contiguous()
    return packed


def unpack(tensors: Mapping[str, Tensor], *, compact: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stored tensors -> float32 tensors of (CLIP, head), the embedding table expanded unless ``compact``.

    Raises :class:`WeightsError` for tensors that are not those of this model.
    """
    clip = {name[5:]: value.float() for name, value in tensors.items() if name.startswith("clip.")}
    head = {name[5:]: value.float() for name, value in tensors.items() if name.startswith("head.")}
    if len(clip) + len(head) != len(tensors) or _EMBEDDING not in clip or not head:
        raise WeightsError("the weights are not those of shapes-clip: they lack clip.* or head.* tensors")
    if len(clip[_EMBEDDING]) != len(known_tokens()) + 1:
        raise WeightsError(
            f"the weights hold {len(clip[_EMBEDDING])} token rows, this version knows {len(known_tokens()) + 1}"
        )
    if not compact:
        clip[_EMBEDDING] = clip[_EMBEDDING][compact_index()]
    return clip, head
