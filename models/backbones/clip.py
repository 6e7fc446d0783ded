"""The two towers of a CLIP (Radford et al. 2021) with open_clip's architecture, and its tokenizer.

The text tower reads as many tokens as the prompt's length bucket holds instead of always the whole context: attention
is causal, so tokens after the end token never reach the pooled feature, and leaving them out changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.backbones import bpe
from models.base import WeightsError
from models.weights import fit

if TYPE_CHECKING:  # open_clip takes seconds to import: a service without such models need not pay them
    from open_clip.model import CLIP

CONTEXT_LENGTH = 77
TEXT_LENGTHS = (16, 32, CONTEXT_LENGTH)
VOCABULARY = 49408


@dataclass(frozen=True)
class ClipSize:
    """What the shapes of a CLIP's tensors tell. Widths in channels, images in pixels, contexts in tokens."""

    embed_dim: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    patch_size: int = 14
    image_size: int = 224
    context_length: int = CONTEXT_LENGTH
    vocabulary: int = VOCABULARY


@dataclass(frozen=True)
class ClipArchitecture:
    """What they do not tell: channels of an attention head, and the activation (quick: x * sigmoid(1.702 x))."""

    name: str
    published: ClipSize
    vision_head_width: int
    text_head_width: int = 64
    quick_gelu: bool = False

    def config(self, size: ClipSize) -> dict[str, Any]:
        """Arguments of open_clip's CLIP."""
        return {
            "embed_dim": size.embed_dim,
            "vision_cfg": {
                "image_size": size.image_size,
                "layers": size.vision_layers,
                "width": size.vision_width,
                "head_width": self.vision_head_width,
                "patch_size": size.patch_size,
            },
            "text_cfg": {
                "context_length": size.context_length,
                "vocab_size": size.vocabulary,
                "width": size.text_width,
                "heads": size.text_width // self.text_head_width,
                "layers": size.text_layers,
            },
            "quick_gelu": self.quick_gelu,
        }


VIT_L_14 = ClipArchitecture("vit-l-14", ClipSize(768, 1024, 24, 768, 12), vision_head_width=64, quick_gelu=True)
VIT_H_14 = ClipArchitecture("vit-h-14", ClipSize(1024, 1280, 32, 1024, 24), vision_head_width=80)
ARCHITECTURES = {architecture.name: architecture for architecture in (VIT_L_14, VIT_H_14)}


class ClipTowers(nn.Module):
    """An open_clip CLIP whose weights are frozen, in evaluation mode and held in one dtype (no autocast).

    ``logit_scale`` stays float32: a head multiplies scores by its exponential.
    """

    def __init__(self, clip: CLIP, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        super().__init__()
        # Only with both does cutting off the tokens after the end token leave the pooled feature as it is.
        if clip.text_pool_type != "argmax":
            raise ValueError(f"the text tower pools by {clip.text_pool_type!r}; only 'argmax' (end token) is supported")
        if clip.attn_mask is None:
            raise ValueError("the text tower has no causal mask: its features depend on the padding")
        scale = clip.logit_scale.detach().float()
        self.clip = clip.to(device=device, dtype=dtype).requires_grad_(False)
        self.clip.logit_scale = nn.Parameter(scale.to(device), requires_grad=False)
        self.dtype = dtype
        self.image_size = int(clip.visual.image_size[0])
        self.context_length = int(clip.context_length)
        self.eval()

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        tensors: Mapping[str, Tensor] | None = None,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ClipTowers:
        """Towers of an open_clip model ``config`` (embed_dim, vision_cfg, text_cfg, ...); nothing is downloaded.

        Weights are copies of ``tensors`` under open_clip's names, all of them, or random ones from ``seed``: exactly
        one is given. Raises :class:`WeightsError` when names or shapes do not fit.
        """
        if (tensors is None) == (seed is None):
            raise ValueError("give either tensors or a seed")
        if tensors is not None:
            clip = empty_clip(config)
            fit(clip.state_dict(), tensors, "this CLIP")
            return cls(_filled(clip, tensors, dtype, device), dtype, device)
        from open_clip.model import CLIP

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            clip = CLIP(**config)
        return cls(clip, dtype, device)

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of the factor that CLIP's logits are scaled by, float32 scalar."""
        scale: Tensor = self.clip.logit_scale
        return scale

    def encode_image(self, pixels_B3SS: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> image features [B, D] in the towers' dtype, not normalised."""
        features: Tensor = self.clip.visual(pixels_B3SS.to(self.dtype))
        return features

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Token ids int64 [B, L], L <= context length -> text features [B, D] in the towers' dtype, not normalised.

        Every row holds its end token. Raises ValueError when L exceeds the context.
        """
        length = tokens_BL.shape[-1]
        if length > self.context_length:
            raise ValueError(f"{length} tokens do not fit into a context of {self.context_length}")
        clip = self.clip
        hidden = clip.token_embedding(tokens_BL) + clip.positional_embedding[:length]
        hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))
        ends_B = tokens_BL.argmax(dim=-1)  # the end token has the largest id
        pooled: Tensor = hidden[torch.arange(len(hidden), device=hidden.device), ends_B]
        projection = clip.text_projection
        if isinstance(projection, nn.Linear):
            pooled = projection(pooled)
        elif projection is not None:
            pooled = pooled @ projection
        return pooled


def empty_clip(config: Mapping[str, Any]) -> CLIP:
    """An open_clip model on the meta device: names and shapes without memory or time for random numbers."""
    from open_clip.model import CLIP

    with torch.device("meta"):
        return CLIP(**config)


def _filled(clip: CLIP, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> CLIP:
    """An empty model with copies of ``tensors``: converted one by one, a second model's worth of memory is never held.

    Copies, because a mapped file may be replaced or cut short while the service runs.
    """
    kept = {"logit_scale"}  # float32 whatever the towers' dtype
    state = {
        name: tensor.to(device, torch.float32 if name in kept else dtype, copy=True) for name, tensor in tensors.items()
    }
    clip.load_state_dict(state, assign=True)
    if clip.attn_mask is not None:  # not in checkpoints: -inf above the diagonal
        length = clip.context_length
        clip.attn_mask = torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu_(1)
    return clip


def size_of(tensors: Mapping[str, Tensor], model: str) -> ClipSize:
    """The sizes of a CLIP from its tensors under open_clip's names.

    Raises :class:`WeightsError` when the tensors that tell them are missing or of no CLIP's shape.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        tensor = tensors.get(name)
        if tensor is None or tensor.ndim != dimensions or 0 in tensor.shape:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise WeightsError(
                f"the weights are not those of {model}: {name} is {found}; {dimensions} axes expected, none empty"
            )
        return tensor.shape

    vision_width, _, patch_size, _ = shape("visual.conv1.weight", 4)
    positions, _ = shape("visual.positional_embedding", 2)
    context_length, _ = shape("positional_embedding", 2)
    vocabulary, _ = shape("token_embedding.weight", 2)
    text_width, embed_dim = shape("text_projection", 2)
    layers = {tower: _layers(tensors, f"{tower}transformer.resblocks.") for tower in ("visual.", "")}
    if not all(layers.values()):
        raise WeightsError(f"the weights are not those of {model}: a tower has no layers")
    return ClipSize(
        embed_dim=embed_dim,
        vision_width=vision_width,
        vision_layers=layers["visual."],
        text_width=text_width,
        text_layers=layers[""],
        patch_size=patch_size,
        image_size=patch_size * round((positions - 1) ** 0.5),
        context_length=context_length,
        vocabulary=vocabulary,
    )


def _layers(names: Iterable[str], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def tokenize(prompt: str, lengths: Sequence[int] = TEXT_LENGTHS) -> tuple[Tensor, bool]:
    """Token ids int64 [L] of open_clip's BPE: start, tokens, end, zeros; and whether the prompt was truncated.

    L is the smallest of ``lengths`` (ascending) that holds them all, otherwise the largest one with the end token kept
    in last place. Up to the zeros the ids are those that open_clip's own tokenizer gives for the largest length. Words
    beyond it are not read, so the work does not grow with their number.
    """
    longest = lengths[-1]
    words = bpe.encode(prompt, longest - 1)
    start, end = bpe.tokenizer().sot_token_id, bpe.tokenizer().eot_token_id
    tokens = [start, *words[: longest - 2], end]
    length = next(length for length in lengths if length >= len(tokens))
    ids = torch.zeros(length, dtype=torch.int64)
    ids[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return ids, len(words) > longest - 2
