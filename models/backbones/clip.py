"""The two towers of a CLIP (Radford et al. 2021) with open_clip's architecture, and its tokenizer.

The text tower reads as many tokens as the prompt's length bucket holds instead of always the whole context: attention
is causal, so tokens after the end token never reach the pooled feature, and leaving them out changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.backbones import bpe
from models.base import WeightsError

if TYPE_CHECKING:  # open_clip takes seconds to import: a service without such models need not pay them
    from open_clip.model import CLIP

CONTEXT_LENGTH = 77
TEXT_LENGTHS = (16, 32, CONTEXT_LENGTH)


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

        Weights are ``tensors`` under open_clip's names, all of them, or random ones from ``seed``: exactly one is
        given. Raises :class:`WeightsError` when names or shapes do not fit.
        """
        if (tensors is None) == (seed is None):
            raise ValueError("give either tensors or a seed")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            from open_clip.model import CLIP

            clip = CLIP(**config)
        if tensors is not None:
            _load_exactly(clip, tensors)
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


def _load_exactly(clip: CLIP, tensors: Mapping[str, Tensor]) -> None:
    expected = clip.state_dict()
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise WeightsError(
            f"the weights are not those of this CLIP: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unexpected)} are unknown {unexpected[:3]}"
        )
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise WeightsError(
                f"the weights are not those of this CLIP: {name} is {tuple(tensors[name].shape)}, "
                f"not {tuple(tensor.shape)}"
            )
    clip.load_state_dict(dict(tensors))


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
