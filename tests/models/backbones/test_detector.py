"""The instance detector on a tiny checkpoint of the published structure; its post-processing against plain loops."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import models.backbones.detector
from models.backbones.detector import (
    COCO_CLASSES,
    Detection,
    DetectorInput,
    InstanceDetector,
    found_instances,
    mask_box,
    write_random_detector,
)
from models.base import InputError, LoadOptions, ModelError, WeightsError
from models.parity_recipe import write_checkpoint
from models.weights import load_safetensors

IMAGES = Path(__file__).parents[2] / "fixtures" / "pointwise" / "images"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_detector(tmp_path_factory.mktemp("detector"), "tiny")


@pytest.fixture(scope="module")
def detector(folder: Path) -> InstanceDetector:
    return InstanceDetector.load(folder, LoadOptions())


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The checkpoint's files, to be spoiled."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Copies, since the file that they are mapped from is written over."""
    return {name: tensor.clone() for name, tensor in load_safetensors(folder / "model.safetensors").items()}


def photo(name: str) -> Image.Image:
    return Image.open(IMAGES / f"{name}.png")


def found(detector: InstanceDetector, images: list[Image.Image], rows: int = 1) -> list[list[Detection]]:
    results = detector.detect([detector.prepare(image) for image in images], [0.2] * len(images), rows)
    assert not any(isinstance(result, ModelError) for result in results)
    return [result for result in results if not isinstance(result, ModelError)]


def whole_mask(detection: Detection, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask on a picture of ``size`` (width, height)."""
    mask = np.zeros(size[::-1], dtype=np.bool_)
    left, top, right, bottom = (int(edge) for edge in detection.box)
    mask[top:bottom, left:right] = detection.mask
    return mask


def summary(detections: list[Detection]) -> list[tuple[str, tuple[float, ...], int]]:
    return [(entry.name, entry.box, int(entry.mask.sum())) for entry in detections]


# -- post-processing --------------------------------------------------------------------------------------------------


def naive_instances(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], confidence: float
) -> list[tuple[int, float, list[int]]]:
    """(class, confidence, box) by loops, for masks that have the picture's size already."""
    queries, classes = class_logits.shape[0], class_logits.shape[1] - 1
    pairs = []
    for query in range(queries):
        weights = [math.exp(value) for value in class_logits[query].tolist()]
        pairs += [(weights[label] / sum(weights), query, label) for label in range(classes)]
    results = []
    for probability, query, label in sorted(pairs, reverse=True)[:100]:
        inside, xs, ys = [], [], []
        for y in range(size[0]):
            for x in range(size[1]):
                value = float(mask_logits[query, y, x])
                if value > 0:
                    inside.append(1 / (1 + math.exp(-value)))
                    xs.append(x)
                    ys.append(y)
        score = probability * sum(inside) / len(inside) if inside else 0.0
        if score > confidence:
            results.append((label, score, [min(xs), min(ys), max(xs) + 1, max(ys) + 1]))
    return results


def test_instances_match_plain_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    class_logits = 4 * torch.randn(30, 6, generator=generator)
    mask_logits = torch.randn(30, 7, 9, generator=generator) - 1.5
    mask_logits[3] = -1.0  # a query with an empty mask
    names = ["a", "b", "c", "d", "e"]
    entry = DetectorInput(torch.zeros(3, 7, 9), (7, 9), (7, 9))
    results = found_instances(class_logits, mask_logits, entry, names, 0.1)
    assert not isinstance(results, ModelError)
    expected = naive_instances(class_logits, mask_logits, (7, 9), 0.1)
    assert 5 < len(expected) < 100
    assert [names.index(result.name) for result in results] == [label for label, _, _ in expected]
    assert [result.confidence for result in results] == pytest.approx([score for _, score, _ in expected], rel=1e-5)
    assert [list(result.box) for result in results] == [box for _, _, box in expected]


def test_the_hundred_best_pairs_are_kept_and_the_void_class_is_none() -> None:
    class_logits = torch.zeros(40, 5)  # 40 x 4 pairs of probability 1/5
    class_logits[0] = torch.tensor([0.0, 0.0, 0.0, 0.0, 50.0])
    entry = DetectorInput(torch.zeros(3, 4, 4), (4, 4), (4, 4))
    results = found_instances(class_logits, torch.full((40, 4, 4), 20.0), entry, "abcd", 0.1)
    assert not isinstance(results, ModelError)
    assert len(results) == 100
    assert [result.confidence for result in results] == pytest.approx([0.2] * 100)


def test_padding_is_cut_off_before_the_mask_is_enlarged() -> None:
    """The left half of the content: a mask that also covers the padding must end in the middle of the picture."""
    mask_logits = torch.full((1, 16, 16), -9.0)
    mask_logits[0, :, :4] = 9.0  # 16 of 64 padded pixels; the content is 32 wide
    entry = DetectorInput(torch.zeros(3, 64, 64), (48, 32), (150, 100))
    results = found_instances(torch.tensor([[9.0, 0.0]]), mask_logits, entry, ["thing"], 0.3)
    assert not isinstance(results, ModelError)
    (thing,) = results
    left, top, right, bottom = thing.box
    assert thing.mask.shape == (bottom - top, right - left)
    assert (left, top, bottom) == (0, 0, 150)
    assert right == pytest.approx(50, abs=2)


def test_masks_in_parts_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    class_logits = 4 * torch.randn(30, 6, generator=generator)
    mask_logits = torch.randn(30, 7, 9, generator=generator)
    entry = DetectorInput(torch.zeros(3, 14, 18), (14, 18), (40, 50))
    results = []
    for pixels in (1, 3 * 40 * 50, 10**9):
        monkeypatch.setattr(models.backbones.detector, "_PIXELS_AT_ONCE", pixels)
        found_now = found_instances(class_logits, mask_logits, entry, "abcde", 0.1)
        assert not isinstance(found_now, ModelError)
        results.append(summary(found_now))
    assert len(results[0]) > 5
    assert results[0] == results[1] == results[2]


def test_a_box_holds_its_mask() -> None:
    mask = np.zeros((5, 8), dtype=np.bool_)
    mask[1, 6] = mask[3, 2] = True
    assert mask_box(mask) == (2, 1, 7, 4)


def test_logits_that_are_not_finite_fail_their_picture_alone(
    detector: InstanceDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [detector.prepare(photo("square")) for _ in range(3)]
    entries[1].pixels[0, 0, 0] = float("nan")
    results = detector.detect(entries, [0.2] * 3, rows=3)
    assert isinstance(results[1], ModelError)
    assert results[1].code == "not_finite"
    assert isinstance(results[0], list)
    assert isinstance(results[2], list)
    assert summary(results[0]) == summary(results[2]) != []


# -- the network ------------------------------------------------------------------------------------------------------


def test_pictures_of_several_sizes_share_forwards_and_keep_their_places(detector: InstanceDetector) -> None:
    images = [photo(name) for name in ("landscape", "square", "portrait", "landscape", "gray", "rgba", "palette")]
    alone = [summary(found(detector, [image], rows=4)[0]) for image in images]
    assert all(alone)
    assert [summary(entry) for entry in found(detector, images, rows=4)] == alone
    assert alone[0] == alone[3] != alone[1]


def test_results_do_not_depend_on_neighbours(detector: InstanceDetector) -> None:
    def confidences(images: list[Image.Image]) -> list[float]:
        return [entry.confidence for entry in found(detector, images, rows=3)[0]]

    square, others = photo("square"), [photo("landscape"), photo("square").rotate(90)]
    assert confidences([square]) == confidences([square, *others]) == confidences([square] * 3)


@pytest.mark.parametrize("size", [(16, 2000), (2000, 16), (1, 1)])
def test_extreme_shapes_are_looked_at(detector: InstanceDetector, size: tuple[int, int]) -> None:
    (detections,) = found(detector, [Image.linear_gradient("L").resize(size)])
    assert all(whole_mask(entry, size).shape == size[::-1] for entry in detections)


def test_a_strip_of_which_nothing_would_be_left_is_an_error_of_the_input(detector: InstanceDetector) -> None:
    for size in ((8192, 16), (16, 8192)):
        with pytest.raises(InputError, match=f"{size[0]}x{size[1]}") as caught:
            detector.prepare(Image.new("RGB", size))
        assert caught.value.code == "aspect_ratio"


def test_class_names_come_from_the_configuration_and_may_be_renamed(copy: Path) -> None:
    assert InstanceDetector.load(copy, LoadOptions()).names == COCO_CLASSES
    renamed = InstanceDetector.load(copy, LoadOptions(), {"mouse": "computer mouse", "sofa": "couch"})
    assert set(renamed.names) ^ set(COCO_CLASSES) == {"mouse", "computer mouse"}
    config = json.loads((copy / "config.json").read_text())
    config["id2label"]["0"] = "human"
    config["use_auxiliary_loss"] = False  # of training alone, and it must not matter here
    (copy / "config.json").write_text(json.dumps(config))
    changed = InstanceDetector.load(copy, LoadOptions())
    assert changed.names[:2] == ("human", "bicycle")
    assert found(changed, [photo("square")])[0]


def test_the_processor_is_the_checkpoints_own(copy: Path) -> None:
    file = copy / "preprocessor_config.json"
    config = json.loads(file.read_text())
    shapes = {}
    # A fixed size; the form that old files have; and padding to a fixed size.
    for name, change in {
        "fixed": {"size": {"height": 64, "width": 96}},
        "old": {"size": 64, "max_size": 96},
        "padded": {"size": {"height": 64, "width": 96}, "pad_size": {"height": 128, "width": 128}},
    }.items():
        file.write_text(json.dumps(config | change))
        entry = InstanceDetector.load(copy, LoadOptions()).prepare(Image.new("L", (100, 50), 128))
        assert entry.size == (50, 100)
        shapes[name] = (tuple(entry.pixels.shape), entry.content)
    assert shapes == {
        "fixed": ((3, 64, 96), (64, 96)),
        "old": ((3, 64, 96), (64, 96)),
        "padded": ((3, 128, 128), (64, 96)),
    }


def test_a_file_that_is_replaced_while_it_is_used_changes_nothing(copy: Path) -> None:
    detector = InstanceDetector.load(copy, LoadOptions())
    before = summary(found(detector, [photo("square")])[0])
    size = (copy / "model.safetensors").stat().st_size
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(size // 3)
        file.write(bytes(size // 2))
    assert summary(found(detector, [photo("square")])[0]) == before


def test_a_file_in_place_of_the_folder_is_said_so(copy: Path) -> None:
    with pytest.raises(WeightsError, match=r"a folder with config\.json.*model\.safetensors is none"):
        InstanceDetector.load(copy / "model.safetensors", LoadOptions())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_detector_is_float32_whatever_is_asked_for(
    dtype: torch.dtype, folder: Path, detector: InstanceDetector
) -> None:
    """A process with a half-precision detector of the true size was ended by a segmentation fault."""
    asked = InstanceDetector.load(folder, LoadOptions(dtype=dtype))
    assert {parameter.dtype for parameter in asked.network.parameters()} == {torch.float32}
    image = photo("square")
    assert summary(found(asked, [image])[0]) == summary(found(detector, [image])[0])


def test_loading_says_nothing_and_leaves_the_librarys_settings(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    InstanceDetector.load(folder, LoadOptions())
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# -- weights ----------------------------------------------------------------------------------------------------------


def test_every_tensor_reaches_the_network(folder: Path, copy: Path, detector: InstanceDetector) -> None:
    tensors = tensors_of(copy)
    assert "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.query.weight" in tensors
    tensors["class_predictor.weight"] = -tensors["class_predictor.weight"]
    write_checkpoint(tensors, copy / "model.safetensors")
    changed = InstanceDetector.load(copy, LoadOptions())
    assert changed.weights_hash != detector.weights_hash
    image = photo("square")
    assert summary(found(changed, [image])[0]) != summary(found(detector, [image])[0])
    # transformers renames the backbone: its values must be those of the file, not freshly drawn ones.
    query = "model.pixel_level_module.encoder.swin.encoder.layers.0.blocks.0.attention.q_proj.weight"
    loaded = detector.network.state_dict()
    published = tensors_of(folder)
    assert torch.equal(loaded[query], published[query.replace(".swin", "").replace("q_proj", "self.query")])
    values = [tensor.double().sum().item() for tensor in published.values()]
    assert sorted(values) == pytest.approx(sorted(tensor.double().sum().item() for tensor in loaded.values()))


def test_buffers_of_older_files_are_left(copy: Path, detector: InstanceDetector) -> None:
    tensors = tensors_of(copy)
    block = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self"
    tensors[f"{block}.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    write_checkpoint(tensors, copy / "model.safetensors")
    image = photo("square")
    loaded = InstanceDetector.load(copy, LoadOptions())
    assert summary(found(loaded, [image])[0]) == summary(found(detector, [image])[0])


def test_missing_and_misshapen_tensors_are_named(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = tensors_of(copy)
    del tensors["class_predictor.bias"]
    tensors["class_predictor.weight"] = torch.zeros(3, 3)
    write_checkpoint(tensors, copy / "model.safetensors")
    with pytest.raises(WeightsError, match=r"1 tensors are missing \['class_predictor.bias'\]") as error:
        InstanceDetector.load(copy, LoadOptions())
    assert "1 have another shape ['class_predictor.weight']" in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json cannot be read"),
        ("config.json", "no JSON", "config.json is damaged"),
        ("config.json", "[]", "config.json is damaged"),
        ("config.json", '{"model_type": "detr"}', "of 'detr', not of a mask2former"),
        ("config.json", '{"model_type": "mask2former"}', "does not name its classes"),
        ("config.json", '{"model_type": "mask2former", "id2label": {"1": "cat"}}', "does not name its classes"),
        ("preprocessor_config.json", None, "preprocessor_config.json cannot be read"),
        ("model.safetensors", None, "model.safetensors"),
        ("model.safetensors", "version https://git-lfs", "git-lfs"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(copy: Path, file: str, content: str | None, message: str) -> None:
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    with pytest.raises(WeightsError) as error:
        InstanceDetector.load(copy, LoadOptions())
    assert message in str(error.value)
