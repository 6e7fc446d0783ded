"""The OCR reward of text rendering (Flow-GRPO, Liu et al. 2025): is the text that the prompt quotes in the image?

The target is the text between the first pair of straight double quotes of the prompt. Both texts lose their spaces and
their case. The option ``normalisation`` chooses what is made of their Levenshtein distance:

``reference`` (default)  the published code: a target that the recognised text contains has distance 0, other distances
                         are cut off at the target's length; 1 - distance / length.
``paper``                the paper's formula: max(1 - N_e / N_ref, 0) with N_e the distance and N_ref the number of
                         characters in the quotes. Text around the target counts as errors. The paper leaves open
                         whether spaces and case count; here they do not, in either number.

Recognition is by the PP-OCRv6 models that ship in rapidocr's wheel, where the published numbers used PaddleOCR 2.9.1:
the text part is the same, what is read from an image may differ. The recogniser's 18,708 characters are Chinese
(simplified and traditional), Japanese kana, Latin with accents, Greek, digits and signs; Cyrillic, Korean, Arabic,
Devanagari and Thai are not among them. Measured on clean black-on-white renderings: Chinese of few strokes, English,
digits and Greek without accents are read; accented letters are often misread or left out ("Café" came out as "Caf",
"naïve" as "naāve", "Köln" as "Kn").

The option ``recogniser`` names another PP-OCR recognition model in ONNX form (a path, or a source as for any weights).
``dictionary`` is its list of characters, one a line, and needed where the file does not carry one itself. Scripts that
are written from right to left come out in the order in which the recogniser sees them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

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
    WeightSource,
)
from models.registry import register
from models.weights import hash_files, obtain

Normalisation = Literal["reference", "paper"]

Line = tuple[str, float]
"""One recognised line: its text and the recogniser's confidence in [0, 1]."""

Engine = Callable[[PILImage.Image], Sequence[Line]]
"""Reads an RGB image: its lines in reading order (top to bottom, left to right); may raise anything."""

_DETECTION_MODEL = "PP-OCRv6_det_small.onnx"
_RECOGNITION_MODEL = "PP-OCRv6_rec_small.onnx"
# PaddleOCR's default, which the published reward used: images are never enlarged for detection. rapidocr's own default
# (shortest side to 736) took 1.15 s for 512x256 on one thread, this one 0.16 s.
_DETECTION_LONGEST_SIDE = 960
# rapidocr shrinks larger images to this first, to multiples of 32, and fails where nothing is left of the short side.
_LARGEST_SIDE = 2000


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
    """``reward`` in [0, 1], ``distance`` in edits (``reference``: at most the target's length), ``recognised`` text."""

    reward: float
    distance: int
    recognised: str


def ocr_reward(target: str, lines: Sequence[Line], normalisation: Normalisation = "reference") -> OcrScore:
    """The reward of recognised ``lines`` for a ``target`` that is not empty.

    Lines count if their confidence is above 0 and are joined without a separator in the order given.
    """
    recognised = "".join(text for text, confidence in lines if confidence > 0)
    wanted, found = comparable(target), comparable(recognised)
    distance = Levenshtein.distance(found, wanted)
    if normalisation == "reference":
        distance = 0 if wanted in found else min(distance, len(wanted))
    return OcrScore(max(1 - distance / len(wanted), 0.0), distance, recognised)


@dataclass(frozen=True)
class ModelFiles:
    """ONNX files of detection and recognition; ``dictionary`` where the latter does not carry its characters."""

    detection: Path
    recognition: Path
    dictionary: Path | None = None

    def hash(self) -> str:
        """Over the files as they are, since their tensors are not ours to list."""
        return hash_files(*(file for file in (self.detection, self.recognition, self.dictionary) if file is not None))


def shipped_files() -> ModelFiles:
    """The models in the installed rapidocr; raises :class:`WeightsError` when they are missing."""
    spec = find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise WeightsError("the ocr reward needs the package rapidocr: pip install rapidocr onnxruntime")
    folder = Path(spec.origin).parent / "models"
    for name in (_DETECTION_MODEL, _RECOGNITION_MODEL):
        if not (folder / name).is_file():
            raise WeightsError(f"rapidocr does not hold {name}: install rapidocr >= 3.10")
    return ModelFiles(folder / _DETECTION_MODEL, folder / _RECOGNITION_MODEL)


def model_files(options: LoadOptions) -> ModelFiles:
    """The shipped models, or those with the recogniser of the options; raises :class:`WeightsError`.

    A recogniser is looked into, because rapidocr would download a list of characters where one is missing, and would
    read nonsense with one of another length.
    """
    shipped = shipped_files()
    named = {role: options.options.get(role) for role in ("recogniser", "dictionary")}
    if named["recogniser"] is None:
        if named["dictionary"] is not None:
            raise ValueError("the option dictionary of the ocr reward belongs to a recogniser, and none is named")
        return shipped
    paths = {role: obtain(WeightSource("", role=role), options, "ocr") for role, given in named.items() if given}
    recogniser, dictionary = paths["recogniser"], paths.get("dictionary")
    carries, classes = _inspect(recogniser)
    if carries and dictionary is not None:
        raise ValueError(
            "the recogniser carries its own characters: leave the option models.ocr.options.dictionary out"
        )
    if not carries and dictionary is None:
        raise WeightsError(
            f"the recogniser {recogniser} does not carry its characters: name a file that lists them, one a line, in "
            "models.ocr.options.dictionary"
        )
    if dictionary is not None and classes is not None:
        characters = len(dictionary.read_bytes().splitlines())
        if characters + 2 != classes:  # and a blank, and the space
            raise WeightsError(
                f"the dictionary {dictionary} lists {characters} characters, the recogniser knows {classes - 2}"
            )
    return ModelFiles(shipped.detection, recogniser, dictionary)


def _inspect(recogniser: Path) -> tuple[bool, int | None]:
    """Whether an ONNX recogniser carries its characters, and how many classes it tells apart (None: unknown)."""
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(recogniser), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # its errors have no base class of their own
        raise WeightsError(f"the recogniser {recogniser} is damaged or not an ONNX file") from exc
    classes = session.get_outputs()[0].shape[-1]
    known = isinstance(classes, int)
    return "character" in session.get_modelmeta().custom_metadata_map, classes if known else None


def _onnxruntime() -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # its wheel reports to its maker otherwise; read at import
    import onnxruntime

    return onnxruntime


def rapidocr_engine(files: ModelFiles, threads: int) -> Engine:
    """An engine on the CPU with ``threads`` threads; it must not be called by two threads at once.

    Every model file is named, because rapidocr would otherwise look for one to download.
    """
    _onnxruntime()
    # These import OpenCV and more: only where the model is loaded.
    from rapidocr import RapidOCR
    from rapidocr.utils.output import RapidOCROutput

    engine = RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.text_score": 0.0,
            "Global.use_cls": False,
            "Det.model_path": str(files.detection),
            "Det.limit_type": "max",
            "Det.limit_side_len": _DETECTION_LONGEST_SIDE,
            "Rec.model_path": str(files.recognition),
            "Rec.rec_keys_path": str(files.dictionary) if files.dictionary else None,
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
    """Reads each image with ``engine``, on its own thread and on the CPU.

    Options: ``threads`` (1), ``normalisation``, ``recogniser`` and ``dictionary`` as the module says.
    """

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
        options=("threads", "normalisation", "recogniser", "dictionary"),
    )

    def __init__(self, engine: Engine, weights_hash: str = "", normalisation: Normalisation = "reference") -> None:
        self._engine = engine
        self._normalisation: Normalisation = normalisation
        self.weights_hash = weights_hash

    @classmethod
    def load(cls, options: LoadOptions) -> OcrReward:
        threads = options.options.get("threads", 1)
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"the option threads of the ocr reward is a positive integer, not {threads!r}")
        normalisation = options.options.get("normalisation", "reference")
        if normalisation not in get_args(Normalisation):
            known = ", ".join(get_args(Normalisation))
            raise ValueError(f"the option normalisation of the ocr reward is one of {known}, not {normalisation!r}")
        files = model_files(options)
        model = cls(rapidocr_engine(files, threads), files.hash(), cast(Normalisation, normalisation))
        model._engine(model.canary().image("ocr"))  # rapidocr reads its files at the first call: fail here, not later
        return model

    def prepare(self, sample: Sample) -> OcrInput:
        image = sample.image(self.info.name)
        target = target_text(sample.prompt, sample.metadata)
        long, short = max(image.size), min(image.size)
        if long > _LARGEST_SIDE and round(int(short * _LARGEST_SIDE / long) / 32) == 0:
            raise InputError("the image is too long and thin for the text recogniser", code="aspect_ratio")
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
        score = ocr_reward(entry.target, lines, self._normalisation)
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
