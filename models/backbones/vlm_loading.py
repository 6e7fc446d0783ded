"""Vision-language models from their folders, and random ones of the same form for tests and measurements."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from PIL import Image as PILImage

from models.backbones.hf import quiet
from models.backbones.llava_original import cut_every_image, is_original, load_original
from models.backbones.qwen2_vl_tokenizer import train_tokenizer
from models.base import Candidate, LoadOptions, WeightsError
from models.judge import Turn
from models.judging.templates import list_templates, load_template
from models.weights import hash_files

if TYPE_CHECKING:
    from models.backbones.vlm import LocalChat

Family: TypeAlias = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"]
FAMILIES: Mapping[str, str] = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL",
}
"""``model_type`` of a config.json to the family's name."""
_IDENTITY_FILES = ("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
                   "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json")  # fmt: skip


def load_chat(folder: Path, options: LoadOptions) -> LocalChat:
    """The chat model of a folder in transformers' form or LLaVA's own, without running its code.

    ``options.options`` may hold ``min_pixels`` and ``max_pixels``, the area of a resized image in place of the
    processor's own (Qwen families), and ``pair_tiles`` (LLaVA-OneVision: each of several images is cut into tiles).
    Raises :class:`WeightsError` for a folder that is none, another family, weights that are quantised or no
    safetensors, tensors that are missing or do not fit, and a processor without a chat template that shows images;
    ValueError for an option that the processor does not have.
    """
    from models.backbones.vlm import LocalChat

    config = _config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} holds no .safetensors; other forms of weights are not read for judges")
    try:
        with quiet():
            if is_original(config):
                model, processor = load_original(folder, files, config, options.dtype)
            else:
                model, processor = _load(folder, options.dtype)
    except WeightsError as error:
        raise WeightsError(f"{folder} cannot be loaded: {error}") from error
    except Exception as error:  # whatever damaged files make three libraries raise
        raise WeightsError(f"{folder} cannot be read by transformers: {_told(error)}") from error
    if not getattr(processor, "chat_template", None):
        raise WeightsError(f"the processor in {folder} has no chat template")
    pixels = _set_pixels(processor, options.options)
    if options.options.get("pair_tiles"):
        cut_every_image(processor)
        pixels["pair_tiles"] = True
    most = getattr(config_of(model), "max_position_embeddings", 32768)
    chat = LocalChat(
        model.to(options.device).eval().requires_grad_(False),
        processor,
        weights_hash=hash_files(*files),
        identity=_identity(folder, pixels, processor.chat_template if is_original(config) else ""),
        max_tokens=int(most),
    )
    try:
        chat.prepare(Turn((Candidate(image=PILImage.new("RGB", (64, 64))), "?")))
    except Exception as error:  # templates are programs: they fail in ways of their own
        raise WeightsError(f"the chat template in {folder} cannot show an image: {_told(error)}") from error
    return chat


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and processor of a folder in transformers' form."""
    import transformers

    library: Any = transformers
    processor = library.AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model, report = library.AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise WeightsError(f"the weights lack {len(missing)} tensors, such as {missing[0]}")
    return model, processor


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def config_of(model: Any) -> Any:
    """The configuration of a model's language part."""
    return model.config.get_text_config()


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder that judges run on."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} holds no config.json that can be read: it is no transformers model") from error
    config = config if isinstance(config, dict) else {}
    family = config.get("model_type")
    if family not in FAMILIES and not is_original(config):
        raise WeightsError(f"{folder} is a {family!r}; judges run on {', '.join(FAMILIES.values())}")
    if config.get("quantization_config"):
        raise WeightsError(f"the weights in {folder} are quantised; give the folder of the model's plain weights")
    return config


def _set_pixels(processor: Any, options: Mapping[str, Any]) -> dict[str, int]:
    chosen = {name: options[name] for name in ("min_pixels", "max_pixels") if options.get(name) is not None}
    for name, value in chosen.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is an area in pixels, not {value!r}")
        edge = "shortest_edge" if name == "min_pixels" else "longest_edge"
        size = dict(processor.image_processor.size)
        if edge not in size:
            raise ValueError(f"the image processor of this model takes no {name}")
        processor.image_processor.size = type(processor.image_processor.size)(**{**size, edge: value})
    if len(chosen) == 2 and chosen["min_pixels"] > chosen["max_pixels"]:
        raise ValueError("min_pixels is larger than max_pixels")
    return chosen


def _identity(folder: Path, pixels: Mapping[str, int], template: str) -> str:
    """Hash of what beside the tensors an answer depends on: configuration, tokenizer, processor, chat template
    (``template``: of a folder that lacks one, or whose own is made to show pictures)."""
    hasher = hashlib.sha256(json.dumps(dict(pixels), sort_keys=True).encode())
    hasher.update(template.encode())
    for name in ("config.json", "generation_config.json", *_IDENTITY_FILES):
        path = folder / name
        hasher.update(f"|{name}|".encode() + (path.read_bytes() if path.exists() else b""))
    return hasher.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ random checkpoints

_TEXTS = (
    "a photo of a red circle left of a blue square and three yellow stars",
    "yes no Yes No image 1 is better than image 2 Answer Text Caption both images are equally good",
    "user assistant system",
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_random_chat(folder: Path, family: Family = "qwen2_vl", size: Literal["tiny", "bench"] = "tiny") -> Path:
    """Write a model of the family's true classes with random weights, its own small tokenizer and a chat template.

    ``bench`` (Qwen2-VL alone) has about 100 million parameters, for measurements. The same call writes the same bytes.
    """
    import transformers

    library: Any = transformers
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        processor = _processor(family, size)
        config = _random_config(family, size, processor)
        model = library.AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    # Larger than the usual start, so that answers differ between images and texts.
                    parameter.normal_(std=1.2 * parameter[0].numel() ** -0.5 if "embed_tokens" not in name else 0.5)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def _tokenizer(family: Family, size: Literal["tiny", "bench"]) -> Any:
    import transformers
    from tokenizers import AddedToken

    library: Any = transformers

    extra: dict[str, str] = {}
    if family == "llava_onevision":
        extra = {"image_token": "<image>", "video_token": "<video>"}
    elif family == "internvl":
        extra = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    # What is measured should have about a token a word, as published tokenizers give.
    texts = _TEXTS if size == "tiny" else (*_TEXTS, *(load_template(name).text for name in list_templates()))
    tokenizer = train_tokenizer(texts, 400 if size == "tiny" else 4096)
    tokenizer.add_tokens(["yes", "no", "Yes", "No", " yes", " no"])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in extra.values()])
    return library.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=extra,
    )


def _template(image: str, video: str) -> str:
    template = _QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", image)
    return template.replace("<|vision_start|><|video_pad|><|vision_end|>", video)


def _processor(family: Family, scale: Literal["tiny", "bench"]) -> Any:
    import transformers

    t: Any = transformers
    tokenizer = _tokenizer(family, scale)
    if family == "llava_onevision":
        pinpoints = [[56, 56], [56, 112], [112, 56]]
        images = t.LlavaOnevisionImageProcessor(size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints)
        videos: Any = t.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56})
        template = _template("<image>", "<video>")
        return t.LlavaOnevisionProcessor(
            images, tokenizer, videos, num_image_tokens=16, vision_feature_select_strategy="full",
            chat_template=template,
        )  # fmt: skip
    if family == "internvl":
        size = {"height": 56, "width": 56}
        images = t.GotOcr2ImageProcessor(size=size, crop_to_patches=False)
        videos = t.InternVLVideoProcessor(size=size)
        template = _template("<IMG_CONTEXT>\n", "<video>\n")
        return t.InternVLProcessor(images, tokenizer, videos, image_seq_length=4, chat_template=template)
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    if family == "qwen3_vl":
        size = {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 1024}
        return t.Qwen3VLProcessor(
            t.Qwen2VLImageProcessor(size=size, patch_size=16), tokenizer, t.Qwen3VLVideoProcessor(), _QWEN_TEMPLATE
        )
    kind = t.Qwen2VLProcessor if family == "qwen2_vl" else t.Qwen2_5_VLProcessor
    return kind(t.Qwen2VLImageProcessor(size=size), tokenizer, t.Qwen2VLVideoProcessor(size=size), _QWEN_TEMPLATE)


def _random_config(family: Family, size: Literal["tiny", "bench"], processor: Any) -> Any:
    tokenizer, big = processor.tokenizer, size == "bench"
    if big and family != "qwen2_vl":
        raise ValueError("the large random model is a Qwen2-VL")
    width, head = (768, 64) if big else (64, 32)
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2048 if big else 128,
        "num_hidden_layers": 10 if big else 3,
        "num_attention_heads": width // head,
        "num_key_value_heads": 4 if big else 1,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    if family == "llava_onevision":
        return _llava_config(text, tokenizer)
    if family == "internvl":
        return _internvl_config(text, tokenizer)
    return _qwen_config(family, text, tokenizer, big)


def _qwen_config(family: Family, text: dict[str, Any], tokenizer: Any, big: bool) -> Any:
    import transformers as t

    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    width = text["hidden_size"]
    rope: dict[str, Any] = {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12] if big else [4, 6, 6]
    }  # fmt: skip
    text = {**text, "rope_parameters": rope}
    if family == "qwen2_vl":
        vision: dict[str, Any] = {
            "depth": 8 if big else 2, "embed_dim": 512 if big else 32, "num_heads": 8 if big else 2,
            "mlp_ratio": 4, "hidden_size": width,
        }  # fmt: skip
        return t.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": width}
    if family == "qwen2_5_vl":
        vision |= {"depth": 2, "fullatt_block_indexes": [1], "window_size": 56}
        return t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    vision |= {"depth": 3, "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    rope["mrope_interleaved"] = True
    head = width // text["num_attention_heads"]
    return t.Qwen3VLConfig(text_config={**text, "head_dim": head}, vision_config=vision, **ids)


def _llava_config(text: dict[str, Any], tokenizer: Any) -> Any:
    import transformers as t

    return t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56,
            patch_size=14, vision_use_head=False,
        ),
        text_config=t.Qwen2Config(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[56, 56], [56, 112], [112, 56]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )  # fmt: skip


def _internvl_config(text: dict[str, Any], tokenizer: Any) -> Any:
    import transformers as t

    return t.InternVLConfig(
        vision_config=t.InternVLVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=[56, 56],
            patch_size=[14, 14],
        ),
        text_config=t.Qwen2Config(**text),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )  # fmt: skip
