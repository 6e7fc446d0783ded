"""BLIP's vision tower and its text encoder that looks at the image (Li et al. 2022, arXiv:2201.12086).

The vision tower is a ViT with layer norms before each part (Dosovitskiy et al. 2020). The text encoder is a BERT whose
every layer has cross attention to all vision tokens between self attention and feed-forward; it reads the text in both
directions and has neither token types nor a pooler. GELU is the exact one (erf). Dropout and drop-path, which BLIP
trains with, hold no weights and are left out.

Modules carry the names of the published checkpoints, so that an error names a tensor as it is called in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.wordpiece import lengths_of
from models.base import WeightsError

HEAD_WIDTH = 64
VISION_EPS = 1e-6
TEXT_EPS = 1e-12

UNUSED_TENSORS = (
    "vision_proj.*",  # for BLIP's contrastive loss
    "text_proj.*",
    "text_encoder.embeddings.position_ids",  # 0, 1, 2 ...; only some versions of the library saved it
)
"""Tensors of a BLIP checkpoint that no score depends on, as globs; they may be missing."""


@dataclass(frozen=True)
class BlipConfig:
    """Sizes; the defaults are those of BLIP-Large (ViT-L/16) with a BERT-base text encoder."""

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_hidden: int = 4096
    text_width: int = 768
    text_layers: int = 12
    text_hidden: int = 3072
    vocabulary: int = 30_524
    positions: int = 512

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> BlipConfig:
        """The sizes of a checkpoint, read from names and shapes.

        Raises :class:`WeightsError` where a tensor that tells a size is missing or of another kind.
        """
        vision, text = f"{prefix}visual_encoder.", f"{prefix}text_encoder."
        width, _, patch, _ = _shape(tensors, f"{vision}patch_embed.proj.weight", 4)
        tokens = _shape(tensors, f"{vision}pos_embed", 3)[1]
        side = round((tokens - 1) ** 0.5)
        if side < 1 or side * side + 1 != tokens:
            raise WeightsError(f"{vision}pos_embed has {tokens} places: not a class token and a square of patches")
        vocabulary, text_width = _shape(tensors, f"{text}embeddings.word_embeddings.weight", 2)
        if width % HEAD_WIDTH or text_width % HEAD_WIDTH:
            raise WeightsError(f"widths {width} and {text_width} are not multiples of a head's {HEAD_WIDTH}")
        return cls(
            image_size=side * patch,
            patch_size=patch,
            vision_width=width,
            vision_layers=_depth(tensors, f"{vision}blocks."),
            vision_hidden=_shape(tensors, f"{vision}blocks.0.mlp.fc1.weight", 2)[0],
            text_width=text_width,
            text_layers=_depth(tensors, f"{text}encoder.layer."),
            text_hidden=_shape(tensors, f"{text}encoder.layer.0.intermediate.dense.weight", 2)[0],
            vocabulary=vocabulary,
            positions=_shape(tensors, f"{text}embeddings.position_embeddings.weight", 2)[0],
        )


class BlipEncoder(nn.Module):
    """Image and text to the hidden states of the text, each token having looked at the image."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTower(config)
        self.text_encoder = TextEncoder(config)

    def encode_image(self, pixels_B3SS: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> all vision tokens [B, 1 + patches, D] after the final norm, class first."""
        tokens: Tensor = self.visual_encoder(pixels_B3SS)
        return tokens

    def encode_text(self, tokens_BL: Tensor, vision_BND: Tensor) -> Tensor:
        """Token ids int64 [B, L] as of ``wordpiece.tokenize`` and vision tokens [B, N, D] -> hidden states [B, L, T].

        Pads are masked out: the states up to ``[SEP]`` do not depend on their number, those behind mean nothing. Raises
        ValueError when L exceeds the positions that the encoder knows.
        """
        if tokens_BL.shape[-1] > self.config.positions:
            raise ValueError(f"{tokens_BL.shape[-1]} tokens do not fit into {self.config.positions} positions")
        hidden: Tensor = self.text_encoder(tokens_BL, vision_BND)
        return hidden


class VisionTower(nn.Module):
    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        width = config.vision_width
        patches = (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, config.patch_size, config.patch_size)})
        self.blocks = nn.ModuleList(VisionBlock(width, config.vision_hidden) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(width, eps=VISION_EPS)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        patches_BND = self.patch_embed["proj"](pixels_B3SS).flatten(2).transpose(1, 2)
        classes_B1D = self.cls_token.expand(len(patches_BND), -1, -1)
        hidden = torch.cat([classes_B1D, patches_BND], dim=1) + self.pos_embed
        for block in self.blocks:
            hidden = block(hidden)
        normed: Tensor = self.norm(hidden)
        return normed


class VisionBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=VISION_EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=VISION_EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, hidden_BND: Tensor) -> Tensor:
        query, key, value = self.attn["qkv"](self.norm1(hidden_BND)).chunk(3, dim=-1)
        hidden_BND = hidden_BND + self.attn["proj"](attend(query, key, value))
        grown = F.gelu(self.mlp["fc1"](self.norm2(hidden_BND)))
        result: Tensor = hidden_BND + self.mlp["fc2"](grown)
        return result


class TextEncoder(nn.Module):
    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        width = config.text_width
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocabulary, width),
                "position_embeddings": nn.Embedding(config.positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=TEXT_EPS),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(TextLayer(config) for _ in range(config.text_layers))})

    def forward(self, tokens_BL: Tensor, vision_BND: Tensor) -> Tensor:
        places_L = torch.arange(tokens_BL.shape[-1], device=tokens_BL.device)
        # BERT's own mask adds -10000 to the logits of pads, whose exponential is 0 in every dtype used here.
        mask_B11L = (places_L < lengths_of(tokens_BL)[:, None])[:, None, None]
        words = self.embeddings["word_embeddings"](tokens_BL)
        hidden: Tensor = self.embeddings["LayerNorm"](words + self.embeddings["position_embeddings"](places_L))
        for layer in self.encoder["layer"].children():
            hidden = layer(hidden, mask_B11L, vision_BND)
        return hidden


class TextLayer(nn.Module):
    """Self attention, cross attention, feed-forward; the norm comes after each residual sum."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        width, hidden = config.text_width, config.text_hidden
        self.attention = TextAttention(width, width)
        self.crossattention = TextAttention(width, config.vision_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = ResidualNorm(hidden, width)

    def forward(self, hidden_BLT: Tensor, mask_B11L: Tensor, vision_BND: Tensor) -> Tensor:
        hidden_BLT = self.attention(hidden_BLT, hidden_BLT, mask_B11L)
        hidden_BLT = self.crossattention(hidden_BLT, vision_BND, None)
        result: Tensor = self.output(F.gelu(self.intermediate["dense"](hidden_BLT)), hidden_BLT)
        return result


class TextAttention(nn.Module):
    def __init__(self, width: int, seen_width: int) -> None:
        super().__init__()
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(seen_width, width),
                "value": nn.Linear(seen_width, width),
            }
        )
        self.output = ResidualNorm(width, width)

    def forward(self, hidden_BLT: Tensor, seen_BND: Tensor, mask_B11N: Tensor | None) -> Tensor:
        query, key, value = self.self["query"](hidden_BLT), self.self["key"](seen_BND), self.self["value"](seen_BND)
        result: Tensor = self.output(attend(query, key, value, mask_B11N), hidden_BLT)
        return result


class ResidualNorm(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=TEXT_EPS)

    def forward(self, inner: Tensor, residual: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.dense(inner) + residual)
        return normed


def attend(query_BLT: Tensor, key_BNT: Tensor, value_BNT: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention in heads of width 64 (Vaswani et al. 2017): queries [B, L, T], keys and values [B, N, T] -> [B, L, T].

    ``mask`` is true where a key may be seen, and broadcasts to [B, heads, L, N].
    """
    query, key, value = (x.view(*x.shape[:2], -1, HEAD_WIDTH).transpose(1, 2) for x in (query_BLT, key_BNT, value_BNT))
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return seen.transpose(1, 2).flatten(2)


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors:
        raise WeightsError(f"the weights are not those of a BLIP text and image encoder: {name} is missing")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions:
        raise WeightsError(f"the weights are not those of a BLIP: {name} is {list(shape)}, not of {dimensions} axes")
    return shape


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the largest N of the names ``<prefix>N.*``; a layer that is missing below it is found later."""
    numbered = re.compile(re.escape(prefix) + r"(\d+)\.")
    found = [int(match[1]) for name in tensors if (match := numbered.match(name))]
    return 1 + max(found, default=-1)
