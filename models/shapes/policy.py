"""The parts of the shapes policy: a small Stable Diffusion 3 whose folder loads as an unmodified diffusers pipeline.

Architecture of Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", at 32x32
pixels: an MM-DiT over 4x4 patches, two CLIP text towers without T5, Euler sampling of a rectified flow. The latent is
the picture itself, shifted and scaled: the autoencoder has its weights written down, not learned.

Call it as ``pipeline(prompt, num_inference_steps=20, guidance_scale=1.0, max_sequence_length=0)``: it is trained to
need no guidance. The pipeline's own defaults (28 steps, guidance 7, 256 zero tokens) draw too, but guidance costs exact
pictures, of counted things above all, and the zero tokens change nothing but the time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from models.shapes.merges import word_merges
from models.shapes.prompts import COUNTS, Include
from models.shapes.world import COLORS, SHAPES

DIRECTORY = Path(__file__).parent / "weights" / "policy"
IMAGE_SIZE = 32
PATCH_SIZE = 4
TEXT_LENGTH = 24
"""Tokens of a prompt with its start and end; the longest prompt of the world has 19."""
NULL_TOKENS = 256
"""Zero tokens that the pipeline appends in place of T5's by default (``max_sequence_length=256``)."""
LATENT_SHIFT = 0.035
LATENT_SCALE = 1.43
"""latent = (pixel - shift) * scale: mean 0 and standard deviation 1 over pictures of the world, pixels on [-1, 1]."""
TIME_SHIFT = 2.0
"""Shift of the sampler's sigmas towards noise (Esser et al. 2024, equation 23), where the arrangement is decided."""

_WORDS = (
    *COLORS,
    *(Include(shape).noun(count) for shape in SHAPES for count in (1, 2)),
    *COUNTS,
    *("a", "an", "the", "one", "single", "exactly", "2", "3", "4", "-", "colored", "coloured", "that", "is", "are"),
    *("photo", "picture", "image", "drawing", "of", "showing", "and", "also", "with", "together", "."),
    *("to", "on", "left", "right", "above", "over", "below", "under", "beneath"),
)
_END_OF_WORD = "</w>"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer over the grammar's words: each of them is one token, any other text falls apart into
    pieces. Padding is the end token; ``model_max_length`` is ``TEXT_LENGTH``."""
    alphabet = sorted(ByteLevel.alphabet())
    letters = [*alphabet, *(letter + _END_OF_WORD for letter in alphabet)]
    merges = word_merges(_WORDS, letters, _END_OF_WORD)
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*letters, *map("".join, merges), *_SPECIAL]))}
    # The annotation of CLIPTokenizer says strings; its BPE takes pairs.
    return CLIPTokenizer(vocab=vocabulary, merges=cast(Any, merges), model_max_length=TEXT_LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 64, layers: int = 3) -> CLIPTextModelWithProjection:
    """A randomly initialised CLIP text tower, ``width`` wide; SD3 reads its last layer but one and its projection."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_transformer(width: int = 128, layers: int = 4, head: int = 64) -> SD3Transformer2DModel:
    """A randomly initialised MM-DiT that predicts zero: modulations and the last layer start at zero, as in DiT
    (Peebles and Xie 2023), which diffusers leaves to the trainer."""
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        attention_head_dim=min(head, width),
        num_attention_heads=max(1, width // head),
        joint_attention_dim=width,
        caption_projection_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=IMAGE_SIZE // PATCH_SIZE,
    )
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if ".norm1" in name or "norm_out" in name or name == "proj_out":
            nn.init.zeros_(module.weight)
        else:
            nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    return transformer


@torch.no_grad()
def build_autoencoder() -> AutoencoderKL:
    """An autoencoder that hands the picture through; encode and decode are exact to about 1e-4.

    Its one group norm sees channels x, -x, K, -K: their mean is zero and their deviation is K / 2 whatever the picture
    is, so the norm is a constant factor; then SiLU(x) - SiLU(-x) = x. Residual branches are zero.
    """
    channels, constant = 16, 128.0
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(channels,),
        norm_num_groups=1,
        latent_channels=3,
        sample_size=IMAGE_SIZE,
        scaling_factor=LATENT_SCALE,
        shift_factor=LATENT_SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    for parameter in autoencoder.parameters():
        nn.init.zeros_(parameter)
    for half in (autoencoder.encoder, autoencoder.decoder):
        half.conv_norm_out.weight[:] = constant / 2
        for i in range(3):
            half.conv_in.weight[i, i, 1, 1] = 1.0
            half.conv_in.weight[i + 3, i, 1, 1] = -1.0
            half.conv_out.weight[i, i, 1, 1] = 1.0
            half.conv_out.weight[i, i + 3, 1, 1] = -1.0
        half.conv_in.bias[6:10] = torch.tensor([constant, -constant] * 2)
    autoencoder.encoder.conv_out.bias[3:] = -30.0  # log variance: a sample is its mean
    return autoencoder


def build_pipeline(width: int = 128, layers: int = 4) -> StableDiffusion3Pipeline:
    """An untrained policy; random weights come from torch's global generator."""
    tokenizer = build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=build_transformer(width, layers),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT),
        vae=build_autoencoder(),
        text_encoder=build_text_encoder(tokenizer, width // 2),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer, width // 2),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def trained_parts(pipeline: StableDiffusion3Pipeline) -> nn.ModuleDict:
    """What training changes: the transformer and both text towers, under their names in the pipeline."""
    return nn.ModuleDict({name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "text_encoder_2")})


def encode_text(parts: nn.ModuleDict, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids -> (sequence [B, L, W], pooled [B, W]), as ``StableDiffusion3Pipeline.encode_prompt`` joins them with
    ``max_sequence_length=0``."""
    outputs = [parts[name](tokens_BL, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    sequence = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return sequence, torch.cat([output.text_embeds for output in outputs], dim=-1)


class CountedAttention:
    """SD3's joint attention in which the last text token stands for ``count`` equal ones.

    The zero tokens that stand in for T5 have no position, so they stay equal to each other through all layers, and
    ``count`` of them are one token whose keys weigh ``count`` times as much: log(count) on its logits. Training with
    256 zero tokens thus costs no more than with one. Plain products are also faster than torch's fused attention in
    the backward pass on a CPU.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, N, W] and text tokens [B, L, W] -> both after attention."""
        heads = attn.heads
        image = [layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        text = [layer(encoder_hidden_states) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        query, key, value = (
            torch.cat(pair, dim=1).view(len(hidden_states), -1, heads, pair[0].shape[2] // heads).transpose(1, 2)
            for pair in zip(image, text, strict=True)
        )
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
        if self.count > 1:
            bias = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
            bias[-1] = torch.log(torch.tensor(float(self.count)))
            logits = logits + bias
        joined = (logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        image_out, text_out = joined.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        image_out = attn.to_out[1](attn.to_out[0](image_out))
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


@contextmanager
def counted_attention(transformer: SD3Transformer2DModel, count: int) -> Iterator[None]:
    """Within it the last text token counts as ``count`` tokens (any number for none or one)."""
    before = transformer.attn_processors
    transformer.set_attn_processor(CountedAttention(count))
    try:
        yield
    finally:
        transformer.set_attn_processor(before)


def to_latents(pixels_BHW3: Tensor) -> Tensor:
    """uint8 pictures [B, S, S, 3] -> latents [B, 3, S, S], as the autoencoder and its scaling make them."""
    return (pixels_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1.0 - LATENT_SHIFT) * LATENT_SCALE


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """int64 [B, TEXT_LENGTH], padded and cut as the pipeline does it."""
    encoded = tokenizer(list(prompts), padding="max_length", max_length=TEXT_LENGTH, truncation=True)
    return torch.tensor(encoded["input_ids"])


def save_pipeline(pipeline: StableDiffusion3Pipeline, directory: Path) -> None:
    """Write the diffusers folder with float16 weights, to which ``pipeline`` is rounded; it loads in float32 unless
    told otherwise."""
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, name).to(torch.float16)
    pipeline.save_pretrained(directory, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2"):
        # transformers loads in the stored dtype, diffusers in float32: without this they would not fit each other.
        path = directory / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")
    for path in directory.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def load_pipeline(directory: Path = DIRECTORY) -> StableDiffusion3Pipeline:
    """The stored policy in float32, without progress bars."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(directory, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
