"""What is sent and scored: crops of real photographs, captions that never repeat, and the three wires."""

from __future__ import annotations

import io
import json
import random
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image as PILImage
from safetensors.numpy import save

from service.load_generator import Load

Wire = Literal["json-jpeg", "json-png", "safetensors"]
WIRES: tuple[Wire, ...] = ("json-jpeg", "json-png", "safetensors")
MODEL = "bench-clip"
SIDE = 512
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png",
          "motorcycle_left.png", "retina.jpg")  # fmt: skip
"""Photographs in scikit-image's wheel (skimage.data)."""

_ADJECTIVES = ("red", "small", "old", "wooden", "bright", "striped", "rusty", "tiny", "golden", "wet", "round", "pale")
_NOUNS = ("cat", "lighthouse", "bicycle", "teapot", "violin", "rocket", "umbrella", "market stall", "horse", "bridge")
_PLACES = ("on a table", "in the rain", "under a street lamp", "beside a river", "in a crowded station", "at dawn")
_STYLES = ("oil painting", "35mm photograph", "watercolour", "studio lighting", "highly detailed", "soft focus")


def photo(name: str) -> PILImage.Image:
    """One of PHOTOS, RGB."""
    with PILImage.open(Path(skimage.__file__).parent / "data" / name) as image:
        return image.convert("RGB")


def crops(count: int, side: int = SIDE, seed: int = 0) -> list[NDArray[np.uint8]]:
    """``count`` different random square crops of the photographs, uint8 [side, side, 3]."""
    chooser = random.Random(seed)
    photos = [photo(name) for name in PHOTOS]
    found = []
    for i in range(count):
        image = photos[i % len(photos)]
        edge = int(min(image.size) * chooser.uniform(0.5, 1.0))
        left, top = chooser.randint(0, image.width - edge), chooser.randint(0, image.height - edge)
        box = (left, top, left + edge, top + edge)
        found.append(np.asarray(image.resize((side, side), PILImage.Resampling.BICUBIC, box=box)))
    return found


def caption(number: int) -> str:
    """The ``number``-th caption: 8 to 26 words, as text-to-image prompts are; no two numbers give the same one."""
    chooser = random.Random(number)
    parts = [f"a {chooser.choice(_ADJECTIVES)} {chooser.choice(_NOUNS)} {chooser.choice(_PLACES)}"]
    parts += [
        f"with a {chooser.choice(_ADJECTIVES)} {chooser.choice(_NOUNS)} {chooser.choice(_PLACES)}"
        for _ in range(chooser.randint(0, 2))
    ]
    parts.append(f"{chooser.choice(_STYLES)}, take {number}")
    return ", ".join(parts)


def encode(pixels: NDArray[np.uint8], wire: Wire) -> bytes:
    """The image as it travels: a JPEG file of quality 95, a PNG file, or its raw bytes."""
    if wire == "safetensors":
        return pixels.tobytes()
    buffer = io.BytesIO()
    if wire == "json-jpeg":
        PILImage.fromarray(pixels).save(buffer, "JPEG", quality=95)
    else:
        PILImage.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def load(images: Sequence[NDArray[np.uint8]], wire: Wire, group: int, first_caption: int) -> Load:
    """Requests of one item: ``group`` of the images in turn, and a caption of its own, counted from ``first_caption``.

    Images are encoded now, so that sending costs little; captions never repeat, so that no cache can hold them.
    """
    if wire == "safetensors":
        return Load("application/vnd.safetensors", group, _tensor_body(images, group, first_caption))
    return Load("application/json", group, _json_body(images, wire, group, first_caption))


def _json_body(
    images: Sequence[NDArray[np.uint8]], wire: Wire, group: int, first_caption: int
) -> Callable[[int], bytes]:
    encoded = [json.dumps(b64encode(encode(pixels, wire)).decode()).encode() for pixels in images]

    def body(number: int) -> bytes:
        prompt = json.dumps(caption(first_caption + number)).encode()
        chosen = b",".join(encoded[(number * group + i) % len(encoded)] for i in range(group))
        return b'{"models":{"%b":1.0},"items":[{"prompt":%b,"images":[%b]}]}' % (MODEL.encode(), prompt, chosen)

    return body


def _tensor_body(images: Sequence[NDArray[np.uint8]], group: int, first_caption: int) -> Callable[[int], bytes]:
    names = [f"item0.image{i}" for i in range(group)]

    def body(number: int) -> bytes:
        item = {"prompt": caption(first_caption + number), "images": names}
        tensors = {name: images[(number * group + i) % len(images)] for i, name in enumerate(names)}
        return save(tensors, {"request": json.dumps({"models": {MODEL: 1.0}, "items": [item]})})

    return body
