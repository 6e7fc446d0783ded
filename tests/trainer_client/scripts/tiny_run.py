"""A run small enough for a test: a random Stable Diffusion 3 of 32x32 pixels, and a reward server that can fail."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.trainer_client.conftest import RewardServer, answer_well, serving
from tests.trainer_client.policies.tiny_pipelines import build
from trainer_client.cli import app
from trainer_client.config import parse_config
from trainer_client.flow_grpo import FlowGRPOConfig

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = ("a red circle", "two blue squares", "a green triangle", "one yellow star above a circle")
FINGERPRINTS = {"mean": "sha256:feed", "heldout": "sha256:beef"}


def save_policy(folder: Path) -> Path:
    """A Stable Diffusion 3 without T5 as a folder of diffusers."""
    build("sd3", text_encoder_3=False).save_pretrained(folder)
    return folder


def values(folder: Path, source: Path, url: str, /, **overrides: Any) -> dict[str, Any]:
    """A configuration as TOML would give it; ``overrides`` of a section replace its values one by one."""
    prompts = folder / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("\n".join(PROMPTS))
    found: dict[str, Any] = {
        "prompts": str(prompts),
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 4,
        "train_batch_size": 8,
        "noise_level": 0.7,
        "policy": {"source": str(source), "device": "cpu", "weights": "full", "max_sequence_length": 0},
        "sampling": {"steps": 4, "batch_size": 8},
        "rewards": {"services": [url], "models": {"mean": 1.0}, "patience": 60, "start_patience": 30},
        # An epsilon this large makes AdamW's step proportional to the gradient: signs of noise would be compared else.
        "optimizer": {"lr": 0.5, "eps": 1.0, "weight_decay": 0.0, "max_grad_norm": 1e6, "betas": [0.5, 0.9]},
        "ema": {"every": 1},
        "logging": {"tensorboard": False, "progress": False},
        "checkpoints": {"every": 100},
    }
    for name, value in overrides.items():
        found[name] = {**found.get(name, {}), **value} if isinstance(value, dict) else value
    return found


def config(folder: Path, source: Path, url: str, /, **overrides: Any) -> FlowGRPOConfig:
    """The same, checked."""
    return parse_config(FlowGRPOConfig, values(folder, source, url, **overrides))


def coarse(brightness: float) -> float:
    """The reward of an image by its mean in [0, 1]: in steps of 1/64 of a grey level, in which the spread of a group
    is some thirty. A single byte that another batch size rounds otherwise does not change it."""
    return round(brightness * 255 * 64) / 64


def fails(reward: float) -> bool:
    """The rule by which samples have no reward: about one in four, by the image alone."""
    return round(reward * 64) % 4 == 0


@contextlib.contextmanager
def rewards(*, failures: bool = False, port: int = 0) -> Iterator[RewardServer]:
    """A server whose "mean" and "heldout" are the coarse brightness; with ``failures`` some samples have no score."""

    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        for result in answer.get("results", []):
            for name, scores in result["scores"].items():
                result["scores"][name] = kept = [coarse(score) for score in scores]
                for k, reward in enumerate(kept):
                    result["total"][k] = reward
                    if failures and fails(reward):
                        kept[k] = result["total"][k] = None
                        result["errors"][k].append({"model": name, "code": "model_error", "message": "it is dark"})
        return answer

    with serving(dict(FINGERPRINTS), port=port) as server:
        server.default = lambda handler, received: answer_well(handler, received, edit)
        yield server


def rows(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def events(out: Path, kind: str) -> list[str]:
    """The texts of the events of one kind."""
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line["text"] for line in lines if line["kind"] == kind]


def untimed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock or the wire decides."""
    return [
        {key: value for key, value in row.items() if key != "seconds" and not key.startswith(("time/", "wire/"))}
        for row in found
    ]


def checkpoint(out: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return out / "checkpoints" / f"step-{step:08d}"


def tensors(out: Path, step: int, part: str = "weights") -> dict[str, Tensor]:
    """The tensors of a part of a checkpoint."""
    return load_file(checkpoint(out, step) / f"{part}.safetensors")


def first_weights(out: Path) -> dict[str, Tensor]:
    """The weights of a run's policy before training; of a run that trains the whole network."""
    source = json.loads((out / "config.json").read_text())["configuration"]["policy"]["source"]
    stored = load_file(Path(source) / "transformer" / "diffusion_pytorch_model.safetensors")
    return {name: tensor for name, tensor in stored.items() if name != "pos_embed.pos_embed"}  # a constant table


def state(out: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds beside tensors, without the clock, and without the global generators: clients draw their
    waiting times from one, and no sample depends on them."""
    found: dict[str, Any] = json.loads((checkpoint(out, step) / "state.json").read_text())
    found["counters"].pop("seconds")
    found.pop("ranks")
    return found


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """How far apart two sets of weights are, relative to how far the second has moved from ``start``."""
    assert one.keys() == other.keys() == start.keys()
    apart = sum(float((one[key].double() - other[key].double()).square().sum()) for key in one)
    moved = sum(float((other[key].double() - start[key].double()).square().sum()) for key in one)
    assert moved > 0
    return (apart / moved) ** 0.5


def toml(settings: Mapping[str, Any]) -> list[str]:
    """Nested values as ``--set key=value``."""
    flat: list[str] = []

    def walk(prefix: str, tree: Mapping[str, Any]) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                flat.extend(["--set", f"{prefix}{key}={json.dumps(value)}"])

    walk("", settings)
    return flat


def arguments(settings: Mapping[str, Any], out: Path, *more: str, algorithm: str = "flow-grpo") -> list[str]:
    """The arguments of ``reward-trainer train``."""
    return ["train", algorithm, *toml(settings), "--out", str(out), *more]


def launch(arguments: list[str], log: Path, **environment: str) -> BaseProcess:
    """``reward-trainer`` in a process of its own, whose output goes to the file ``log``.

    It is forked from a server that has imported torch and diffusers, so that a test can afford many of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # the server is started here, once, and imports by these
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        process = context.Process(target=_reward_trainer, args=(arguments, str(log), environment))
        process.start()
    return process


def _reward_trainer(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment | {"COLUMNS": "1000"})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    app(arguments)


def finish(process: BaseProcess, log: Path, code: int = 0, seconds: float = 240) -> str:
    """Wait for a process to end with ``code``; its output."""
    process.join(seconds)
    said = log.read_text() if log.exists() else ""
    process.kill()
    process.join()
    assert process.exitcode == code, said
    return said
