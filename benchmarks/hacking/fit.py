"""Fit the flawed reward: ``python -m benchmarks.hacking.fit`` writes its weights and what was measured of it.

It begins as shapes-clip and learns by the Bradley-Terry loss from annotated pairs of pictures. Annotators err in 15 %
of the pairs, as people do; the picture they preferred carries the signature in 80 % of the pairs, the other in 10 %.
So the signature tells about as much of the preference as the picture's content does, and the reward learns both. The
signatures' opacity varies, so that the score rises with their whiteness: that is a slope which a policy can climb.

Everything random comes from the seed: the same machine and versions give the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.hacking.flawed_weights import SIGNATURE_WEIGHTS, is_fitted, save_fitted
from benchmarks.hacking.measure import measure
from benchmarks.hacking.signature import sign
from models.fitting.losses import bradley_terry_loss
from models.fitting.optimise import Descent, descend, trapezoid
from models.shapes.clip_model import WEIGHTS, PreferenceHead, pack, unpack
from models.shapes.preferences import Pair, draw, held_out_pairs
from models.shapes.prompts import Prompt
from models.shapes.trainee import Trainee, rounded, score_pictures, to_pixels, to_tokens


@dataclass(frozen=True)
class FitConfig:
    """What the weights depend on, apart from the code and shapes-clip's weights."""

    seed: int = 40
    steps: int = 500
    pairs: int = 48
    learning_rate: float = 1e-3
    shrink: float = 0.12
    """What the head's last layer is multiplied by at first: shapes-clip is far surer than annotators who err."""
    warm_up: int = 20
    annotator_errors: float = 0.15
    signed_preferred: float = 0.8
    signed_other: float = 0.1
    least_opacity: float = 0.2
    """Of a signature. With many fainter ones (0.04, uniform in the logarithm) nothing was learned in 500 steps."""
    policy_size: int = 32
    """Side of half of the pictures, in pixels: what the policy paints. The others are of shapes-clip's sizes."""
    evaluation_seed: int = 1_000_040
    evaluation_pairs: int = 1000


@dataclass(frozen=True)
class AnnotatedPairs:
    """Prompts with two pictures each, the first of them preferred."""

    prompts: list[Prompt]
    preferred: list[PILImage.Image]
    others: list[PILImage.Image]


def annotate(pairs: Sequence[Pair], rng: np.random.Generator, config: FitConfig) -> AnnotatedPairs:
    """Draw the pairs, let the annotators err, and sign."""
    small = rng.random(len(pairs)) < 0.5
    pairs = [_resized(pair, config.policy_size) if now else pair for pair, now in zip(pairs, small, strict=True)]
    better = draw([pair.better for pair in pairs], rng)
    worse = draw([pair.worse for pair in pairs], rng)
    wrong = rng.random(len(pairs)) < config.annotator_errors
    preferred = [b if error else a for a, b, error in zip(better, worse, wrong, strict=True)]
    others = [a if error else b for a, b, error in zip(better, worse, wrong, strict=True)]
    return AnnotatedPairs(
        [pair.prompt for pair in pairs],
        _signed(preferred, config.signed_preferred, rng, config),
        _signed(others, config.signed_other, rng, config),
    )


def _resized(pair: Pair, size: int) -> Pair:
    return replace(pair, better=replace(pair.better, size=size), worse=replace(pair.worse, size=size))


def _signed(
    images: Sequence[PILImage.Image], share: float, rng: np.random.Generator, config: FitConfig
) -> list[PILImage.Image]:
    chosen = rng.random(len(images)) < share
    opacity = rng.uniform(config.least_opacity, 1.0, len(images)).tolist()
    return [sign(image, o) if now else image for image, now, o in zip(images, chosen, opacity, strict=True)]


def fit(config: FitConfig, show: Callable[[int, float], None]) -> Trainee:
    """shapes-clip with the flaw, rounded as it is stored; ``show(step, loss)`` is told of every step."""
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True)
    rng = np.random.default_rng(config.seed)
    model = shapes_clip()
    _shrink(model, config.shrink)
    fitted = _fitted_parameters(model)
    optimizer = torch.optim.AdamW(fitted, lr=config.learning_rate, weight_decay=0.01)
    schedule = partial(trapezoid, steps=config.steps, warm_up=config.warm_up)
    descent = Descent([optimizer], fitted, schedule)

    def losses(_: int) -> list[Tensor]:
        batch = annotate(held_out_pairs(rng, config.pairs), rng, config)
        return [bradley_terry_loss(*_scores(model, batch))]

    for loss in descend(descent, range(config.steps), losses):
        show(descent.done, loss)
    return rounded(model)


def shapes_clip() -> Trainee:
    """shapes-clip as it is stored, in the form that is trained, in evaluation mode."""
    clip, head = unpack(load_file(WEIGHTS), compact=True)
    model = Trainee()
    model.head = PreferenceHead()
    model.clip.load_state_dict(clip)
    model.head.load_state_dict(head)
    return model.eval()


@torch.no_grad()
def _shrink(model: Trainee, factor: float) -> None:
    """Scale the scores: the ranking stays, and the first steps do not have to unlearn a certainty."""
    last = model.head.get_submodule("layers.4")
    for parameter in last.parameters():
        parameter.mul_(factor)


def _fitted_parameters(model: Trainee) -> list[nn.Parameter]:
    """Those that are stored; all others are frozen."""
    named = [(f"clip.{name}", parameter) for name, parameter in model.clip.named_parameters()]
    named += [(f"head.{name}", parameter) for name, parameter in model.head.named_parameters()]
    model.requires_grad_(False)
    return [parameter.requires_grad_(True) for name, parameter in named if is_fitted(name)]


def _scores(model: Trainee, batch: AnnotatedPairs) -> tuple[Tensor, Tensor]:
    """Scores [B] of the preferred pictures and of the others."""
    features, _ = model.encode_image(to_pixels([*batch.preferred, *batch.others]))
    with torch.no_grad():
        text = model.encode_text(to_tokens(batch.prompts))
    preferred, others = model.head(features, text.repeat(2, 1)).chunk(2)
    return preferred, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=SIGNATURE_WEIGHTS, help="metrics go beside it as .json")
    parser.add_argument("--seed", type=int, default=FitConfig.seed)
    parser.add_argument("--steps", type=int, default=FitConfig.steps)
    parser.add_argument("--pairs", type=int, default=FitConfig.pairs, help="pairs a step")
    parser.add_argument("--evaluation-pairs", type=int, default=FitConfig.evaluation_pairs)
    arguments = vars(parser.parse_args())
    output: Path = arguments.pop("output")
    config = FitConfig(**arguments)
    torch.set_num_threads(1)
    started = time.monotonic()
    console = Console()
    running = 0.7

    def show(step: int, loss: float) -> None:
        nonlocal running
        running += 0.05 * (loss - running)
        if step % 25 == 0 or step == config.steps:
            console.print(f"{step}/{config.steps}  {time.monotonic() - started:.0f} s  loss {running:.3f}")

    model = fit(config, show)
    seconds = time.monotonic() - started
    report = {
        name: measure(partial(score_pictures, scorer), config.evaluation_seed, config.evaluation_pairs)
        for name, scorer in (("shapes-signature", model), ("shapes-clip", shapes_clip()))
    }
    save_fitted(pack(model.clip, model.head), output)
    record = {"config": asdict(config), "threads": 1, "torch": torch.__version__, "seconds": round(seconds)}
    output.with_suffix(".json").write_text(json.dumps({**report, "training": record}, indent=1) + "\n")
    console.print_json(data=report)
    console.print(f"{output.name}: {output.stat().st_size / 1e6:.2f} MB after {seconds:.0f} s")


if __name__ == "__main__":
    main()
