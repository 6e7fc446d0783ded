"""What differs between the families of vision-language models: how pictures are processed and how they are encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from models.base import Candidate, InputError

LARGEST_RATIO = 200
"""Of the sides of an image, in the Qwen families: their resizing knows no more."""
_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_TIMED = ("qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True, eq=False)
class Picture:
    """An image or a video as its processor gives it.

    ``pixels`` are patches or images; ``grid`` [3] counts frames, rows and columns of patches (for families without one
    the image's height and width); ``text`` stands for it in the chat; ``digest`` names its content. Of a video
    ``seconds`` is the time between two of its grid's frames, where the family looks at it.
    """

    pixels: Tensor
    grid: Tensor
    text: str
    digest: str
    video: bool = False
    seconds: float | None = None


def process(processor: Any, family: str, candidate: Candidate, several: bool) -> Picture:
    """A candidate as the checkpoint's own processor sees it; ``several``: the turn shows other images too.

    Raises InputError for a text ("unsupported_input"), an image too narrow ("invalid_image_shape") and a video that
    cannot be read ("invalid_video") or not by this processor ("video_unsupported").
    """
    if candidate.frames:
        return _video(processor, family, candidate)
    if candidate.image is None:
        raise InputError("a text cannot stand where an image is asked for", code="unsupported_input")
    return _image(processor, family, candidate.image.convert("RGB"), candidate.digest, several)


def _image(processor: Any, family: str, image: PILImage.Image, digest: str, several: bool) -> Picture:
    _check_shape(family, image.size)
    # LLaVA-OneVision cuts an image into tiles where it is alone.
    nested: Any = [[image, image]] if several and family == "llava_onevision" else [image]
    # Some processors have defaults of their own (InternVL cuts large images into tiles).
    defaults: dict[str, Any] = getattr(type(processor), "images_kwargs", {})
    made = processor.image_processor(images=nested, return_tensors="pt", **defaults)
    text = processor.replace_image_token(made, 0)
    if family == "llava_onevision":
        return Picture(made["pixel_values"][0], made["image_sizes"][0], text, f"{digest}{several}")
    if family == "internvl":
        return Picture(made["pixel_values"], torch.tensor(image.size[::-1]), text, digest)
    return Picture(made["pixel_values"], made["image_grid_thw"][0], text, digest)


def _video(processor: Any, family: str, candidate: Candidate) -> Picture:
    reader = getattr(processor, "video_processor", None)
    if reader is None:
        raise InputError(f"this {family} judge has no processor for videos", code="video_unsupported")
    frames = [frame.convert("RGB") for frame in candidate.frames]
    if len({frame.size for frame in frames}) > 1:
        raise InputError("the frames of a video have one size", code="invalid_video")
    _check_shape(family, frames[0].size)
    if family in _TIMED and not candidate.fps:
        raise InputError(f"{family} judges look at a video's time: its fps is needed", code="invalid_video")
    clip = torch.stack([_tensor(frame) for frame in frames])
    told: dict[str, Any] = {}
    if family in _QWEN:
        # The cap on a frame's pixels is that of the reference implementation, with which judges are trained.
        told = {"video_metadata": [_metadata(candidate)], "return_metadata": True, "cap_pixels_per_frame": True}
    made = reader(videos=[clip], do_sample_frames=False, return_tensors="pt", **told)
    text = processor.replace_video_token(made, 0)
    pixels, digest = made["pixel_values_videos"], f"{candidate.digest}video"
    if family not in _QWEN:
        return Picture(pixels[0], torch.tensor(clip.shape[-2:]), text, digest, video=True)
    seconds = reader.temporal_patch_size / candidate.fps if candidate.fps and family in _TIMED else None
    return Picture(pixels, made["video_grid_thw"][0], text, digest, video=True, seconds=seconds)


def _check_shape(family: str, size: tuple[int, int]) -> None:
    if family in _QWEN and max(size) > LARGEST_RATIO * min(size):
        raise InputError(
            f"an image of {size[0]}x{size[1]} pixels is too narrow: one side may be {LARGEST_RATIO} times the other",
            code="invalid_image_shape",
        )


def _metadata(candidate: Candidate) -> dict[str, Any]:
    count, fps = len(candidate.frames), candidate.fps
    return {
        "total_num_frames": count,
        "fps": fps,
        "frames_indices": list(range(count)),
        "duration": count / fps if fps else None,
    }


def _tensor(image: PILImage.Image) -> Tensor:
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, 3).permute(2, 0, 1)


def deeper_layers(model: Any) -> int:
    """How many deeper layers of the language model are given image features too (Qwen3-VL), else 0."""
    return len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())


def encode(model: Any, pixels: Tensor, picture: Picture) -> Tensor:
    """Tokens of one picture, [K, N, D] with K - 1 = :func:`deeper_layers`; ``pixels``, on the model's device, are the
    picture's own or a twin of them that gradients flow through."""
    family, inner, grid = model.config.model_type, model.model, picture.grid[None].to(pixels.device)
    if family == "internvl":
        out = inner.get_image_features(pixels, return_dict=True)
    elif family == "llava_onevision" and picture.video:
        out = inner.get_video_features(pixels[None], return_dict=True)
    elif family == "llava_onevision":
        # Its packing asks how many images the turn has: one is cut into tiles, several are not.
        several = torch.tensor([1 if pixels.shape[0] > 1 else 2])
        out = inner.get_image_features(pixels[None], grid, batch_num_images=several, return_dict=True)
    elif picture.video:
        out = inner.get_video_features(pixels, grid)
    else:
        out = inner.get_image_features(pixels, grid)
    tokens = out.pooler_output
    main = tokens[0] if isinstance(tokens, tuple | list) else tokens.flatten(0, -2)
    return torch.stack([main, *(layer[0] for layer in _deepstack(out))])


def _deepstack(out: Any) -> Sequence[Any]:
    return getattr(out, "deepstack_features", None) or ()


@contextmanager
def only_at(layer: Any, places: tuple[Tensor, Tensor] | None) -> Iterator[None]:
    """Within it, the last layer computes only what is read beside its keys and values: the tokens (rows, columns) in
    ``places``, or nothing at all."""

    def select(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes[module] = inputs[0].shape
        return (inputs[0][:0, 0] if places is None else inputs[0][places],)

    def put_back(module: Any, _: Any, output: Tensor) -> Tensor:
        whole = output.new_zeros(*shapes.pop(module)[:-1], output.shape[-1])
        if places is not None:
            whole[places] = output
        return whole

    shapes: dict[Any, torch.Size] = {}
    with ExitStack() as hooks:
        for module in (layer.mlp, layer.self_attn.q_proj, layer.self_attn.o_proj):
            hooks.enter_context(module.register_forward_pre_hook(select))
            hooks.enter_context(module.register_forward_hook(put_back))
        yield
