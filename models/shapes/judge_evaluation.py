"""How good shapes-judge is: held-out pairs in both orders, answered by plain transformers calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

from models.backbones.vlm_independent import additive
from models.judging.pairs import parse_think
from models.judging.templates import load_template
from models.shapes.judge import IMAGE_SIZE, PATCH_SIZE, chat_text
from models.shapes.judge_data import IGNORED, ScenePair, pictures_of, random_pair, text_first_rows
from models.shapes.judge_text import check_reasons
from models.shapes.preferences import TRAINING_SPLIT, draw
from models.shapes.prompts import TASKS
from models.shapes.scenes import EVERYTHING, Split, random_prompt

SEED = 77_000
MAX_TOKENS = 240
CHUNK = 50

Image = PILImage.Image


def held_out_pairs(count: int, *, out_of_domain: bool = False, seed: int = SEED) -> list[ScenePair]:
    """``count`` pairs, tasks in equal shares, from a stream that no training uses; out of domain every prompt asks for
    a composition that training never showed."""
    rng = np.random.default_rng((seed, int(out_of_domain)))
    tasks = ("counting", "colors", "position", "color_attr") if out_of_domain else TASKS
    split: Split = EVERYTHING if out_of_domain else TRAINING_SPLIT
    pairs = []
    for i in range(count):
        prompt = random_prompt(rng, tasks[i % len(tasks)])
        while TRAINING_SPLIT.admits(prompt) == out_of_domain:
            prompt = random_prompt(rng, tasks[i % len(tasks)])
        pairs.append(random_pair(rng, split, prompt))
    return pairs


def draw_pairs(pairs: Sequence[ScenePair], seed: int = SEED) -> list[tuple[Image, Image]]:
    """The pictures of both scenes of each pair."""
    rng = np.random.default_rng((seed, 1))
    images = draw(pictures_of([scene for pair in pairs for scene in pair.scenes], rng), rng)
    return list(zip(images[::2], images[1::2], strict=True))


def _inputs(processor: Any, prompts: Sequence[str], images: Sequence[tuple[Image, Image]], template: str) -> Any:
    question = load_template(template)
    texts = [chat_text([None, None, question.fill(prompt=prompt)]) for prompt in prompts]
    flat = [image for both in images for image in both]
    return processor(text=texts, images=flat, padding=True, return_tensors="pt")


@torch.inference_mode()
def think(model: Any, processor: Any, prompts: Sequence[str], images: Sequence[tuple[Image, Image]]) -> list[str]:
    """The greedy answers in UnifiedReward-Think's form."""
    said: list[str] = []
    for start in range(0, len(prompts), CHUNK):
        inputs = _inputs(processor, prompts[start : start + CHUNK], images[start : start + CHUNK], "shapes_judge")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
        said += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


@torch.inference_mode()
def yes_probabilities(
    model: Any, processor: Any, prompts: Sequence[str], images: Sequence[tuple[Image, Image]]
) -> list[float]:
    """P(yes), that image 2 is better, among yes and no in the spelling that was trained."""
    yes, no = (processor.tokenizer(word).input_ids[0] for word in ("yes", "no"))
    found: list[float] = []
    for start in range(0, len(prompts), CHUNK):
        inputs = _inputs(
            processor, prompts[start : start + CHUNK], images[start : start + CHUNK], "shapes_judge_yes_no"
        )
        logits = model(**inputs).logits[:, -1, [yes, no]]
        found += logits.softmax(-1)[:, 0].tolist()
    return found


@torch.inference_mode()
def text_first_probabilities(
    model: Any, processor: Any, prompts: Sequence[str], images: Sequence[tuple[Image, Image]]
) -> list[float]:
    """As :func:`yes_probabilities`, asked with the text first, about images that do not see each other."""
    yes, no = (processor.tokenizer(word).input_ids[0] for word in ("yes", "no"))
    question = load_template("shapes_judge_text_first")
    found: list[float] = []
    for start in range(0, len(prompts), CHUNK):
        asked = [question.fill(prompt=prompt) for prompt in prompts[start : start + CHUNK]]
        flat = [image for both in images[start : start + CHUNK] for image in both]
        rows = text_first_rows(processor, asked, [[yes]] * len(asked), [[1.0]] * len(asked), flat)
        assert rows.seen is not None
        side = IMAGE_SIZE // PATCH_SIZE
        logits = model(
            input_ids=rows.ids,
            pixel_values=rows.patches.flatten(0, 1),
            image_grid_thw=torch.tensor([[1, side, side]] * len(flat)),
            position_ids=rows.positions,
            attention_mask=additive(rows.seen, torch.float32)[:, None],
        ).logits
        found += logits[rows.targets != IGNORED][:, [yes, no]].softmax(-1)[:, 0].tolist()
    return found


def evaluate(model: Any, processor: Any, count: int = 600) -> dict[str, Any]:
    """Accuracy, position bias and truth of the reasons on held-out pairs, in and out of domain."""
    return {
        "in_domain": measure(model, processor, held_out_pairs(count)),
        "out_of_domain": measure(model, processor, held_out_pairs(count // 2, out_of_domain=True)),
    }


def measure(model: Any, processor: Any, pairs: Sequence[ScenePair]) -> dict[str, float]:
    """Numbers of one set of pairs, each asked in both orders; a text without verdict counts as wrong.

    ``*_accuracy`` over all answers. ``*_position_bias`` is the mean probability (or share of verdicts) of the first
    image minus a half. ``*_flips``: the share of pairs whose verdict names the same place after the swap.
    ``true_statements`` of the reasons; ``following_reasons``: the share of readable pairs of answers whose reasons are
    all true in both orders. ``text_first_*``: as ``yes_no_*``, with the text first and independent images.
    """
    images = draw_pairs(pairs)
    both = [*pairs, *(pair.swapped() for pair in pairs)]
    shown = [*images, *((second, first) for first, second in images)]
    prompts = [pair.prompt.text for pair in both]
    truth = np.array([pair.first_is_better for pair in both])
    count = len(pairs)

    answers = [parse_think(text) for text in think(model, processor, prompts, shown)]
    first = np.array([np.nan if a.preference is None else a.preference for a in answers])
    readable = ~np.isnan(first)
    checks = [check_reasons(a.reasons, pair.prompt, pair.scenes) for a, pair in zip(answers, both, strict=True)]
    right = np.array([all(check) for check in checks])
    yes_no = 1.0 - np.array(yes_probabilities(model, processor, prompts, shown))
    text_first = 1.0 - np.array(text_first_probabilities(model, processor, prompts, shown))
    return {
        "pairs": count,
        "think_accuracy": float(((first > 0.5) == truth)[readable].sum() / len(both)),
        "think_readable": float(readable.mean()),
        "think_position_bias": float(first[readable].mean() - 0.5),
        "think_flips": float((first[:count] == first[count:]).mean()),
        "true_statements": float(np.mean([check for row in checks for check in row])),
        "following_reasons": float((right[:count] & right[count:]).mean()),
        **_graded("yes_no", yes_no, truth),
        **_graded("text_first", text_first, truth),
    }


def _graded(name: str, first: NDArray[np.float64], truth: NDArray[np.bool_]) -> dict[str, float]:
    """Of probabilities that the first image is better, of all pairs and then of all swapped pairs."""
    count = len(first) // 2
    cancelled = (first[:count] + 1.0 - first[count:]) / 2
    return {
        f"{name}_accuracy": float(((first > 0.5) == truth).mean()),
        f"{name}_accuracy_both_orders": float(((cancelled > 0.5) == truth[:count]).mean()),
        f"{name}_position_bias": float(first.mean() - 0.5),
        f"{name}_flips": float(((first[:count] > 0.5) == (first[count:] > 0.5)).mean()),
    }
