"""From a turn to token ids and pixels: what of a vision-language model runs on the CPU, before the batch.

The chat template, the tokenizer and the image processor are the checkpoint's own. Text of users never becomes a control
token: a caption that spells one is read as its letters.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from models.backbones.vlm_families import Picture, process
from models.backbones.vlm_independent import Block, place_blocks, split_blocks
from models.base import Candidate, InputError
from models.judge import Turn

_MARK = re.compile("\ue000(\\d+)\ue001")

Positions = Tensor
"""Rotary positions int64 [3, L] (time, row, column) or [1, L]."""


@dataclass(frozen=True, eq=False)
class LocalTurn:
    """A prepared turn: ids [L], positions, pictures in order, and ``cut``, the length of the beginning that may be
    shared: all before the last picture's first token. A turn of independent pictures has ``blocks`` and is cut after
    the last of them."""

    ids: Tensor
    positions: Positions
    pictures: tuple[Picture, ...]
    cut: int
    prefix: Hashable
    warnings: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.ids)


class _Made:
    """What is made of one candidate: as one of several pictures of a turn, and as the only one."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.pictures: dict[bool, Picture] = {}


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
        listed = (processor.image_token, getattr(processor, "video_token", None))
        self._tokens = tuple(token for token in listed if token)
        # Copies, since a tokenizer's settings are state that its other users may change.
        self._whole, self._plain = (_untruncated(self._tokenizer.backend_tokenizer) for _ in range(2))
        # Control tokens are letters to this one: they are no part of what users may say.
        self._plain.encode_special_tokens = True
        added = self._tokenizer.added_tokens_decoder.values()
        self._control = tuple(token.content for token in added if token.special and token.content)
        self._made: WeakKeyDictionary[Candidate, _Made] = WeakKeyDictionary()
        self._lock = Lock()

    def prepare(self, turn: Turn) -> LocalTurn:
        """Raises InputError: "context_too_long", "video_unsupported", "invalid_unicode", "invalid_image_shape"."""
        pictures = self._pictures(turn)
        ids = torch.tensor(self._ids(turn, pictures))
        if len(ids) > self._max_tokens:
            raise InputError(
                f"the turn has {len(ids)} tokens; the judge takes {self._max_tokens}", code="context_too_long"
            )
        places, counts = self._places(ids, pictures)
        if turn.independent and pictures:
            return self._apart(ids, pictures, split_blocks(places, counts))
        cut = places[-counts[-1]] if counts else 0
        seen = tuple((picture.digest, picture.seconds) for picture in pictures[:-1])
        return LocalTurn(ids, self._place(ids, pictures), pictures, cut, (_name(ids[:cut]), seen))

    def _apart(self, ids: Tensor, pictures: tuple[Picture, ...], blocks: tuple[Block, ...]) -> LocalTurn:
        """The turn of pictures that do not see each other."""
        head = _name(ids[: blocks[0].start])
        named = tuple(
            replace(
                block,
                head=(head, ()),
                name=(head, _name(ids[block.start : block.stop]), picture.digest, picture.seconds),
            )
            for block, picture in zip(blocks, pictures, strict=True)
        )
        positions = place_blocks(ids, blocks, lambda own, k: self._place(own, pictures[k : k + 1]))
        cut, prefix = blocks[-1].stop, (head, tuple(block.name for block in named))
        return LocalTurn(ids, positions, pictures, cut, prefix, blocks=named)

    def _pictures(self, turn: Turn) -> tuple[Picture, ...]:
        visual = [part for part in turn.parts if isinstance(part, Candidate)]
        several = sum(candidate.image is not None for candidate in visual) > 1
        return tuple(self._picture(candidate, several) for candidate in visual)

    def _picture(self, candidate: Candidate, several: bool) -> Picture:
        with self._lock:
            made = self._made.setdefault(candidate, _Made())
        # Threads that prepare other comparisons of the candidate wait for the one that processes it.
        with made.lock:
            if several not in made.pictures:
                made.pictures[several] = process(self._processor, self._family, candidate, several)
            return made.pictures[several]

    def _ids(self, turn: Turn, pictures: Sequence[Picture]) -> list[int]:
        """Token ids of the whole turn, with the start of the answer."""
        guarded: list[str] = []
        # Of all texts at once: two that meet may spell together what neither spells alone.
        said = "".join((turn.system, *(part for part in turn.parts if isinstance(part, str)), turn.reply))
        _check_unicode(said)
        hostile = "\ue000" in said or any(token in said for token in self._control)

        def guard(text: str) -> str:
            if not hostile:
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
                ids += self.encode(piece)
        return ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, in which control tokens are control tokens."""
        ids: list[int] = self._whole.encode(text, add_special_tokens=False).ids
        return ids

    def _expand(self, rendered: str, pictures: Sequence[Picture]) -> str:
        """Put each picture's own text where the template has one token for it."""
        pieces = re.split("|".join(map(re.escape, self._tokens)), rendered)
        if len(pieces) != len(pictures) + 1:
            videos = any(picture.video for picture in pictures)
            raise InputError(
                "the checkpoint's chat template does not show every picture once",
                code="video_unsupported" if videos else "reserved_token",
            )
        told = [picture.text for picture in pictures] + [""]
        return "".join(piece + text for piece, text in zip(pieces, told, strict=True))

    def _visual(self, ids: Tensor) -> Tensor:
        """0 for text, 1 for the tokens of images, 2 for those of videos."""
        types = (ids == self._image_id).int()
        return types if self._video_id is None else types + 2 * (ids == self._video_id).int()

    def _places(self, ids: Tensor, pictures: Sequence[Picture]) -> tuple[list[int], list[int]]:
        """Where the pictures' tokens stand, and how many each has. Raises InputError where there are others."""
        places = self._visual(ids).nonzero().flatten().tolist()
        counts = [sum(picture.text.count(token) for token in self._tokens) for picture in pictures]
        if len(places) != sum(counts):
            raise InputError("the turn's text holds the token that stands for an image", code="reserved_token")
        return places, counts

    def _place(self, ids: Tensor, pictures: Sequence[Picture]) -> Positions:
        if self._positions is None:
            return torch.arange(len(ids))[None]
        images = [picture.grid for picture in pictures if not picture.video]
        videos = [picture.grid for picture in pictures if picture.video]
        seconds = [picture.seconds for picture in pictures if picture.seconds is not None]
        positions: Tensor = self._positions(
            ids[None],
            mm_token_type_ids=self._visual(ids)[None],
            image_grid_thw=torch.stack(images) if images else None,
            video_grid_thw=torch.stack(videos) if videos else None,
            **({"second_per_grid_ts": torch.tensor(seconds)} if seconds else {}),
        )[0]
        return positions[:, 0]


def _name(ids: Tensor) -> str:
    return hashlib.blake2b(ids.numpy().tobytes(), digest_size=16).hexdigest()


def _untruncated(tokenizer: Any) -> Any:
    copied = copy.deepcopy(tokenizer)
    copied.no_truncation()
    copied.no_padding()
    copied.encode_special_tokens = False
    return copied


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the text holds characters that are not valid Unicode", code="invalid_unicode") from error
