"""The network of shapes-judge: a small Qwen2-VL whose folder loads as an unmodified transformers model.

Architecture of Wang et al. 2024, "Qwen2-VL" (arXiv:2409.12191), at 64 x 64 pixels: patches of 8 x 8, four of which
merge into one of 16 image tokens. Its tokenizer has one token for each word of the world's language; any other text
falls apart into bytes. ``AutoProcessor`` and ``AutoModelForImageTextToText`` read the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from models.backbones.qwen2_vl_tokenizer import CONTROL_TOKENS, IMAGE_TOKEN, PAD_TOKEN
from models.shapes.judge_text import WORDS
from models.shapes.merges import word_merges

DIRECTORY = Path(__file__).parent / "weights" / "judge"
IMAGE_SIZE = 64
PATCH_SIZE = 8
IMAGE_TOKENS = 16
END_TOKEN = "<|im_end|>"

# The library's classes have no useful types.
_library: Any = transformers

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL's, without its default system turn."""

_PIECES = r"</?\p{L}+>\n?| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def build_tokenizer() -> Any:
    """Byte-level BPE over the words of the world's language, and the control tokens of Qwen2-VL."""
    letters = sorted(ByteLevel.alphabet())
    to_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    words = tuple(to_bytes.pre_tokenize_str(word)[0][0] for word in WORDS)
    merges = word_merges(words, letters)
    vocabulary = dict.fromkeys([*letters, *map("".join, merges)])
    tokenizer = Tokenizer(BPE({piece: i for i, piece in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_PIECES), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    return _library.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD_TOKEN, eos_token=END_TOKEN, padding_side="left", model_max_length=1024
    )


def build_processor() -> Any:
    """Any image becomes 64 x 64 pixels where it is square, and about as many where it is not."""
    size = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2}
    images = _library.Qwen2VLImageProcessor(size=size, patch_size=PATCH_SIZE)
    videos = _library.Qwen2VLVideoProcessor(size=size, patch_size=PATCH_SIZE)
    return _library.Qwen2VLProcessor(images, build_tokenizer(), videos, chat_template=CHAT_TEMPLATE)


def build_config(tokenizer: Any, *, width: int = 128, layers: int = 4, vision_layers: int = 3) -> Qwen2VLConfig:
    """The sizes of the network with the ids of the tokenizer's control tokens."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS}
    head = 32
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head,
        "num_key_value_heads": width // head,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ids[END_TOKEN],
        "pad_token_id": ids[PAD_TOKEN],
    }
    vision = {
        "depth": vision_layers,
        "embed_dim": 96,
        "num_heads": 3,
        "mlp_ratio": 3,
        "hidden_size": width,
        "patch_size": PATCH_SIZE,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE_TOKEN],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_model(tokenizer: Any) -> Qwen2VLForConditionalGeneration:
    """The network with random weights (torch's own random stream)."""
    return Qwen2VLForConditionalGeneration(build_config(tokenizer))


def save(model: Qwen2VLForConditionalGeneration, processor: Any, folder: Path) -> None:
    """Write the folder, weights in float16."""
    half = Qwen2VLForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    halved: Any = half
    halved.half().save_pretrained(folder)
    processor.save_pretrained(folder)


def load(folder: Path = DIRECTORY) -> tuple[Any, Any]:
    """Model in float32 and evaluation mode, and processor, read as any user's program would."""
    model = _library.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    processor = _library.AutoProcessor.from_pretrained(folder, local_files_only=True)
    return model.eval(), processor


def chat_text(parts: list[str | None], reply: str = "") -> str:
    """A user turn of texts and images (None), and the start of the answer; one placeholder token an image."""
    image = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
    turn = "".join(image if part is None else part for part in parts)
    return f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n{reply}"


def image_positions(ids_BL: Tensor, image_id: int) -> Tensor:
    """Rotary positions [3, L] of rows whose images stand at the same places: those of the first row.

    As transformers' ``get_rope_index`` for images of 4 x 4 tokens, without its loop over rows.
    """
    side = int(IMAGE_TOKENS**0.5)
    columns: list[tuple[int, int, int]] = []
    start, place, ids = 0, 0, ids_BL[0].tolist()
    while place < len(ids):
        if ids[place] == image_id:
            columns += [(start, start + row, start + column) for row in range(side) for column in range(side)]
            start, place = start + side, place + IMAGE_TOKENS
        else:
            columns.append((start, start, start))
            start, place = start + 1, place + 1
    return torch.tensor(columns).T
