"""From a turn to token ids and pixels: what of a vision-language model runs on the CPU, before the batch.

The chat template, the tokenizer and the image processor are the checkpoint's own. Text of users never becomes a control
token: a caption that spells one is read as its letters.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image as PILImage
from torch import Tensor

from models.base import Candidate, InputError
from models.judge import Turn

_MARK = re.compile("\ue000(\\d+)\ue001")

Positions = Tensor
"""Rotary positions int64 [3, L] (time, row, column) or [1, L]."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image or a video as its processor gives it: ``pixels``, ``grid`` [3] (frames, rows, columns of patches; for
    families without one the image's size), the text that stands for it, and the name of its content."""

    pixels: Tensor
    grid: Tensor
    text: str
    digest: str
    video: bool = False

    @property
    def shape(self) -> Hashable:
        """Pictures whose shapes are equal may be encoded in one batch."""
        return (tuple(self.pixels.shape), tuple(self.grid.flatten().tolist()), self.video)


@dataclass(frozen=True, eq=False)
class LocalTurn:
    """A prepared turn: ids [L], positions, pictures in order, and ``cut``, the length of the beginning that may be
    shared: all before the last picture's first token."""

    ids: Tensor
    positions: Positions
    pictures: tuple[Picture, ...]
    cut: int
    prefix: Hashable
    warnings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.ids)


class Preparation:
    """Turns -> :class:`LocalTurn`. Thread-safe; what is made of a candidate is kept as long as the candidate."""

    def __init__(self, model: Any, processor: Any, max_tokens: int) -> None:
        """``model`` and ``processor`` are transformers' own; turns of more than ``max_tokens`` tokens are refused."""
        self._positions = getattr(model.model, "get_rope_index", None)
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._family = model.config.model_type
        self._max_tokens = max_tokens
        self._image_id: int = processor.image_token_id
        self._video_id: int | None = getattr(processor, "video_token_id", None)
        # Control tokens are letters to this one: they are no part of what users may say.
        self._plain = copy.deepcopy(self._tokenizer.backend_tokenizer)
        self._plain.encode_special_tokens = True
        self._control = tuple(token for token in self._tokenizer.get_added_vocab() if token)
        self._made: WeakKeyDictionary[Candidate, dict[bool, Picture]] = WeakKeyDictionary()
        self._lock = Lock()

    def prepare(self, turn: Turn) -> LocalTurn:
        """Raises InputError: "context_too_long", "video_unsupported", "invalid_unicode", "invalid_image_shape"."""
        pictures = self._pictures(turn)
        ids = torch.tensor(self._ids(turn, pictures))
        if len(ids) > self._max_tokens:
            raise InputError(
                f"the turn has {len(ids)} tokens; the judge takes {self._max_tokens}", code="context_too_long"
            )
        starts = self._starts(ids)
        if len(starts) != len(pictures):
            raise InputError("the turn's text holds the token that stands for an image", code="reserved_token")
        cut = starts[-1] if starts else 0
        digests = tuple(picture.digest for picture in pictures[:-1])
        name = hashlib.blake2b(ids[:cut].numpy().tobytes(), digest_size=16).hexdigest()
        return LocalTurn(ids, self._place(ids, pictures), pictures, cut, (name, digests))

    def _pictures(self, turn: Turn) -> tuple[Picture, ...]:
        visual = [part for part in turn.parts if isinstance(part, Candidate)]
        several = len(visual) > 1
        return tuple(self._picture(candidate, several) for candidate in visual)

    def _picture(self, candidate: Candidate, several: bool) -> Picture:
        with self._lock:
            made = self._made.setdefault(candidate, {})
            found = made.get(several)
        if found is None:
            found = self._video(candidate) if candidate.frames else self._image(candidate, several)
            with self._lock:
                made[several] = found
        return found

    def _image(self, candidate: Candidate, several: bool) -> Picture:
        if candidate.image is None:
            raise InputError("a text cannot stand where an image is asked for", code="unsupported_input")
        image = candidate.image.convert("RGB")
        # LLaVA-OneVision cuts an image into tiles where it is alone.
        nested: Any = [[image, image]] if several and self._family == "llava_onevision" else [image]
        # Some processors have defaults of their own (InternVL cuts large images into tiles).
        defaults: dict[str, Any] = getattr(type(self._processor), "images_kwargs", {})
        made = self._processor.image_processor(images=nested, return_tensors="pt", **defaults)
        text = self._processor.replace_image_token(made, 0)
        if self._family == "llava_onevision":
            return Picture(made["pixel_values"][0], made["image_sizes"][0], text, f"{candidate.digest}{several}")
        if "image_grid_thw" in made:
            return Picture(made["pixel_values"], made["image_grid_thw"][0], text, candidate.digest)
        size = torch.tensor(image.size[::-1])
        return Picture(made["pixel_values"], size, text, candidate.digest)

    def _video(self, candidate: Candidate) -> Picture:
        if self._family not in ("qwen2_vl", "qwen2_5_vl"):
            raise InputError(f"videos are not supported with {self._family} judges", code="video_unsupported")
        frames = [frame.convert("RGB") for frame in candidate.frames]
        if len({frame.size for frame in frames}) > 1:
            raise InputError("the frames of a video have one size", code="invalid_video")
        clip = torch.stack([_tensor(frame) for frame in frames])
        made = self._processor.video_processor(videos=[clip], do_sample_frames=False, return_tensors="pt")
        text = self._processor.replace_video_token(made, 0)
        return Picture(made["pixel_values_videos"], made["video_grid_thw"][0], text, candidate.digest, video=True)

    def _ids(self, turn: Turn, pictures: Sequence[Picture]) -> list[int]:
        """Token ids of the whole turn, with the start of the answer."""
        guarded: list[str] = []

        def guard(text: str) -> str:
            _check_unicode(text)
            if "\ue000" not in text and not any(token in text for token in self._control):
                return text
            guarded.append(text)
            return f"\ue000{len(guarded) - 1}\ue001"

        content = [
            {"type": "text", "text": guard(part)}
            if isinstance(part, str)
            else {"type": "video" if isinstance(part, Candidate) and part.frames else "image"}
            for part in turn.parts
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if turn.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": guard(turn.system)}]})
        rendered = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rendered = self._expand(rendered, pictures) + guard(turn.reply)
        ids: list[int] = []
        for place, piece in enumerate(_MARK.split(rendered)):
            if place % 2:
                ids += self._plain.encode(guarded[int(piece)], add_special_tokens=False).ids
            elif piece:
                ids += self._tokenizer(piece, add_special_tokens=False).input_ids
        return ids

    def _expand(self, rendered: str, pictures: Sequence[Picture]) -> str:
        """Put each picture's own text where the template has one token for it."""
        tokens = [
            token for token in (self._processor.image_token, getattr(self._processor, "video_token", None)) if token
        ]
        pieces = re.split("|".join(map(re.escape, tokens)), rendered)
        if len(pieces) != len(pictures) + 1:
            raise InputError("the chat template does not show every image once", code="reserved_token")
        told = [picture.text for picture in pictures] + [""]
        return "".join(piece + text for piece, text in zip(pieces, told, strict=True))

    def _visual(self, ids: Tensor) -> Tensor:
        """0 for text, 1 for the tokens of images, 2 for those of videos."""
        types = (ids == self._image_id).int()
        return types if self._video_id is None else types + 2 * (ids == self._video_id).int()

    def _starts(self, ids: Tensor) -> list[int]:
        """Where each picture's tokens begin."""
        visual = self._visual(ids) > 0
        begins = visual & ~torch.cat([torch.zeros(1, dtype=torch.bool), visual[:-1]])
        return begins.nonzero().flatten().tolist()

    def _place(self, ids: Tensor, pictures: Sequence[Picture]) -> Positions:
        if self._positions is None:
            return torch.arange(len(ids))[None]
        images = [picture.grid for picture in pictures if not picture.video]
        videos = [picture.grid for picture in pictures if picture.video]
        positions: Tensor = self._positions(
            ids[None],
            mm_token_type_ids=self._visual(ids)[None],
            image_grid_thw=torch.stack(images) if images else None,
            video_grid_thw=torch.stack(videos) if videos else None,
        )[0]
        return positions[:, 0]


def _tensor(image: PILImage.Image) -> Tensor:
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, 3).permute(2, 0, 1)


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the text holds characters that are not valid Unicode", code="invalid_unicode") from error
