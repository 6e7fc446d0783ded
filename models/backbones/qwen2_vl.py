"""Vision-language models as backbones of reward heads: Qwen2-VL (Wang et al. 2024, arXiv:2409.12191).

The modules and their rotary embeddings are those of transformers 5; checkpoints written by transformers up to 4.46 are
read under their own names. ``lm_head`` is not part of a backbone: a head reads hidden states, or the few rows of
``lm_head`` that it needs (:class:`LevelTokenHead`).

The forward passes are written here instead of calling the library's, because a reward knows more than the library: all
images of a batch have one size, so the vision tower attends in one batch and not image by image (one graph to compile,
and no device-to-host copy of lengths); padding lies on the right of a causal model, so no mask is needed; and one state
of each row is read, so the last layer computes no other. Tests compare them with the library's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.qwen2_vl_image import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, patch_positions, patchify
from models.base import WeightsError

if TYPE_CHECKING:  # transformers takes seconds to import: a service without such models need not pay them
    from transformers import Qwen2VLConfig, Qwen2VLTextConfig
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

QWEN2_VL_7B: Mapping[str, Mapping[str, Any]] = {
    "text": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    },
    "vision": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "hidden_act": "quick_gelu",
    },
}
"""Sizes of Qwen2-VL-7B-Instruct; the vocabulary is that of the checkpoint."""

Config = Mapping[str, Any] | str | Path | None
"""How the sizes of a model may be given: see :func:`qwen2_vl_config`."""

_PUBLISHED_PREFIXES = {"model.visual.": "visual.", "model.language_model.": "model."}


def published_name(name: str) -> str:
    """A tensor's name of transformers 5 (model.visual.*, model.language_model.*) -> that of transformers <= 4.46.

    Those are ``visual.*`` and ``model.*``; names that already are stay as they are.
    """
    for new, old in _PUBLISHED_PREFIXES.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def qwen2_vl_config(given: Config, vocabulary: int) -> Qwen2VLConfig:
    """The configuration of a Qwen2-VL with ``vocabulary`` token rows.

    ``given`` is a mapping with the parts ``text`` and ``vision``, a mapping in the form of transformers' config.json,
    the path of such a file, or None for the 7B model. Raises :class:`WeightsError` for a file that cannot be read,
    values of a wrong type, sizes of patches that are not Qwen2-VL's, and sliding windows of attention.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Qwen2VLConfig

    if isinstance(given, (str, Path)):
        try:
            given = json.loads(Path(given).read_text("utf-8"))
        except (OSError, ValueError) as exc:
            raise WeightsError(
                f"the config {given} cannot be read: it is the path of a transformers config.json"
            ) from exc
    parts = QWEN2_VL_7B if given is None else given
    if not isinstance(parts, Mapping):
        raise WeightsError(f"a config is a mapping or the path of a config.json, not {parts!r}")
    try:
        if "text" in parts and "vision" in parts:
            config = Qwen2VLConfig(text_config=_plain(parts["text"]), vision_config=_plain(parts["vision"]))
        else:
            config = Qwen2VLConfig.from_dict(_plain(parts))
    except (StrictDataclassError, TypeError, ValueError) as exc:
        raise WeightsError(f"the config is not one of a Qwen2-VL: {' '.join(str(exc).split())}") from exc
    text, vision = sizes(config)
    text.vocab_size = vocabulary
    config._attn_implementation = "sdpa"
    if text.use_sliding_window:
        raise WeightsError("a Qwen2-VL with sliding window attention is not supported")
    found = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    if found != (PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE):
        raise WeightsError(f"patch, merge and temporal sizes {found} are not those of a Qwen2-VL")
    return config


def sizes(config: Qwen2VLConfig) -> tuple[Qwen2VLTextConfig, Qwen2VLVisionConfig]:
    """The configurations of the language model and of the vision tower."""
    from transformers import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    text, vision = config.text_config, config.vision_config
    assert isinstance(text, Qwen2VLTextConfig)
    assert isinstance(vision, Qwen2VLVisionConfig)
    return text, vision


def _plain(value: Any) -> Any:
    """A deep copy in dicts and lists: transformers changes the mappings that it is given."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def beyond_tensors(config: Qwen2VLConfig) -> dict[str, Any]:
    """What of the configuration scores depend on and the tensors' names and shapes do not tell."""
    text, vision = sizes(config)
    rotary = text.rope_parameters
    assert rotary is not None
    return {
        "text": [
            text.num_attention_heads,
            text.num_key_value_heads,
            text.rms_norm_eps,
            rotary["rope_theta"],
            rotary.get("mrope_section"),
            text.hidden_act,
        ],
        "vision": [vision.num_heads, vision.hidden_act],
    }


class Qwen2VLBackbone(nn.Module):
    """Vision tower and language model of a Qwen2-VL without its ``lm_head``: frozen, in evaluation mode, in one dtype.

    Its state dict has the published names: ``visual.*`` and ``model.{embed_tokens,layers,norm}.*``.
    """

    def __init__(self, config: Qwen2VLConfig) -> None:
        """A model of this configuration whose tensors are still to be had (on the meta device): see :meth:`assign`."""
        from transformers import Qwen2VLModel

        super().__init__()
        with torch.device("meta"):
            whole = Qwen2VLModel(config)
        self.config = config
        # The library's modules have no useful types.
        self.visual: Any = whole.visual
        self.model: Any = whole.language_model
        # Rotary frequencies are computed and not read: those of the meta device hold nothing.
        self.visual.rotary_pos_emb = type(self.visual.rotary_pos_emb)(config.vision_config)
        self.model.rotary_emb = type(self.model.rotary_emb)(config.text_config)
        self.eval().requires_grad_(False)

    def assign(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        """Take copies of the tensors of the state dict, cast one by one.

        Copies, because a mapped file may be replaced or cut short while the service runs.
        """
        placed = {name: tensors[name].to(device=device, dtype=dtype, copy=True) for name in self.state_dict()}
        self.load_state_dict(placed, assign=True)
        self.requires_grad_(False).to(device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.embed_tokens.weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.embed_tokens.weight.device
        return device

    def encode_image(self, pixels_B3HW: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] of one size, multiples of 28 -> tokens [B, H/28 * W/28, hidden]."""
        rows, columns = (side // PATCH_SIZE for side in pixels_B3HW.shape[-2:])
        return self.encode_patches(patchify(pixels_B3HW), rows, columns)

    def encode_patches(self, patches_BNP: Tensor, rows: int, columns: int) -> Tensor:
        """Patches [B, N, 1176] of images of ``rows`` x ``columns`` patches -> tokens [B, N/4, hidden]."""
        return encode_patches(self.visual, patches_BNP, rows, columns)

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Token ids -> embeddings [B, L, hidden]."""
        embeddings: Tensor = self.model.embed_tokens(ids_BL)
        return embeddings

    def hidden_states(self, embeddings_BLD: Tensor, positions_3BL: Tensor) -> Tensor:
        """Embeddings at the given rotary positions (time, row, column) -> states [B, L, hidden] after the last norm.

        Attention is causal and unmasked: states up to the first padding token on the right are exact.
        """
        rotary = self.model.rotary_emb(embeddings_BLD, positions_3BL)
        states: Tensor = self.model.norm(_through(self.model.layers, embeddings_BLD, rotary))
        return states

    def pooled_state(self, embeddings_BLD: Tensor, positions_3BL: Tensor, places_B: Tensor) -> Tensor:
        """The one of :meth:`hidden_states` [B, hidden] at one place of each row.

        In the last layer only this place queries and passes the MLP: 3 % of a 7B model's work at 800 tokens.
        """
        rotary = self.model.rotary_emb(embeddings_BLD, positions_3BL)
        hidden_BLD = _through(self.model.layers[:-1], embeddings_BLD, rotary)
        pooled: Tensor = self.model.norm(_at_places(self.model.layers[-1], hidden_BLD, rotary, places_B))
        return pooled


def encode_patches(visual: Any, patches_BNP: Tensor, rows: int, columns: int) -> Tensor:
    """Patches [B, N, P] of images of ``rows`` x ``columns`` patches -> tokens [B, N/4, hidden], by a Qwen2-VL's tower.

    ``visual`` is transformers' module. All images attend in one batch, where the library goes image by image.
    """
    batch, count, _ = patches_BNP.shape
    # A convolution whose stride is its kernel is a product of matrices, and faster as one.
    weight = visual.patch_embed.proj.weight
    hidden = F.linear(patches_BNP.to(weight.dtype), weight.flatten(1))
    cos, sin = visual.rotary_pos_emb(hidden, patch_positions(rows, columns, hidden.device))
    for block in visual.blocks:
        hidden = hidden + _attend(block.attn, block.norm1(hidden), cos, sin)
        hidden = hidden + block.mlp(block.norm2(hidden))
    tokens: Tensor = visual.merger(hidden.flatten(0, 1))
    return tokens.view(batch, count // MERGE_SIZE**2, -1)


def _through(layers: Iterable[Any], hidden_BLD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    for layer in layers:
        hidden_BLD = layer(hidden_BLD, attention_mask=None, position_embeddings=rotary)
    return hidden_BLD


def _at_places(layer: Any, hidden_BLD: Tensor, rotary: tuple[Tensor, Tensor], places_B: Tensor) -> Tensor:
    """A decoder layer's output [B, D] at one place of each row, which sees the tokens up to it."""
    attention = layer.self_attn
    batch, length, _ = hidden_BLD.shape
    rows, cos_BLD, sin_BLD = torch.arange(batch, device=hidden_BLD.device), *rotary
    normed = layer.input_layernorm(hidden_BLD)
    query = attention.q_proj(normed[rows, places_B]).view(batch, 1, -1, attention.head_dim)
    query = _rotate(query, cos_BLD[rows, places_B, None], sin_BLD[rows, places_B, None])
    key = _rotate(attention.k_proj(normed).view(batch, length, -1, attention.head_dim), cos_BLD, sin_BLD)
    value = attention.v_proj(normed).view(batch, length, -1, attention.head_dim)
    seen_B11L = (torch.arange(length, device=places_B.device) <= places_B[:, None])[:, None, None]
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=seen_B11L, enable_gqa=True
    )
    state_BD: Tensor = hidden_BLD[rows, places_B] + attention.o_proj(attended.flatten(1))
    output: Tensor = state_BD + layer.mlp(layer.post_attention_layernorm(state_BD))
    return output


def _attend(attention: Any, hidden_BND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Full attention among the patches of each image."""
    qkv: Tensor = attention.qkv(hidden_BND)
    query, key, value = qkv.view(*qkv.shape[:2], 3, attention.num_heads, -1).unbind(2)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    attended = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    projected: Tensor = attention.proj(attended.transpose(1, 2).flatten(2))
    return projected


def _rotate(states_BNHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotary embedding in the dtype of the angles or a finer one; cos and sin are [N, D] or [B, N, D]."""
    cos, sin = cos_ND.unsqueeze(-2), sin_ND.unsqueeze(-2)
    first, second = states_BNHD.chunk(2, dim=-1)
    return (states_BNHD * cos + torch.cat([-second, first], dim=-1) * sin).to(states_BNHD.dtype)


def sequential_positions(batch: int, length: int, device: torch.device) -> Tensor:
    """Positions int64 [3, batch, length] that count tokens, with all three rotary sections equal."""
    return torch.arange(length, device=device).expand(3, batch, length)


def insert_image(embeddings_BLD: Tensor, image_BND: Tensor, place: int) -> Tensor:
    """Put the image's tokens where the one placeholder stands: [B, L - 1 + N, D]."""
    return torch.cat([embeddings_BLD[:, :place], image_BND, embeddings_BLD[:, place + 1 :]], dim=1)


LEVELS = ("excellent", "good", "fair", "poor", "bad")


class LevelTokenHead(nn.Module):
    """A score from the words in which a language model would rate: the expectation over five levels of quality.

    The logits of the tokens of "excellent", "good", "fair", "poor" and "bad" are softmaxed among themselves and weigh
    the levels 5 to 1, so the score lies in [1, 5] (Q-Align, Wu et al. 2023, arXiv:2312.17090; DeQA-Score, You et al.
    2025, arXiv:2501.11561). Only five rows of ``lm_head`` are kept and multiplied.
    """

    def __init__(self, lm_head_VD: Tensor, level_ids: Sequence[int]) -> None:
        """``lm_head_VD`` are the rows of all tokens, ``level_ids`` the tokens of :data:`LEVELS` in that order."""
        super().__init__()
        if len(set(level_ids)) != len(LEVELS):
            raise ValueError(f"{len(LEVELS)} different tokens name the levels, not {list(level_ids)}")
        self.rows_5D: Tensor
        self.levels_5: Tensor
        self.register_buffer("rows_5D", lm_head_VD[list(level_ids)].detach().float())
        self.register_buffer("levels_5", torch.arange(len(LEVELS), 0, -1, device=lm_head_VD.device).float())

    def probabilities(self, states_BD: Tensor) -> Tensor:
        """States after the last norm, at the token before the answer -> P(level) [B, 5], float32, rows sum to 1."""
        return F.linear(states_BD.float(), self.rows_5D).softmax(dim=-1)

    def forward(self, states_BD: Tensor) -> Tensor:
        """States [B, hidden] -> scores [B] in [1, 5], float32."""
        return self.probabilities(states_BD) @ self.levels_5
