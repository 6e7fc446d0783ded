"""A policy with what a run taught it: adapters in diffusers' form, a checkpoint, or the folder of a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer_client._state_files import unpack
from trainer_client.checkpoint import CheckpointDamaged, CheckpointMissing, Checkpoints
from trainer_client.policies import Policy

TRAINED_PART, AVERAGED_PART = "weights", "ema"
"""Parts of a run's state: the weights that the optimizer changes, and their average; by ``named_tensors()`` key."""
EXPORTED_LORA = "lora"
"""The folder of a checkpoint with adapters in diffusers' form; a run that trains the whole network has none."""


@dataclass(frozen=True)
class TrainedWeights:
    """Where trained weights lie: ``adapters`` in diffusers' form, a ``checkpoint``'s folder, or both."""

    adapters: Path | None
    checkpoint: Path | None = None


def locate(path: str | Path) -> TrainedWeights:
    """What ``path`` is: adapters (a folder or a .safetensors file), a checkpoint, or a run, of which the last
    checkpoint counts. Raises CheckpointMissing in one line where it is none of them."""
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return TrainedWeights(path)
    if (path / "run.json").is_file():
        adapters = path / EXPORTED_LORA
        return TrainedWeights(adapters if adapters.is_dir() else None, path)
    for folder in (path / "checkpoints", path):
        checkpoints = Checkpoints(folder)
        if (latest := checkpoints.latest()) is not None:
            return locate(checkpoints.path(latest))
    if any(path.glob("*.safetensors")):
        return TrainedWeights(path)
    raise CheckpointMissing(f"{path} holds no adapters (*.safetensors), no checkpoint and no run with one")


def apply(policy: Policy, found: TrainedWeights, *, averaged: bool = False) -> None:
    """Give ``policy``, fresh from its source, trained weights; with ``averaged`` their average over the run.

    Raises CheckpointMissing where there is no average, CheckpointDamaged where a file is not what was written,
    ValueError for weights that do not fit the policy.
    """
    if found.checkpoint is None:
        if averaged:
            raise CheckpointMissing(f"{found.adapters} are adapters alone; averaged weights are in a checkpoint")
        _load_adapters(policy, found.adapters)
        return
    name = AVERAGED_PART if averaged else TRAINED_PART
    tensors = read_part(found.checkpoint, name)
    if not tensors:
        words = "averaged weights" if averaged else "weights"
        raise CheckpointMissing(f"{found.checkpoint} has no {words} (no part {name!r} of the state)")
    if found.adapters is None:
        policy.train_full()
    else:
        _load_adapters(policy, found.adapters)
    policy.weights.load(tensors)


def _load_adapters(policy: Policy, adapters: Path | None) -> None:
    try:
        policy.load_lora(str(adapters))
        known = bool(policy.weights.named_tensors())
    except AttributeError as exc:  # diffusers only warns when no key is one of the network's; peft is then not there
        if hasattr(policy.network, "peft_config"):
            raise
        raise ValueError(f"{adapters} has no adapters of {type(policy.network).__name__}") from exc
    if not known:
        raise ValueError(f"{adapters} has no adapters of {type(policy.network).__name__}")


def read_part(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint's state, verified; empty where it has no such part.

    Raises CheckpointDamaged where a file is not what was written.
    """
    file = f"{name}.safetensors"
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / "run.json").read_text())["files"]
        trees = json.loads((checkpoint / "state.json").read_text())
        if name not in trees or file not in manifest:
            return {}
        with (checkpoint / file).open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != manifest[file]["sha256"]:
            raise CheckpointDamaged(f"{checkpoint / file} is not what was written")
        part: dict[str, Tensor] = unpack(trees[name], load_file(checkpoint / file))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as exc:
        raise CheckpointDamaged(f"{checkpoint} is not what was written ({exc})") from exc
    return part
