"""What the oracle finds in pictures, clean and as generators make them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from models.shapes.oracle import detect, examine
from models.shapes.prompts import TASKS, parse
from models.shapes.rules import exact_score
from models.shapes.scenes import near_miss, random_prompt, random_scene, right_scene, truth
from models.shapes.world import Scene, SceneObject, degrade, render, render_batch


@given(st.integers(0, 2**32), st.integers(0, 9), st.sampled_from((32, 45, 64, 100, 224)))
@settings(max_examples=60)
def test_clean_pictures_are_read_without_error(seed: int, count: int, size: int) -> None:
    scene = random_scene(np.random.default_rng(seed), count)
    found = detect(render(scene, size))
    assert sorted(f.name for f in found) == sorted(f.name for f in truth(scene))
    for entry in truth(scene):
        nearest = min(found, key=lambda f: abs(f.x - entry.x) + abs(f.y - entry.y))
        assert nearest.name == entry.name
        assert abs(nearest.x - entry.x) < 0.03
        assert abs(nearest.y - entry.y) < 0.05  # the centroid of a triangle lies below its middle


CONDITIONS = [
    # size, blur in pixels, noise, least share of right verdicts (measured on 600 pictures: see the module's report)
    (32, 0.0, 0.0, 1.0),
    (32, 0.8, 0.0, 0.985),
    (32, 0.0, 0.1, 0.97),
    (32, 0.8, 0.1, 0.93),
    (64, 0.0, 0.0, 1.0),
    (64, 0.8, 0.0, 1.0),
    (64, 0.0, 0.1, 0.985),
    (64, 0.8, 0.1, 0.985),
]


@pytest.mark.parametrize(("size", "blur", "noise", "least"), CONDITIONS)
def test_verdicts_hold_on_blurred_and_noisy_pictures(size: int, blur: float, noise: float, least: float) -> None:
    """Half the pictures are right and half are near misses; the verdict is that of the known scene."""
    rng = np.random.default_rng(size)
    prompts = [random_prompt(rng, TASKS[i % 6]) for i in range(150)]
    scenes = [
        right_scene(prompt, rng) if i // 6 % 2 else near_miss(prompt, rng, int(rng.integers(1, 4)))[0]
        for i, prompt in enumerate(prompts)
    ]
    pixels = degrade(render_batch(scenes, size), rng, blur=blur, noise=noise)
    right = [
        examine(prompt, Image.fromarray(picture))[0].exact == exact_score(prompt, truth(scene))
        for prompt, scene, picture in zip(prompts, scenes, pixels, strict=True)
    ]
    assert np.mean(right) >= least


def test_things_that_are_none_of_the_shapes_or_colours_spoil_the_exact_score() -> None:
    prompt = parse("a red circle")
    assert prompt is not None
    image = render(Scene((SceneObject("circle", "red", (0, 0)),), background=0), 96)
    assert examine(prompt, image)[0].exact == 1.0
    with_black = image.copy()
    ImageDraw.Draw(with_black).ellipse((55, 55, 80, 80), fill=(20, 20, 20))
    verdict, found = examine(prompt, with_black)
    assert (verdict.exact, verdict.geneval) == (0.0, 1.0)
    assert "also found 1 grey circle" in verdict.reason
    with_bar = image.copy()
    ImageDraw.Draw(with_bar).rectangle((0, 70, 95, 80), fill=(40, 70, 230))
    verdict, found = examine(prompt, with_bar)
    assert verdict.exact == 0.0
    assert [f.name for f in found] == ["red circle", "blue blob"]


def test_pictures_without_objects_hold_nothing() -> None:
    assert detect(Image.new("RGB", (64, 64), "white")) == ()
    assert detect(Image.new("L", (200, 30), 90)) == ()
    noise = degrade(np.full((1, 64, 64, 3), 128, np.uint8), np.random.default_rng(0), noise=0.1)[0]
    assert detect(Image.fromarray(noise)) == ()


def test_a_tinted_background_is_no_object() -> None:
    scene = Scene((SceneObject("star", "blue", (1, 1)),), background=1)
    tinted = np.asarray(render(scene)).astype(int) + np.array((14, 4, -8))
    (only,) = detect(Image.fromarray(np.clip(tinted, 0, 255).astype(np.uint8)))
    assert only.name == "blue star"


def test_wide_pictures_keep_their_shapes() -> None:
    left = render(Scene((SceneObject("circle", "red", (1, 1)),)))
    right = render(Scene((SceneObject("square", "blue", (1, 1)),)))
    wide = Image.new("RGB", (128, 64))
    wide.paste(left, (0, 0))
    wide.paste(right, (64, 0))
    assert [f.name for f in detect(wide)] == ["red circle", "blue square"]


def test_modes_other_than_rgb() -> None:
    image = render(Scene((SceneObject("cross", "green", (2, 0)),)), 64)
    for mode in ("RGBA", "P", "CMYK"):
        assert [f.name for f in detect(image.convert(mode))] == ["green cross"]
