"""Train the shapes policy from nothing: ``python -m models.shapes.train_policy`` writes its diffusers folder.

Rectified flow matching (Esser et al. 2024) on freshly rendered scenes that fulfil their prompts. Two linear probes are
trained along and thrown away: the pooled text tells what the prompt asks for, and the image tokens of an inner layer
tell what stands in each cell of the clean picture (a representation target in the sense of Yu et al. 2024, "REPA",
with the known truth in place of a pretrained encoder). Some prompts are empty, so that guidance has its unconditional
half, and half of the batches carry the zero tokens that diffusers appends by default.

The rate is constant after its warm-up and what is exported is a moving average, so a run stopped after K steps is the
run of K steps. Every batch has its own random stream from (seed, step): a resumed run equals an uninterrupted one bit
for bit, and the same machine and versions give the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from models.shapes.clip_losses import SLOTS, cell_labels, slot_labels, slot_loss
from models.shapes.policy import (
    DIRECTORY,
    IMAGE_SIZE,
    NULL_TOKENS,
    PATCH_SIZE,
    TIME_SHIFT,
    build_pipeline,
    counted_attention,
    encode_text,
    load_pipeline,
    save_pipeline,
    to_latents,
    tokenize,
    trained_parts,
)
from models.shapes.policy_evaluation import evaluate
from models.shapes.preferences import TASK_WEIGHTS, Picture
from models.shapes.prompts import TASKS, Prompt
from models.shapes.scenes import random_prompt, right_scene
from models.shapes.world import COLORS, GRID, SHAPES, render_batch

STEPS = 3000
"""Steps of 64 pictures: what the stored weights were trained for."""


@dataclass(frozen=True)
class PolicyConfig:
    """What the weights depend on, apart from the code and ``steps``."""

    seed: int = 30
    batch: int = 64
    width: int = 128
    layers: int = 4
    probed_layer: int = 2
    muon_learning_rate: float = 0.005
    learning_rate: float = 0.001
    weight_decay: float = 0.02
    warm_up: int = 100
    average: float = 0.999
    empty_prompts: float = 0.05
    null_tokens: float = 0.5
    slots_weight: float = 0.02
    cells_weight: float = 0.1


@dataclass(frozen=True)
class PolicyBatch:
    """What one step learns from.

    Latents [B, 3, S, S], unit noise of the same shape, sigmas [B] in (0, 1), token ids [B, L]; labels of both probes:
    slots [B, 7] of what the prompts say, with ``told`` [B] false where the prompt was emptied, and cells [B, 2, 9] of
    the scenes; and how many zero tokens follow the text.
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    tokens: Tensor
    slots: Tensor
    told: Tensor
    cells: Tensor
    null_tokens: int


class PolicyTrainee(nn.Module):
    """The pipeline's trained parts and the two probes."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, config: PolicyConfig) -> None:
        super().__init__()
        self.parts = trained_parts(pipeline)
        self.slot_probe = nn.Linear(config.width, sum(SLOTS))
        self.cell_probe = nn.Linear(config.width, len(SHAPES) + len(COLORS) + 2)


def draw_batch(tokenizer: Any, config: PolicyConfig, step: int) -> PolicyBatch:
    """The batch of one step; it depends on (seed, step) alone."""
    rng = np.random.default_rng((config.seed, step))
    tasks = rng.choice(len(TASKS), config.batch, p=[TASK_WEIGHTS[task] for task in TASKS])
    prompts: list[Prompt] = [random_prompt(rng, TASKS[i]) for i in tasks]
    scenes = [right_scene(prompt, rng) for prompt in prompts]
    latents = to_latents(torch.from_numpy(render_batch(scenes, IMAGE_SIZE)))
    told = rng.random(config.batch) >= config.empty_prompts
    texts = [prompt.text if kept else "" for prompt, kept in zip(prompts, told, strict=True)]
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    # Logit-normal times, shifted like the sampler's.
    sigma = torch.sigmoid(torch.randn(config.batch, generator=generator))
    sigma = TIME_SHIFT * sigma / (1 + (TIME_SHIFT - 1) * sigma)
    return PolicyBatch(
        latents,
        torch.randn(latents.shape, generator=generator),
        sigma,
        tokenize(tokenizer, texts),
        slot_labels(prompts),
        torch.from_numpy(told),
        cell_labels([Picture(scene, IMAGE_SIZE) for scene in scenes]),
        NULL_TOKENS if rng.random() < config.null_tokens else 0,
    )


def _patch_cells() -> Tensor:
    """The cell in which each patch's centre lies, int64 [patches]."""
    side = IMAGE_SIZE // PATCH_SIZE
    cell = ((torch.arange(side) + 0.5) / side * GRID).long()
    return (cell[:, None] * GRID + cell[None, :]).flatten()


def flow_loss(model: PolicyTrainee, batch: PolicyBatch, probed_layer: int) -> dict[str, Tensor]:
    """Losses by name: "flow", the mean squared error of the velocity noise - latents at (1 - sigma) latents + sigma
    noise; "slots" and "cells", the cross-entropies of the probes."""
    sequence, pooled = encode_text(model.parts, batch.tokens)
    if batch.null_tokens:
        sequence = torch.cat([sequence, sequence.new_zeros(len(sequence), 1, sequence.shape[2])], dim=1)
    sigma = batch.sigma[:, None, None, None]
    noisy = (1 - sigma) * batch.latents + sigma * batch.noise
    transformer: Any = model.parts["transformer"]
    inner: list[Tensor] = []
    hook = transformer.transformer_blocks[probed_layer].register_forward_hook(
        lambda _module, _inputs, outputs: inner.append(outputs[1])
    )
    with hook, counted_attention(transformer, batch.null_tokens):
        velocity = transformer(noisy, sequence, pooled, batch.sigma * 1000.0, return_dict=False)[0]
    logits = model.cell_probe(F.layer_norm(inner[0], inner[0].shape[-1:]))
    labels = batch.cells[:, :, _patch_cells()]
    shapes = len(SHAPES) + 1
    return {
        "flow": F.mse_loss(velocity, batch.noise - batch.latents),
        "slots": slot_loss(model.slot_probe(pooled[batch.told]), batch.slots[batch.told]),
        "cells": F.cross_entropy(logits[..., :shapes].flatten(0, 1), labels[:, 0].flatten())
        + F.cross_entropy(logits[..., shapes:].flatten(0, 1), labels[:, 1].flatten()),
    }


def _optimizers(model: PolicyTrainee, config: PolicyConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks except modulations, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = "transformer_blocks" in name and parameter.ndim == 2 and ".norm1" not in name
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)),
    ]


def _averaged(model: PolicyTrainee, decay: float) -> AveragedModel:
    """An exponential moving average whose memory grows to ``decay``, so that the first steps are forgotten."""

    @torch.no_grad()
    def update(averages: Any, values: Any, count: Any) -> None:
        keep = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(list(averages), list(values), 1 - keep)

    return AveragedModel(model, multi_avg_fn=update)


class PolicyTraining:
    """A run: the model, its average, its optimizers, how many steps were made and the CPU seconds they took."""

    def __init__(self, config: PolicyConfig) -> None:
        torch.manual_seed(config.seed)
        torch.use_deterministic_algorithms(True)
        self.config = config
        self.pipeline = build_pipeline(config.width, config.layers)
        self.model = PolicyTrainee(self.pipeline, config).train()
        self.average = _averaged(self.model, config.average)
        self.optimizers = _optimizers(self.model, config)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.step = 0
        self.cpu_seconds = 0.0

    def advance(self) -> dict[str, float]:
        """One step; the losses before it."""
        started = time.process_time()
        batch = draw_batch(self.pipeline.tokenizer, self.config, self.step)
        losses = flow_loss(self.model, batch, self.config.probed_layer)
        total = losses["flow"] + self.config.slots_weight * losses["slots"] + self.config.cells_weight * losses["cells"]
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (self.step + 1) / self.config.warm_up)
            optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        self.cpu_seconds += time.process_time() - started
        return {name: loss.item() for name, loss in losses.items()}

    def averaged_pipeline(self) -> StableDiffusion3Pipeline:
        """A pipeline of its own with the averaged weights."""
        pipeline = build_pipeline(self.config.width, self.config.layers)
        averaged: Any = self.average.module
        trained_parts(pipeline).load_state_dict(averaged.parts.state_dict())
        return pipeline

    def save(self, path: Path) -> None:
        """Write everything that the rest of the run depends on; the file is whole or absent."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{index}.{name}": value for name, value in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        config = json.dumps(asdict(self.config))
        metadata = {"step": str(self.step), "cpu_seconds": str(self.cpu_seconds), "config": config}
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Continue from what :meth:`save` wrote; ValueError for a checkpoint of another configuration."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if json.loads(metadata["config"]) != asdict(self.config):
            raise ValueError(f"{path} is of another configuration: {metadata['config']}")
        self.model.load_state_dict(_below("model.", tensors.items()))
        self.average.load_state_dict(_below("average.", tensors.items()))
        for i, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, Tensor]] = {}
            for name, value in _below(f"optimizer.{i}.", tensors.items()).items():
                index, entry = name.split(".")
                states.setdefault(int(index), {})[entry] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        self.step = int(metadata["step"])
        self.cpu_seconds = float(metadata["cpu_seconds"])


def _below(prefix: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors if name.startswith(prefix)}


def train(
    config: PolicyConfig,
    steps: int,
    checkpoint: Path,
    *,
    save_every: int,
    show: Callable[[int, dict[str, float]], None],
) -> PolicyTraining:
    """Train up to ``steps`` steps, from ``checkpoint`` where it exists; ``show(step, losses)`` follows every step.

    Raises ValueError where the checkpoint is of another configuration or beyond ``steps``.
    """
    training = PolicyTraining(config)
    if checkpoint.exists():
        training.resume(checkpoint)
    if training.step > steps:
        raise ValueError(f"{checkpoint} is at step {training.step}, beyond {steps}")
    while training.step < steps:
        losses = training.advance()
        show(training.step, losses)
        if training.step % save_every == 0 or training.step == steps:
            training.save(checkpoint)
    return training


def _log() -> Callable[[int, dict[str, float]], None]:
    """Print running means every 50 steps."""
    started, means = time.monotonic(), dict[str, float]()

    def show(step: int, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            means[name] = 0.98 * means.get(name, value) + 0.02 * value
        if step % 50 == 0:
            text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
            print(f"{step}  {time.monotonic() - started:.0f} s  {text}", flush=True)

    return show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=DIRECTORY, help="diffusers folder; results go beside it as .json"
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("build/policy.safetensors"), help="resumed if it exists"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=PolicyConfig.seed)
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--images-per-task", type=int, default=200, help="for the evaluation at the end")
    parser.add_argument("--threads", type=int, default=1, help="the weights depend on it in the last digits")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = PolicyConfig(seed=arguments.seed)
    training = train(config, arguments.steps, arguments.checkpoint, save_every=arguments.save_every, show=_log())
    save_pipeline(training.averaged_pipeline(), arguments.output)
    report = evaluate(load_pipeline(arguments.output), per_task=arguments.images_per_task)
    record = {
        "config": asdict(config),
        "steps": training.step,
        "cpu_seconds": round(training.cpu_seconds),
        "threads": arguments.threads,
        "torch": torch.__version__,
    }
    text = json.dumps({**report, "training": record}, indent=1)
    arguments.output.with_suffix(".json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
