"""The gradient of a reward over HTTP: as a picture, checked against differences, and climbed until it is hacked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from benchmarks.demo import pictures
from benchmarks.demo.document import Column, Fact, Figure, Row, Section, Table, decimals
from benchmarks.demo.scoring import failures_of
from benchmarks.demo.session import Session
from trainer_client import Item

MODEL = "shapes-clip"
STEPS, STEP = 12, 1 / 255
PROBE = 0.02
"""Length (L2 norm of the pixels) of the step to both sides that measures the slope."""
SLOPE_TOLERANCE = 0.01

Floats = NDArray[np.float32]

# Black over violet and orange to pale yellow: lightness grows all the way, so the order survives a grey print.
_HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float64)


def gradient_norm(gradient_3HW: Floats) -> Floats:
    """Length of the gradient over the colour channels, per pixel: [H, W]."""
    norm: Floats = np.sqrt((gradient_3HW.astype(np.float64) ** 2).sum(axis=0)).astype(np.float32)
    return norm


def heat_picture(values_HW: NDArray[Any], zoom: int = 1) -> PILImage.Image:
    """Values >= 0 as colours from black (0) to pale yellow (their largest); each becomes ``zoom`` x ``zoom`` pixels."""
    largest = float(values_HW.max())
    share = values_HW / largest if largest > 0 else np.zeros_like(values_HW)
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(share, stops, _HEAT[:, channel]) for channel in range(3)]
    pixels = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return PILImage.fromarray(pixels.repeat(zoom, axis=0).repeat(zoom, axis=1))


def to_tensor(image: PILImage.Image) -> Floats:
    """float32 [3, H, W] in [0, 1]."""
    return np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1) / 255)


def to_image(pixels_3HW: Floats) -> PILImage.Image:
    return PILImage.fromarray(np.rint(pixels_3HW.transpose(1, 2, 0) * 255).astype(np.uint8))


def ascent_step(pixels_3HW: Floats, gradient_3HW: Floats) -> Floats:
    """One step of STEP along the gradient's signs, within [0, 1]."""
    moved: Floats = np.clip(pixels_3HW + np.float32(STEP) * np.sign(gradient_3HW), 0, 1)
    return moved


def gradient(session: Session) -> Section:
    """A gradient map of a wrong drawing, its slope check, and what happens to who follows the gradient blindly."""
    image = pictures.wrong_drawing()
    prompt = pictures.POSITION.text
    start = to_tensor(image)
    first = session.gradient("a wrong drawing", Item(prompt, [start]), MODEL)[0].raise_for_errors()
    found = first.gradients[0]
    assert found is not None  # raise_for_errors
    norm = gradient_norm(found)
    slope, measured = float(np.linalg.norm(found)), _measured_slope(session, prompt, start, found)
    error = abs(measured - slope) / slope
    pixels = ascent_step(start, found)
    for _ in range(1, STEPS):
        answer = session.gradient("ascent", Item(prompt, [pixels]), MODEL)[0].raise_for_errors()
        assert answer.gradients[0] is not None
        pixels = ascent_step(pixels, answer.gradients[0])
    climbed = to_image(pixels)
    pair = Item(prompt, [image, climbed])
    scores = session.score("before and after", [pair], [MODEL, "shapes-oracle"], explain=True)[0]
    before, after = scores.as_array(MODEL).values.tolist()
    failures = failures_of(scores)
    if not error <= SLOPE_TOLERANCE:
        failures += (f"the gradient's slope {slope:.3f} and the measured one {measured:.3f} differ by {error:.1%}",)
    if any(scores.scores["shapes-oracle"]):
        failures += ("the oracle takes a green square for a blue one",)
    if not after > before:
        failures += (f"following the gradient lowered the score from {before:.2f} to {after:.2f}",)
    change = int(np.abs(np.asarray(climbed, np.int16) - np.asarray(image, np.int16)).max())
    rows = tuple(
        Row((name, decimals(scores.scores[MODEL][i], 2), decimals(scores.scores["shapes-oracle"][i], 0),
             str((scores.details["shapes-oracle"][i] or {}).get("reason", "–"))))
        for i, name in enumerate(("as drawn", f"after {STEPS} steps"))
    )  # fmt: skip
    columns = (Column("drawing"), Column(MODEL, numeric=True), Column("oracle exact", numeric=True),
               Column("oracle's reason"))  # fmt: skip
    return Section(
        "Gradients over HTTP",
        f"POST /gradient answers d(score)/d(pixels), which is what ReFL trains with. Prompt: “{prompt}”; this drawing "
        "is wrong. The map shows where the reward would rise fastest. Whoever follows that gradient alone raises the "
        "score and leaves the drawing as wrong as it was: reward hacking in small, seen by the oracle.",
        (Table(f"{STEPS} steps of 1/255 along the gradient's sign", columns, rows,
               f"No pixel changed by more than {change} of 255. The scores are those of POST /score on the rounded "
               "8-bit pictures."),),
        (Figure(image.resize((192, 192), PILImage.Resampling.BICUBIC), "the drawing"),
         Figure(heat_picture(norm, 2), f"length of the gradient at each pixel: black 0, pale yellow {norm.max():.2f}"),
         Figure(climbed.resize((192, 192), PILImage.Resampling.BICUBIC), f"after {STEPS} steps")),
        (Fact(f"{slope:.4f} | {measured:.4f}",
              "slope along the gradient: its length as answered, and measured from scores on both sides"),
         Fact(f"{before:.2f} → {after:.2f}".replace("-", "−"), "score before and after; the oracle says no to both")),
        failures,
    )  # fmt: skip


def _measured_slope(session: Session, prompt: str, pixels_3HW: Floats, gradient_3HW: Floats) -> float:
    """(f(x + e d) - f(x - e d)) / 2 e along the gradient's direction d: scores alone, as anyone can check them."""
    direction = gradient_3HW / np.linalg.norm(gradient_3HW)
    # not clipped: a cut step would be a shorter one. The service refuses pixels outside [0, 1].
    both = [pixels_3HW + np.float32(side * PROBE) * direction for side in (1, -1)]
    answer = session.gradient("slope to both sides", Item(prompt, both), MODEL)[0]
    up, down = answer.raise_for_errors().as_array(MODEL).values.tolist()
    return float(up - down) / (2 * PROBE)
