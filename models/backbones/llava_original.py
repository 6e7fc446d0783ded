"""LLaVA-OneVision checkpoints in the form of its authors' program (LLaVA-NeXT), read into transformers' classes.

Such a folder has a config.json of ``model_type`` "llava_qwen", which names the vision tower in place of describing it,
tensors under the names of that program, and a tokenizer without picture tokens. UnifiedReward's LLaVA checkpoints
(CodeGoat24/UnifiedReward-7b, -0.5b, -7b-v1.5) are published so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.base import WeightsError
from models.weights import load_safetensors


@dataclass(frozen=True)
class VisionTower:
    """The sizes of a SigLIP tower as LLaVA uses it: without its last layer and its pooling head."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int


TOWERS: dict[str, VisionTower] = {"siglip-so400m-patch14-384": VisionTower(1152, 4304, 26, 16, 384, 14)}
"""By the last part of ``mm_vision_tower``: trainers write paths of their own before it."""

_ONLY: Mapping[str, tuple[Any, ...]] = {
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (None, False),
    "mm_vision_select_feature": (None, "patch"),
    "rope_scaling": (None,),
}
"""What transformers' class computes; None stands for a field that is null or absent."""
_ONLY_FOR_VIDEOS: Mapping[str, tuple[Any, ...]] = {
    "add_faster_video": (None, False),
    "mm_newline_position": (None, "one_token"),
    "mm_spatial_pool_mode": (None, "bilinear"),
    "mm_spatial_pool_stride": (None, 2),
}

_TEXT = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
_TEXT_OPTIONAL = (
    "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "max_window_layers", "pad_token_id",
    "sliding_window", "use_sliding_window",
)  # fmt: skip

_RENAMED = (
    (re.compile(r"model\.vision_tower\.vision_tower\.vision_model\."), "model.vision_tower."),
    (re.compile(r"model\.mm_projector\.0\."), "model.multi_modal_projector.linear_1."),
    (re.compile(r"model\.mm_projector\.2\."), "model.multi_modal_projector.linear_2."),
    (re.compile(r"model\.(embed_tokens|layers|norm)\."), r"model.language_model.\1."),
    (re.compile(r"(model\.image_newline$|lm_head\.)"), r"\1"),
)
_BUFFERS = (".rotary_emb.inv_freq", ".embeddings.position_ids")
"""Older programs saved them; they follow from the configuration."""
_EMBEDDINGS, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"

# A checkpoint's own chat template is of a language model: the content of its messages is text, in which the authors'
# program spells the places of pictures.
_AS_TEXT = (
    "{%- set told = namespace(messages=[]) -%}{%- for message in messages -%}{%- set said = namespace(text='') -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}"
    "{%- set said.text = said.text + part['text'] -%}{%- else -%}"
    "{%- set said.text = said.text + '<' + part['type'] + '>' -%}{%- endif -%}{%- endfor -%}"
    "{%- set told.messages = told.messages + [{'role': message['role'], 'content': said.text}] -%}"
    "{%- endfor -%}{%- set messages = told.messages -%}"
)
_QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_IMAGE, _VIDEO = "<image>", "<video>"


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this form. Some trainers write the ``model_type`` of their base."""
    return config.get("model_type") == "llava_qwen" or config.get("architectures") == ["LlavaQwenForCausalLM"]


def load_original(
    folder: Path, files: Sequence[Path], config: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Any, Any]:
    """Model and processor of a folder in the original form, as transformers' LlavaOnevision classes.

    ``files`` are its safetensors, ``config`` its config.json. Raises :class:`WeightsError` for a configuration that
    transformers' class does not compute, and for tensors that are missing, left over or of another shape: no part of
    the model is left as it was initialised. Videos are refused where the checkpoint treats them in a way of its own.
    """
    import transformers

    library: Any = transformers
    _check(config, _ONLY)
    tensors = _renamed(files)
    if _EMBEDDINGS not in tensors:
        raise WeightsError("the weights lack the tensor model.embed_tokens.weight")
    tokenizer = _tokenizer(folder)
    built = _config(config, tensors[_EMBEDDINGS].shape[0], tokenizer)
    tied = bool(config.get("tie_word_embeddings"))
    if tied:
        _drop_tied_head(tensors)
    _check_tensors(tensors, built, tied=tied)
    model, report = library.LlavaOnevisionForConditionalGeneration.from_pretrained(
        None, config=built, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    unread = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if unread:
        raise WeightsError(f"transformers did not read {len(unread)} tensors of {folder}, such as {unread[0]}")
    if (folder / "generation_config.json").exists():
        model.generation_config = library.GenerationConfig.from_pretrained(folder, local_files_only=True)
    _make_room(model, max(built.image_token_index, built.video_token_index) + 1)
    return model, _processor(built, tokenizer, videos=_differs(config, _ONLY_FOR_VIDEOS) is None)


def _differs(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> str | None:
    return next((name for name, values in allowed.items() if config.get(name) not in values), None)


def _check(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    name = _differs(config, allowed)
    if name is not None:
        read = " or ".join(repr(value) for value in allowed[name])
        raise WeightsError(f"config.json says {name} is {config.get(name)!r}; of this form only {read} is read")


def _config(config: Mapping[str, Any], rows: int, tokenizer: Any) -> Any:
    """``rows`` of the embeddings count, not what the configuration says: published ones leave it out."""
    import transformers

    library: Any = transformers
    missing = [name for name in (*_TEXT, "rope_theta", "mm_vision_tower") if config.get(name) is None]
    if missing:
        raise WeightsError(f"config.json lacks {', '.join(missing)}, which a checkpoint of LLaVA has")
    text = {name: config[name] for name in (*_TEXT, *_TEXT_OPTIONAL) if name in config}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    tower = _tower(str(config["mm_vision_tower"]))
    pinpoints = _pinpoints(config, tower.image_size)
    image, video = tokenizer.convert_tokens_to_ids([_IMAGE, _VIDEO])
    return library.LlavaOnevisionConfig(
        vision_config=library.SiglipVisionConfig(**asdict(tower), vision_use_head=False),
        text_config=library.Qwen2Config(
            **text, vocab_size=rows, rope_parameters=rope, tie_word_embeddings=bool(config.get("tie_word_embeddings"))
        ),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=_aspect_ratio(config, pinpoints, tower.image_size),
        # The authors' program takes the last layer that it has kept, whatever mm_vision_select_layer says.
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _tower(name: str) -> VisionTower:
    known = TOWERS.get(name.rstrip("/").rsplit("/", 1)[-1])
    if known is None:
        raise WeightsError(f"the vision tower {name!r} is not known; LLaVA's are {', '.join(TOWERS)}")
    return known


def _pinpoints(config: Mapping[str, Any], side: int) -> list[list[int]]:
    """[height, width] of the layouts of tiles; the original form has the width first."""
    given = config.get("image_grid_pinpoints")
    pairs = given if isinstance(given, list) else []
    whole = all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(edge, int) and edge > 0 and edge % side == 0 for edge in pair)
        for pair in pairs
    )
    if not pairs or not whole:
        raise WeightsError(f"image_grid_pinpoints in config.json is no list of [width, height], multiples of {side}")
    return [[height, width] for width, height in pairs]


def _aspect_ratio(config: Mapping[str, Any], pinpoints: Sequence[Sequence[int]], side: int) -> str:
    ratio = config.get("image_aspect_ratio")
    if ratio == "anyres":  # as many tiles as the largest layout has: none is made smaller
        return f"anyres_max_{max(height * width for height, width in pinpoints) // side**2}"
    if not isinstance(ratio, str) or re.fullmatch(r"anyres_max_[1-9]\d*", ratio) is None:
        raise WeightsError(f"config.json says image_aspect_ratio is {ratio!r}; anyres and anyres_max_N are read")
    return ratio


def _renamed(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of all files, mapped into memory, under transformers' names."""
    found: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in load_safetensors(file).items():
            if name.endswith(_BUFFERS):
                continue
            own = next((rule.sub(to, name, count=1) for rule, to in _RENAMED if rule.match(name)), None)
            if own is None:
                raise WeightsError(f"{file} holds the tensor {name}, which LLaVA-OneVision has not")
            if own in found:
                raise WeightsError(f"{file} holds the tensor {name} again")
            found[own] = tensor
    return found


def _drop_tied_head(tensors: dict[str, Tensor]) -> None:
    head = tensors.pop(_HEAD, None)
    if head is not None and not torch.equal(head, tensors[_EMBEDDINGS]):
        raise WeightsError("config.json says tie_word_embeddings, but lm_head.weight is not model.embed_tokens.weight")


def _check_tensors(tensors: Mapping[str, Tensor], config: Any, *, tied: bool) -> None:
    """Names are transformers' own, which differ from the files' in the prefix alone."""
    import transformers

    with torch.device("meta"):
        model: Any = transformers.LlavaOnevisionForConditionalGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del expected[_HEAD]
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise WeightsError(f"the weights lack {len(missing)} tensors, such as {missing[0]}")
    if extra:
        raise WeightsError(f"the weights hold {len(extra)} tensors too many for config.json, such as {extra[0]}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise WeightsError(f"{name} has the shape {list(tensors[name].shape)}, not {list(shape)} of config.json")


def _make_room(model: Any, rows: int) -> None:
    """Rows for the tokens that stand for pictures: they are looked up before what they stand for takes their place.

    The head gains none: no answer can hold them.
    """
    old = model.get_input_embeddings().weight.data
    words, width = old.shape
    if rows > words:
        wider = torch.nn.Embedding(rows, width, device="meta")
        wider.weight = torch.nn.Parameter(torch.cat([old, old.new_zeros(rows - words, width)]), requires_grad=False)
        model.set_input_embeddings(wider)


def _tokenizer(folder: Path) -> Any:
    import transformers
    from tokenizers import AddedToken

    if not (folder / "tokenizer.json").is_file():
        raise WeightsError(f"{folder} holds no tokenizer.json: other forms of tokenizers are not read for judges")
    library: Any = transformers
    tokenizer = library.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    tokens = [AddedToken(token, normalized=False, special=True) for token in (_IMAGE, _VIDEO)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


def _processor(config: Any, tokenizer: Any, *, videos: bool) -> Any:
    import transformers

    library: Any = transformers
    side = config.vision_config.image_size
    siglip = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = library.LlavaOnevisionProcessor(
        library.LlavaOnevisionImageProcessor(**siglip, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        library.LlavaOnevisionVideoProcessor(**siglip),
        num_image_tokens=(side // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=_chat_template(tokenizer.chat_template),
    )
    if not videos:
        processor.video_processor = None
    return processor


def cut_every_image(processor: Any) -> None:
    """Let a LLaVA-OneVision processor cut each of several images into tiles, as it does with a single one.

    Transformers makes one padded square of each, as the checkpoints were trained; UnifiedReward's evaluation programs
    cut them. A tile costs as many tokens as a square. Raises ValueError for a processor that cuts no tiles.
    """
    own = processor.image_processor
    if not hasattr(own, "image_grid_pinpoints"):
        raise ValueError("the image processor of this model cuts no tiles: it takes no pair_tiles")

    class EveryImage(type(own)):  # type: ignore[misc]
        def preprocess(self, images: Any, **settings: Any) -> Any:
            nested = isinstance(images[0], list)
            return super().preprocess([each for some in images for each in some] if nested else images, **settings)

    processor.image_processor = EveryImage.from_dict(own.to_dict())


def _chat_template(own: str | None) -> str:
    if own is not None and "image" in own:
        return own
    return _AS_TEXT + (own or _QWEN)
