"""HPSv3 (Ma et al. 2025, arXiv:2508.03789): a Qwen2-VL-7B that reads image and prompt, and an MLP on one token.

The user turn is the image, an instruction with the prompt, and the token ``<|Reward|>``, whose last hidden state the
MLP turns into a mean (the score) and the logarithm of a standard deviation. As in the reference, image tokens take
plain sequential positions and not Qwen2-VL's three-dimensional ones.

What is not computed, counted for the 7B model with an image of 256 tokens and 512 of text (11.4 TFLOP): ``lm_head`` is
not even read (7 % more); attention is causal, so the turn is cut off after ``<|Reward|>`` (1 %); of the last layer, the
last norm and the MLP only this token is computed (3 %). The image comes first, so of the text only the 15 tokens before
it do not depend on it: keeping their keys and values would save 1.7 % and is not done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from models.backbones import qwen2_vl_image
from models.backbones.qwen2_vl import (
    Config,
    Qwen2VLBackbone,
    beyond_tensors,
    insert_image,
    published_name,
    qwen2_vl_config,
    sequential_positions,
    sizes,
)
from models.backbones.qwen2_vl_tokenizer import RewardTokenizer, train_tokenizer
from models.base import Calibration, CheckpointSize, InputError, LoadOptions, RewardInfo, WeightsError, WeightSource
from models.fitting.fittable import Fittable, write_tensors
from models.parity_recipe import fill, write_checkpoint
from models.preprocessing import normalize
from models.registry import register
from models.towers import HeadOutput, TowerReward
from models.weights import HASH_PREFIX, file_sha256, fit, hash_tensors, load_checkpoint, obtain

PARAMETERS = 8_292_152_882
# About 17 GB are published, so two bytes a parameter.
WEIGHTS = WeightSource("hf:MizzenAI/HPSv3/HPSv3.safetensors", PARAMETERS * 2)
TOKENIZER = WeightSource("hf:Qwen/Qwen2-VL-7B-Instruct", role="tokenizer", files=("tokenizer.json",))

PIXELS = 256 * 28 * 28
"""Smallest and largest area of a resized image, so that every image has about 256 tokens."""

TEMPLATE = (Path(__file__).parent / "prompts" / "hpsv3.txt").read_bytes().decode("utf-8")
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{user}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
IMAGE_TOKEN_ID, REWARD_TOKEN_ID = 151655, 151657
"""Of the published tokenizer once ``<|Reward|>`` is added to it."""

TEXT_LENGTHS = (*range(64, 1025, 64), 1536, 2048, 4096, 8192, 16384)
"""Padded lengths of a turn: the published context of 32768 tokens is never exceeded, with the image included."""
MAX_TOKENS = 2048
"""Default of the option ``max_tokens``: some 1500 tokens of prompt beside the instruction. Work grows with the turn,
and a whole batch is padded to it: a prompt of 16 thousand tokens would hold up every other model on the device."""

_LM_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_TINY = {
    "text": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]},
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
    },
    "vision": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
}


def user_text(prompt: str) -> str:
    """The instruction with the prompt and the reward token: the text of the user's turn, without the image."""
    return TEMPLATE.replace("{text_prompt}", prompt)


def chat_text(prompt: str) -> str:
    """The whole turn with one placeholder for the image, in Qwen2-VL's chat template (not checked against HPSv3's)."""
    return CHAT.replace("{user}", user_text(prompt))


class Hpsv3Network(nn.Module):
    """Qwen2-VL without ``lm_head``, and the MLP ``rm_head`` in float32."""

    def __init__(
        self,
        config: Config,
        vocabulary: int,
        image_token_id: int = IMAGE_TOKEN_ID,
        reward_token_id: int = REWARD_TOKEN_ID,
    ) -> None:
        """Modules without tensors, which :meth:`assign` takes; ``config`` is that of :func:`qwen2_vl_config`."""
        super().__init__()
        self.backbone = Qwen2VLBackbone(qwen2_vl_config(config, vocabulary))
        self.image_token_id, self.reward_token_id = image_token_id, reward_token_id
        with torch.device("meta"):
            self.rm_head = nn.Sequential(
                nn.Linear(sizes(self.backbone.config)[0].hidden_size, 1024),
                nn.ReLU(),
                nn.Dropout(0.05),
                nn.Linear(1024, 16),
                nn.ReLU(),
                nn.Linear(16, 2),
            )
        self.eval().requires_grad_(False)

    @classmethod
    def load(
        cls, options: LoadOptions, image_token_id: int = IMAGE_TOKEN_ID, reward_token_id: int = REWARD_TOKEN_ID
    ) -> tuple[Hpsv3Network, str]:
        """The network from the published checkpoint, and the hash of the tensors that it uses.

        Names of transformers <= 4.46 and 5 are read. The option ``config`` gives other sizes than those of the 7B
        model: {"text": {...}, "vision": {...}}, or a config.json's content or path. Raises :class:`WeightsError`.
        """
        tensors = load_checkpoint(obtain(WEIGHTS, options, "hpsv3"), ("model",))
        tensors = {published_name(name): tensor for name, tensor in tensors.items()}
        tensors.pop(_LM_HEAD, None)
        embeddings = tensors.get(_EMBEDDINGS)
        if embeddings is None:
            raise WeightsError(f"the weights are not those of hpsv3: {_EMBEDDINGS} is missing")
        network = cls(options.options.get("config"), len(embeddings), image_token_id, reward_token_id)
        fit(network.published_state(), tensors, "hpsv3")
        weights_hash = hash_tensors(tensors)
        network.assign(tensors, options.dtype, options.device)
        return network, weights_hash

    def published_state(self) -> dict[str, Tensor]:
        """The state dict under the names of the checkpoint, without ``lm_head``."""
        head = {f"rm_head.{name}": tensor for name, tensor in self.rm_head.state_dict().items()}
        return {**self.backbone.state_dict(), **head}

    def assign(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        """Take the tensors of :meth:`published_state`; each is cast on its own, and ``rm_head`` stays float32."""
        self.backbone.assign(tensors, dtype, device)
        head = {
            name: tensors[f"rm_head.{name}"].to(device, torch.float32, copy=True) for name in self.rm_head.state_dict()
        }
        self.rm_head.load_state_dict(head, assign=True)
        self.rm_head.requires_grad_(False)

    def forward(self, embeddings_BLD: Tensor, places_B: Tensor) -> Tensor:
        """Embeddings of whole turns, and the places of their reward tokens -> (mean, raw second output) [B, 2]."""
        batch, length, _ = embeddings_BLD.shape
        positions = sequential_positions(batch, length, embeddings_BLD.device)
        state_BD = self.backbone.pooled_state(embeddings_BLD, positions, places_B)
        logits_B2: Tensor = self.rm_head(state_BD.to(next(self.rm_head.parameters()).dtype))
        return logits_B2

    @torch.inference_mode()
    def logits(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(mean, raw second output) [B, 2] from the arrays of Qwen2-VL's processor, by the modules that score images.

        ``input_ids`` int64 [B, L] hold one image token for each four patches; ``pixel_values`` [patches of all images,
        1176]; ``image_grid_thw`` [images, 3]. ``attention_mask`` [B, L] may mask padding on the right alone: ValueError
        otherwise, and where a row does not hold one reward token.
        """
        if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
            raise ValueError("padding is expected on the right")
        rewards_BL = torch.eq(input_ids, self.reward_token_id)
        if not bool((rewards_BL.sum(-1) == 1).all()):
            raise ValueError("every row holds one reward token")
        grids = image_grid_thw.tolist()
        patches = torch.split(pixel_values, [frames * rows * columns for frames, rows, columns in grids])
        tokens = [
            self.backbone.encode_patches(part[None], rows, columns)[0]
            for part, (_, rows, columns) in zip(patches, grids, strict=True)
        ]
        embeddings = self.backbone.embed(input_ids)
        embeddings[torch.eq(input_ids, self.image_token_id)] = torch.cat(tokens)
        result: Tensor = self(embeddings, rewards_BL.int().argmax(-1))
        return result


@register("hpsv3")
class Hpsv3(TowerReward):
    """The mean of HPSv3's preference distribution; its standard deviation is the output ``uncertainty``.

    Control tokens that stand in a prompt as text are read as such, which is what the published tokenizer does; only
    ``<|image_pad|>`` and ``<|Reward|>`` raise :class:`InputError` ("reserved_token").
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        name="hpsv3",
        description="Human preference by a Qwen2-VL-7B with an MLP head: mean, and standard deviation as uncertainty. "
        "The network is checked against the reference from token ids, the user's text by its hash; the chat template "
        "around the text could not be checked against the published checkpoint",
        kind="pointwise",
        inputs=("prompt", "image"),
        range=(-2.0, 13.0),
        citation="Ma et al., 2025 (arXiv:2508.03789); backbone: Wang et al., 2024 (arXiv:2409.12191)",
        license="MIT (the project's; the weights' page was not seen); backbone Qwen2-VL-7B-Instruct: Apache-2.0",
        calibration=Calibration(1.0, "the training loss is the log-sigmoid of a score difference (its mean is used)"),
        weights=WEIGHTS.source,
        weights_bytes=WEIGHTS.bytes,
        differentiable=True,
        verified=False,
        outputs=("uncertainty",),
        sources=(WEIGHTS, TOKENIZER),
        options=("config", "max_tokens"),
    )
    joint: ClassVar[bool] = True
    max_batch: ClassVar[int | None] = 8
    cpu_batch: ClassVar[int | None] = 2

    def __init__(
        self, network: Hpsv3Network, tokenizer: RewardTokenizer, weights_hash: str, max_tokens: int = MAX_TOKENS
    ) -> None:
        """``weights_hash`` names the tensors, the tokenizer and the configuration."""
        self.max_tokens = max_tokens
        self.network = network
        self.tokenizer = tokenizer
        self.weights_hash = weights_hash
        self.dtype = network.backbone.dtype
        self.device = network.backbone.device
        self.image_key = f"{weights_hash}/qwen2-vl/{PIXELS}/{self.preprocessing}"
        self.text_key = f"{weights_hash}/ids/{self.preprocessing}"
        self.image_place = tokenizer.encode(chat_text("")).index(tokenizer.image_id)
        # Candidates of a group share their prompt.
        self._tokenized = lru_cache(maxsize=256)(self._tokenize)

    @classmethod
    def load(cls, options: LoadOptions) -> Hpsv3:
        """The published checkpoint with the tokenizer of Qwen2-VL (option ``tokenizer``: a folder or tokenizer.json).

        The option ``config`` is that of :meth:`Hpsv3Network.load`; ``max_tokens`` the longest turn that is scored, text
        only. The backbone runs in ``options.dtype``. Raises :class:`WeightsError` where a file is missing or does not
        fit, and ValueError for another value of ``max_tokens`` than 1 to 16384.
        """
        max_tokens = options.options.get("max_tokens", MAX_TOKENS)
        if not isinstance(max_tokens, int) or not 1 <= max_tokens <= TEXT_LENGTHS[-1]:
            raise ValueError(f"the option max_tokens of hpsv3 is 1 to {TEXT_LENGTHS[-1]}, not {max_tokens!r}")
        path = obtain(TOKENIZER, options, "hpsv3")
        path = path / "tokenizer.json" if path.is_dir() else path
        tokenizer = RewardTokenizer.load(path)
        network, tensors_hash = Hpsv3Network.load(options, tokenizer.image_id, tokenizer.reward_id)
        vocabulary = sizes(network.backbone.config)[0].vocab_size
        if tokenizer.reward_id >= vocabulary:
            raise WeightsError(
                f"the tokenizer {path} does not belong to the weights of hpsv3: the id of its reward token is "
                f"{tokenizer.reward_id}, and the weights have {vocabulary} rows"
            )
        config = json.dumps(beyond_tensors(network.backbone.config), sort_keys=True)
        parts = "|".join((tensors_hash, file_sha256(path), config))
        return cls(network, tokenizer, HASH_PREFIX + hashlib.sha256(parts.encode()).hexdigest(), max_tokens)

    @classmethod
    def random_checkpoint(cls, folder: Path, size: CheckpointSize = "tiny") -> LoadOptions:
        """A random HPSv3.safetensors (full: bfloat16, 17 GB, built in memory) and a tokenizer trained on the template.

        The tokenizer is small in both sizes, so its ids are not the published ones; its turns are about as long.
        """
        trained = train_tokenizer([chat_text("")], 2048)
        trained.save(str(folder / "tokenizer.json"))
        tokenizer = RewardTokenizer.load(folder / "tokenizer.json")
        full = size == "full"
        vocabulary = (REWARD_TOKEN_ID if full else tokenizer.reward_id) + 1
        config, dtype = (None, torch.bfloat16) if full else (_TINY, torch.float32)
        shapes = {name: tensor.shape for name, tensor in Hpsv3Network(config, vocabulary).published_state().items()}
        shapes[_LM_HEAD] = shapes[_EMBEDDINGS]
        tensors = {name: fill(name, shape, seed=0).to(dtype) for name, shape in shapes.items()}
        weights = write_checkpoint(tensors, folder / "HPSv3.safetensors")
        options: dict[str, Any] = {"tokenizer": str(folder / "tokenizer.json")}
        return LoadOptions(weights=str(weights), options=options | ({"config": config} if config else {}))

    def fittable(self) -> Fittable:
        """The MLP is the head; tokenizer and configuration stay those of the options."""

        def save(folder: Path) -> LoadOptions:
            # The published form has lm_head too, which nothing reads.
            return LoadOptions(weights=write_tensors(self.network.published_state(), folder / "model.safetensors"))

        return Fittable(self.network, ("rm_head.",), save)

    def prepare_image(self, image: PILImage.Image) -> Tensor:
        """uint8 [3, H, W] of about 256*28*28 pixels; raises :class:`InputError` ("aspect_ratio")."""
        return qwen2_vl_image.resize(image, PIXELS, PIXELS)

    def prepare_text(self, prompt: str) -> tuple[Tensor, tuple[str, ...]]:
        """The whole turn up to the reward token, padded on the right to one of :data:`TEXT_LENGTHS`; never truncated.

        Raises :class:`InputError`: "prompt_too_long", "reserved_token", "invalid_unicode".
        """
        return self._tokenized(prompt), ()

    def _tokenize(self, prompt: str) -> Tensor:
        ids = self.tokenizer.encode(chat_text(prompt))
        if len(ids) > self.max_tokens:
            raise InputError(
                f"the prompt and its instruction are {len(ids)} tokens; {self.max_tokens} are allowed",
                code="prompt_too_long",
            )
        length = next(length for length in TEXT_LENGTHS if length >= len(ids))
        padded = torch.full((length,), self.tokenizer.pad_id)
        padded[: len(ids)] = torch.tensor(ids)
        return padded

    def normalize(self, pixels_B3SS: Tensor) -> Tensor:
        return normalize(pixels_B3SS, dtype=self.dtype)

    def encode_image(self, pixels_B3SS: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> image tokens [B, H/28 * W/28, hidden]."""
        return self.network.backbone.encode_image(pixels_B3SS)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """The ids themselves, int64 [B, L]: nothing of the text can be encoded before the image."""
        return tokens_BL

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        """Image tokens [B, N, hidden] and ids [B, L] -> mean and uncertainty [B], float32."""
        ids_BL = text_features_BD
        embeddings = insert_image(self.network.backbone.embed(ids_BL), image_features_BD, self.image_place)
        rewards_BL = torch.eq(ids_BL, self.network.reward_token_id)
        places_B = rewards_BL.int().argmax(-1) + image_features_BD.shape[1] - 1
        mean_B, raw_B = self.network(embeddings, places_B).unbind(-1)
        return HeadOutput(mean_B, {"uncertainty": raw_B.exp()})

    def preprocess_tensor(self, pixels_B3HW: Tensor) -> Tensor:
        return self.normalize(qwen2_vl_image.resize_tensor(pixels_B3HW, PIXELS, PIXELS))
