"""Training and test data of shapes-clip: pictures under prompts with the truth known, and which of two is better.

What a picture shows decides first (exact plus soft score of its scene, known without looking at the pixels); between
pictures that show the same, the one less blurred and less noisy is better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from models.shapes.prompts import RELATIONS, TASKS, Include, Prompt, Task, compose, parse
from models.shapes.rules import Found, exact_score, soft_score
from models.shapes.scenes import (
    EVERYTHING,
    Split,
    find_near_miss,
    near_miss,
    random_prompt,
    random_scene,
    right_scene,
    truth,
)
from models.shapes.world import COLORS, SHAPES, Scene, degrade, render_batch

TRAINING_SPLIT = Split(
    held_out=frozenset(
        {("circle", "purple"), ("square", "orange"), ("triangle", "cyan"), ("cross", "red"), ("star", "green")}
    ),
    held_out_pairs=frozenset(map(frozenset, (("yellow", "purple"), ("green", "pink"), ("orange", "cyan")))),
)
"""Every training scene and prompt is admitted by it; the out-of-domain test asks for what it holds out."""

SIZES = (32, 40, 48, 64, 80, 96)
"""Pixels that scenes are rendered with, before the resize to the model's size."""


@dataclass(frozen=True)
class Picture:
    """A scene as it is rendered: size in pixels, and how much it is degraded (0 not at all, 1 mildly, 2 badly).

    With ``clutter`` (a seed) it is no scene at all but a random texture without shapes; its scene is then empty.
    """

    scene: Scene
    size: int = 64
    damage: int = 0
    clutter: int | None = None


def random_picture(scene: Scene, rng: np.random.Generator, damage: int | None = None) -> Picture:
    """A picture of random size; without a given ``damage``, 65 % are clean, 20 % mildly and 15 % badly degraded."""
    if damage is None:
        damage = int(rng.choice(3, p=(0.65, 0.2, 0.15)))
    return Picture(scene, int(rng.choice(SIZES)), damage)


def draw(pictures: Sequence[Picture], rng: np.random.Generator) -> list[PILImage.Image]:
    """Render in the order given. Blur grows with the size, so that damage looks alike at all sizes."""
    images: list[PILImage.Image] = [PILImage.new("RGB", (1, 1))] * len(pictures)
    for size in sorted({picture.size for picture in pictures}):
        chosen = [i for i, picture in enumerate(pictures) if picture.size == size]
        for i, pixels in zip(chosen, render_batch([pictures[i].scene for i in chosen], size), strict=True):
            seed = pictures[i].clutter
            if seed is not None:
                images[i] = _texture(seed, size)
                continue
            images[i] = PILImage.fromarray(_damage(pixels, pictures[i].damage, size, rng))
    return images


def _texture(seed: int, size: int) -> PILImage.Image:
    """Smooth random colours of a random coarseness: what a photograph looks like to a model of shapes."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (*rng.integers(2, 17, 2), 3), dtype=np.uint8)
    return PILImage.fromarray(coarse).resize((size, size), PILImage.Resampling.BICUBIC)


def _damage(pixels: NDArray[np.uint8], damage: int, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    if damage == 0:
        return pixels
    low, high = ((0.5, 0.8), (0.03, 0.08)) if damage == 1 else ((1.1, 1.6), (0.12, 0.2))
    way = int(rng.integers(3))
    blur = float(rng.uniform(*low)) * size / 32 if way != 1 else 0.0
    noise = float(rng.uniform(*high)) if way != 0 else 0.0
    degraded: NDArray[np.uint8] = degrade(pixels[None], rng, blur=blur, noise=noise)[0]
    return degraded


def content(prompt: Prompt, found: Sequence[Found]) -> float:
    """How well a picture shows what the prompt asks for: exact plus soft score, in [0, 2]."""
    return exact_score(prompt, found) + soft_score(prompt, found)


@dataclass(frozen=True)
class Batch:
    """G prompts and N pictures, the k-th N / G of them made for the k-th prompt; content [G, N] and damage [N]."""

    prompts: list[Prompt]
    pictures: list[Picture]
    images: list[PILImage.Image]
    content_GN: NDArray[np.float32]
    damage_N: NDArray[np.int64]


def admitted_prompt(rng: np.random.Generator, split: Split, task: Task | None = None) -> Prompt:
    """A random prompt without held-out compositions."""
    while True:
        prompt = random_prompt(rng, task)
        if split.admits(prompt):
            return prompt


def group(prompt: Prompt, rng: np.random.Generator, size: int, split: Split) -> list[Picture]:
    """``size`` >= 4 pictures for one prompt: two right ones (one of them degraded by chance), near misses with 1 to 3
    faults, and last a near miss, a picture filled with what was asked for, or one that ignores the prompt."""
    scene = right_scene(prompt, rng, split)
    pictures = [random_picture(scene, rng, 0)]
    again = scene if rng.random() < 0.5 else right_scene(prompt, rng, split)
    pictures.append(random_picture(again, rng))
    while len(pictures) < size:
        faults = int(rng.choice(3, p=(0.65, 0.2, 0.15))) + 1
        pictures.append(random_picture(near_miss(prompt, rng, faults, split=split)[0], rng))
    chance = rng.random()
    if chance < 0.2:
        pictures[-1] = random_picture(random_scene(rng, int(rng.integers(0, 10)), split), rng)
    elif chance < 0.3:
        pictures[-1] = Picture(Scene(), int(rng.choice(SIZES)), 0, int(rng.integers(2**31)))
    elif chance < 0.45:
        filled = near_miss(prompt, rng, int(rng.integers(3, 6)), kinds=("one_too_many",), split=split)[0]
        pictures[-1] = random_picture(filled, rng)
    return pictures


ARRANGEMENT_FAULTS = ("wrong_relation", "swapped_attributes")
"""Faults that leave every shape, colour and count as asked for: what a bag of words can't see."""


def arranged_group(prompt: Prompt, rng: np.random.Generator, size: int, split: Split) -> list[Picture]:
    """A group in which, for two things, each of the first near misses is likely one of arrangement alone."""
    pictures = group(prompt, rng, size, split)
    for i in (2, 3):
        if prompt.task in ("position", "color_attr") and rng.random() < 0.6:
            # The other arrangement may be held out: then the group stays as it is.
            found = find_near_miss(prompt, rng, 1, kinds=ARRANGEMENT_FAULTS, split=split, attempts=20)
            if found is not None:
                pictures[i] = random_picture(found[0], rng)
    return pictures


TASK_WEIGHTS: dict[Task, float] = {
    "single_object": 0.08,
    "two_object": 0.14,
    "counting": 0.18,
    "colors": 0.1,
    "position": 0.27,
    "color_attr": 0.23,
}
"""How often each task is trained; relations and attributes are learned last and need the most."""


def _change(include: list[Include], kind: str, rng: np.random.Generator) -> list[Include] | None:
    """One change of what is asked for, or None where it doesn't apply."""
    i = int(rng.integers(len(include)))
    first, last, one = include[0], include[-1], include[i]
    if kind == "relation" and last.position:
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
        return [first, replace(last, position=(relation, 0))]
    if kind == "swap" and len(include) == 2:
        if first.color and last.color:
            return [replace(first, color=last.color), replace(last, color=first.color)]
        return [replace(first, shape=last.shape), replace(last, shape=first.shape)]
    if kind == "count" and one.count > 1:
        include[i] = replace(one, count=int(rng.integers(2, 5)))
        return include
    if kind == "color" and one.color:
        include[i] = replace(one, color=str(rng.choice(list(COLORS))))
        return include
    if kind == "shape":
        include[i] = replace(one, shape=str(rng.choice(list(SHAPES))))
        return include
    return None


def sibling_prompt(prompt: Prompt, rng: np.random.Generator, split: Split) -> Prompt:
    """A prompt of the same task that asks for something slightly different: another relation, count, colour or shape,
    or the two objects' colours or roles swapped."""
    while True:
        kind = str(rng.choice(("relation", "relation", "swap", "swap", "count", "color", "shape")))
        include = _change(list(prompt.include), kind, rng)
        if include is None or len({(i.shape, i.color) for i in include}) < len(include):
            continue
        changed = Counter(include) != Counter(prompt.include)
        other = compose(prompt.task, tuple(include), rng)
        if changed and parse(other.text) is not None and split.admits(other):
            return other


def training_batch(
    rng: np.random.Generator,
    prompts: int,
    per_prompt: int,
    split: Split = TRAINING_SPLIT,
    *,
    siblings: bool = False,
) -> Batch:
    """A batch of groups; every picture's content is known under every prompt of the batch.

    With ``siblings`` every second prompt is a slight change of the one before it, and groups are arranged ones.
    """
    tasks = rng.choice(len(TASKS), prompts, p=[TASK_WEIGHTS[task] for task in TASKS])
    chosen = [admitted_prompt(rng, split, TASKS[i]) for i in tasks]
    if siblings:
        chosen[1::2] = [sibling_prompt(prompt, rng, split) for prompt in chosen[: len(chosen) // 2 * 2 : 2]]
    make = arranged_group if siblings else group
    pictures = [picture for prompt in chosen for picture in make(prompt, rng, per_prompt, split)]
    found = [truth(picture.scene) for picture in pictures]
    values = np.array([[content(prompt, things) for things in found] for prompt in chosen], np.float32)
    damage = np.array([picture.damage for picture in pictures], np.int64)
    return Batch(chosen, pictures, draw(pictures, rng), values, damage)


# ------------------------------------------------------------------------------------------------------ test pairs


@dataclass(frozen=True)
class Pair:
    """Two pictures for one prompt, the first better than the second, and what sets them apart."""

    prompt: Prompt
    better: Picture
    worse: Picture
    kind: str
    fault: str = ""
    """The single fault of the worse picture, for near misses."""


def _pair(prompt: Prompt, kind: str, rng: np.random.Generator, split: Split) -> Pair:
    right = right_scene(prompt, rng, split)
    if kind == "degraded":
        size = int(rng.choice(SIZES))
        return Pair(prompt, Picture(right, size), Picture(right, size, 2), kind)
    if kind == "near_miss":
        other, (fault,) = near_miss(prompt, rng, 1, split=split)
        return Pair(prompt, random_picture(right, rng), random_picture(other, rng), kind, fault)
    if kind == "unrelated":
        other = random_scene(rng, int(rng.integers(1, 5)), split)
        while exact_score(prompt, truth(other)):
            other = random_scene(rng, int(rng.integers(1, 5)), split)
        return Pair(prompt, random_picture(right, rng), random_picture(other, rng), kind)
    while True:
        scenes = [near_miss(prompt, rng, faults, split=split)[0] for faults in (1, 3)]
        one, three = (content(prompt, truth(scene)) for scene in scenes)
        if one > three + 0.05:
            return Pair(prompt, random_picture(scenes[0], rng), random_picture(scenes[1], rng), kind)


KINDS = ("near_miss", "near_miss", "near_miss", "fewer_faults", "unrelated", "degraded")
"""Kinds of test pairs in turn: half of them differ by a single fault."""


def held_out_pairs(rng: np.random.Generator, count: int, *, out_of_domain: bool = False) -> list[Pair]:
    """``count`` pairs, tasks and kinds in equal shares; out of domain every prompt asks for a held-out composition."""
    tasks = ("counting", "colors", "position", "color_attr") if out_of_domain else TASKS
    split = EVERYTHING if out_of_domain else TRAINING_SPLIT
    pairs = []
    for i in range(count):
        prompt = random_prompt(rng, tasks[i % len(tasks)])
        while TRAINING_SPLIT.admits(prompt) == out_of_domain:
            prompt = random_prompt(rng, tasks[i % len(tasks)])
        pairs.append(_pair(prompt, KINDS[(i // len(tasks)) % len(KINDS)], rng, split))
    return pairs
