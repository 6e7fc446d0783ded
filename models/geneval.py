"""GenEval (Ghosh et al., 2023, arXiv:2310.11513) as a reward: does the picture show the objects that were asked for?

A detector finds objects of COCO's 80 classes, CLIP names the colours of those whose colour was asked for, and the rules
of :mod:`models.geneval_rules` compare them with the task in the sample's metadata. The prompt is not read.

Settings: ``weights`` is the detector (a folder or a hub repository), ``options.clip`` the CLIP; ``options.score`` is
``soft`` (default, what Flow-GRPO trains with), ``strict`` or ``correct``; ``options.relation_quirk: false`` leaves out
the half that the soft score gives to a relation that does not hold.

The published numbers were made with mmdet's Mask2Former Swin-S (lsj, 50 epochs). The default here is the checkpoint
of Mask2Former's authors for the same architecture and data, in transformers' form; it was trained separately, and
scores will differ in single pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from PIL import ImageDraw
from torch import Tensor

from models.backbones.clip import VIT_L_14, tokenize
from models.backbones.clip_reward import random_clip
from models.backbones.detector import (
    FILES,
    Detection,
    DetectorInput,
    InstanceDetector,
    write_random_detector,
)
from models.backbones.shared import LoadedClip, shared_clip
from models.base import (
    Calibration,
    Candidate,
    CheckpointSize,
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
from models.geneval_rules import COLORS, Task, Verdict, judge, parse_task, select, wanted_colors
from models.preprocessing import clip_preprocess, normalize
from models.registry import register
from models.weights import HASH_PREFIX, obtain

Score = Literal["soft", "strict", "correct"]

CLASS_NAMES: Mapping[str, str] = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""What GenEval calls a class where a checkpoint's configuration may call it otherwise.

The first three are GenEval's own names (and ``couch``, which is COCO's too); the others are older names of the same
COCO classes. All other names are COCO's. That there are no further renames could not be checked.
"""

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_GREY = (0x99, 0x99, 0x99)
_TEXT_LENGTH = 32  # holds every template with every class
_COLOR_ROWS = 8

DETECTOR = WeightSource("hf:facebook/mask2former-swin-small-coco-instance", files=FILES)
CLIP = WeightSource("hf:openai/clip-vit-large-patch14/model.safetensors", role="clip")
PARAMETERS = 68_741_164 + 427_616_513


def color_crop(image: PILImage.Image, detection: Detection) -> PILImage.Image:
    """What the colour is judged by: the box of the object, grey (#999) outside its mask. ``image`` is RGB."""
    left, top, right, bottom = (int(edge) for edge in detection.box)
    crop = image.crop((left, top, right, bottom))
    return PILImage.composite(crop, PILImage.new("RGB", crop.size, _GREY), PILImage.fromarray(detection.mask))


class ColorClassifier:
    """CLIP as a zero-shot classifier of ten colours: the mean text feature of three templates for each."""

    def __init__(self, loaded: LoadedClip) -> None:
        self.loaded = loaded
        self.towers = loaded.towers
        self._device = loaded.towers.logit_scale.device
        self._texts: dict[str, Tensor] = {}
        # One at a time on a CPU, where larger batches gain little; else forwards of one shape, whoever is in them.
        self._rows = 1 if self._device.type == "cpu" else _COLOR_ROWS

    @torch.inference_mode()
    def classify(self, crops: Sequence[PILImage.Image], names: Sequence[str]) -> list[str | None]:
        """The colour of each crop, of an object of the class in ``names``; None where it is not a finite number."""
        colors: list[str | None] = []
        for start in range(0, len(crops), self._rows):
            chunk = [clip_preprocess(crop, self.towers.image_size) for crop in crops[start : start + self._rows]]
            filled = torch.stack([*chunk, *[chunk[-1]] * (self._rows - len(chunk))]).to(self._device)
            features_BD = F.normalize(
                self.towers.encode_image(normalize(filled, dtype=self.towers.dtype)).float(), dim=-1
            )
            for row, name in enumerate(names[start : start + self._rows]):
                similarity = self._text_features(name) @ features_BD[row]
                finite = bool(torch.isfinite(similarity).all())
                colors.append(COLORS[int(similarity.argmax())] if finite else None)
        return colors

    def _text_features(self, name: str) -> Tensor:
        """Unit features [10, D] of the colours of one class, computed once."""
        if name not in self._texts:
            prompts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = torch.stack([tokenize(prompt, (_TEXT_LENGTH,))[0] for prompt in prompts]).to(self._device)
            features = F.normalize(self.towers.encode_text(tokens).float(), dim=-1)
            self._texts[name] = F.normalize(features.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)
        return self._texts[name]


@dataclass(frozen=True, eq=False)
class GenevalInput:
    """An RGB image, the same prepared for the detector, and what it should show."""

    image: PILImage.Image
    prepared: DetectorInput
    task: Task


Objects = dict[str, list[Detection]]


@register("geneval")
class Geneval(RewardModel):
    """Scores pictures against the metadata of GenEval's prompts."""

    uses_device: ClassVar[bool] = True
    max_batch: ClassVar[int | None] = 4
    cpu_batch: ClassVar[int | None] = 1
    info: ClassVar[RewardInfo] = RewardInfo(
        name="geneval",
        description="Share of the objects, counts, colours and relations asked for in metadata that a detector and "
        "CLIP find (GenEval; below 0 where far too many objects are found). Not verified: published numbers are from "
        "mmdet's Mask2Former Swin-S, this loads transformers' form of it; no reference scores were at hand",
        kind="pointwise",
        inputs=("image", "metadata"),
        range=(0.0, 1.0),
        citation="Ghosh et al., GenEval, 2023 (arXiv:2310.11513); soft score: Liu et al., Flow-GRPO, 2025 "
        "(arXiv:2505.05470); detector: Cheng et al., Mask2Former, 2022 (arXiv:2112.01527)",
        license="detector: see its repository; CLIP: MIT",
        calibration=Calibration(0.25, "a convention: right against wrong is 98 %"),
        weights=f"{DETECTOR.source}, {CLIP.source}",
        weights_bytes=PARAMETERS * 4,
        verified=False,
        outputs=("strict", "correct", "soft"),
        sources=(DETECTOR, CLIP),
        options=("score", "relation_quirk"),
    )

    def __init__(
        self,
        detector: InstanceDetector,
        colors: ColorClassifier,
        weights_hash: str = "",
        score: Score = "soft",
        relation_quirk: bool = True,
    ) -> None:
        self.detector = detector
        self.colors = colors
        self.weights_hash = weights_hash
        self.dtype = colors.towers.dtype  # the detector is always float32
        self._classes = frozenset(detector.names)
        self._score: Score = score
        self._relation_quirk = relation_quirk

    @classmethod
    def load(cls, options: LoadOptions) -> Geneval:
        score, quirk = options.options.get("score", "soft"), options.options.get("relation_quirk", True)
        if score not in get_args(Score):
            raise ValueError(f"the option score of geneval is one of {', '.join(get_args(Score))}, not {score!r}")
        if not isinstance(quirk, bool):
            raise ValueError(f"the option relation_quirk of geneval is true or false, not {quirk!r}")
        detector = InstanceDetector.load(obtain(DETECTOR, options, "geneval"), options, CLASS_NAMES)
        if not {"computer mouse", "tv remote", "person"} <= set(detector.names):
            raise WeightsError("the detector of geneval does not name COCO's classes in its configuration (id2label)")
        colors = ColorClassifier(shared_clip(CLIP, options, VIT_L_14, "geneval"))
        both = f"{detector.weights_hash}|{colors.loaded.weights_hash}"
        weights_hash = HASH_PREFIX + hashlib.sha256(both.encode()).hexdigest()
        return cls(detector, colors, weights_hash, cast(Score, score), quirk)

    @classmethod
    def random_checkpoint(cls, folder: Path, size: CheckpointSize = "tiny") -> LoadOptions:
        """The random detector is made to find stop signs often, so that the canary's score depends on the image."""
        detector = write_random_detector(folder / "detector", size, frequent=("stop sign",))
        clip = random_clip(folder / "clip.safetensors", VIT_L_14, size, hugging_face=True)
        return LoadOptions(weights=str(detector), options={CLIP.role: str(clip)})

    def prepare(self, sample: Sample) -> GenevalInput:
        """Raises :class:`InputError` for metadata that is not GenEval's (see ``parse_task``) and for a long strip."""
        image = sample.image(self.info.name)
        task = parse_task(sample.metadata, self._classes)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return GenevalInput(rgb, self.detector.prepare(rgb), task)

    def run(self, batch: Sequence[GenevalInput]) -> list[Output | SampleError]:
        """Copies of one entry, which fill a batch up, are examined once."""
        distinct = list(dict.fromkeys(batch))
        detected = self.detector.detect(
            [entry.prepared for entry in distinct],
            [entry.task.confidence for entry in distinct],
            rows=1 if self.detector.device.type == "cpu" else len(batch),
        )
        found: list[Objects | ModelError] = [
            objects if isinstance(objects, ModelError) else select(objects, entry.task.confidence)
            for entry, objects in zip(distinct, detected, strict=True)
        ]
        colors = self._colors_of(distinct, found)
        outputs = {
            entry: self._output(entry.task, objects, of_classes)
            for entry, objects, of_classes in zip(distinct, found, colors, strict=True)
        }
        return [outputs[entry] for entry in batch]

    def _colors_of(
        self, entries: Sequence[GenevalInput], found: Sequence[Objects | ModelError]
    ) -> list[dict[str, list[str | None]]]:
        """For each entry the colours that its rules need, all of them classified together."""
        wanted: list[tuple[int, str, Detection]] = [
            (place, name, detection)
            for place, (entry, objects) in enumerate(zip(entries, found, strict=True))
            if not isinstance(objects, ModelError)
            for name, count in wanted_colors(entry.task, objects).items()
            for detection in objects[name][:count]
        ]
        crops = [color_crop(entries[place].image, detection) for place, _, detection in wanted]
        colors: list[dict[str, list[str | None]]] = [{} for _ in entries]
        classified = self.colors.classify(crops, [name for _, name, _ in wanted])
        for (place, name, _), color in zip(wanted, classified, strict=True):
            colors[place].setdefault(name, []).append(color)
        return colors

    def _output(
        self, task: Task, found: Objects | ModelError, colors: Mapping[str, Sequence[str | None]]
    ) -> Output | SampleError:
        if isinstance(found, ModelError):
            return found
        known = {name: [color for color in of_class if color is not None] for name, of_class in colors.items()}
        if any(len(known[name]) < len(of_class) for name, of_class in colors.items()):
            return ModelError("the colour classifier gave a number that is not finite", code="not_finite")
        verdict = judge(task, found, known, relation_quirk=self._relation_quirk)
        scores = {"strict": float(verdict.strict), "correct": float(verdict.correct), "soft": verdict.soft}
        return Output(scores[self._score], scores, _details(verdict, found, known))

    def canary(self) -> Sample:
        """A red sign with a white rim."""
        image = PILImage.new("RGB", (256, 256), (150, 180, 200))
        draw = ImageDraw.Draw(image)
        for radius, color in ((96, "white"), (86, "red")):
            draw.regular_polygon((128, 128, radius), 8, rotation=22.5, fill=color)
        metadata = {"tag": "colors", "include": [{"class": "stop sign", "count": 1, "color": "red"}]}
        return Sample("a photo of a red stop sign", Candidate(image=image), metadata=metadata)


def _details(verdict: Verdict, found: Objects, colors: Mapping[str, Sequence[str]]) -> dict[str, object]:
    """What failed, how many objects of each class were found, and the colours that were looked at."""
    return {
        "reason": "; ".join(verdict.failures) or "all that was asked for was found",
        "found": {name: len(objects) for name, objects in found.items()},
        "colors": {name: list(of_class) for name, of_class in colors.items()},
    }
