"""Images with captions, for the loss that a policy was pre-trained with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trainer_client.distributed import derived_seed
from trainer_client.prompts import Prompt, load_prompts

IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp"})
IMAGE_FIELDS = ("image", "file_name")
"""Where a row names its image: the first of these that it has."""
LISTING = "metadata.jsonl"
"""What lists the images of a folder, as Hugging Face's ImageFolder has it."""


@dataclass(frozen=True)
class Captioned:
    """An image file and its prompt."""

    path: Path
    prompt: Prompt


def load_captioned(source: str | Path) -> list[Captioned]:
    """Images with captions, in order.

    ``source`` is a JSON lines file whose rows have a prompt (``prompt``, ``text``, ``caption``) and a path (``image``
    or ``file_name``, relative to the file); a folder with such a ``metadata.jsonl``; or a folder of images, each with
    its caption in a ``.txt`` file of the same name. Raises ValueError in one line for what cannot be read, for an image
    that is missing, and for none at all.
    """
    path = Path(source)
    if not path.is_dir():
        return _listed(path)
    if (path / LISTING).exists():
        return _listed(path / LISTING)
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS)
    if not images:
        raise ValueError(f"{path}: has no images")
    return [Captioned(file, _caption(file.with_suffix(".txt"))) for file in images]


def read_image(path: Path, height: int, width: int) -> Tensor:
    """Pixels float32 [3, height, width] in [0, 1]: scaled to cover that size, and cropped to its middle."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(fitted, np.float32) / np.float32(255)).permute(2, 0, 1)


def shuffled(count: int, seed: int, numbers: range) -> Iterator[int]:
    """Which of ``count`` images are the draws ``numbers`` of a run: all once, then all again in another order."""
    epoch, order = -1, torch.empty(0)
    for number in numbers:
        if number // count != epoch:
            epoch = number // count
            generator = torch.Generator().manual_seed(derived_seed(seed, "pretraining order", epoch))
            order = torch.randperm(count, generator=generator)
        yield int(order[number % count])


def _listed(file: Path) -> list[Captioned]:
    found = []
    for number, prompt in enumerate(load_prompts(file, "jsonl"), start=1):
        name = next((prompt.metadata[field] for field in IMAGE_FIELDS if field in prompt.metadata), None)
        if not isinstance(name, str):
            raise ValueError(f"{file}: entry {number}: none of the fields {', '.join(IMAGE_FIELDS)} names an image")
        if not (file.parent / name).is_file():
            raise ValueError(f"{file}: entry {number}: there is no image {name}")
        found.append(Captioned(file.parent / name, Prompt(prompt.text)))
    return found


def _caption(file: Path) -> Prompt:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as the caption of its image ({error})") from error
    if not text:
        raise ValueError(f"{file}: is empty, and an image needs a caption")
    return Prompt(text)
