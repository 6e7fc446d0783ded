"""shapes-clip: what its shipped weights know, and that its gradient is the gradient of its score."""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from models.base import Candidate, LoadOptions, Output, Sample, WeightsError
from models.preprocessing import OPENAI_MEAN, OPENAI_STD
from models.shapes.clip_model import WEIGHTS as PATH
from models.shapes.clip_model import PreferenceHead, clip_config, unpack
from models.shapes.evaluation import accuracy_report, judge_pairs
from models.shapes.preferences import TRAINING_SPLIT, Pair, Picture, admitted_prompt, held_out_pairs
from models.shapes.prompts import Prompt, Task, parse
from models.shapes.scenes import near_miss, random_scene, right_scene
from models.shapes.world import Scene, SceneObject, render
from models.shapes_clip import PARAMETERS, ShapesClip
from models.weights import load_safetensors

TEXT = "a red circle left of a blue square"
RIGHT = Scene((SceneObject("circle", "red", (1, 0)), SceneObject("square", "blue", (1, 2))))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> ShapesClip:
    return ShapesClip.load(LoadOptions())


def scores(model: ShapesClip, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
    """Through the plain path, in batches of 100."""
    found: list[float] = []
    for start in range(0, len(prompts), 100):
        pairs = zip(prompts[start : start + 100], images[start : start + 100], strict=True)
        outputs = model.run([model.prepare(Sample(prompt, Candidate(image=image))) for prompt, image in pairs])
        assert all(isinstance(output, Output) for output in outputs)
        found += [output.score for output in outputs if isinstance(output, Output)]
    return found


def scorer(model: ShapesClip):
    def score(prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[float]:
        return scores(model, [prompt.text for prompt in prompts], images)

    return score


def test_preference_accuracy_on_fresh_pairs(model: ShapesClip) -> None:
    """The JSON file beside the weights reports 4,000 pairs a split; these are 480 others."""
    report = accuracy_report(scorer(model), seed=77, count=480)
    assert report["held_out"]["accuracy"] >= 0.90
    assert report["out_of_domain"]["accuracy"] >= 0.88
    assert report["held_out"]["between_prompts"]["accuracy"] >= 0.83
    for split in ("held_out", "out_of_domain"):
        assert report[split]["kinds"]["unrelated"]["accuracy"] >= 0.93


def test_the_reported_accuracy_is_reproduced_by_the_shipped_weights(model: ShapesClip) -> None:
    reported = json.loads(PATH.with_suffix(".json").read_text())
    config = reported["training"]["config"]
    pairs = held_out_pairs(np.random.default_rng(config["evaluation_seed"]), 240)
    outcomes, _ = judge_pairs(scorer(model), pairs, seed=5)
    low = reported["held_out"]["accuracy"] - 0.06
    assert low < np.mean(outcomes) <= 1.0
    assert reported["held_out"]["accuracy"] >= 0.90
    assert reported["held_out"]["n"] >= 2000


@pytest.mark.parametrize(
    ("fault", "task", "least"), [("wrong_relation", "position", 0.70), ("swapped_attributes", "color_attr", 0.61)]
)
def test_arrangement_is_seen_better_than_by_chance(model: ShapesClip, fault: str, task: Task, least: float) -> None:
    """Its weakest side: shapes, colours and counts are right, only their arrangement isn't (0.77 and 0.69 of 800)."""
    rng = np.random.default_rng(31)
    prompts = [admitted_prompt(rng, TRAINING_SPLIT, task) for _ in range(300)]
    pairs = [
        Pair(p, Picture(right_scene(p, rng)), Picture(near_miss(p, rng, 1, kinds=(fault,))[0]), "near_miss", fault)
        for p in prompts
    ]
    outcomes, _ = judge_pairs(scorer(model), pairs, seed=2)
    assert np.mean(outcomes) >= least


def test_a_right_picture_beats_pictures_that_ignore_the_prompt(model: ShapesClip) -> None:
    prompt = parse(TEXT)
    assert prompt is not None
    rng = np.random.default_rng(0)
    right = [render(right_scene(prompt, rng), size) for size in (32, 64, 128) for _ in range(6)]
    filled = [Scene(random_scene(rng, 9).objects) for _ in range(6)]
    ignoring = [render(scene) for scene in (Scene(), random_scene(rng, 1), random_scene(rng, 3), *filled)]
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    flat = [Image.new("RGB", (64, 64), color) for color in ("white", "black", "red", "blue")]
    high = scores(model, [TEXT] * len(right), right)
    low = scores(model, [TEXT] * (len(ignoring) + 5), [*ignoring, noise, *flat])
    assert min(high) > max(low)


def test_another_prompt_changes_the_score_in_the_right_direction(model: ShapesClip) -> None:
    others = [
        "a blue circle left of a red square",
        "three green stars",
        "a red circle",
        "a red circle right of a blue square",
    ]
    first, *rest = scores(model, [TEXT, *others], [render(RIGHT)] * 5)
    assert first > max(rest) + 0.5


def test_neighbours_do_not_change_a_score_at_one_batch_shape(model: ShapesClip) -> None:
    rng = np.random.default_rng(1)
    images = [render(random_scene(rng, 3), 48) for _ in range(14)]
    prompts = [TEXT, "three green stars"] * 7
    first = scores(model, [TEXT, *prompts[:7]], [render(RIGHT), *images[:7]])[0]
    second = scores(model, [TEXT, *prompts[7:]], [render(RIGHT), *images[7:]])[0]
    assert first == second


def test_bfloat16_towers_rank_like_float32_ones(model: ShapesClip) -> None:
    half = ShapesClip.load(LoadOptions(dtype=torch.bfloat16))
    rng = np.random.default_rng(2)
    pairs = held_out_pairs(rng, 120)
    full_right, full = judge_pairs(scorer(model), pairs, seed=1)
    half_right, halved = judge_pairs(scorer(half), pairs, seed=1)
    assert np.mean(np.array(full_right) == np.array(half_right)) >= 0.96
    assert np.corrcoef(full, halved)[0, 1] > 0.99
    assert half.weights_hash == model.weights_hash


def test_the_differentiable_twin_scores_like_the_exact_path(model: ShapesClip) -> None:
    tokens, _ = model.prepare_text(TEXT)
    text = model.encode_text(tokens[None])
    for size in (32, 64, 100):
        image = render(RIGHT, size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        twin = model.head(model.encode_image(model.preprocess_tensor(pixels)), text).score_B
        assert twin.item() == pytest.approx(scores(model, [TEXT], [image])[0], abs=0.15)


class DoublePrecision:
    """The same score written out in float64, from the stored tensors: preprocessing, towers and head."""

    def __init__(self) -> None:
        clip_tensors, head_tensors = unpack(load_safetensors(PATH))
        self.clip = CLIP(**clip_config(compact=False))
        self.clip.load_state_dict(clip_tensors)
        self.clip = self.clip.double().eval()
        head = PreferenceHead()
        head.load_state_dict(head_tensors)
        self.head = deepcopy(head).double()

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, text: torch.Tensor) -> float:
        if pixels.shape[-1] != 64:
            pixels = F.interpolate(pixels, (64, 64), mode="bicubic", align_corners=False, antialias=True)
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (OPENAI_MEAN, OPENAI_STD))
        return float(self.head(self.clip.visual((pixels - mean) / std), text))


@pytest.mark.parametrize("size", [64, 80])
def test_the_gradient_is_that_of_finite_differences_in_float64(model: ShapesClip, size: int) -> None:
    """At the pixels with the largest gradients, and at random ones; pixels are kept off 0 and 1, where they clamp."""
    double = DoublePrecision()
    tokens, _ = model.prepare_text(TEXT)
    text = model.encode_text(tokens[None])
    picture = np.array(render(RIGHT, size), np.float64) / 255 * 0.5 + 0.25
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].contiguous()
    single = pixels.float().requires_grad_()
    model.head(model.encode_image(model.preprocess_tensor(single)), text).score_B.sum().backward()
    assert single.grad is not None
    gradient = single.grad.flatten()
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).float().mean() > 0.99
    largest = gradient.abs().topk(4).indices
    chosen = [*largest.tolist(), *np.random.default_rng(size).integers(0, gradient.numel(), 4).tolist()]
    step = 1e-5
    for i in chosen:
        values = []
        for sign in (1, -1):
            moved = pixels.clone()
            moved.view(-1)[i] += sign * step
            values.append(double(moved, text.double()))
        difference = (values[0] - values[1]) / (2 * step)
        assert gradient[i].item() == pytest.approx(difference, rel=2e-3, abs=2e-3 * gradient.abs().max().item())


def test_a_step_along_the_gradient_raises_the_score(model: ShapesClip) -> None:
    tokens, _ = model.prepare_text("a green star")
    text = model.encode_text(tokens[None])
    pixels = torch.full((1, 3, 64, 64), 0.5, requires_grad=True)
    score = model.head(model.encode_image(model.preprocess_tensor(pixels)), text).score_B
    score.sum().backward()
    assert pixels.grad is not None
    moved = (pixels + 0.02 * pixels.grad.sign()).detach()
    assert model.head(model.encode_image(model.preprocess_tensor(moved)), text).score_B > score


def test_warnings_tell_of_truncated_and_unknown_words(model: ShapesClip) -> None:
    assert model.prepare_text(TEXT)[1] == ()
    assert model.prepare_text("a dachshund")[1] == ("unknown_words",)
    assert model.prepare_text("a red circle " * 60)[1] == ("prompt_truncated",)
    assert [len(model.prepare_text("a star " * n)[0]) for n in (1, 10, 40)] == [16, 32, 77]


def test_weights_are_small_and_named_and_can_be_replaced(model: ShapesClip, tmp_path: Path) -> None:
    assert PATH.stat().st_size < 6_000_000
    parameters = [*model.towers.clip.parameters(), *model.preference_head.parameters()]
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS
    assert model.image_key.startswith(model.weights_hash)
    tensors = load_safetensors(PATH)
    tensors["head.layers.4.bias"] = tensors["head.layers.4.bias"] + 1
    other = tmp_path / "other.safetensors"
    save_file(tensors, other)
    moved = ShapesClip.load(LoadOptions(weights=str(other)))
    assert moved.weights_hash != model.weights_hash
    shifted, plain = (scores(each, [TEXT], [render(RIGHT)])[0] for each in (moved, model))
    assert shifted - plain == pytest.approx(1.0, abs=5e-3)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not a file"):
        ShapesClip.load(LoadOptions(weights=str(tmp_path / "missing.safetensors")))
    tensors = load_safetensors(PATH)
    tensors["head.layers.4.bias"] = torch.zeros(2)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match="head"):
        ShapesClip.load(LoadOptions(weights=str(tmp_path / "bad.safetensors")))
