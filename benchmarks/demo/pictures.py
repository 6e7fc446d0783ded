"""What the demo scores: photographs of scikit-image's wheel, painted signs, and drawings of the shapes world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter, ImageFont, ImageOps

from benchmarks import samples
from models.shapes.preferences import TRAINING_SPLIT, admitted_prompt, draw, group
from models.shapes.prompts import TASKS, Include, Prompt, compose
from models.shapes.scenes import near_miss, right_scene
from models.shapes.world import Scene, SceneObject, degrade, render, render_batch

SIDE = 300
"""Every photograph is cropped and shrunk to this many pixels a side: file sizes are compared, so areas are equal."""


@dataclass(frozen=True)
class Picture:
    """An image with the words that say what it is."""

    image: PILImage.Image
    name: str


@dataclass(frozen=True)
class Photo:
    """A photograph in scikit-image's wheel, its prompt and where it comes from (see docs/credits.md)."""

    file: str
    name: str
    credit: str


PHOTOS = (
    Photo("astronaut.png", "astronaut", "Eileen Collins; NASA, public domain"),
    Photo("chelsea.png", "cat", "Chelsea; Stefan van der Walt, CC0"),
    Photo("coffee.png", "coffee", "Pikolo Espresso Bar; Rachel Michetti, CC0"),
    Photo("rocket.jpg", "rocket", "DSCOVR on Falcon 9; SpaceX, public domain"),
    Photo("hubble_deep_field.jpg", "deep field", "Hubble eXtreme Deep Field; NASA, public domain"),
    Photo("retina.jpg", "retina", "Mikael Häggström, CC0"),
)


def photographs() -> list[Picture]:
    """PHOTOS as squares of SIDE pixels, none enlarged; without their files' comments and colour profiles."""
    squares = [ImageOps.fit(samples.photo(p.file), (SIDE, SIDE), PILImage.Resampling.LANCZOS) for p in PHOTOS]
    return [
        Picture(PILImage.fromarray(np.asarray(square)), photo.name)
        for photo, square in zip(PHOTOS, squares, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------- signs

SIGN_TEXT = "OPEN DAILY"
SIGN_PROMPT = f'a wooden shop sign that says "{SIGN_TEXT}"'


def sign(text: str, *, blur: float = 0.0, tilt: float = 0.0) -> PILImage.Image:
    """A painted wooden board, 400 x 160 pixels; ``blur`` in pixels, ``tilt`` in degrees."""
    board = PILImage.new("RGB", (400, 160), (214, 206, 190))
    pen = ImageDraw.Draw(board)
    pen.rounded_rectangle((14, 18, 386, 142), 14, fill=(92, 58, 34), outline=(58, 34, 18), width=5)
    for y in range(36, 142, 21):
        pen.line((22, y, 378, y), fill=(82, 51, 29), width=2)
    pen.text((200, 80), text, fill=(250, 240, 214), font=ImageFont.load_default(54), anchor="mm")
    board = board.rotate(tilt, PILImage.Resampling.BICUBIC, fillcolor=(214, 206, 190))
    return board.filter(ImageFilter.GaussianBlur(blur)) if blur else board


def signs() -> list[Picture]:
    """Six candidates for SIGN_PROMPT: the first two as asked, the others wrong in one way each."""
    return [
        Picture(sign(SIGN_TEXT), "as asked"),
        Picture(sign(SIGN_TEXT, blur=1.6, tilt=4), "as asked, tilted, blurred"),
        Picture(sign("OPEN DALY"), "a letter missing"),
        Picture(sign("OPEN DAIRY"), "a letter exchanged"),
        Picture(sign("OPEN"), "a word missing"),
        Picture(sign("CLOSED"), "another text"),
    ]


# ------------------------------------------------------------------------------------------------------------ shapes

DRAWING_SIDE = 96
ATTRIBUTES = compose("color_attr", (Include("triangle", 1, "yellow"), Include("star", 1, "red")))
POSITION = compose("position", (Include("square", 1, "blue"), Include("circle", 1, "red", ("left of", 0))))


def drawings(prompt: Prompt, seed: int = 7) -> list[Picture]:
    """Eight candidates: one right, one right but blurred and noisy, and six with one fault each."""
    rng = np.random.default_rng(seed)
    pixels = render_batch([right_scene(prompt, rng) for _ in range(2)], DRAWING_SIDE)
    damaged = degrade(pixels[1:], rng, blur=1.2, noise=0.06)[0]
    found = [Picture(PILImage.fromarray(pixels[0]), "right")]
    found.append(Picture(PILImage.fromarray(damaged), "right, blurred and noisy"))
    last = "wrong_relation" if prompt.task == "position" else "one_too_many"
    for fault in ("swapped_attributes", "wrong_color", "wrong_shape", "extra_object", "missing_object", last):
        scene, _ = near_miss(prompt, rng, 1, kinds=(fault,))
        found.append(Picture(render(scene, DRAWING_SIDE), fault.replace("_", " ").replace("color", "colour")))
    return found


def wrong_drawing() -> PILImage.Image:
    """A drawing for POSITION whose square is green in place of blue; every value is well within 0 and 255."""
    objects = (SceneObject("circle", "red", (1, 0)), SceneObject("square", "green", (1, 2)))
    return render(Scene(objects, background=1), DRAWING_SIDE)


@dataclass(frozen=True)
class Caption:
    """A caption of the shapes world and the drawings that compete for it."""

    prompt: Prompt
    images: tuple[PILImage.Image, ...]


def captions(per_task: int, images: int, seed: int = 20_260) -> list[Caption]:
    """``per_task`` random captions of each of the six tasks with ``images`` >= 4 drawings each, as in training groups:
    right ones, near misses, degraded ones, unrelated ones; none of the compositions that training holds out."""
    rng = np.random.default_rng(seed)
    made = []
    for task in TASKS:
        for _ in range(per_task):
            prompt = admitted_prompt(rng, TRAINING_SPLIT, task)
            made.append(Caption(prompt, tuple(draw(group(prompt, rng, images, TRAINING_SPLIT), rng))))
    return made
