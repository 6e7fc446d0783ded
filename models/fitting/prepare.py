"""Rows of preferences -> pairs that the towers take, what was read of them, and which pairs are for what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from models.base import SampleError
from models.fitting.config import FitConfig, FitProblem
from models.fitting.pair_scores import PreparedPair
from models.fitting.preference_data import PreferenceRow, UnreadableRow, decode_picture
from models.towers import TowerInput, TowerReward

Track: TypeAlias = Callable[[Sequence[Any], str], Iterator[Any]]
"""Passes its items on, and shows how far they are; told what they are."""
READERS = 4


@dataclass(frozen=True)
class DataRead:
    """What was read of one source. ``sha256`` is over the used rows in their order, which decides the batches: their
    prompts, the hashes of their encoded pictures, preferences, ranks and weights. ``skipped`` rows have no part in it.
    """

    sha256: str
    rows: int
    skipped: int
    prompts: int
    pictures: int
    pairs: int
    ties: int


@dataclass(frozen=True, eq=False)
class Prepared:
    """The pairs of the rows that the model takes, in the order of the rows, and what was read."""

    pairs: list[PreparedPair]
    read: DataRead


@dataclass(frozen=True, eq=False)
class _Row:
    """One row as the towers take it; ``sha256`` of each encoded picture."""

    inputs: list[TowerInput]
    pictures: list[str]


def prepare(model: TowerReward, rows: Sequence[PreferenceRow], track: Track) -> Prepared:
    """All pairs of the rows; a row with something that cannot be read, or that the model refuses, is counted."""
    pairs: list[PreparedPair] = []
    pictures: set[str] = set()
    hasher = hashlib.sha256()
    used = 0

    def made(row: PreferenceRow) -> _Row | None:
        try:
            return _row(model, row)
        except (SampleError, UnreadableRow):
            return None

    with ThreadPoolExecutor(READERS) as pool:
        for row, ready in track(list(zip(rows, pool.map(made, rows), strict=True)), "images"):
            if ready is None:
                continue
            used += 1
            pictures.update(ready.pictures)
            hasher.update(row_digest(row, ready.pictures))
            pairs += [
                PreparedPair(ready.inputs[pair.first], ready.inputs[pair.second], pair.label, row.weight, row.prompt)
                for pair in row.pairs
            ]
    prompts, ties = len({pair.prompt for pair in pairs}), sum(pair.label == 0.5 for pair in pairs)
    skipped = len(rows) - used
    read = DataRead(f"sha256:{hasher.hexdigest()}", used, skipped, prompts, len(pictures), len(pairs), ties)
    return Prepared(pairs, read)


def row_digest(row: PreferenceRow, pictures: Sequence[str]) -> bytes:
    """SHA-256 [32 bytes] of what a row teaches; ``pictures`` are the hashes of its encoded images."""
    ranks = None if row.ranks is None else list(row.ranks)
    said = json.dumps([row.prompt, list(pictures), row.preference, ranks, row.weight])
    return hashlib.sha256(said.encode()).digest()


def _row(model: TowerReward, row: PreferenceRow) -> _Row:
    tokens, warnings = model.prepare_text(row.prompt)
    inputs, pictures = [], []
    for picture in row.images:
        data = picture.read()
        pixels = model.prepare_image(decode_picture(data, picture.name))
        inputs.append(TowerInput(pixels, tokens, _digest(pixels), row.prompt, warnings))
        pictures.append(hashlib.sha256(data).hexdigest())
    return _Row(inputs, pictures)


def _digest(pixels: Tensor) -> str:
    """Features are kept by this: rows of two files may have the same key, and a picture may be in many rows."""
    shape = f"{pixels.dtype}{tuple(pixels.shape)}".encode()
    return hashlib.blake2b(shape + pixels.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True, eq=False)
class Parts:
    """Pairs to learn from, to choose the epoch by, and to measure what was chosen; no prompt is in two of them."""

    taught: list[PreparedPair]
    choosing: list[PreparedPair]
    measuring: list[PreparedPair]


def split(pairs: Sequence[PreparedPair], config: FitConfig) -> Parts:
    """A share of the prompts, drawn by the seed, is held out: half of it to choose by, half of it to measure on.

    Raises FitProblem for fewer than three prompts, and where a part has nothing that people decided.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < 3:
        raise FitProblem(
            "pairs of at least three prompts are needed: to learn from, to choose the epoch by, and to measure on"
        )
    order = np.random.default_rng((config.seed, 1)).permutation(len(prompts))
    count = min(len(prompts) - 1, max(2, round(config.held_out * len(prompts))))
    held = {prompts[i] for i in order[:count]}
    choosing = {prompts[i] for i in order[: count // 2]}
    return _checked(
        Parts(
            [pair for pair in pairs if pair.prompt not in held],
            [pair for pair in pairs if pair.prompt in choosing],
            [pair for pair in pairs if pair.prompt in held - choosing],
        )
    )


def split_with(pairs: Sequence[PreparedPair], validation: Sequence[PreparedPair], config: FitConfig) -> Parts:
    """All ``pairs`` to learn from; half of the prompts of ``validation`` to choose by, half to measure on.

    Raises FitProblem for a prompt that is in both, fewer than two prompts of validation, and as :func:`split` does.
    """
    if shared := {pair.prompt for pair in validation} & {pair.prompt for pair in pairs}:
        raise FitProblem(f"{len(shared)} prompts are in the data and in the validation file, such as {min(shared)!r}")
    prompts = sorted({pair.prompt for pair in validation})
    if len(prompts) < 2:
        raise FitProblem("the validation file needs at least two prompts: to choose the epoch by, and to measure on")
    order = np.random.default_rng((config.seed, 1)).permutation(len(prompts))
    choosing = {prompts[i] for i in order[: len(prompts) // 2]}
    return _checked(
        Parts(
            list(pairs),
            [pair for pair in validation if pair.prompt in choosing],
            [pair for pair in validation if pair.prompt not in choosing],
        )
    )


def _checked(parts: Parts) -> Parts:
    for what, pairs in (
        ("learn from", parts.taught),
        ("choose the epoch by", parts.choosing),
        ("measure on", parts.measuring),
    ):
        if not any(pair.label != 0.5 for pair in pairs):
            raise FitProblem(f"there is no decided pair to {what}")
    return parts
