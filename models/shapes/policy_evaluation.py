"""How often a text-to-image pipeline draws exactly what a prompt of the shapes world asks for.

``python -m models.shapes.policy_evaluation DIRECTORY`` prints the table, and with ``--grid FILE`` paints samples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image as PILImage

from models.shapes.evaluation import accuracy
from models.shapes.oracle import examine
from models.shapes.policy import DIRECTORY, load_pipeline
from models.shapes.prompts import TASKS, Prompt
from models.shapes.rules import Verdict
from models.shapes.scenes import random_prompt

SEED = 2_000_003
SAMPLING_STEPS = 20
_CHUNK = 50


def evaluation_prompts(seed: int, per_task: int) -> list[Prompt]:
    """``per_task`` random prompts of each task in their random wordings, task after task."""
    rng = np.random.default_rng(seed)
    return [random_prompt(rng, task) for task in TASKS for _ in range(per_task)]


def draw(pipeline: StableDiffusion3Pipeline, texts: Sequence[str], seed: int, **call: Any) -> list[PILImage.Image]:
    """One picture for each text; the i-th starts from noise of (seed + i), whatever the others are.

    ``call`` goes to the pipeline, with 20 steps, no guidance and no zero tokens for T5 where it says nothing else.
    """
    call = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": 1.0, "max_sequence_length": 0, **call}
    images: list[PILImage.Image] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        images += pipeline(chunk, generator=generators, output_type="pil", **call).images
    return images


def tabulate(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Shares of exact pictures with their number and 95 % interval, overall and per task; beside them GenEval's lax
    rule and the mean partial credit."""

    def row(chosen: Sequence[Verdict]) -> dict[str, Any]:
        exact = accuracy([verdict.exact == 1.0 for verdict in chosen])
        return {
            "exact": exact.pop("accuracy"),
            **exact,
            "geneval": round(float(np.mean([verdict.geneval for verdict in chosen])), 4),
            "soft": round(float(np.mean([verdict.soft for verdict in chosen])), 4),
        }

    pairs = list(zip(prompts, verdicts, strict=True))
    tasks = {task: [verdict for prompt, verdict in pairs if prompt.task == task] for task in TASKS}
    return {**row(verdicts), "tasks": {task: row(chosen) for task, chosen in tasks.items() if chosen}}


def evaluate(
    pipeline: StableDiffusion3Pipeline, *, per_task: int = 200, seed: int = SEED, **call: Any
) -> dict[str, Any]:
    """Draw ``per_task`` prompts of each task once and let the oracle judge; ``call`` as in :func:`draw`."""
    prompts = evaluation_prompts(seed, per_task)
    images = draw(pipeline, [prompt.text for prompt in prompts], seed, **call)
    verdicts = [examine(prompt, image)[0] for prompt, image in zip(prompts, images, strict=True)]
    settings = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": 1.0, "max_sequence_length": 0, **call}
    return {**tabulate(prompts, verdicts), "seed": seed, "sampling": settings}


def grid(images: Sequence[PILImage.Image], columns: int, size: int = 96) -> PILImage.Image:
    """Pictures in rows of ``columns``, each enlarged to ``size`` pixels, with a gap of 4."""
    rows = -(-len(images) // columns)
    sheet = PILImage.new("RGB", (columns * (size + 4), rows * (size + 4)), (128, 0, 128))
    for i, image in enumerate(images):
        place = (i % columns * (size + 4), i // columns * (size + 4))
        sheet.paste(image.resize((size, size), PILImage.Resampling.NEAREST), place)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=DIRECTORY)
    parser.add_argument("--images-per-task", type=int, default=200)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=SAMPLING_STEPS)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--max-sequence-length", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="paint one row of samples a task into this PNG instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_pipeline(arguments.directory)
    call = {
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "max_sequence_length": arguments.max_sequence_length,
    }
    if arguments.grid is None:
        print(json.dumps(evaluate(pipeline, per_task=arguments.images_per_task, seed=arguments.seed, **call), indent=1))
        return
    prompts = evaluation_prompts(arguments.seed, 8)
    images = draw(pipeline, [prompt.text for prompt in prompts], arguments.seed, **call)
    grid(images, 8).save(arguments.grid)
    for prompt, image in zip(prompts, images, strict=True):
        print(f"{prompt.text}: {examine(prompt, image)[0].reason}")


if __name__ == "__main__":
    main()
