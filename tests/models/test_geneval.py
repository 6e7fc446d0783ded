"""GenEval from a picture to its score: tiny networks of the published structure, and stand-ins that see colours."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from models.backbones.clip import TEXT_LENGTHS, tokenize
from models.backbones.detector import COCO_CLASSES, Detection, InstanceDetector
from models.base import Candidate, InputError, LoadOptions, ModelError, Output, Sample, UnsupportedInput, WeightsError
from models.clip_score import ClipScore
from models.geneval import CLASS_NAMES, TEMPLATES, ColorClassifier, Geneval, color_crop
from models.geneval_rules import COLORS
from models.parity_recipe import write_checkpoint
from models.preprocessing import OPENAI_MEAN, OPENAI_STD
from models.registry import load_model
from models.weights import load_safetensors

GROUND = (90, 90, 90)
PAINT = {"red": (230, 0, 0), "green": (0, 230, 0), "blue": (0, 0, 230)}
CLASS_OF = {"red": "apple", "green": "mouse", "blue": "car"}
"""What the stand-in detector takes a patch of colour for."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> LoadOptions:
    return Geneval.random_checkpoint(tmp_path_factory.mktemp("geneval"))


@pytest.fixture(scope="module")
def random_model(options: LoadOptions) -> Geneval:
    model = load_model("geneval", options)
    assert isinstance(model, Geneval)
    return model


def scored(model: Geneval, samples: list[Sample]) -> list[Output]:
    results = model.run([model.prepare(sample) for sample in samples])
    outputs = [result for result in results if isinstance(result, Output)]
    assert len(outputs) == len(results) == len(samples), results
    return outputs


# -- from a drawn picture to the score --------------------------------------------------------------------------------


class PatchDetector(nn.Module):
    """In place of the network: one query for each colour of paint and quarter of the picture, sure of what it sees."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean).view(3, 1, 1), requires_grad=False)
        self.std = nn.Parameter(torch.tensor(std).view(3, 1, 1), requires_grad=False)
        self.batches: list[int] = []

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        self.batches.append(len(pixel_values))
        rgb = (pixel_values * self.std + self.mean)[:, :, 2::4, 2::4]
        height, width = rgb.shape[-2:]
        rows, columns = torch.arange(height) * 2 // height, torch.arange(width) * 2 // width
        quarter = 2 * rows[:, None] + columns[None, :]
        classes, masks = [], []
        for channel, color in enumerate(PAINT):
            dominant = rgb[:, channel] > 0.4 + (rgb.sum(1) - rgb[:, channel]) / 2
            for index in range(4):
                mask = dominant & (quarter == index)
                logits = torch.zeros(len(rgb), len(COCO_CLASSES) + 1)
                logits[:, -1] = torch.where(mask.flatten(1).any(1), 0.0, 30.0)
                logits[:, COCO_CLASSES.index(CLASS_OF[color])] = 15.0
                classes.append(logits)
                masks.append(mask * 40.0 - 20.0)
        return SimpleNamespace(class_queries_logits=torch.stack(classes, 1), masks_queries_logits=torch.stack(masks, 1))


@pytest.fixture
def model(options: LoadOptions, monkeypatch: pytest.MonkeyPatch) -> Geneval:
    """The real model, whose two networks are replaced by ones that see colours; everything between them is its own."""
    model = seeing_patches(Geneval.load(options))
    see_colors(model.colors, monkeypatch)
    return model


def seeing_patches(model: Geneval) -> Geneval:
    processor = model.detector._processor
    network = PatchDetector(processor.image_mean, processor.image_std)
    model.detector = InstanceDetector(network, processor, model.detector.names, "")
    return model


def see_colors(classifier: ColorClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image tower answers with the text feature ("a photo of a red object") of the paint that it sees most of."""
    prompts = [tokenize(f"a photo of a {color} object", TEXT_LENGTHS)[0] for color in PAINT]
    features = classifier.towers.encode_text(torch.stack(prompts))

    def encode_image(pixels_B3SS: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
        rgb = pixels_B3SS * std + mean
        amounts = torch.stack([(rgb[:, c] > 0.75).float().mean((1, 2)) for c in range(3)], 1)
        return features[amounts.argmax(1)]

    monkeypatch.setattr(classifier.towers, "encode_image", encode_image)


def picture(*patches: tuple[str, int, int], size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Painted rectangles of 40 x 24 pixels around given centres."""
    image = Image.new("RGB", size, GROUND)
    for color, x, y in patches:
        ImageDraw.Draw(image).rectangle((x - 20, y - 12, x + 19, y + 11), fill=PAINT[color])
    return image


def sample(image: Image.Image, tag: str, *include: dict[str, Any], **more: Any) -> Sample:
    return Sample("a photo", Candidate(image=image), metadata={"tag": tag, "include": list(include), **more})


APPLE: dict[str, Any] = {"class": "apple", "count": 1}
CAR: dict[str, Any] = {"class": "car", "count": 1}
LEFT, RIGHT, LOW_RIGHT = (36, 30), (124, 30), (124, 90)


def test_objects_are_counted(model: Geneval) -> None:
    three = picture(("red", *LEFT), ("red", *RIGHT), ("red", *LOW_RIGHT))
    counted, too_few, other = scored(
        model,
        [
            sample(three, "counting", APPLE | {"count": 3}),
            sample(three, "counting", APPLE | {"count": 4}),
            sample(three, "single_object", {"class": "computer mouse", "count": 1}),
        ],
    )
    assert counted.score == 1.0
    assert counted.outputs == {"strict": 1.0, "correct": 1.0, "soft": 1.0}
    assert counted.details == {"reason": "all that was asked for was found", "found": {"apple": 3}, "colors": {}}
    assert too_few.outputs == {"strict": 0.0, "correct": 0.0, "soft": 0.75}
    assert too_few.details["reason"] == "found 3 apple, expected 4"
    assert other.score == 0.0
    assert other.details["reason"] == "found 0 computer mouse, expected 1"


def test_left_is_left(model: Geneval) -> None:
    beside = picture(("red", *LEFT), ("blue", *RIGHT))
    for relation, score in (("left of", 1.0), ("right of", 0.75), ("above", 0.75), ("below", 0.75)):
        (output,) = scored(model, [sample(beside, "position", CAR, APPLE | {"position": [relation, 0]})])
        assert output.score == score
    below = picture(("red", *LOW_RIGHT), ("blue", *RIGHT))
    (output,) = scored(model, [sample(below, "position", CAR, APPLE | {"position": ["below", 0]})])
    assert output.outputs["correct"] == 1.0


def test_colours_are_those_inside_the_mask(model: Geneval) -> None:
    image = picture(("red", *LEFT), ("blue", *RIGHT), ("green", *LOW_RIGHT))
    right, swapped, one = scored(
        model,
        [
            sample(image, "color_attr", APPLE | {"color": "red"}, CAR | {"color": "blue"}),
            sample(image, "color_attr", APPLE | {"color": "blue"}, CAR | {"color": "red"}),
            sample(image, "colors", APPLE, {"class": "computer mouse", "count": 1, "color": "green"}),
        ],
    )
    assert right.outputs == {"strict": 1.0, "correct": 1.0, "soft": 1.0}
    assert right.details["colors"] == {"apple": ["red"], "car": ["blue"]}
    assert swapped.outputs == {"strict": 0.0, "correct": 0.0, "soft": 0.5}
    assert "expected 1 blue apple, their colours: red" in swapped.details["reason"]
    assert one.score == 1.0
    assert one.details["colors"] == {"computer mouse": ["green"]}  # nobody asked for the apple's


def test_masks_lie_on_the_picture(model: Geneval) -> None:
    """Through resizing to the detector's size and back: right to less than one logit."""
    entry = model.prepare(sample(picture(("red", *RIGHT), size=(320, 120)), "single_object", APPLE))
    (detections,) = model.detector.detect([entry.prepared], [0.3], rows=1)
    assert not isinstance(detections, ModelError)
    (apple,) = detections
    assert apple.name == "apple"
    assert apple.confidence > 0.95
    assert apple.box == pytest.approx((104, 18, 144, 42), abs=8)  # one logit covers 10 x 7.5 pixels here
    left, top, right, bottom = apple.box
    assert apple.mask.shape == (bottom - top, right - left)
    assert apple.mask.sum() == pytest.approx(40 * 24, rel=0.4)


def test_pictures_of_a_batch_are_detected_once_and_in_few_forwards(
    model: Geneval, monkeypatch: pytest.MonkeyPatch
) -> None:
    classified: list[int] = []
    encode_image = model.colors.towers.encode_image

    def counting(pixels_B3SS: Tensor) -> Tensor:
        classified.append(len(pixels_B3SS))
        return encode_image(pixels_B3SS)

    monkeypatch.setattr(model.colors.towers, "encode_image", counting)
    red = model.prepare(sample(picture(("red", *LEFT)), "colors", APPLE | {"color": "red"}))
    wide = model.prepare(sample(picture(("blue", *LEFT), size=(320, 120)), "colors", CAR | {"color": "red"}))
    results = model.run([red, wide, red, red])
    assert [result.score for result in results if isinstance(result, Output)] == [1.0, 0.5, 1.0, 1.0]
    network = model.detector.network
    assert isinstance(network, PatchDetector)
    assert network.batches == [1, 1]  # one at a time on a CPU, and the copies not at all
    assert classified == [1, 1]


def test_one_sick_picture_does_not_spoil_the_others(model: Geneval, monkeypatch: pytest.MonkeyPatch) -> None:
    good, sick = (model.prepare(sample(picture(("red", *LEFT)), "single_object", APPLE)) for _ in range(2))
    sick.prepared.pixels[0, 0, 0] = float("nan")
    network = model.detector.network
    assert isinstance(network, PatchDetector)

    def forward(pixel_values: Tensor) -> SimpleNamespace:
        output = PatchDetector.forward(network, pixel_values.nan_to_num())
        output.masks_queries_logits[pixel_values.isnan().flatten(1).any(1)] = float("nan")
        return output

    monkeypatch.setattr(network, "forward", forward)
    first, failed, last = model.run([good, sick, good])
    assert isinstance(failed, ModelError)
    assert failed.code == "not_finite"
    assert isinstance(first, Output)
    assert first is last
    assert first.score == 1.0


def test_a_colour_that_is_no_number_is_an_error_of_its_sample(model: Geneval, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_image = model.colors.towers.encode_image

    def spoiled(pixels_B3SS: Tensor) -> Tensor:
        features = encode_image(pixels_B3SS).clone()
        blue = pixels_B3SS[:, 2].mean((1, 2)) > pixels_B3SS[:, 0].mean((1, 2))
        features[blue] = float("nan")
        return features

    monkeypatch.setattr(model.colors.towers, "encode_image", spoiled)
    image = picture(("red", *LEFT), ("blue", *RIGHT))
    entries = [
        sample(image, "colors", APPLE | {"color": "red"}),
        sample(image, "colors", APPLE | {"color": "red"}, CAR | {"color": "blue"}),
    ]
    right, failed = model.run([model.prepare(entry) for entry in entries])
    assert isinstance(right, Output)
    assert right.score == 1.0
    assert isinstance(failed, ModelError)
    assert failed.code == "not_finite"


# -- colours ----------------------------------------------------------------------------------------------------------


def test_a_crop_is_the_box_with_grey_outside_the_mask() -> None:
    image = Image.effect_noise((20, 10), 64).convert("RGB")
    mask = torch.zeros(10, 20, dtype=torch.bool)
    mask[2:6, 5:9] = True
    mask[2, 5] = False
    crop = color_crop(image, Detection("apple", 0.9, (5, 2, 9, 6), mask[2:6, 5:9].numpy()))
    assert crop.size == (4, 4)
    assert crop.getpixel((0, 0)) == (0x99, 0x99, 0x99)
    assert crop.getpixel((1, 0)) == image.getpixel((6, 2))
    assert crop.getpixel((3, 3)) == image.getpixel((8, 5))


def test_text_features_are_means_of_unit_features_and_made_once(
    random_model: Geneval, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = ColorClassifier(random_model.colors.loaded)
    calls: list[int] = []
    encode_text = classifier.towers.encode_text

    def counting(tokens_BL: Tensor) -> Tensor:
        calls.append(len(tokens_BL))
        return encode_text(tokens_BL)

    monkeypatch.setattr(classifier.towers, "encode_text", counting)
    crops = [Image.new("RGB", (30, 40), color) for color in PAINT.values()]
    named = classifier.classify(crops, ["tv remote"] * 3)
    assert classifier.classify(crops[:1], ["tv remote"]) == named[:1]
    assert calls == [30]
    expected = []
    for color in COLORS:
        texts = (f"a photo of a {color} tv remote", f"a photo of a {color}-colored tv remote")
        texts += (f"a photo of a {color} object",)
        features = [encode_text(tokenize(text, TEXT_LENGTHS)[0][None])[0] for text in texts]
        mean = sum((feature / feature.norm() for feature in features), torch.zeros(())) / 3
        expected.append(mean / mean.norm())
    assert torch.allclose(classifier._text_features("tv remote"), torch.stack(expected), atol=1e-5)
    with torch.inference_mode():
        images = random_model.colors.towers.encode_image(clip_pixels(crops))
    assert named == [COLORS[int((torch.stack(expected) @ image).argmax())] for image in images]


def clip_pixels(crops: list[Image.Image]) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    plain = [torch.tensor(crop.getpixel((0, 0))).view(3, 1, 1).expand(3, 224, 224) / 255 for crop in crops]
    return torch.stack([(pixels - mean) / std for pixels in plain])


def test_every_template_fits_the_text_length() -> None:
    for name in COCO_CLASSES:
        for template in TEMPLATES:
            for color in COLORS:
                _, truncated = tokenize(template.format(color=color, name=CLASS_NAMES.get(name, name)), (32,))
                assert not truncated


def test_the_tower_is_clip_scores(options: LoadOptions, random_model: Geneval) -> None:
    assert ClipScore.load(LoadOptions(weights=str(options.options["clip"]))).towers is random_model.colors.towers


# -- loading, options, errors -----------------------------------------------------------------------------------------


def test_a_random_checkpoint_is_scored_and_the_picture_matters(random_model: Geneval) -> None:
    canary = random_model.canary()
    images = [canary.image("geneval"), *(Image.new("RGB", (256, 256), color) for color in ("white", "navy", "olive"))]
    outputs = scored(random_model, [replace(canary, candidate=Candidate(image=image)) for image in images])
    assert len({output.score for output in outputs}) > 1
    assert len({str(output.details["found"]) for output in outputs}) == len(images)


def test_the_score_is_the_one_that_the_option_names(options: LoadOptions) -> None:
    for score in ("soft", "strict", "correct"):
        model = seeing_patches(Geneval.load(replace(options, options={**options.options, "score": score})))
        two = sample(picture(("red", *LEFT), ("red", *RIGHT)), "single_object", APPLE)
        (output,) = scored(model, [two])
        assert output.outputs == {"soft": 0.0, "strict": 0.0, "correct": 1.0}
        assert output.score == output.outputs[score]
        assert set(output.outputs) == set(model.info.outputs)


def test_the_quirk_is_an_option(options: LoadOptions) -> None:
    model = seeing_patches(Geneval.load(replace(options, options={**options.options, "relation_quirk": False})))
    beside = picture(("red", *LEFT), ("blue", *RIGHT))
    (output,) = scored(model, [sample(beside, "position", CAR, APPLE | {"position": ["right of", 0]})])
    assert output.score == pytest.approx(2 / 3)


@pytest.mark.parametrize(("option", "value"), [("score", "hard"), ("score", None), ("relation_quirk", 1)])
def test_unknown_options_are_refused(options: LoadOptions, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        Geneval.load(replace(options, options={**options.options, option: value}))


def test_the_hash_is_over_both_networks(options: LoadOptions, random_model: Geneval, tmp_path: Path) -> None:
    assert Geneval.load(options).weights_hash == random_model.weights_hash
    other = Geneval.random_checkpoint(tmp_path)
    file = Path(str(other.options["clip"]))
    changed = {name: tensor.clone() for name, tensor in load_safetensors(file).items()}
    changed["logit_scale"] += 1
    write_checkpoint(changed, file)
    assert Geneval.load(other).weights_hash != random_model.weights_hash


def test_missing_weights_name_the_setting(options: LoadOptions, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"models\.geneval\.weights"):
        Geneval.load(replace(options, weights=str(tmp_path / "nowhere")))
    with pytest.raises(WeightsError, match=r"models\.geneval\.options\.clip"):
        Geneval.load(replace(options, options={"clip": str(tmp_path / "nowhere.safetensors")}))


def test_what_cannot_be_scored_is_a_typed_error(random_model: Geneval) -> None:
    image = Candidate(image=Image.new("RGB", (64, 64)))
    with pytest.raises(InputError) as missing:
        random_model.prepare(Sample("a photo of a cat", image))
    assert missing.value.code == "metadata_missing"
    with pytest.raises(InputError) as unknown:
        random_model.prepare(sample(Image.new("RGB", (64, 64)), "single_object", {"class": "mouse", "count": 1}))
    assert unknown.value.code == "unknown_class"
    with pytest.raises(UnsupportedInput, match="geneval"):
        random_model.prepare(Sample("a cat", Candidate(text="a cat"), metadata={"tag": "counting", "include": [APPLE]}))


def test_all_of_genevals_classes_are_known(random_model: Geneval) -> None:
    assert len(set(random_model.detector.names)) == 80
    assert {"computer mouse", "tv remote", "computer keyboard", "couch"} <= set(random_model.detector.names)
    assert not {"mouse", "remote", "keyboard"} & set(random_model.detector.names)
