"""Train shapes-judge from nothing: ``python -m models.shapes.train_judge`` writes its folder.

Next-token prediction on freshly rendered pictures. Stage 1: descriptions of single pictures alone, then these together
with reasons and verdicts on pairs (UnifiedReward-Think's form) and with plain yes or no (RewardDance's form). Stage 2,
in rounds, each from the weights before it as they would be stored: what follows from a description, mostly in words
alone. Stage 3: the same, and yes or no with the text first, about pictures that do not see each other. Muon for the
matrices inside the blocks, AdamW for the rest, a warm-up and a linear decay. Every batch has its own random stream from
(seed, step); the same machine and versions give the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models.backbones.qwen2_vl import encode_patches
from models.backbones.vlm_independent import additive
from models.fitting.optimise import Descent, muon_and_adamw
from models.judging.templates import load_template
from models.shapes.judge import DIRECTORY, IMAGE_SIZE, PATCH_SIZE, build_model, build_processor, load, save
from models.shapes.judge_data import (
    IGNORED,
    Examples,
    deciding_examples,
    describe_examples,
    random_pair,
    reasoning_examples,
    scenes_to_describe,
    text_first_examples,
    think_examples,
    yes_no_examples,
)
from models.shapes.judge_evaluation import evaluate
from models.shapes.preferences import TRAINING_SPLIT

STEPS = 1800
REASONING_STEPS = (1000, 550, 1000)
TEXT_FIRST_STEPS = 900
"""What the stored weights were trained for: stage 1, the rounds of stage 2, and stage 3."""


@dataclass(frozen=True)
class JudgeConfig:
    """What the weights depend on, apart from the code and ``steps``."""

    seed: int = 50
    describing_share: float = 0.25
    describing_alone: int = 64
    describing: int = 12
    thinking: int = 14
    answering: int = 30
    muon_learning_rate: float = 0.004
    learning_rate: float = 0.0015
    weight_decay: float = 0.02
    warm_up: int = 100
    decay_from: float = 0.5
    reasoning: int = 12
    deciding: int = 12
    in_words: int = 40
    text_first: int = 40
    deciding_last: int = 8
    second_rate: float = 0.5
    second_decay_from: float = 0.3


class Batches(Dataset[list[Examples]]):
    """The batch of each step, by (seed, step) alone."""

    def __init__(self, config: JudgeConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.processor = build_processor()
        names = ("shapes_judge", "shapes_judge_yes_no", "shapes_judge_text_first")
        self.questions = [load_template(name).text for name in names]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Examples]:
        config, rng = self.config, np.random.default_rng((self.config.seed, step))
        if step < config.describing_share * self.steps:
            scenes = list(scenes_to_describe(rng, config.describing_alone, TRAINING_SPLIT))
            return [describe_examples(self.processor, scenes, rng)]
        think, yes_no, _ = self.questions
        scenes = list(scenes_to_describe(rng, config.describing, TRAINING_SPLIT))
        pairs = [random_pair(rng, TRAINING_SPLIT) for _ in range(config.thinking + config.answering)]
        return [
            describe_examples(self.processor, scenes, rng),
            think_examples(self.processor, pairs[: config.thinking], think, rng),
            yes_no_examples(self.processor, pairs[config.thinking :], yes_no, rng),
        ]


class ReasoningBatches(Batches):
    """The batch of each step of a round of stage 2."""

    def __init__(self, config: JudgeConfig, steps: int, number: int) -> None:
        super().__init__(config, steps)
        self.number = number

    def __getitem__(self, step: int) -> list[Examples]:
        config, rng = self.config, np.random.default_rng((self.config.seed, 2 + self.number, step))
        think, yes_no, _ = self.questions
        seen = [random_pair(rng, TRAINING_SPLIT) for _ in range(config.reasoning + config.deciding)]
        told = [random_pair(rng, TRAINING_SPLIT) for _ in range(config.in_words)]
        return [
            reasoning_examples(self.processor, told, think, rng, with_images=False),
            reasoning_examples(self.processor, seen[: config.reasoning], think, rng, with_images=True),
            deciding_examples(self.processor, seen[config.reasoning :], yes_no, rng),
        ]


class TextFirstBatches(ReasoningBatches):
    """The batch of each step of stage 3."""

    def __getitem__(self, step: int) -> list[Examples]:
        config, rng = self.config, np.random.default_rng((self.config.seed, 2 + self.number, step))
        think, yes_no, text_first = self.questions
        seen = [random_pair(rng, TRAINING_SPLIT) for _ in range(config.reasoning + config.deciding_last)]
        told = [random_pair(rng, TRAINING_SPLIT) for _ in range(config.in_words)]
        apart = [random_pair(rng, TRAINING_SPLIT) for _ in range(config.text_first)]
        return [
            reasoning_examples(self.processor, told, think, rng, with_images=False),
            reasoning_examples(self.processor, seen[: config.reasoning], think, rng, with_images=True),
            deciding_examples(self.processor, seen[config.reasoning :], yes_no, rng),
            text_first_examples(self.processor, apart, text_first, rng),
        ]


def answer_loss(model: Any, batch: Examples) -> Tensor:
    """Weighted mean cross-entropy of the answers' tokens."""
    ids, side = batch.ids, IMAGE_SIZE // PATCH_SIZE
    embeddings = model.get_input_embeddings()(ids)
    if len(batch.patches):
        tokens = encode_patches(model.model.visual, batch.patches, side, side)
        embeddings = embeddings.masked_scatter((ids == model.config.image_token_id)[..., None], tokens.flatten(0, 1))
    given: dict[str, Tensor] = {}
    if batch.seen is not None:
        given["attention_mask"] = additive(batch.seen, torch.float32)[:, None]
    # Padding stands on the right of a causal model: no mask is needed for it.
    told = model.model.language_model(inputs_embeds=embeddings, position_ids=batch.positions, **given)
    hidden = told.last_hidden_state
    asked = batch.targets != IGNORED
    losses = F.cross_entropy(model.lm_head(hidden[asked]), batch.targets[asked], reduction="none")
    weights = batch.weights[asked]
    return (losses * weights).sum() / weights.sum()


def optimizers(model: nn.Module, config: JudgeConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks of both towers, AdamW for everything else."""
    return muon_and_adamw(
        model,
        lambda name: ".layers." in name or ".blocks." in name,
        muon_learning_rate=config.muon_learning_rate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )


def rate(step: int, steps: int, warm_up: int, decay_from: float) -> float:
    """Of the learning rates at ``step``: a linear warm-up, constant, and a linear fall to zero."""
    return min((step + 1) / warm_up, 1.0, max(steps - step, 0) / max(steps - decay_from * steps, 1))


def train(config: JudgeConfig, steps: int, *, workers: int = 1) -> Any:
    """The network after stage 1."""
    torch.manual_seed(config.seed)
    batches = Batches(config, steps)
    model = build_model(batches.processor.tokenizer).train()
    return optimise(model, batches, config, 1.0, config.decay_from, ("describe", "think", "yes/no"), workers)


def reason(model: Any, config: JudgeConfig, steps: int, number: int, *, workers: int = 1) -> Any:
    """The network after round ``number`` of stage 2, from a network as it is read from its folder."""
    return _go_on(model, ReasoningBatches(config, steps, number), ("in words", "think", "yes/no"), workers)


def put_text_first(model: Any, config: JudgeConfig, steps: int, *, workers: int = 1) -> Any:
    """The network after stage 3, from a network as it is read from its folder."""
    batches = TextFirstBatches(config, steps, len(REASONING_STEPS))
    return _go_on(model, batches, ("in words", "think", "yes/no", "text first"), workers)


def _go_on(model: Any, batches: ReasoningBatches, names: tuple[str, ...], workers: int) -> Any:
    config = batches.config
    torch.manual_seed(config.seed + 1 + batches.number)
    return optimise(model.train(), batches, config, config.second_rate, config.second_decay_from, names, workers)


def optimise(
    model: Any,
    batches: Batches,
    config: JudgeConfig,
    scale: float,
    decay_from: float,
    names: tuple[str, ...],
    workers: int,
    show_every: int = 50,
) -> Any:
    """All steps with fresh optimizers, by the core of ``reward-service fit``; prints running means of the losses."""
    steps = len(batches)
    descent = Descent(
        optimizers(model, config),
        list(model.parameters()),
        lambda step: scale * rate(step, steps, config.warm_up, decay_from),
    )
    loader: Any = DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None)
    started, means = time.monotonic(), dict[int, float]()
    for step, kinds in enumerate(loader):
        losses = [answer_loss(model, batch) for batch in kinds]
        descent.step([sum(losses, torch.zeros(()))])
        for place, loss in enumerate(losses):
            means[place] = 0.95 * means.get(place, loss.item()) + 0.05 * loss.item()
        if (step + 1) % show_every == 0:
            told = "  ".join(f"{name} {means[i]:.4f}" for i, name in enumerate(names[: len(losses)]))
            print(f"{step + 1}  {time.monotonic() - started:.0f} s  {told}", flush=True)
    return model.eval()


def stages(config: JudgeConfig, output: Path, start: int = 0) -> None:
    """Train all stages from the one after ``start``, each from what the one before it stored, into ``output``."""
    folders = [*(output.with_name(f"{output.name}-{k + 1}") for k in range(len(REASONING_STEPS) + 1)), output]
    if start == 0:
        save(train(config, STEPS), build_processor(), folders[0])
    for number, steps in enumerate(REASONING_STEPS):
        if number + 1 >= start:
            save(reason(load(folders[number])[0], config, steps, number), build_processor(), folders[number + 1])
    save(put_text_first(load(folders[-2])[0], config, TEXT_FIRST_STEPS), build_processor(), output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="folder; results go beside it as .json")
    parser.add_argument("--work", type=Path, default=Path("build/judge"), help="where the stages before the last go")
    parser.add_argument("--start", type=int, default=0, help="stages that WORK-1, WORK-2 ... hold already")
    parser.add_argument("--seed", type=int, default=JudgeConfig.seed)
    parser.add_argument("--pairs", type=int, default=600, help="for the evaluation at the end")
    parser.add_argument("--threads", type=int, default=1, help="the weights depend on it in the last digits")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config, started = JudgeConfig(seed=arguments.seed), time.monotonic()
    stages(config, arguments.work, arguments.start)
    seconds = round(time.monotonic() - started)
    model, processor = load(arguments.work)
    save(model, processor, arguments.output)
    report = evaluate(*load(arguments.output), count=arguments.pairs)
    steps = {"steps": STEPS, "reasoning_steps": REASONING_STEPS, "text_first_steps": TEXT_FIRST_STEPS}
    steps["stages_before"] = arguments.start
    record = {**asdict(config), **steps, "seconds": seconds, "threads": arguments.threads}
    text = json.dumps({**report, "training": {**record, "torch": torch.__version__}}, indent=1)
    arguments.output.with_suffix(".json").write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
