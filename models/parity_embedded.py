"""Parity of the embedded rewards: ``jpeg.json`` and ``ocr_text.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import PIL
from PIL import Image as PILImage
from PIL import features

from models.base import Candidate, InputError, ModelError, Output, RewardModel, Sample, SampleError
from models.jpeg import JpegCompressibility, JpegIncompressibility
from models.ocr import Line, OcrReward
from models.parity import Topic, largest, parity_kind

_ENGINE_RAISES = "RAISE"
_OTHER_LIBRARY_TOLERANCE = 5e-3
# Stored decimals go through one division: equal up to the last bit.
_SAME_LIBRARY_TOLERANCE = 1e-12


def _score(model: RewardModel, sample: Sample) -> Output | SampleError:
    """What the service would get for this sample alone: its output or its typed error."""
    try:
        return model.run([model.prepare(sample)])[0]
    except SampleError as error:
        return error


def _mismatch(result: Output | SampleError, expected: float) -> float:
    """Relative error of the score (absolute where the expected one is 0); infinite for an error."""
    if isinstance(result, SampleError):
        return float("inf")
    return abs(result.score - expected) / (abs(expected) or 1.0)


def _untyped(result: Output | SampleError, wanted: type[SampleError]) -> float:
    return 0.0 if isinstance(result, wanted) else float("inf")


@parity_kind("jpeg.json")
def jpeg(file: Path) -> Sequence[Topic]:
    """Sizes of the images as RGB, as grey where the file has a number for it, and the error for transparency."""
    document = json.loads(file.read_text("utf-8"))
    inputs = json.loads((file.parent / "inputs.json").read_text("utf-8"))["images"]
    library = {"pillow": PIL.__version__, "libjpeg_turbo": features.version_feature("libjpeg_turbo")}
    same = all(document["library"].get(name) == version for name, version in library.items())
    tolerance = _SAME_LIBRARY_TOLERANCE if same else _OTHER_LIBRARY_TOLERANCE
    note = "relative, same libjpeg" if same else "relative, another libjpeg or Pillow than the reference's"

    larger, smaller = JpegIncompressibility(), JpegCompressibility()
    topics_of = ("incompressibility", "compressibility", "grey stays grey", "alpha")
    errors: dict[str, list[float]] = {name: [] for name in topics_of}
    for case in document["scores"]:
        stored = PILImage.open(file.parent / inputs[case["image"]]["file"])
        rgb = _sample(stored.convert("RGB"))
        errors["incompressibility"].append(_mismatch(_score(larger, rgb), case["incompressibility_kB"]))
        errors["compressibility"].append(_mismatch(_score(smaller, rgb), case["compressibility"]))
        if "as_2d_gray_array" in case:
            grey = _sample(stored.convert("L"))
            errors["grey stays grey"].append(_mismatch(_score(larger, grey), case["as_2d_gray_array"]))
        if "as_rgba_array_reference_error" in case:
            errors["alpha"].append(_untyped(_score(larger, _sample(stored.convert("RGBA"))), InputError))
    alpha = errors.pop("alpha")
    topics = [Topic(name, len(found), largest(found), tolerance, note) for name, found in errors.items()]
    topics.append(Topic("transparency", len(alpha), largest(alpha), 0.0, "reference raises, here a typed error"))
    return [topic for topic in topics if topic.cases]


def _sample(image: PILImage.Image) -> Sample:
    return Sample("", Candidate(image=image))


@parity_kind("ocr_text.json")
def ocr_text(file: Path) -> Sequence[Topic]:
    """The ocr reward, from the prompt to the score, with an engine that recognises what the case says."""
    image = PILImage.new("RGB", (8, 8))
    rewards: list[float] = []
    refused: list[float] = []
    failed: list[float] = []
    for case in json.loads(file.read_text("utf-8"))["cases"]:
        model = OcrReward(_recorded_engine(case["recognised"]))
        result = _score(model, Sample(case["prompt"], Candidate(image=image)))
        if "reference_error" in case:
            refused.append(_untyped(result, InputError))
        elif case["recognised"] == _ENGINE_RAISES:
            failed.append(_untyped(result, ModelError))
        else:
            rewards.append(_mismatch(result, case["reward"]))
    topics = [
        Topic("reward", len(rewards), largest(rewards), 0.0, "exact"),
        Topic("prompt without target", len(refused), largest(refused), 0.0, "reference raises, here a typed error"),
        Topic("engine failure", len(failed), largest(failed), 0.0, "intended: a typed error, not the reference's 0"),
    ]
    return [topic for topic in topics if topic.cases]


def _recorded_engine(recognised: Any) -> Callable[[PILImage.Image], Sequence[Line]]:
    def read(image: PILImage.Image) -> Sequence[Line]:
        return [(text, confidence) for text, confidence in recognised or ()]

    def fail(image: PILImage.Image) -> NoReturn:
        raise RuntimeError("this engine always fails")

    return fail if recognised == _ENGINE_RAISES else read
