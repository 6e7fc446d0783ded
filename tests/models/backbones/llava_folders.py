"""A random LLaVA-OneVision in transformers' form, and the same network as its authors' program writes it."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from safetensors.torch import load_file, save_file

from models.backbones.llava_original import VisionTower
from models.backbones.vlm_loading import write_random_chat

TOWER = VisionTower(32, 64, 2, 2, 56, 14)
SETTINGS = {"size": {"height": 56, "width": 56}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# Qwen2's own: the content of a message is text.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHOWN = (
    "{{ '<|im_start|>system\n' + (messages[0]['content'][0]['text'] if messages[0]['role'] == 'system' else "
    "'You are a helpful assistant.') + '<|im_end|>\n' }}"
    "{% for message in messages if message['role'] == 'user' %}{{ '<|im_start|>user\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'video' %}"
    "<video>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
"""The same chat for transformers' form."""

# Written from the names of the authors' program, apart from the table under test; longest first.
OLD_NAMES = {
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "image_newline": "model.image_newline",
}


@cache
def published() -> Path:
    """A random model in transformers' form, with SigLIP's image settings and the chat of LLaVA."""
    folder = write_random_chat(Path(mkdtemp(prefix="llava-hf-")), "llava_onevision")
    edit(folder / "processor_config.json", lambda told: told["image_processor"].update(SETTINGS))
    edit(folder / "processor_config.json", lambda told: told["video_processor"].update(SETTINGS))
    (folder / "chat_template.jinja").write_text(SHOWN)
    return folder


@cache
def original() -> Path:
    """The same model as its authors' program writes it: two files, no processor, a tokenizer of text alone."""
    folder = Path(mkdtemp(prefix="llava-original-"))
    tensors = {old_name(name): tensor for name, tensor in load_file(published() / "model.safetensors").items()}
    names = sorted(tensors)
    for place, part in enumerate((names[:40], names[40:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{place + 1:05d}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps(old_config(json.loads((published() / "config.json").read_text()))))
    tokenizer = json.loads((published() / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] not in ("<image>", "<video>")]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHATML}))
    return folder


def old_name(name: str) -> str:
    new, old = next((new, old) for new, old in OLD_NAMES.items() if name.startswith(new))
    return old + name.removeprefix(new)


def old_config(config: dict[str, Any]) -> dict[str, Any]:
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    return {
        **{name: value for name, value in text.items() if name not in ("layer_types", "model_type", "vocab_size")},
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "rope_scaling": None,
        "rope_theta": rope["rope_theta"],
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[width, height] for height, width in config["image_grid_pinpoints"]],
        "mm_hidden_size": 32,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "/home/trainer/checkpoints/siglip-tiny",
        "tokenizer_model_max_length": 4096,
    }


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


def changed(path: Path, **fields: Any) -> None:
    edit(path / "config.json", lambda told: told.update(fields))
