"""ImageReward v1.0 (Xu et al. 2023): a BLIP whose text encoder looks at the image, and a linear head on ``[CLS]``.

A published prompt is always padded to 35 tokens. Pads are masked out and only ``[CLS]`` is read, so here it is padded
to the smallest of three lengths, and the score is the same.

Measured on the checkpoints of tests/fixtures/pointwise, whose numbers the reference implementation gave: scores are off
by at most 1.2e-6 in float32. In bfloat16 they scatter by 0.008 around those (full size; the scores' own standard
deviation is 0.47), and the order of images was the same for all 182 pairs that are further apart than four times that.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from models.backbones.blip import UNUSED_TENSORS, BlipConfig, BlipEncoder
from models.backbones.mlp import ScoreMLP
from models.backbones.wordpiece import VOCABULARY_SIZE, tokenize
from models.base import Calibration, CheckpointSize, InputError, LoadOptions, RewardInfo, WeightsError, WeightSource
from models.fitting.fittable import Fittable, write_tensors
from models.parity_recipe import fill, write_checkpoint
from models.preprocessing import (
    clip_preprocess_tensor,
    crop_offset,
    cut_far_ends,
    normalize,
    resized_size,
    to_uint8_tensor,
)
from models.registry import register
from models.towers import HeadOutput, TowerReward
from models.weights import fit, hash_tensors, load_checkpoint, obtain

TEXT_LENGTHS = (12, 20, 35)
REWARD_MEAN = 0.16717362830052426
REWARD_STD = 1.0333394966054072
WEIGHTS = WeightSource("hf:THUDM/ImageReward/ImageReward.pt")
PARAMETERS = 446_665_953
TINY = BlipConfig(vision_width=128, vision_layers=2, vision_hidden=256, text_width=64, text_layers=2, text_hidden=128)

_IGNORED = tuple(f"blip.{name}" for name in UNUSED_TENSORS)
_PROJECTION = 256


class Network(nn.Module):
    """The networks under the names of the published checkpoint: ``blip.*`` and ``mlp.*``."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.blip = BlipEncoder(config)
        self.mlp = ScoreMLP(config.text_width)


def _unfilled(config: BlipConfig) -> Network:
    with torch.device("meta"):  # neither memory nor random numbers for what is overwritten at once
        return Network(config)


def refuse_cut_short(config: BlipConfig) -> None:
    """Sizes come from the file: one that lacks the last layers of a tower would load as a smaller model, and score.

    Raises :class:`WeightsError` where the widths are the published ones and the layers of one tower alone are not.
    """
    published = BlipConfig()
    if (config.vision_width, config.text_width) != (published.vision_width, published.text_width):
        return
    found, wanted = (config.vision_layers, config.text_layers), (published.vision_layers, published.text_layers)
    if found != wanted and (found[0] == wanted[0] or found[1] == wanted[1]):
        raise WeightsError(
            f"the weights are not those of imagereward: {found[0]} layers of the image tower and {found[1]} of the "
            f"text encoder instead of {wanted[0]} and {wanted[1]}: the file is cut short"
        )


def checkpoint_shapes(config: BlipConfig) -> dict[str, list[int]]:
    """Names and shapes of a published checkpoint of these sizes, with the tensors that no score depends on."""
    shapes = {name: list(tensor.shape) for name, tensor in _unfilled(config).state_dict().items()}
    shapes["blip.text_encoder.embeddings.position_ids"] = [1, config.positions]
    for name, width in (("vision_proj", config.vision_width), ("text_proj", config.text_width)):
        shapes |= {f"blip.{name}.weight": [_PROJECTION, width], f"blip.{name}.bias": [_PROJECTION]}
    return shapes


@register("imagereward")
class ImageReward(TowerReward):
    """score = (MLP(text state at [CLS]) - mean) / std, with the published mean and standard deviation."""

    info: ClassVar[RewardInfo] = RewardInfo(
        name="imagereward",
        description="ImageReward v1.0: human preference for an image of a prompt, by BLIP's cross attention and an MLP",
        kind="pointwise",
        inputs=("prompt", "image"),
        range=(-2.5, 2.0),
        citation="Xu et al., 2023 (arXiv:2304.05977)",
        license="Apache-2.0",
        # Trained by Bradley-Terry on the MLP's raw output, which is score * std + mean.
        calibration=Calibration(1 / REWARD_STD, "Bradley-Terry training loss on the output before standardisation"),
        weights=WEIGHTS.source,
        weights_bytes=PARAMETERS * 4,
        differentiable=True,
        sources=(WEIGHTS,),
    )
    joint: ClassVar[bool] = True
    cpu_batch: ClassVar[int | None] = 8

    def __init__(self, network: Network, weights_hash: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.weights_hash = weights_hash
        self.dtype = network.blip.visual_encoder.cls_token.dtype
        self.device = network.blip.visual_encoder.cls_token.device
        self.image_size = network.blip.config.image_size
        self.image_key = f"{weights_hash}/imagereward{self.image_size}/{self.preprocessing}"
        self.text_key = f"wordpiece/{'-'.join(map(str, TEXT_LENGTHS))}/{self.preprocessing}"

    @classmethod
    def load(cls, options: LoadOptions) -> ImageReward:
        """A checkpoint of the published form, whatever its depths and widths."""
        tensors = load_checkpoint(obtain(WEIGHTS, options, cls.info.name))
        config = BlipConfig.of(tensors, "blip.")
        if config.vocabulary < VOCABULARY_SIZE or config.positions < TEXT_LENGTHS[-1]:
            raise WeightsError(
                f"the weights know {config.vocabulary} tokens at {config.positions} places; "
                f"prompts have {VOCABULARY_SIZE} at {TEXT_LENGTHS[-1]}"
            )
        refuse_cut_short(config)
        network = _unfilled(config)
        fit(network.state_dict(), tensors, cls.info.name, _IGNORED)
        used = {name: tensors[name] for name in network.state_dict()}
        network.to(options.dtype)
        # A bfloat16 score has too few digits to rank a group.
        network.mlp.to(torch.promote_types(options.dtype, torch.float32))
        network.to_empty(device=options.device)
        network.load_state_dict(used)
        return cls(network, hash_tensors(used))

    @classmethod
    def random_checkpoint(cls, folder: Path, size: CheckpointSize = "tiny") -> LoadOptions:
        shapes = checkpoint_shapes(TINY if size == "tiny" else BlipConfig())
        tensors = {name: fill(name, shape, seed=0) for name, shape in shapes.items()}
        return LoadOptions(weights=str(write_checkpoint(tensors, folder / "ImageReward.pt")))

    def prepare_image(self, image: PILImage.Image) -> Tensor:
        return imagereward_preprocess(image, self.image_size)

    def prepare_text(self, prompt: str) -> tuple[Tensor, tuple[str, ...]]:
        tokens, truncated = tokenize(prompt, TEXT_LENGTHS)
        return tokens, ("prompt_truncated",) if truncated else ()

    def fittable(self) -> Fittable:
        def save(folder: Path) -> LoadOptions:
            return LoadOptions(weights=write_tensors(self.network.state_dict(), folder / "model.safetensors"))

        return Fittable(self.network, ("mlp.",), save)

    def normalize(self, pixels_B3SS: Tensor) -> Tensor:
        return normalize(pixels_B3SS, dtype=self.dtype)

    def encode_image(self, pixels_B3SS: Tensor) -> Tensor:
        """Tower input [B, 3, S, S] -> vision tokens [B, 197, 1024] (published sizes), class token first."""
        return self.network.blip.encode_image(pixels_B3SS.to(self.dtype))

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """The ids themselves: the text encoder looks at the image, and so is part of the head."""
        return tokens_BL

    def text_cls(self, image_features_BND: Tensor, tokens_BL: Tensor) -> Tensor:
        """Vision tokens [B, N, D] and ids [B, L] -> the text encoder's last hidden state at ``[CLS]`` [B, T]."""
        return self.network.blip.encode_text(tokens_BL, image_features_BND)[:, 0]

    def raw_score(self, text_cls_BT: Tensor) -> Tensor:
        """The MLP's output [B], before standardisation; float32 (float64 for a float64 model)."""
        raw_B: Tensor = self.network.mlp(text_cls_BT.to(torch.promote_types(self.dtype, torch.float32)))
        return raw_B

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        """Vision tokens [B, N, D] and token ids [B, L] -> scores [B]."""
        raw_B = self.raw_score(self.text_cls(image_features_BD, text_features_BD))
        return HeadOutput((raw_B - REWARD_MEAN) / REWARD_STD)

    def preprocess_tensor(self, pixels_B3HW: Tensor) -> Tensor:
        return self.normalize(clip_preprocess_tensor(pixels_B3HW, self.image_size))


def imagereward_preprocess(image: PILImage.Image, size: int = 224) -> Tensor:
    """Shortest edge to ``size`` (PIL's bicubic), centre crop, and only then RGB -> uint8 [3, size, size].

    The published order: PIL resizes palette and two-level images by the nearest neighbour, and weighs colours by alpha,
    which the conversion then drops. Raises :class:`InputError` for a mode that PIL cannot convert.
    """
    image = cut_far_ends(image)
    height, width = resized_size(image.height, image.width, size)
    top, left = crop_offset(height, size), crop_offset(width, size)
    image = image.resize((width, height), PILImage.Resampling.BICUBIC)
    image = image.crop((left, top, left + size, top + size))
    if image.mode != "RGB":
        try:
            image = image.convert("RGB")
        except ValueError as exc:
            raise InputError(f"an image of mode {image.mode} cannot become RGB", code="unsupported_image") from exc
    return to_uint8_tensor(image)
