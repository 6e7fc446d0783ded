"""The OCR reward of text rendering (Flow-GRPO, Liu et al. 2025): is the text that the prompt quotes in the image?

The target is the text between the first pair of straight double quotes of the prompt. Both texts lose their spaces and
their case; a target that the recognised text contains has distance 0, otherwise the distance is Levenshtein's, at most
the target's length; the reward is 1 - distance / length.

Recognition is by the PP-OCR models that ship in rapidocr's wheel, where the published numbers used PaddleOCR 2.9.1: the
text part is the same, what is read from an image may differ. It often misreads accented letters: clean black-on-white
"Café" came out as "Caf", "naïve" as "naāve".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from rapidfuzz.distance import Levenshtein

from models.base import (
    Calibration,
    Candidate,
    InputError,
    LoadOptions,
    ModelError,
    Output,
    RewardInfo,
    RewardModel,
    Sample,
    SampleError,
    WeightsError,
)
from models.registry import register
from models.weights import hash_files

Line = tuple[str, float]
"""One recognised line: its text and the recogniser's confidence in [0, 1]."""

Engine = Callable[[PILImage.Image], Sequence[Line]]
"""Reads an RGB image: its lines in reading order (top to bottom, left to right); may raise anything."""

_DETECTION_MODEL = "PP-OCRv6_det_small.onnx"
_RECOGNITION_MODEL = "PP-OCRv6_rec_small.onnx"
# PaddleOCR's default, which the published reward used: images are never enlarged for detection. rapidocr's own default
# (shortest side to 736) took 1.15 s for 512x256 on one thread, this one 0.16 s.
_DETECTION_LONGEST_SIDE = 960


def target_text(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text that should be in the image: ``metadata["target"]`` if given, else the prompt's first quoted text.

    Raises :class:`InputError`: ``target_missing`` (no pair of straight double quotes), ``target_empty`` (nothing but
    spaces), ``target_invalid`` (the metadata's target is not a string).
    """
    target = metadata.get("target")
    if target is None:
        parts = prompt.split('"', 2)
        if len(parts) < 3:
            raise InputError('the prompt has no text between straight double quotes (")', code="target_missing")
        target = parts[1]
    elif not isinstance(target, str):
        raise InputError("metadata.target must be a string", code="target_invalid")
    if not comparable(target):
        raise InputError("the target text is empty", code="target_empty")
    return target


def comparable(text: str) -> str:
    """The text without spaces (tabs and line breaks stay, as in the reference) and in lower case."""
    return text.replace(" ", "").lower()


@dataclass(frozen=True)
class OcrScore:
    """``reward`` in [0, 1], ``distance`` in edits from 0 to the target's length, and the ``recognised`` text."""

    reward: float
    distance: int
    recognised: str


def ocr_reward(target: str, lines: Sequence[Line]) -> OcrScore:
    """The reward of recognised ``lines`` for a ``target`` that is not empty.

    Lines count if their confidence is above 0 and are joined without a separator in the order given.
    """
    recognised = "".join(text for text, confidence in lines if confidence > 0)
    wanted, found = comparable(target), comparable(recognised)
    distance = 0 if wanted in found else min(Levenshtein.distance(found, wanted), len(wanted))
    return OcrScore(1 - distance / len(wanted), distance, recognised)


def model_files() -> tuple[Path, Path]:
    """Detection and recognition model in the installed rapidocr; raises :class:`WeightsError` when they are missing."""
    spec = find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise WeightsError("the ocr reward needs the package rapidocr: pip install rapidocr onnxruntime")
    folder = Path(spec.origin).parent / "models"
    files = (folder / _DETECTION_MODEL, folder / _RECOGNITION_MODEL)
    for file in files:
        if not file.is_file():
            raise WeightsError(f"rapidocr does not hold {file.name}: install rapidocr >= 3.10")
    return files


def rapidocr_engine(detection: Path, recognition: Path, threads: int) -> Engine:
    """An engine on the CPU with ``threads`` threads; it must not be called by two threads at once.

    Every model file is named, because rapidocr would otherwise look for one to download.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # its wheel reports to its maker otherwise; read at import
    # These import OpenCV and more: only where the model is loaded.
    from rapidocr import RapidOCR
    from rapidocr.utils.output import RapidOCROutput

    engine = RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.text_score": 0.0,
            "Global.use_cls": False,
            "Det.model_path": str(detection),
            "Det.limit_type": "max",
            "Det.limit_side_len": _DETECTION_LONGEST_SIDE,
            "Rec.model_path": str(recognition),
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )

    def read(image: PILImage.Image) -> list[Line]:
        result = engine(image)
        if not isinstance(result, RapidOCROutput):
            raise TypeError(f"rapidocr answered with {type(result).__name__}")
        if result.txts is None or result.scores is None:
            return []
        return [(str(text), float(score)) for text, score in zip(result.txts, result.scores, strict=True)]

    return read


@dataclass(frozen=True, eq=False)
class OcrInput:
    """An RGB image and the text that should be in it."""

    image: PILImage.Image
    target: str


@register("ocr")
class OcrReward(RewardModel):
    """Reads each image with ``engine``, on its own thread and on the CPU; option ``threads`` (1) widens it."""

    max_batch: ClassVar[int | None] = 4
    info: ClassVar[RewardInfo] = RewardInfo(
        name="ocr",
        description="Share of the text quoted in the prompt (or metadata.target) that is readable in the image",
        kind="pointwise",
        inputs=("prompt", "image", "metadata"),
        range=(0.0, 1.0),
        citation="Liu et al., Flow-GRPO, 2025 (arXiv:2505.05470); PP-OCR by PaddlePaddle, ONNX by RapidOCR",
        license="Apache-2.0",
        calibration=Calibration(0.1, "a convention: a tenth of the target's letters is 73 %"),
        weights=f"rapidocr wheel: {_DETECTION_MODEL}, {_RECOGNITION_MODEL}",
        weights_bytes=31_163_977,
        outputs=("distance",),
    )

    def __init__(self, engine: Engine, weights_hash: str = "") -> None:
        self._engine = engine
        self.weights_hash = weights_hash

    @classmethod
    def load(cls, options: LoadOptions) -> OcrReward:
        threads = options.options.get("threads", 1)
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"the option threads of the ocr reward is a positive integer, not {threads!r}")
        files = model_files()
        # The hash is over the two ONNX files as they are, since their tensors are not ours to list.
        model = cls(rapidocr_engine(*files, threads), hash_files(*files))
        model._engine(model.canary().image("ocr"))  # rapidocr reads its files at the first call: fail here, not later
        return model

    def prepare(self, sample: Sample) -> OcrInput:
        image = sample.image(self.info.name)
        target = target_text(sample.prompt, sample.metadata)
        return OcrInput(image if image.mode == "RGB" else image.convert("RGB"), target)

    def run(self, batch: Sequence[OcrInput]) -> Sequence[Output | SampleError]:
        return [self._score(entry) for entry in batch]

    def _score(self, entry: OcrInput) -> Output | SampleError:
        try:
            lines = self._engine(entry.image)
        except Exception as exc:
            # The reference turns this into a reward of 0, which a policy would learn from.
            error = ModelError("the text recogniser failed on this image", code="ocr_failed")
            error.__cause__ = exc
            return error
        score = ocr_reward(entry.target, lines)
        details = {"recognised": score.recognised, "target": entry.target}
        return Output(score.reward, {"distance": float(score.distance)}, details)

    def canary(self) -> Sample:
        return Sample('a sign that says "READY"', Candidate(image=text_image("READY")))


def text_image(text: str, size: tuple[int, int] = (384, 128), font_size: int = 72) -> PILImage.Image:
    """Black text in Pillow's own font, centred on white: RGB of ``size`` (width, height)."""
    image = PILImage.new("RGB", size, "white")
    centre = (size[0] / 2, size[1] / 2)
    ImageDraw.Draw(image).text(centre, text, fill="black", font=ImageFont.load_default(font_size), anchor="mm")
    return image
