"""The training data: nothing held out ever occurs in it, and its labels are what the oracle sees in the pictures."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.shapes.oracle import detect
from models.shapes.preferences import (
    SIZES,
    TRAINING_SPLIT,
    Picture,
    admitted_prompt,
    arranged_group,
    content,
    draw,
    held_out_pairs,
    sibling_prompt,
    training_batch,
)
from models.shapes.prompts import TASKS, Task, parse
from models.shapes.scenes import random_scene, truth
from models.shapes.world import COLORS, SHAPES


def test_no_training_prompt_or_scene_has_a_held_out_composition() -> None:
    assert len(TRAINING_SPLIT.held_out) == 5
    assert {shape for shape, _ in TRAINING_SPLIT.held_out} == set(SHAPES)
    rng = np.random.default_rng(5)
    seen: set[tuple[str, str]] = set()
    together: set[frozenset[str]] = set()
    for _ in range(12):
        batch = training_batch(rng, 12, 6)
        for prompt in batch.prompts:
            seen |= {(include.shape, include.color) for include in prompt.include if include.color}
        for picture in batch.pictures:
            objects = picture.scene.objects
            seen |= {(entry.shape, entry.color) for entry in objects}
            together |= {frozenset({a.color, b.color}) for a in objects for b in objects if a.color != b.color}
    assert not seen & TRAINING_SPLIT.held_out
    assert not together & TRAINING_SPLIT.held_out_pairs
    assert len(seen) == len(SHAPES) * len(COLORS) - 5
    assert len(together) == len(COLORS) * (len(COLORS) - 1) // 2 - 3


def test_out_of_domain_pairs_ask_for_what_was_held_out_and_in_domain_ones_never() -> None:
    rng = np.random.default_rng(6)
    for pair in held_out_pairs(rng, 120, out_of_domain=True):
        assert not TRAINING_SPLIT.admits(pair.prompt)
    inside = held_out_pairs(rng, 120)
    for pair in inside:
        assert TRAINING_SPLIT.admits(pair.prompt)
        assert TRAINING_SPLIT.admits(pair.better.scene)
        assert TRAINING_SPLIT.admits(pair.worse.scene)
    assert {pair.prompt.task for pair in inside} == set(TASKS)
    assert {pair.kind for pair in inside} == {"near_miss", "fewer_faults", "unrelated", "degraded"}


def test_the_better_picture_of_a_pair_is_better() -> None:
    for pair in held_out_pairs(np.random.default_rng(7), 240):
        better, worse = (content(pair.prompt, truth(picture.scene)) for picture in (pair.better, pair.worse))
        if pair.kind == "degraded":
            assert better == worse == 2.0
            assert pair.better.damage < pair.worse.damage
        else:
            assert better > worse


def test_content_agrees_with_the_oracle_on_the_rendered_pictures() -> None:
    batch = training_batch(np.random.default_rng(8), 6, 6)
    compared = 0
    for n, (picture, image) in enumerate(zip(batch.pictures, batch.images, strict=True)):
        assert image.size == (picture.size, picture.size)
        if picture.damage or picture.clutter is not None:
            continue
        compared += 1
        found = detect(image)
        for g, prompt in enumerate(batch.prompts):
            assert batch.content_GN[g, n] == pytest.approx(content(prompt, found), abs=1e-6)
    assert compared > 10
    own = [batch.content_GN[g, 6 * g : 6 * g + 6] for g in range(6)]
    assert all(row[0] == row[1] == 2.0 and (row[2:] < 2.0).all() for row in own)


def test_arranged_groups_hold_pictures_whose_only_fault_is_their_arrangement() -> None:
    rng = np.random.default_rng(12)
    arranged, others = 0, 0
    for _ in range(60):
        prompt = admitted_prompt(rng, TRAINING_SPLIT, "position" if rng.random() < 0.5 else "color_attr")
        for picture in arranged_group(prompt, rng, 6, TRAINING_SPLIT)[2:]:
            assert TRAINING_SPLIT.admits(picture.scene)
            objects = picture.scene.objects
            same = sorted(entry.shape for entry in objects) == sorted(include.shape for include in prompt.include)
            named = sorted(i.color for i in prompt.include if i.color)
            same = same and (not named or named == sorted(entry.color for entry in objects))
            arranged, others = arranged + same, others + (not same)
    assert arranged > 45
    assert others > 45


@given(st.integers(0, 2**32), st.sampled_from(TASKS))
def test_sibling_prompts_ask_for_something_slightly_different(seed: int, task: Task) -> None:
    rng = np.random.default_rng(seed)
    prompt = admitted_prompt(rng, TRAINING_SPLIT, task)
    sibling = sibling_prompt(prompt, rng, TRAINING_SPLIT)
    assert sibling.task == prompt.task
    assert Counter(sibling.include) != Counter(prompt.include)
    assert TRAINING_SPLIT.admits(sibling)
    assert parse(sibling.text) == sibling


def test_drawing_is_reproducible_keeps_the_order_and_damages_as_told() -> None:
    rng = np.random.default_rng(9)
    scenes = [random_scene(rng, 3) for _ in range(6)]
    pictures = [Picture(scene, size, damage) for scene, size, damage in zip(scenes, SIZES, (0, 1, 2) * 2, strict=True)]
    pictures.append(Picture(random_scene(rng, 0), 48, 0, clutter=3))
    first, again = (draw(pictures, np.random.default_rng(1)) for _ in range(2))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert [image.width for image in first] == [picture.size for picture in pictures]
    clean = draw([Picture(picture.scene, picture.size) for picture in pictures[:6]], np.random.default_rng(1))
    for picture, image, reference in zip(pictures, first, clean, strict=False):
        difference = np.abs(np.asarray(image, float) - np.asarray(reference, float)).mean()
        assert (difference > 0) == (picture.damage > 0)
