"""Checkpoints of a run on disk: whole or not there, kept or removed by rule, and refused by another run.

    FOLDER/step-00000120/
        run.json               step, score, identity of the run, size and SHA-256 of every other file
        state.json             all that is not a tensor
        weights.safetensors    one file for each part of the state that has tensors
        lora/                  what an export wrote, such as adapters in diffusers' format

A checkpoint is written under a temporary name in the same folder, synced to the disk, and renamed: a process that is
killed, or a disk that is full, leaves the one before. One process writes to a folder at a time. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, uint8

from trainer_client._state_files import pack, unpack

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL, _REMOVED = ".partial-", ".removed-"
_log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint could not be written, read or taken."""


class CheckpointMissing(CheckpointError):
    """There is no checkpoint, or not of that step."""


class CheckpointDamaged(CheckpointError):
    """A file of a checkpoint is missing, or not what was written."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint is of another policy, algorithm or configuration; the message names what differs."""


class CheckpointNotWritten(CheckpointError):
    """The disk refused (full, read-only); those before are untouched. ``__cause__`` is the disk's error."""


@dataclass(frozen=True)
class RunIdentity:
    """What must be equal for a checkpoint to be continued; ``versions`` of packages are recorded and only logged.

    ``policy`` is the class; ``policy_config`` and ``base_weights`` are digests (:func:`policy_identity`);
    ``configuration`` is all that a user can set, as JSON; ``fingerprints`` are those of the rewards by name.
    """

    algorithm: str
    policy: str
    policy_config: str
    base_weights: str
    configuration: Mapping[str, Any]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def differences(self, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """(saved, own) by dotted name, such as "configuration.optimizer.lr", where they differ; None: not there."""
        was, now = _flat(saved), _flat(json.loads(json.dumps(asdict(self))))
        return {key: (was.get(key), now.get(key)) for key in sorted({*was, *now}) if was.get(key) != now.get(key)}

    def check(self, saved: Mapping[str, Any], allow: Iterable[str] = ()) -> None:
        """Raises CheckpointMismatch in one line where an identity differs in what ``allow`` does not name.

        A name allows all below it: "configuration" allows "configuration.steps".
        """
        allowed = (*allow, "versions")
        found = self.differences(saved)
        for key, (was, now) in found.items():
            if _is_under(key, ("versions",)):
                _log.warning("resuming with %s %s; the checkpoint was written with %s", key, now, was)
        wrong = {key: pair for key, pair in found.items() if not _is_under(key, allowed)}
        if wrong:
            words = "; ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in wrong.items())
            raise CheckpointMismatch(f"the checkpoint is of another run: {words} (allow={sorted(wrong)} takes it)")


def policy_identity(network: nn.Module, config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The three policy fields of :class:`RunIdentity` for the network that is trained, before it is trained.

    ``config``: JSON values, of which private keys ("_name_or_path") are left out; None takes ``network.config``, which
    diffusers' models have. Call it before adapters are added. Takes seconds per GB. Raises TypeError for a
    configuration that JSON cannot hold.
    """
    chosen = dict(getattr(network, "config", {}) if config is None else config)
    # diffusers keeps the path and its version under private keys: they say where from, not what.
    chosen = {key: value for key, value in chosen.items() if not key.startswith("_")}
    return {
        "policy": f"{type(network).__module__}.{type(network).__qualname__}",
        "policy_config": hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest(),
        "base_weights": weights_digest(network.state_dict()),
    }


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, by name: equal bits, equal digest, on every device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def package_versions(*names: str) -> dict[str, str]:
    """Installed versions of those distributions that are installed; of the usual ones for no names."""
    usual = ("reward-trainer", "torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "safetensors")
    found = {}
    for name in names or usual:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: ``state`` by part, on the CPU; ``score`` None where none was given."""

    step: int
    score: float | None
    state: dict[str, Any]
    path: Path


class Checkpoints:
    """The checkpoints in one folder: the last ``keep`` and the one with the best score.

    Raises ValueError for ``keep`` below 1.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"at least the last checkpoint is kept, not the last {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def latest(self) -> int | None:
        """The last step; None without a checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The first step with the highest score; None where no checkpoint has one."""
        scores = {step: self._run_file(step)["score"] for step in self.steps()}
        known = {step: score for step, score in scores.items() if score is not None}
        return max(known, key=lambda step: (known[step], -step), default=None)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it is there or not."""
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        identity: RunIdentity,
        *,
        score: float | None = None,
        exports: Mapping[str, Callable[[Path], object]] | None = None,
    ) -> Path:
        """Write the state, each part a file, then remove checkpoints that are no longer kept.

        ``score``: higher is better. ``exports`` write other files into a subfolder of their name:
        ``{"lora": policy.save_lora}``. Raises CheckpointNotWritten where the disk refuses; ValueError for a score that
        is not finite, a bad name of a part, or a step that is not after the latest (see :meth:`rewind`); TypeError for
        what a checkpoint cannot hold; CheckpointDamaged where an older one cannot be compared (the new one is there).
        """
        if score is not None and not math.isfinite(score):
            raise ValueError(f"a score is finite, not {score}")
        latest = self.latest()
        if step < 0 or (latest is not None and step <= latest):
            raise ValueError(f"step {step} is not after {latest}, the last in {self.folder}; rewind() first")
        for name in (*state, *(exports or {})):
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
                raise ValueError(f"parts of a checkpoint have plain names, not {name!r}")
        packed = {name: pack(part, name) for name, part in state.items()}
        partial = self.folder / f"{_PARTIAL}{self.path(step).name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            partial.mkdir()
            _write_parts(partial, packed)
            for name, export in (exports or {}).items():
                (partial / name).mkdir()
                export(partial / name)
            run = {"format": FORMAT, "step": step, "score": score, "identity": asdict(identity)}
            (partial / "run.json").write_text(json.dumps({**run, "files": _manifest(partial)}, indent=1))
            _sync(partial)
            partial.rename(self.path(step))
            _sync_one(self.folder)
            self._prune()
        except (OSError, SafetensorError) as exc:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointNotWritten(
                f"the checkpoint of step {step} could not be written to {self.folder}: {exc}; whole are the steps "
                f"{self.steps()}"
            ) from exc
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return self.path(step)

    def load(self, identity: RunIdentity, *, step: int | None = None, allow: Iterable[str] = ()) -> Checkpoint:
        """Read and verify a checkpoint, by default the latest.

        ``allow`` names differences that are accepted (:meth:`RunIdentity.check`). What was saved is what comes back: a
        learning rate that was allowed to change must be set again after the optimizer's state was loaded. Raises
        CheckpointMissing, CheckpointDamaged, CheckpointMismatch.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self.steps():
            raise CheckpointMissing(f"no checkpoint of step {step} in {self.folder}; there are {self.steps()}")
        run, path = self._run_file(step), self.path(step)
        identity.check(run["identity"], allow)
        for name, file in run["files"].items():
            if not (path / name).is_file() or _file_entry(path / name) != file:
                raise CheckpointDamaged(f"{path / name} is not what was written; the checkpoints are {self.steps()}")
        trees = json.loads((path / "state.json").read_text())
        state = {name: unpack(tree, _tensors(path / f"{name}.safetensors")) for name, tree in trees.items()}
        return Checkpoint(step, run["score"], state, path)

    def rewind(self, step: int) -> None:
        """Remove all checkpoints after ``step``, to go on from there. Raises CheckpointMissing where it isn't."""
        if step not in self.steps():
            raise CheckpointMissing(f"no checkpoint of step {step} in {self.folder}; there are {self.steps()}")
        for later in reversed([each for each in self.steps() if each > step]):
            self._remove(later)

    def _run_file(self, step: int) -> dict[str, Any]:
        path = self.path(step) / "run.json"
        try:
            run: dict[str, Any] = json.loads(path.read_text())
            if run["format"] != FORMAT:
                raise CheckpointMismatch(f"{path} has format {run['format']}; this version reads {FORMAT}")
            if not {"step", "score", "identity", "files"} <= run.keys():
                raise KeyError("step, score, identity and files")
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise CheckpointDamaged(f"{path} is not what was written ({exc})") from exc
        return run

    def _prune(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best()}
        for step in self.steps():
            if step not in kept:
                self._remove(step)

    def _remove(self, step: int) -> None:
        # Renamed first: a process killed while it deletes files leaves nothing that looks like a checkpoint.
        removed = self.folder / f"{_REMOVED}{self.path(step).name}"
        self.path(step).rename(removed)
        shutil.rmtree(removed)

    def _sweep(self) -> None:
        for path in self.folder.iterdir():
            if path.name.startswith((_PARTIAL, _REMOVED)):
                shutil.rmtree(path)


def _write_parts(folder: Path, packed: Mapping[str, tuple[Any, dict[str, Tensor]]]) -> None:
    trees = folder / "state.json"
    trees.write_text(json.dumps({name: tree for name, (tree, _) in packed.items()}))
    for name, (_, tensors) in packed.items():
        if tensors:
            save_file(tensors, folder / f"{name}.safetensors")
            # safetensors makes files that only their owner can read, whatever the umask says.
            shutil.copymode(trees, folder / f"{name}.safetensors")


def _tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.exists() else {}


def _manifest(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _file_entry(path) for path in files}


def _file_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(folder: Path) -> None:
    """fsync every file and folder from the leaves up: a rename must not reach the disk before what it names."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _is_under(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)
