"""Answers in words from a :class:`models.backbones.vlm.LocalChat`, token by token over its shared beginnings."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.backbones.vlm_inputs import LocalTurn
from models.base import ModelError, SampleError
from models.judge import Answer, Generation

if TYPE_CHECKING:
    from models.backbones.vlm import LocalChat


@dataclass(eq=False)
class _Row:
    """One answer in the making."""

    turn: LocalTurn
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    failed: bool = False


@torch.inference_mode()
def generate(chat: LocalChat, turns: Sequence[LocalTurn], how: Generation) -> list[list[Answer] | SampleError]:
    """``how.samples`` answers to each turn; see :class:`models.judge.ChatModel`.

    A turn whose logits are no numbers is a :class:`ModelError` with code "not_finite".
    """
    rows = [_Row(turn, _generator(turn, how, k)) for turn in turns for k in range(how.samples)]
    features = chat.features(turns) if chat.share_features else {}
    prefixes: dict[Hashable, Tensor] = {}
    for group, places in enumerate(chat.rows_of([row.turn for row in rows])):
        if group:
            chat.on_step()
        chosen = [rows[place] for place in places]
        own = features if chat.share_features else chat.features([row.turn for row in chosen])
        prefixes = chat.prefixes([row.turn for row in chosen], own, prefixes)
        _write(chat, chosen, own, prefixes, how)
    return [_answers(chat, rows[i : i + how.samples], how) for i in range(0, len(rows), how.samples)]


def _generator(turn: LocalTurn, how: Generation, sample: int) -> torch.Generator:
    """The random stream of one answer: by seed, sample and turn, whatever stands beside it in the batch."""
    name = hashlib.blake2b(turn.ids.numpy().tobytes(), digest_size=8)
    name.update("|".join(picture.digest for picture in turn.pictures).encode())
    name.update(f"|{how.seed}|{sample}".encode())
    return torch.Generator().manual_seed(int.from_bytes(name.digest(), "big") >> 1)


def _write(
    chat: LocalChat,
    rows: list[_Row],
    features: dict[str, Tensor],
    prefixes: dict[Hashable, Tensor],
    how: Generation,
) -> None:
    """Write the answers of rows that share a forward, until all have ended."""
    padded = [*rows, *[rows[-1]] * (chat.rows - len(rows))]
    turns = [row.turn for row in padded]
    states_BD, cache, length = chat.read(turns, features, prefixes, keep=True)
    # What follows an image goes on from the largest of its positions.
    last_B = torch.stack([turn.positions.max() for turn in turns])
    axes = turns[0].positions.shape[0]
    seen_BK = torch.stack([torch.arange(length) < turn.tokens for turn in turns]).to(chat.device)
    ends = _end_tokens(chat)
    tail = max((len(stop.encode()) for stop in how.stop), default=0) + 4
    for step in range(how.max_tokens):
        chosen = _choose(chat.model.lm_head(states_BD).float(), rows, how)
        for row, token in zip(rows, chosen, strict=True):
            if not row.ended:
                row.tokens.append(token)
                text = chat.processor.tokenizer.decode(row.tokens[-tail:]) if how.stop else ""
                row.ended = row.failed or token in ends or any(stop in text for stop in how.stop)
        if all(row.ended for row in rows) or step + 1 == how.max_tokens:
            return
        chat.on_step()
        ids = torch.tensor([row.tokens[-1] for row in padded], device=chat.device)
        embeddings = chat.model.get_input_embeddings()(ids)[:, None]
        seen_BK = torch.cat([seen_BK, seen_BK.new_ones(len(padded), 1)], dim=1)
        place = (last_B + 1 + step)[:, None, None].expand(-1, axes, 1)
        states_BD = chat.forward(embeddings, place, cache, seen=seen_BK)[:, -1]


def _choose(logits_BV: Tensor, rows: Sequence[_Row], how: Generation) -> list[int]:
    """The next token of each row; a row whose logits are no numbers has failed."""
    best = logits_BV.max(-1)
    tokens, finite = best.indices.tolist(), best.values.isfinite().tolist()
    if how.temperature:
        weights_BV = ((logits_BV - best.values[:, None]) / how.temperature).softmax(-1).cpu()
    for place, row in enumerate(rows):
        row.failed = row.failed or (not row.ended and not finite[place])
        if how.temperature and not row.ended and not row.failed:
            tokens[place] = int(torch.multinomial(weights_BV[place], 1, generator=row.generator))
    return tokens[: len(rows)]


def _end_tokens(chat: LocalChat) -> frozenset[int]:
    """The tokens that end an answer: of the checkpoint's generation settings, and the tokenizer's own."""
    configured = chat.model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in [*listed, chat.processor.tokenizer.eos_token_id] if token is not None)


def _answers(chat: LocalChat, rows: Sequence[_Row], how: Generation) -> list[Answer] | SampleError:
    if any(row.failed for row in rows):
        return ModelError("the judge's logits are not finite numbers", code="not_finite")
    return [Answer(_text(chat, row, how.stop), row.ended) for row in rows]


def _text(chat: LocalChat, row: _Row, stops: Sequence[str]) -> str:
    """The answer up to the end of the first stop text: its last token may say more."""
    text: str = chat.processor.tokenizer.decode(row.tokens, skip_special_tokens=True)
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
