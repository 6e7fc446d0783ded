"""What the parity of rewards with checkpoints has in common: ``{pickscore,hpsv2,...}_{small,full}.json``.

Each file names a manifest of tensors and a seed. The checkpoint is built by the recipe, written in the published form
and loaded as a user loads it; then preprocessing, tokens, features and scores are compared with what the reference
implementation gave, and the order of images in bfloat16 with that in float32.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

import models.catalog  # noqa: F401
from models.base import Candidate, LoadOptions, Output, Sample, SampleError
from models.parity import Topic, largest
from models.parity_recipe import build, digest, write_checkpoint
from models.registry import load_model
from models.towers import TowerReward

ISSUE_BOUND = 1e-3
"""Of max(|score|, standard deviation of the file's scores); the tolerances of :class:`Kind` are tighter."""
PIXEL_TOLERANCE = 1e-5
"""Of normalised pixels; one 8-bit level is 1.5e-2."""
FEATURE_TOLERANCE = 2e-6
"""Of features of unit length."""
STATE_TOLERANCE = 2e-5
"""Of hidden states after a layer norm (unit variance)."""
NOISE_FACTOR = 4.0
"""Two images must keep their order in bfloat16 where their float32 scores differ by more noises than this."""

FeatureTopics = Callable[[TowerReward, "Cases"], list[Topic]]


@dataclass(frozen=True)
class Kind:
    """How the checkpoint of a reward is published, and how near its scores must come (absolute, float32).

    ``end_token`` ends what the text tower reads; without one the attention mask does. ``twin`` is a reward that differs
    in nothing but the published weights, and must give the same scores from the same file.
    """

    model: str
    file: str
    tolerance: float
    features: FeatureTopics | None = None
    nested: str | None = None
    end_token: int | None = 49407
    twin: str | None = None


@dataclass(frozen=True)
class Cases:
    """A result file with the images (in the mode of their files) and prompts that it names."""

    file: Path
    document: Mapping[str, Any]
    images: Mapping[str, PILImage.Image] = field(repr=False)
    prompts: Mapping[str, str]

    @property
    def scores(self) -> list[Mapping[str, Any]]:
        return list(self.document["scores"])

    def prompt(self, entry: Mapping[str, Any]) -> str:
        """The prompt of a score; "" for a model that reads none."""
        return self.prompts[entry["prompt"]] if "prompt" in entry else ""


def read_cases(file: Path) -> Cases:
    """Read ``file`` and what it names in ``inputs.json`` beside it."""
    document = json.loads(file.read_text("utf-8"))
    inputs = json.loads((file.parent / "inputs.json").read_text("utf-8"))
    images: dict[str, PILImage.Image] = {}
    for key in document.get("images") or document["preprocessing_full"]:
        with PILImage.open(file.parent / inputs["images"][key]["file"]) as image:
            image.load()
            images[key] = image
    prompts = document.get("prompts") or document.get("prompt_text") or {}
    return Cases(file, document, images, {key: inputs["prompts"][key] for key in prompts})


def checkpoint(cases: Cases, target: Path, *, nested: str | None = None, head: bool = False) -> float:
    """Write the checkpoint that a result file describes; 1.0 if its digest is not the file's, else 0.0."""
    prefix = "mlp_" if head else ""
    manifest = json.loads((cases.file.parent / cases.document[f"{prefix}manifest"]).read_text("utf-8"))
    tensors = build(manifest, cases.document["fill_seed"])
    write_checkpoint(tensors, target, nested=nested)
    return float(digest(tensors.items()) != cases.document[f"{prefix}weights_sha256"])


@contextmanager
def written(cases: Cases, kind: Kind) -> Iterator[tuple[LoadOptions, Topic]]:
    """The options that load the checkpoint, which lies in a folder of its own for the time being, and its digest."""
    with TemporaryDirectory() as folder:
        weights = Path(folder) / kind.file
        wrong = [checkpoint(cases, weights, nested=kind.nested)]
        options: dict[str, Any] = {}
        if "mlp_manifest" in cases.document:
            options["head"] = str(Path(folder) / "head.pth")
            wrong.append(checkpoint(cases, Path(options["head"]), head=True))
        gc.collect()
        yield (
            LoadOptions(weights=str(weights), options=options),
            Topic("checkpoint", len(wrong), sum(wrong), 0, "sha256"),
        )


def load_tower(name: str, options: LoadOptions) -> TowerReward:
    """The reward ``name`` as a user loads it; raises TypeError for one that is no tower."""
    model = load_model(name, options)
    if not isinstance(model, TowerReward):
        raise TypeError(f"{name} is not a TowerReward")
    return model


def compare(file: Path, kind: Kind) -> list[Topic]:
    """All topics of one result file."""
    cases = read_cases(file)
    with written(cases, kind) as (options, built):
        model = load_tower(kind.model, options)
        topics = [built, *preprocessing(model, cases), *tokens(model, cases, kind.end_token)]
        topics += kind.features(model, cases) if kind.features else []
        topics += scores(model, cases, kind.tolerance)
        topics += lists(model, cases, kind.tolerance)
        if kind.twin is not None:
            same = scores(load_tower(kind.twin, options), cases, kind.tolerance)[0]
            topics.append(replace(same, name=kind.twin, note="its scores from the same weights"))
        exact = grid(model, cases)
        del model  # the full-size models do not fit into the memory twice
        gc.collect()
        coarse = grid(load_tower(kind.model, replace(options, dtype=torch.bfloat16)), cases)
        topics = [topic for topic in topics if topic.cases]
        topics.append(bfloat16_order(exact, coarse))
    gc.collect()
    return topics


def record_error(values: Tensor, record: Mapping[str, Any]) -> float:
    """The largest difference from a record of a tensor (first8, probe, mean, std, min, max absolute; l2 relative).

    Infinite for another shape.
    """
    flat = values.double().flatten()
    if "shape" in record and list(values.shape) != record["shape"]:
        return float("inf")
    found = {"first8": flat[:8], "mean": flat.mean(), "min": flat.min(), "max": flat.max(), "l2": flat.norm()}
    found["std"] = flat.std(correction=0)
    errors = [
        float((found[name] - torch.tensor(record[name], dtype=torch.float64)).abs().max())
        / (record["l2"] if name == "l2" else 1.0)
        for name in found
        if name in record
    ]
    errors += [abs(float(flat[place]) - value) for place, value in record.get("probe", ())]
    return largest(errors)


def unit_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the same vector at length 1."""
    length = record["l2"]
    return {"first8": [value / length for value in record["first8"]], "mean": record["mean"] / length, "l2": 1.0}


@torch.inference_mode()
def preprocessing(model: TowerReward, cases: Cases) -> list[Topic]:
    """The image tower's input, from images in the mode of their files."""
    refused = {entry["image"] for entry in cases.scores if "reference_error" in entry}
    errors = []
    note = "normalised pixels"
    for key, expected in cases.document["images"].items():
        if "preprocessed_legacy_no_antialias" in expected:
            note = "normalised pixels, resized with antialiasing"
        record = expected.get("preprocessed_after_convert_rgb")
        if record is None and key in refused:
            continue
        pixels = model.normalize(model.prepare_image(cases.images[key])[None])
        errors.append(record_error(pixels, record or expected["preprocessed"]))
    return [Topic("preprocessing", len(errors), largest(errors), PIXEL_TOLERANCE, note)]


def tokens(model: TowerReward, cases: Cases, end_token: int | None) -> list[Topic]:
    """Prompts whose token ids differ up to and with the first end token (or the end of the attention mask)."""
    wrong = 0
    expected = cases.document.get("prompts", {})
    for key, record in expected.items():
        ids = record["input_ids"]
        length = sum(record["attention_mask"]) if end_token is None else ids.index(end_token) + 1
        found = model.prepare_text(cases.prompts[key])[0].tolist()
        wrong += found[:length] != ids[:length]
    return [Topic("tokens", len(expected), wrong, 0, "prompts that differ")]


def score_all(model: TowerReward, samples: Sequence[tuple[PILImage.Image, str]]) -> list[float | None]:
    """What the service would answer for one batch; None for the typed error of one sample."""
    batch = [model.prepare(Sample(prompt, Candidate(image=image))) for image, prompt in samples]
    return [result.score if isinstance(result, Output) else None for result in model.run(batch)]


def score_of(model: TowerReward, cases: Cases, entry: Mapping[str, Any]) -> float | None:
    """The score of one entry alone; None for a typed error."""
    try:
        (score,) = score_all(model, [(cases.images[entry["image"]], cases.prompt(entry))])
    except SampleError:
        return None
    return score


def scores(model: TowerReward, cases: Cases, tolerance: float) -> list[Topic]:
    """One by one, against the tolerance and the issue's bound; then what the reference refuses to score."""
    given = [entry for entry in cases.scores if "score_fp32" in entry]
    expected = torch.tensor([entry["score_fp32"] for entry in given], dtype=torch.float64)
    spread = float(expected.std(correction=0))
    errors = [difference(score_of(model, cases, entry), entry["score_fp32"]) for entry in given]
    relative = [error / max(abs(entry["score_fp32"]), spread) for error, entry in zip(errors, given, strict=True)]
    return [
        Topic("score", len(errors), largest(errors), tolerance, "absolute"),
        Topic("score, relative", len(relative), largest(relative), ISSUE_BOUND, "to max(|score|, std of the file)"),
        *refused(model, cases, tolerance),
    ]


def refused(model: TowerReward, cases: Cases, tolerance: float) -> list[Topic]:
    """Inputs on which the reference raises: its number after conversion to RGB where it gives one."""
    as_rgb: list[float] = []
    others: list[float | None] = []
    for entry in (entry for entry in cases.scores if "reference_error" in entry):
        ours = score_of(model, cases, entry)
        if "score_fp32_after_convert_rgb" in entry:
            as_rgb.append(difference(ours, entry["score_fp32_after_convert_rgb"]))
        else:
            others.append(ours)
    unusable = [0.0 if score is None or score == score else float("inf") for score in others]
    typed = others.count(None)
    note = f"reference raises; here {len(others) - typed} numbers, {typed} typed errors"
    return [
        Topic("score as RGB", len(as_rgb), largest(as_rgb), tolerance, "reference raises; its number after RGB"),
        Topic("not scored there", len(others), largest(unusable), 0, note),
    ]


def difference(ours: float | None, expected: float) -> float:
    """Absolute; infinite for a sample without a score."""
    return float("inf") if ours is None else abs(ours - expected)


def lists(model: TowerReward, cases: Cases, tolerance: float) -> list[Topic]:
    """Several samples in one call: HPSv2's list, PickScore's batch, ImageReward's ranking (1 is best)."""
    document = cases.document
    batches: list[tuple[list[tuple[PILImage.Image, str]], list[float]]] = []
    for name, numbers in (("list_api", "scores"), ("ranking", "rewards")):
        if name in document:
            prompt = cases.prompt(document[name])
            samples = [(cases.images[key], prompt) for key in document[name]["images"]]
            batches.append((samples, document[name][numbers]))
    if "batched" in document:
        pairs = document["batched"]["pairs"]
        samples = [(cases.images[image], cases.prompts[prompt]) for image, prompt in pairs]
        batches.append((samples, document["batched"]["scores_fp32"]))
    errors: list[float] = []
    ranks: list[float] = []
    for samples, expected in batches:
        found = score_all(model, samples)
        errors += [difference(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
        if "ranking" in document:
            best_first = sorted((score for score in found if score is not None), reverse=True)
            rank = [None if score is None else best_first.index(score) + 1 for score in found]
            ranks += [float(ours != theirs) for ours, theirs in zip(rank, document["ranking"]["rank"], strict=True)]
    return [
        Topic("score in one call", len(errors), largest(errors), tolerance, "absolute"),
        Topic("rank", len(ranks), sum(ranks), 0, "images with another rank"),
    ]


@torch.inference_mode()
def grid(model: TowerReward, cases: Cases) -> Tensor:
    """Scores [prompts, images] of every image of the file for every prompt (or none), float64."""
    images = [model.encode_image(model.normalize(model.prepare_image(image)[None])) for image in cases.images.values()]
    rows = []
    for prompt in cases.prompts.values() or ("",):
        text = model.encode_text(model.prepare_text(prompt)[0][None])
        rows.append(torch.cat([model.head(image, text).score_B for image in images]))
    return torch.stack(rows).double()


def bfloat16_order(exact_PI: Tensor, coarse_PI: Tensor, what: str = "pairs per prompt") -> Topic:
    """Pairs of one row that change their order, where the exact gap is more than four times the measured noise.

    The noise is the standard deviation of (coarse - exact) over all numbers of the file.
    """
    noise = float((coarse_PI - exact_PI).std(correction=0))
    pairs = violated = 0
    for exact, coarse in zip(exact_PI.tolist(), coarse_PI.tolist(), strict=True):
        for first, second in combinations(range(len(exact)), 2):
            gap = exact[first] - exact[second]
            if abs(gap) > NOISE_FACTOR * noise:
                pairs += 1
                violated += not gap * (coarse[first] - coarse[second]) > 0
    note = f"{what} over {NOISE_FACTOR:g} noises of {noise:.2g}, the std of bf16 - fp32"
    return Topic("order in bfloat16", pairs, violated if noise == noise else float("nan"), 0, note)
