"""Answers in words from a :class:`models.backbones.vlm.LocalChat`, token by token over its shared beginnings."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.backbones.vlm_inputs import LocalTurn
from models.base import SampleError
from models.judge import Answer, Generation

if TYPE_CHECKING:
    from models.backbones.vlm import LocalChat

STOP_TOKENS = 24
"""How many last tokens are read for a stop text after each step."""


@dataclass(eq=False)
class _Row:
    """One answer in the making."""

    turn: LocalTurn
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@torch.inference_mode()
def generate(chat: LocalChat, turns: Sequence[LocalTurn], how: Generation) -> list[list[Answer] | SampleError]:
    """``how.samples`` answers to each turn; see :class:`models.judge.ChatModel`."""
    rows = [_Row(turn, _generator(turn, how, k)) for turn in turns for k in range(how.samples)]
    features = chat.features(turns) if chat.share_features else {}
    prefixes: dict[Hashable, Tensor] = {}
    for places in chat.rows_of([row.turn for row in rows], exact=True):
        chosen = [rows[place] for place in places]
        own = features if chat.share_features else chat.features([row.turn for row in chosen])
        _write(chat, chosen, own, prefixes, how)
    answers = [_answer(chat, row) for row in rows]
    return [list(answers[i : i + how.samples]) for i in range(0, len(answers), how.samples)]


def _generator(turn: LocalTurn, how: Generation, sample: int) -> torch.Generator:
    """The random stream of one answer: by seed, sample and turn, whatever stands beside it in the batch."""
    name = hashlib.blake2b(turn.ids.numpy().tobytes(), digest_size=8)
    name.update("|".join(picture.digest for picture in turn.pictures).encode())
    name.update(f"|{how.seed}|{sample}".encode())
    return torch.Generator().manual_seed(int.from_bytes(name.digest(), "big") >> 1)


def _write(
    chat: LocalChat, rows: list[_Row], features: dict[str, Tensor], prefixes: dict[Hashable, Tensor], how: Generation
) -> None:
    """Write the answers of rows whose beginnings and ends have equal lengths, until all have ended."""
    padded = [*rows, *[rows[-1]] * (chat.rows - len(rows))]
    turns = [row.turn for row in padded]
    cut = chat.cut(turns[0])
    if cut:
        prefixes.update({turn.prefix: chat.prefix(turn, features) for turn in turns if turn.prefix not in prefixes})
        cache = chat.cache_of([prefixes[turn.prefix] for turn in turns])
    else:
        cache = chat.new_cache()
    parts = [chat.embed(turn, features, cut, turn.tokens) for turn in turns]
    positions = torch.stack([turn.positions for turn in turns])
    states = chat.forward(parts, positions[:, :, cut:], cache)
    # What follows an image goes on from the largest of its positions.
    last_B = positions.amax(dim=(1, 2))
    ends = _end_tokens(chat)
    for step in range(how.max_tokens):
        logits = chat.model.lm_head(states[:, -1]).float().cpu()
        for row, logits_V in zip(rows, logits, strict=False):
            if not row.ended:
                _choose(chat, row, logits_V, ends, how)
        if all(row.ended for row in rows) or step + 1 == how.max_tokens:
            return
        chat.on_step()
        ids = torch.tensor([row.tokens[-1] for row in padded], device=chat.device)
        embeddings = chat.model.get_input_embeddings()(ids)[:, None]
        empty = embeddings.new_zeros(0, 0, embeddings.shape[-1])
        text = torch.zeros(1, dtype=torch.bool, device=chat.device)
        place = (last_B + 1 + step)[:, None, None].expand(-1, positions.shape[1], 1)
        states = chat.forward([(embedding, text, empty) for embedding in embeddings], place, cache)


def _choose(chat: LocalChat, row: _Row, logits_V: Tensor, ends: frozenset[int], how: Generation) -> None:
    if how.temperature == 0:
        token = int(logits_V.argmax())
    else:
        token = int(torch.multinomial((logits_V / how.temperature).softmax(-1), 1, generator=row.generator))
    row.tokens.append(token)
    if token in ends:
        row.ended = True
    elif how.stop:
        tail = chat.processor.tokenizer.decode(row.tokens[-STOP_TOKENS:])
        row.ended = any(stop in tail for stop in how.stop)


def _end_tokens(chat: LocalChat) -> frozenset[int]:
    """The tokens that end an answer: of the checkpoint's generation settings, and the tokenizer's own."""
    configured = chat.model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in [*listed, chat.processor.tokenizer.eos_token_id] if token is not None)


def _answer(chat: LocalChat, row: _Row) -> Answer:
    return Answer(chat.processor.tokenizer.decode(row.tokens, skip_special_tokens=True), row.ended)
