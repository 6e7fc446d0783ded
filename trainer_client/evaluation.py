"""One policy, or two on the same prompts and noise, by the rewards of a service.

Images are drawn in batches, and a batch is scored while the next one is drawn. Written to the folder: evaluation.json
(every number, and the scores that they come from), images/policy and images/against (lossless), grid.png.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from rich.progress import Progress
from safetensors import SafetensorError
from torch import Tensor

from trainer_client._images import to_uint8
from trainer_client.checkpoint import CheckpointError, package_versions
from trainer_client.config import ConfigError, PolicySection, RewardsSection
from trainer_client.distributed import derived_seed
from trainer_client.eval_grid import GridRow, draw_grid, spread
from trainer_client.eval_results import Judgement, PolicyScores, number, to_json
from trainer_client.eval_statistics import finite_or_none
from trainer_client.items import Item
from trainer_client.policies import Policy, PromptCache
from trainer_client.prompts import Prompt, load_prompts
from trainer_client.results import CompareResponse, ModelInfo
from trainer_client.reward_queue import Handle, RewardQueue, remote_comparisons
from trainer_client.rewards import API_KEY, Rewards, served
from trainer_client.run_setup import build_policy, offered_models
from trainer_client.trained_policy import TrainedWeights, apply, locate

RESULT, GRID, IMAGES = "evaluation.json", "grid.png", "images"
GRID_ROWS = 24
START_PATIENCE = 10.0
"""Seconds for which a service is waited for that does not answer at the start."""

Label = Literal["policy", "against"]


@dataclass(frozen=True)
class PolicySource:
    """A diffusers folder or hub id, with trained weights on top where ``trained`` names them (see ``locate``)."""

    source: str
    trained: Path | None = None
    averaged: bool = False

    def __str__(self) -> str:
        added = "" if self.trained is None else f" + {self.trained}{' (averaged)' if self.averaged else ''}"
        return self.source + added


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated, by which rewards, and how images are drawn. Raises ConfigError for what makes no sense."""

    policy: PolicySource
    prompts: str
    rewards: tuple[str, ...]
    out: Path
    against: PolicySource | None = None
    judge: str | None = None
    services: tuple[str, ...] = ("http://127.0.0.1:8000",)
    count: int | None = None
    """Prompts that are taken from the file's start; None: all."""
    seeds: int = 4
    """Images of each prompt."""
    seed: int = 1_000_003
    """What the noise of all images follows from."""
    steps: int = 20
    guidance: float = 1.0
    negative: str = ""
    height: int | None = None
    width: int | None = None
    batch_size: int = 16
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_sequence_length: int | None = None
    patience: float = 300.0
    """Seconds for which a service that is away is waited for."""

    def __post_init__(self) -> None:
        if self.judge is not None and self.against is None:
            raise ConfigError("a judge compares two policies: name the other one (--against)")
        if not self.rewards or len(set(self.rewards)) < len(self.rewards):
            raise ConfigError(f"rewards are at least one, and none twice, not {', '.join(self.rewards) or 'none'}")
        if min(self.seeds, self.steps, self.batch_size, 1 if self.count is None else self.count) < 1:
            raise ConfigError("seeds, steps, batch size and count are at least 1")

    @property
    def sources(self) -> dict[Label, PolicySource]:
        """The one policy, or both."""
        first: dict[Label, PolicySource] = {"policy": self.policy}
        return first if self.against is None else {**first, "against": self.against}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was found: ``document`` is what evaluation.json holds; ``scores`` has one entry a policy."""

    document: dict[str, Any]
    prompts: list[Prompt]
    scores: list[PolicyScores]
    judgement: Judgement | None


def evaluate(config: EvaluationConfig, progress: Progress | None = None) -> Evaluation:
    """Draw, score and compare, one policy after the other, and write the folder.

    Raises ConfigError before anything is drawn for what cannot be evaluated, and RewardError where the services cannot
    be reached, lack a model, or fail for longer than ``config.patience``.
    """
    bars = Progress(disable=True) if progress is None else progress
    prompts = load_prompts(config.prompts)[: config.count]
    for source in config.sources.values():
        _check_source(source.source)
    trained = {label: _located(source) for label, source in config.sources.items()}
    if (config.out / RESULT).exists():
        raise ConfigError(f"{config.out} holds an evaluation already: take another folder")
    section = RewardsSection(
        services=config.services,
        models=dict.fromkeys(config.rewards, 1.0),
        patience=config.patience,
        start_patience=min(config.patience, START_PATIENCE),
    )
    names = dict.fromkeys([*config.rewards, *([config.judge] if config.judge else [])])
    models = offered_models(section, list(names))
    fingerprints = {name: info.fingerprint for name, info in models.items() if info.fingerprint}
    found: list[PolicyScores] = []
    with ExitStack() as stack:
        rewards = served(section, config.rewards, fingerprints)
        stack.callback(rewards.close)
        judge = stack.enter_context(_Judge(config, prompts, fingerprints)) if config.judge else None
        for label, source in config.sources.items():
            # One at a time: two large policies need not fit beside each other.
            policy = _policy(source, trained[label], config)
            task = bars.add_task(f"{label} {source}", total=len(prompts) * config.seeds)
            compare = judge.submit if judge is not None and label == "against" else None
            found.append(_scored(label, policy, prompts, rewards, config, partial(bars.advance, task), compare))
            del policy
        judgement = None if judge is None else judge.collect()
    document = finite_or_none({**_about(config, prompts, models), **to_json(prompts, found, judgement)})
    (config.out / RESULT).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    _grid(config, prompts, found).save(config.out / GRID)
    return Evaluation(document, prompts, found, judgement)


def _check_source(source: str) -> None:
    """Raises ConfigError for what is no pipeline, before hours are spent on the other policy."""
    try:
        if Path(source).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            DiffusionPipeline.load_config(source)
            return
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy {source}: {error}") from error
    raise ConfigError(f"policy {source}: no such folder, and a hub id is written namespace/name")


def _located(source: PolicySource) -> TrainedWeights | None:
    try:
        return None if source.trained is None else locate(source.trained)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def _policy(source: PolicySource, trained: TrainedWeights | None, config: EvaluationConfig) -> Policy:
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    section = PolicySection(source=source.source, dtype=config.dtype, max_sequence_length=config.max_sequence_length)
    policy = build_policy(section, torch.device(device))
    try:
        policy.latent_shape(config.height, config.width)
        if trained is not None:
            apply(policy, trained, averaged=source.averaged)
    except (CheckpointError, SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
    return policy


# ---------------------------------------------------------------------------------------------------- images


def image_seeds(prompts: int, seeds: int, first: int) -> list[list[int]]:
    """Where the noise of image [p][s] comes from: distinct, and those of a run's own evaluation with the same seed."""
    return [[derived_seed("evaluation", first + s, p) for s in range(seeds)] for p in range(prompts)]


@dataclass(frozen=True)
class Drawn:
    """A batch: uint8 images [B, 3, H, W] on the CPU, and of which (prompt, seed) each is."""

    images: Tensor
    places: list[tuple[int, int]]


@torch.no_grad()
def draw(policy: Policy, prompts: Sequence[Prompt], config: EvaluationConfig) -> Iterator[Drawn]:
    """Every seed of every prompt, prompt after prompt, in batches of at most ``config.batch_size``."""
    guided = policy.needs_negative(config.guidance)
    encode = PromptCache(policy.encode_prompts, negative=config.negative if guided else None)
    seeds = image_seeds(len(prompts), config.seeds, config.seed)
    places = [(p, s) for p in range(len(prompts)) for s in range(config.seeds)]
    for start in range(0, len(places), config.batch_size):
        chosen = places[start : start + config.batch_size]
        images = policy.sample(
            encode([prompts[p].text for p, _ in chosen]),
            [seeds[p][s] for p, s in chosen],
            steps=config.steps,
            guidance_scale=config.guidance,
            height=config.height,
            width=config.width,
        )
        yield Drawn(torch.stack([torch.from_numpy(to_uint8(image)).permute(2, 0, 1) for image in images]), chosen)


def image_name(prompt: int, seed: int) -> str:
    """The file of an image, by the index of its prompt and of its seed."""
    return f"{prompt:03d}-{seed:02d}.png"


def _scored(
    label: Label,
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    config: EvaluationConfig,
    advance: Callable[[int], object],
    compare: Callable[[Drawn], object] | None,
) -> PolicyScores:
    folder = config.out / IMAGES / label
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for drawn in draw(policy, prompts, config):
        rows = [p for p, _ in drawn.places]
        rewards.submit(drawn.images, [prompts[p] for p in rows], rows)
        for image, place in zip(drawn.images, drawn.places, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / image_name(*place))
        if compare is not None:
            compare(drawn)
        advance(len(rows))
    batch = rewards.collect()
    shape = (len(prompts), config.seeds)
    scores = {name: np.asarray(batch.scores[name], np.float64).reshape(shape) for name in config.rewards}
    return PolicyScores(label, scores, Counter(batch.failures), time.monotonic() - started)


class _Judge:
    """Asks which policy's image is better as soon as both are drawn; the first one's are read from their files."""

    def __init__(self, config: EvaluationConfig, prompts: Sequence[Prompt], fingerprints: Mapping[str, str]) -> None:
        self._name = str(config.judge)
        self._shape = (len(prompts), config.seeds)
        self._prompts = prompts
        self._folder = config.out / IMAGES / "policy"
        self._asked: list[tuple[list[tuple[int, int]], Handle[CompareResponse]]] = []
        source = remote_comparisons(
            config.services,
            self._name,
            pairs=[(0, 1)],
            patience=config.patience,
            fingerprints={"score": {name: each for name, each in fingerprints.items() if name == self._name}},
            api_key=os.environ.get(API_KEY),
        )
        self._queue = RewardQueue(source)

    def __enter__(self) -> _Judge:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._queue.close()

    def submit(self, drawn: Drawn) -> None:
        items = []
        for (p, s), second in zip(drawn.places, drawn.images, strict=True):
            prompt = self._prompts[p]
            first = _opened(self._folder / image_name(p, s))
            items.append(Item(prompt.text, [first, second], metadata=dict(prompt.metadata)))
        self._asked.append((drawn.places, self._queue.submit(items)))

    def collect(self) -> Judgement:
        probabilities = np.full(self._shape, math.nan)
        failures: Counter[str] = Counter()
        for places, handle in self._asked:
            response = handle.result()
            failures.update(f"{failure.code}: {failure.message}" for _, failure in response.failures())
            for place, item in zip(places, response, strict=True):
                probability = item.probabilities[0][1]
                probabilities[place] = math.nan if probability is None else probability
        return Judgement(self._name, probabilities, failures)


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------- what is written


def _about(config: EvaluationConfig, prompts: Sequence[Prompt], models: Mapping[str, ModelInfo]) -> dict[str, Any]:
    settings = asdict(config)
    for name in ("policy", "against", "prompts", "rewards", "judge", "out", "services"):
        del settings[name]
    return {
        "policies": {
            label: {
                "source": source.source,
                "trained": None if source.trained is None else str(source.trained),
                "averaged": source.averaged,
            }
            for label, source in config.sources.items()
        },
        "settings": settings,
        "rewards": {name: {"fingerprint": models[name].fingerprint} for name in config.rewards},
        "versions": package_versions(),
        "prompts": {
            "file": config.prompts,
            "texts": [prompt.text for prompt in prompts],
            "tags": [prompt.tag for prompt in prompts],
            "seeds": image_seeds(len(prompts), config.seeds, config.seed),
        },
    }


def _grid(config: EvaluationConfig, prompts: Sequence[Prompt], found: Sequence[PolicyScores]) -> Image.Image:
    """Prompts from all over the file; under each picture the score of the first reward."""
    name = config.rewards[0]
    rows = []
    for p in spread(len(prompts), GRID_ROWS):
        pictures = [
            [_opened(config.out / IMAGES / each.label / image_name(p, s)) for s in range(config.seeds)]
            for each in found
        ]
        captions = [[f"{name} {number(score)}" for score in each.scores[name][p].tolist()] for each in found]
        rows.append(GridRow(prompts[p].text, pictures, captions))
    return draw_grid(rows, [str(source) for source in config.sources.values()])
