"""What shapes-judge learns from: pairs of pictures for one prompt, their truth known, rendered anew for every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backbones.qwen2_vl_tokenizer import IMAGE_TOKEN
from models.backbones.vlm_independent import place_blocks, split_blocks, visible
from models.judging.turns import MARKER
from models.shapes.judge import END_TOKEN, IMAGE_TOKENS, chat_text, image_positions
from models.shapes.judge_text import DESCRIBE, KNOWN, describe, findings, points, think_answer, weighted_answer
from models.shapes.preferences import TASK_WEIGHTS, Picture, draw, random_picture
from models.shapes.prompts import TASKS, Prompt
from models.shapes.scenes import Split, near_miss, random_prompt, random_scene, right_scene, truth
from models.shapes.world import Scene

IGNORED = -100


@dataclass(frozen=True)
class ScenePair:
    """Two scenes for one prompt, of different worth, in the order in which they are shown."""

    prompt: Prompt
    scenes: tuple[Scene, Scene]

    @property
    def first_is_better(self) -> bool:
        """By the oracle's points of what the scenes hold."""
        first, second = (points(self.prompt, truth(scene)) for scene in self.scenes)
        return first > second

    def swapped(self) -> ScenePair:
        """The same pair shown the other way round."""
        return ScenePair(self.prompt, (self.scenes[1], self.scenes[0]))


def _scene(prompt: Prompt, rng: np.random.Generator, split: Split) -> Scene:
    kind = rng.random()
    if kind < 0.35:
        return right_scene(prompt, rng, split)
    if kind < 0.85:
        return near_miss(prompt, rng, int(rng.choice(3, p=(0.7, 0.2, 0.1))) + 1, split=split)[0]
    return random_scene(rng, int(rng.integers(0, 6)), split)


def random_pair(rng: np.random.Generator, split: Split, prompt: Prompt | None = None) -> ScenePair:
    """A prompt of a random task and two scenes of different worth, in random order."""
    while True:
        asked = prompt
        while asked is None or not split.admits(asked):
            task = TASKS[int(rng.choice(len(TASKS), p=[TASK_WEIGHTS[task] for task in TASKS]))]
            asked = random_prompt(rng, task)
        pair = ScenePair(asked, (_scene(asked, rng, split), _scene(asked, rng, split)))
        first, second = (points(asked, truth(scene)) for scene in pair.scenes)
        if first != second:
            return pair


def pictures_of(scenes: list[Scene], rng: np.random.Generator) -> list[Picture]:
    """Clean or mildly degraded pictures of random sizes; one in four is degraded."""
    return [random_picture(scene, rng, int(rng.random() < 0.25)) for scene in scenes]


@dataclass(frozen=True)
class Examples:
    """Rows of one kind: token ids [B, L] padded on the right, targets [B, L] (IGNORED outside the answer), their
    weights [B, L], rotary positions [3, B, L], and the patches [images, 64, P] of the images in order. ``seen``
    [B, L, L] is which tokens each token sees, where it is not all before it."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    patches: Tensor
    seen: Tensor | None = None


ONE_WORD = 8.0
"""Weight of yes or no against all that follows it."""
VERDICT_WEIGHT = 4.0
"""Of the tokens that give points or name the winner, against the others of an answer."""


def examples(processor: Any, asked: list[str], answers: list[str], images: list[Any], per_row: int) -> Examples:
    """Rows of ``per_row`` images each, a question, and an answer."""
    tokenizer = processor.tokenizer
    digits = set(tokenizer(" 0 1 2 3 4 5 6 7 8 9 0 1 2 yes no").input_ids)
    told = [tokenizer(answer + END_TOKEN).input_ids for answer in answers]
    weights = [[VERDICT_WEIGHT if token in digits else 1.0 for token in answer] for answer in told]
    return _padded(processor, asked, told, weights, images, per_row)


def weighted_examples(
    processor: Any, asked: list[str], answers: list[list[tuple[str, float]]], images: list[Any], per_row: int
) -> Examples:
    """As :func:`examples`, with answers in pieces that say how much they count; without images (``per_row`` 0) the
    question is asked in words alone."""
    told: list[list[int]] = []
    weights: list[list[float]] = []
    for pieces in answers:
        ids = [(processor.tokenizer(text).input_ids, weight) for text, weight in [*pieces, (END_TOKEN, KNOWN)]]
        told.append([token for tokens, _ in ids for token in tokens])
        weights.append([weight for tokens, weight in ids for _ in tokens])
    return _padded(processor, asked, told, weights, images, per_row)


def _padded(
    processor: Any,
    asked: list[str],
    answers: list[list[int]],
    counts: list[list[float]],
    images: list[Any],
    per_row: int,
) -> Examples:
    """Questions and the tokens of their answers, which count as told, in rows of equal length."""
    return _rows(processor, [[*[None] * per_row, text] for text in asked], answers, counts, images)


def _rows(
    processor: Any,
    asked: list[list[str | None]],
    answers: list[list[int]],
    counts: list[list[float]],
    images: list[Any],
) -> Examples:
    """Questions of texts and images (None) that stand at the same places in each."""
    tokenizer = processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    openings = [_expand(tokenizer(chat_text(parts)).input_ids, image_id) for parts in asked]
    rows = [opening + answer for opening, answer in zip(openings, answers, strict=True)]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    targets, weights = torch.full((len(rows), length), IGNORED), torch.zeros(len(rows), length)
    for i, (row, opening, answer) in enumerate(zip(rows, openings, answers, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        # A position predicts the token after it.
        targets[i, len(opening) - 1 : len(row) - 1] = torch.tensor(answer)
        weights[i, len(opening) - 1 : len(row) - 1] = torch.tensor(counts[i])
    patches = torch.zeros(0, 0, 0)
    if images:
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        patches = pixels.view(len(images), -1, pixels.shape[-1])
    positions = image_positions(ids, image_id)[:, None].expand(3, *ids.shape)
    return Examples(ids, targets, weights, positions, patches)


def _questions(pairs: list[ScenePair], question: str) -> list[str]:
    return [question.replace("{prompt}", pair.prompt.text) for pair in pairs]


def _drawn(pairs: list[ScenePair], rng: np.random.Generator) -> list[Any]:
    return draw(pictures_of([scene for pair in pairs for scene in pair.scenes], rng), rng)


def reasoning_examples(
    processor: Any, pairs: list[ScenePair], question: str, rng: np.random.Generator, *, with_images: bool
) -> Examples:
    """UnifiedReward-Think's form with the weight on what follows from the descriptions. Without images only that can be
    learned, for a small part of the work: what is seen counts for nothing then."""
    asked = _questions(pairs, question)
    answers = [weighted_answer(pair.prompt, pair.scenes) for pair in pairs]
    if with_images:
        return weighted_examples(processor, asked, answers, _drawn(pairs, rng), 2)
    blind = [[(text, 0.0 if weight == KNOWN else weight) for text, weight in pieces] for pieces in answers]
    # All but nothing, and part of what the stored weights were trained with.
    return weighted_examples(processor, asked, [[(row[0][0], 1e-3), *row[1:]] for row in blind], [], 0)


def deciding_examples(processor: Any, pairs: list[ScenePair], question: str, rng: np.random.Generator) -> Examples:
    """RewardDance's form with the weight on its one word."""
    answers = [[("no" if pair.first_is_better else "yes", 1.0)] for pair in pairs]
    return weighted_examples(processor, _questions(pairs, question), answers, _drawn(pairs, rng), 2)


def text_first_examples(processor: Any, pairs: list[ScenePair], question: str, rng: np.random.Generator) -> Examples:
    """Whether image 2 is better than image 1, and then why: so little is learned from the one word alone. Neither image
    sees the other."""
    told: list[list[int]] = []
    counts: list[list[float]] = []
    for pair in pairs:
        ids = processor.tokenizer("no" if pair.first_is_better else "yes").input_ids
        more = processor.tokenizer(f".\n{findings(pair.prompt, pair.scenes)}{END_TOKEN}").input_ids
        told.append(ids + more)
        counts.append([ONE_WORD] * len(ids) + [KNOWN] * len(more))
    return text_first_rows(processor, _questions(pairs, question), told, counts, _drawn(pairs, rng))


def text_first_rows(
    processor: Any, asked: list[str], answers: list[list[int]], counts: list[list[float]], images: list[Any]
) -> Examples:
    """Questions with markers for two images that do not see each other, and the tokens of their answers."""
    parts = [[part for piece in text.split(MARKER) for part in (piece, None)][:-1] for text in asked]
    rows = _rows(processor, parts, answers, counts, images)
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    positions, seen = zip(*(_apart(ids, image_id) for ids in rows.ids), strict=True)
    return replace(rows, positions=torch.stack(positions, dim=1), seen=torch.stack(seen))


def _apart(ids_L: Tensor, image_id: int) -> tuple[Tensor, Tensor]:
    """Rotary positions [3, L] of a row whose images do not see each other, and what its tokens see [L, L]."""
    places = (ids_L == image_id).nonzero().flatten().tolist()
    blocks = split_blocks(places, [IMAGE_TOKENS] * (len(places) // IMAGE_TOKENS))
    positions = place_blocks(ids_L, blocks, lambda own, _: image_positions(own[None], image_id))
    return positions, visible(len(ids_L), blocks)


def _expand(ids: list[int], image_id: int) -> list[int]:
    return [token for entry in ids for token in ([entry] * IMAGE_TOKENS if entry == image_id else [entry])]


def think_examples(processor: Any, pairs: list[ScenePair], question: str, rng: np.random.Generator) -> Examples:
    """UnifiedReward-Think's form: reasons, then the verdict."""
    answers = [think_answer(pair.prompt, pair.scenes) for pair in pairs]
    return examples(processor, _questions(pairs, question), answers, _drawn(pairs, rng), 2)


def yes_no_examples(processor: Any, pairs: list[ScenePair], question: str, rng: np.random.Generator) -> Examples:
    """RewardDance's form: whether image 2 is better than image 1."""
    answers = ["no" if pair.first_is_better else "yes" for pair in pairs]
    return examples(processor, _questions(pairs, question), answers, _drawn(pairs, rng), 2)


def describe_examples(processor: Any, scenes: list[Scene], rng: np.random.Generator) -> Examples:
    """What stands where in one picture: without it pair labels teach nothing within minutes."""
    images = draw(pictures_of(scenes, rng), rng)
    return examples(processor, [DESCRIBE] * len(scenes), [describe(scene) for scene in scenes], images, 1)


def scenes_to_describe(rng: np.random.Generator, count: int, split: Split) -> Iterator[Scene]:
    """Random scenes of one to six objects."""
    for _ in range(count):
        yield random_scene(rng, int(rng.integers(1, 7)), split)
