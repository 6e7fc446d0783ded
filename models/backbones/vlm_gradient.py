"""d P(word) / d pixels through a whole vision-language model, for training on a judge's preference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor

from models.backbones.vlm_families import encode
from models.backbones.vlm_independent import visible
from models.base import Candidate, ModelError, UnsupportedInput
from models.judge import Turn, WordScores

if TYPE_CHECKING:
    from models.backbones.vlm import LocalChat

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LEAF = "leaf"
"""In place of the digest of the candidate that the pixels stand for: no digest looks like it."""


def score_gradient(chat: LocalChat, turn: Turn, words: Sequence[str]) -> tuple[WordScores, Tensor]:
    """See :class:`models.judge.DifferentiableChat`.

    Raises UnsupportedInput for families without a twin, ModelError with code "not_finite", and ValueError where not
    one part of the turn is a tensor. All activations are kept for the way back.
    """
    if chat.model.config.model_type not in FAMILIES:
        raise UnsupportedInput(f"gradients are there for {', '.join(FAMILIES)}, not {chat.model.config.model_type}")
    leaves = [part for part in turn.parts if isinstance(part, Tensor)]
    if len(leaves) != 1:
        raise ValueError(f"one part of the turn is a tensor; {len(leaves)} are")
    leaf = leaves[0].detach().to(chat.device, torch.float32).requires_grad_()
    stand_in = Candidate(image=_image(leaf), digest=LEAF)
    parts = tuple(stand_in if isinstance(part, Tensor) else part for part in turn.parts)
    prepared = chat.prepare(replace(turn, parts=parts))
    exact = chat.in_float32()
    with torch.enable_grad():
        features = {}
        for picture in prepared.pictures:
            own = picture.digest == LEAF
            pixels = twin_patches(chat.processor.image_processor, leaf) if own else picture.pixels.to(chat.device)
            with torch.set_grad_enabled(own):
                features[picture.digest] = encode(exact.model, pixels, picture)
        embeddings, visual, deeper = exact.embed(prepared, features, 0, prepared.tokens)
        seen = visible(prepared.tokens, prepared.blocks)[None].to(chat.device) if prepared.blocks else None
        states = exact.forward(
            embeddings[None], prepared.positions[None], None, seen=seen, visual=(visual[None], deeper)
        )
        log_probs = exact.model.lm_head(states[0, -1]).float().log_softmax(-1)
        scores = torch.stack([log_probs[list(chat.spellings(word))].logsumexp(-1) for word in words])
        (gradient,) = torch.autograd.grad(scores.softmax(-1)[0], leaf)
    if not (scores.isfinite().all() and gradient.isfinite().all()):
        raise ModelError("the judge's logits or their gradient are not finite numbers", code="not_finite")
    return WordScores(tuple(scores.tolist())), gradient.detach().cpu()


def _image(pixels_3HW: Tensor) -> PILImage.Image:
    """For its size and layout; its pixels are not used."""
    height, width = pixels_3HW.shape[-2:]
    return PILImage.new("RGB", (width, height))


def twin_patches(processor: Any, pixels_3HW: Tensor) -> Tensor:
    """Differentiable twin of a Qwen image processor: float [0, 1] pixels -> patches [N, P].

    The exact path resizes 8-bit pixels, in width and then in height, and rounds and clamps after each; this one clamps
    alike and does not round: 0.3 levels of 255 apart on average, 1.1 at most.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    height, width = pixels_3HW.shape[-2:]
    factor = processor.patch_size * processor.merge_size
    size = smart_resize(height, width, factor, processor.size["shortest_edge"], processor.size["longest_edge"])
    resized = pixels_3HW[None]
    for step in ((height, size[1]), size):
        if step != tuple(resized.shape[-2:]):
            resized = F.interpolate(resized, step, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (
        torch.tensor(values, device=resized.device)[:, None, None]
        for values in (processor.image_mean, processor.image_std)
    )
    patches, _, _ = processor.patchify(
        (resized - mean) / std, processor.patch_size, processor.merge_size, processor.temporal_patch_size
    )
    return patches[0]  # type: ignore[no-any-return]
