"""An instance detector: Mask2Former (Cheng et al., 2022, arXiv:2112.01527) as transformers implements it.

What is found follows the instance inference of mmdet, which GenEval's numbers were made with: a softmax over the
classes without the void one, the 100 best (query, class) pairs, mask logits enlarged to the picture, the mask where
they are above 0, confidence = class probability x mean mask probability inside the mask, the box around the mask.
Nothing is suppressed: several queries may find one object.

transformers' own post-processing differs: it gives each pixel to one object at most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor, nn

from models.backbones.hf import quiet
from models.base import CheckpointSize, InputError, LoadOptions, ModelError, WeightsError
from models.parity_recipe import fill, write_checkpoint
from models.towers import alike
from models.weights import hash_tensors, load_checkpoint, load_safetensors

if TYPE_CHECKING:  # transformers takes seconds to import: a service without such models need not pay them
    from transformers import Mask2FormerConfig

FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
# fmt: off
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
"""The 80 classes of COCO's instances (Lin et al., 2014, arXiv:1405.0312), in its order."""
MAX_CANDIDATES = 100
# There may be 100 masks, and one of a 4096x4096 picture is 64 MiB in float32.
_PIXELS_AT_ONCE = 16 * 1024 * 1024
# Of strips beyond this ratio nothing may be left of the short side when the long one is brought to a size.
_NARROW = 32
_SHARPNESS, _PREFERENCE = 6.0, 6.0

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; right and bottom are exclusive."""


@dataclass(frozen=True, eq=False)
class Detection:
    """One object: ``name`` of its class, ``confidence`` in [0, 1], box, a bool mask [bottom - top, right - left]."""

    name: str
    confidence: float
    box: Box
    mask: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class DetectorInput:
    """A prepared picture: float32 pixels [3, h, w] on the CPU, of which the top left ``content`` (height, width) show
    the picture and the rest is padding, and the picture's own ``size`` (height, width)."""

    pixels: Tensor
    content: tuple[int, int]
    size: tuple[int, int]


class InstanceDetector:
    """A Mask2Former with frozen weights in float32, its image processor and the names of its classes.

    Never in half precision: its attention samples feature maps at coordinates, which bfloat16 knows to a few pixels
    only, and torch 2.14's grid_sample in half precision on a CPU reads outside of maps of more than 32767 places.
    """

    def __init__(self, network: nn.Module, processor: Any, names: Sequence[str], weights_hash: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.names = tuple(names)
        self.weights_hash = weights_hash
        self._processor = processor
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @classmethod
    def load(cls, folder: Path, options: LoadOptions, rename: Mapping[str, str] | None = None) -> InstanceDetector:
        """The detector of a ``folder`` with the files ``FILES``; nothing is downloaded and no code of it is run.

        Class names are those of its configuration, through ``rename`` where that has them. Raises
        :class:`WeightsError` for files that are missing, damaged or of another model.
        """
        config, names = _configuration(folder)
        tensors = load_checkpoint(folder / "model.safetensors")
        network = _network(config, tensors).to(options.device)
        return cls(
            network, _processor(folder), [(rename or {}).get(name, name) for name in names], hash_tensors(tensors)
        )

    def prepare(self, image: PILImage.Image) -> DetectorInput:
        """Resized, normalised and padded as the checkpoint's processor says; any mode is converted to RGB.

        Raises :class:`InputError` ("aspect_ratio") for a strip so long that nothing of its short side would be left.
        """
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        try:
            features = self._processor(images=[rgb], return_tensors="pt")
        except ValueError as exc:  # it gives no other reason to tell by than the sizes
            if max(rgb.size) < _NARROW * min(rgb.size):
                raise
            raise InputError(
                f"the image is {image.width}x{image.height}: so narrow that the detector cannot look at it",
                code="aspect_ratio",
            ) from exc
        covered = features["pixel_mask"][0].bool()
        content = (int(covered.any(1).sum()), int(covered.any(0).sum()))
        return DetectorInput(features["pixel_values"][0].float(), content, (image.height, image.width))

    @torch.inference_mode()
    def detect(
        self, inputs: Sequence[DetectorInput], confidences: Sequence[float], rows: int
    ) -> list[list[Detection] | ModelError]:
        """What is found above each picture's own confidence, in no particular order.

        Pictures of one prepared size share forwards of exactly ``rows`` pictures, filled up with copies: results do not
        depend on the other pictures. A picture whose logits are not finite gets a :class:`ModelError`.
        """
        results: list[list[Detection] | ModelError] = [[] for _ in inputs]
        for places in alike({place: entry.pixels.shape for place, entry in enumerate(inputs)}):
            for start in range(0, len(places), rows):
                chunk = places[start : start + rows]
                classes_BQC, masks_BQhw = self._forward([inputs[place].pixels for place in chunk], rows)
                for row, place in enumerate(chunk):
                    results[place] = found_instances(
                        classes_BQC[row].float(), masks_BQhw[row].float(), inputs[place], self.names, confidences[place]
                    )
        return results

    def _forward(self, pixels: Sequence[Tensor], rows: int) -> tuple[Tensor, Tensor]:
        filled = [*pixels, *[pixels[-1]] * (rows - len(pixels))]
        batch_B3hw = torch.stack(filled).to(self.device, self.dtype)
        output = self.network(pixel_values=batch_B3hw)
        return output.class_queries_logits, output.masks_queries_logits


def found_instances(
    class_logits_QC: Tensor, mask_logits_Qhw: Tensor, entry: DetectorInput, names: Sequence[str], confidence: float
) -> list[Detection] | ModelError:
    """The objects of one picture above ``confidence``; the last class is the void one.

    Logits are float32. The mask logits cover the padded input at any smaller resolution.
    """
    if not bool(torch.isfinite(class_logits_QC).all() & torch.isfinite(mask_logits_Qhw).all()):
        return ModelError("the detector gave logits that are not finite numbers", code="not_finite")
    probabilities = class_logits_QC.softmax(-1)[:, :-1]
    best = probabilities.flatten().topk(min(MAX_CANDIDATES, probabilities.numel()))
    # The mask can only lower the confidence: what is too low by its class needs no mask at all.
    candidates = best.indices[best.values > confidence]
    classes = probabilities.shape[1]
    detections: list[Detection] = []
    for chunk in torch.split(candidates, max(1, _PIXELS_AT_ONCE // (entry.size[0] * entry.size[1]))):
        logits = _enlarged(mask_logits_Qhw[chunk // classes], entry)
        masks = logits > 0
        inside = logits.sigmoid_().mul_(masks).sum((1, 2)) / masks.sum((1, 2)).clamp(min=1)
        total = (probabilities.flatten()[chunk] * inside).tolist()
        labels = (chunk % classes).tolist()
        for label, score, mask in zip(labels, total, masks.cpu().numpy(), strict=True):
            if score > confidence:
                box = mask_box(mask)
                left, top, right, bottom = (int(edge) for edge in box)
                # A copy: a view would keep all masks at the picture's size alive.
                detections.append(Detection(names[label], score, box, mask[top:bottom, left:right].copy()))
    return detections


def _enlarged(logits_Nhw: Tensor, entry: DetectorInput) -> Tensor:
    """Mask logits -> the prepared input's size, without its padding -> the picture's size; bilinear both times."""
    if not len(logits_Nhw):
        return logits_Nhw.new_zeros((0, *entry.size))
    height, width = entry.content
    logits = F.interpolate(logits_Nhw[None], entry.pixels.shape[-2:], mode="bilinear", align_corners=False)
    logits = logits[..., :height, :width]
    return F.interpolate(logits, entry.size, mode="bilinear", align_corners=False)[0]


def mask_box(mask: NDArray[np.bool_]) -> Box:
    """The smallest box that holds every True of a mask [H, W], which has at least one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def _configuration(folder: Path) -> tuple[Mask2FormerConfig, list[str]]:
    """The network's configuration, and the names of its classes in their order."""
    from transformers import Mask2FormerConfig

    if not folder.is_dir():
        raise WeightsError(f"the weights of a detector are a folder with {', '.join(FILES)}; {folder} is none")
    values = _json(folder / "config.json")
    if values.get("model_type") != "mask2former":
        raise WeightsError(f"the configuration in {folder} is of {values.get('model_type')!r}, not of a mask2former")
    labels = values.get("id2label")
    if not isinstance(labels, dict) or set(labels) != {str(index) for index in range(len(labels))} or not labels:
        raise WeightsError(f"the configuration in {folder} does not name its classes (id2label)")
    # Without it transformers 5.23 fails in the forward; its cost is small.
    values["use_auxiliary_loss"] = True
    return Mask2FormerConfig.from_dict(values), [str(labels[str(index)]) for index in range(len(labels))]


def _processor(folder: Path) -> Any:
    # The PIL form is the one that was published with; the torchvision one resizes differently.
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    return Mask2FormerImageProcessorPil.from_dict(_json(folder / "preprocessor_config.json"))


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise WeightsError(f"the detector's {file} cannot be read: {exc.strerror or 'input/output error'}") from exc
    except ValueError as exc:
        raise WeightsError(f"the detector's {file} is damaged: it is not JSON") from exc
    if not isinstance(values, dict):
        raise WeightsError(f"the detector's {file} is damaged: it is not a JSON object")
    return values


def _network(config: Mask2FormerConfig, tensors: Mapping[str, Tensor]) -> nn.Module:
    """transformers renames the published tensors into its own; what it then misses is an error here.

    Tensors that it does not know are left: published files carry buffers that older versions needed.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    architecture: Any = Mask2FormerForUniversalSegmentation
    with quiet():
        network, report = architecture.from_pretrained(
            None,
            config=config,
            # Copies, because a mapped file may be replaced or cut short while the service runs.
            state_dict={name: tensor.clone() for name, tensor in tensors.items()},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
        )
    # The criterion is for training alone.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("criterion."))
    misshapen = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if missing or misshapen:
        raise WeightsError(
            f"the weights are not those of this detector: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(misshapen)} have another shape {misshapen[:3]}"
        )
    return cast(nn.Module, network)


def write_random_detector(folder: Path, size: CheckpointSize, *, frequent: Sequence[str] = ()) -> Path:
    """Write a Mask2Former of the published structure with COCO's classes into ``folder``, filled by the recipe.

    ``full`` is Swin-S as published, ``tiny`` a few layers of it. By the bare recipe no class would be likely enough for
    anything to be found: the class head is made sharper, and the classes ``frequent`` are preferred.
    """
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    config = _random_config(size)
    with quiet():
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    weights = folder / "model.safetensors"
    # Saved once by transformers, because that gives the tensors their published names.
    tensors = {name: fill(name, tensor.shape, seed=0) for name, tensor in load_safetensors(weights).items()}
    tensors["class_predictor.weight"] *= _SHARPNESS
    for name in frequent:
        tensors["class_predictor.bias"][COCO_CLASSES.index(name)] += _PREFERENCE
    write_checkpoint(tensors, weights)
    edges = (800, 1333) if size == "full" else (64, 128)
    Mask2FormerImageProcessorPil(size={"shortest_edge": edges[0], "longest_edge": edges[1]}).save_pretrained(folder)
    return folder


def _random_config(size: CheckpointSize) -> Mask2FormerConfig:
    from transformers import Mask2FormerConfig

    classes: dict[str, Any] = {"id2label": dict(enumerate(COCO_CLASSES))}
    if size == "full":
        return Mask2FormerConfig(**classes)
    backbone = {
        "model_type": "swin",
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 8],
        "window_size": 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        encoder_feedforward_dim=64,
        decoder_layers=3,
        dim_feedforward=64,
        num_attention_heads=2,
        num_queries=20,
        **classes,
    )
