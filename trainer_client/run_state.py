"""The state of a run while it trains: what a checkpoint saves and puts back, on one rank or several."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from trainer_client import distributed
from trainer_client._state_files import pack, unpack
from trainer_client.checkpoint import Checkpoint, CheckpointMismatch, Checkpoints, RunIdentity

_RANKS = "ranks"


@runtime_checkable
class Stateful(Protocol):
    """An optimizer, a schedule, a module, :class:`PromptOrder`, or whatever keeps to their habit."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


Part: TypeAlias = Stateful | torch.Generator | dict[str, Tensor] | dict[str, Any]
"""Something with a state; a generator; tensors by name (weights, averages), overwritten in place; or a dict of plain
values (counters), replaced in place."""


class RunState:
    """The parts of a run by name, and the random numbers of python, numpy and torch, on the CPU and every GPU.

    ``RunState(weights=policy.weights.named_tensors(), ema=..., optimizer=..., schedule=..., order=..., noise=generator,
    counters={"step": 0})``. Tensors must be the live ones. Generators and random numbers are each rank's own; all other
    parts must be equal on every rank (sharded parameters are not handled), and the main process's are saved. Raises
    ValueError for the name "ranks", TypeError for a part of another kind.
    """

    def __init__(self, **parts: Part) -> None:
        if _RANKS in parts:
            raise ValueError(f"a part cannot be called {_RANKS!r}: the ranks' own random numbers are")
        for name, part in parts.items():
            if not isinstance(part, torch.Generator | dict | Stateful):
                raise TypeError(f"{name} is a {type(part).__name__}, which has no state")
        self.parts = parts

    def save(
        self,
        checkpoints: Checkpoints,
        step: int,
        identity: RunIdentity,
        *,
        score: float | None = None,
        exports: Mapping[str, Callable[[Path], object]] | None = None,
    ) -> None:
        """Save a checkpoint; all ranks call it, the main process writes. See :meth:`Checkpoints.save`.

        Raises as that does on the main process, and RankFailed on the others.
        """
        ranks = _gather_states({"random": random_state(), **self._generators()})

        def write() -> None:
            checkpoints.save(step, {**self._shared(), _RANKS: ranks}, identity, score=score, exports=exports)

        distributed.on_main(write)

    def load(
        self, checkpoints: Checkpoints, identity: RunIdentity, *, step: int | None = None, allow: Iterable[str] = ()
    ) -> Checkpoint:
        """Put a checkpoint's state into the parts, in place; every rank reads the folder, all the same step.

        Nothing is changed where names, shapes or dtypes of weights do not fit. Raises as :meth:`Checkpoints.load`;
        CheckpointMismatch where parts differ or do not take their state, or the number of ranks unless ``allow`` names
        "ranks" (every rank then goes on with the first one's random numbers, so noise should come from seeds of
        samples); RankFailed where another rank failed.
        """
        allowed = tuple(allow)
        step = distributed.gather_json(checkpoints.latest() if step is None else step)[0]
        try:
            loaded = checkpoints.load(identity, step=step, allow=allowed)
            self._restore(loaded.state, "ranks" in allowed)
        except Exception as error:
            distributed.raise_together(error)
            raise
        distributed.raise_together(None)
        return loaded

    def _restore(self, saved: Mapping[str, Any], other_ranks: bool) -> None:
        state = dict(saved)
        ranks, count = state.pop(_RANKS), distributed.world_size()
        if len(ranks) != count and not other_ranks:
            raise CheckpointMismatch(
                f"the checkpoint is of {len(ranks)} ranks, and there are {count} (allow=['ranks'] takes it)"
            )
        own = dict(ranks[distributed.rank() if len(ranks) == count else 0])
        randomness = own.pop("random")
        state |= own
        self._check(state)
        for name, part in self.parts.items():
            _restore(name, part, state[name])
        # Last: what was restored before may have drawn numbers.
        restore_random_state(randomness)

    def _shared(self) -> dict[str, Any]:
        parts = {name: part for name, part in self.parts.items() if not isinstance(part, torch.Generator)}
        return {name: part if isinstance(part, dict) else part.state_dict() for name, part in parts.items()}

    def _generators(self) -> dict[str, Any]:
        return {name: _generator_state(g) for name, g in self.parts.items() if isinstance(g, torch.Generator)}

    def _check(self, state: Mapping[str, Any]) -> None:
        if differ := sorted(state.keys() ^ self.parts.keys()):
            raise CheckpointMismatch(f"the checkpoint and the run differ in their parts: {', '.join(differ)}")
        for name, part in self.parts.items():
            if isinstance(part, dict):
                wrong = sorted(str(key) for key in {*part, *state[name]} if not _fits(part, state[name], key))
                if wrong:
                    raise CheckpointMismatch(f"{name} does not fit: {', '.join(wrong[:3])} ({len(wrong)} in all)")


def random_state() -> dict[str, Any]:
    """States of the global generators: python, numpy (the legacy one), torch on the CPU and on every CUDA device."""
    legacy: Any = np.random.get_state(legacy=False)
    keys = legacy["state"]["key"]
    return {
        "python": random.getstate(),
        "numpy": {
            "key": torch.from_numpy(keys.astype(np.int64)),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` gave. Raises CheckpointMismatch for another number of CUDA devices."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) != devices:
        raise CheckpointMismatch(f"the checkpoint has random numbers of {len(state['cuda'])} GPUs; there are {devices}")
    random.setstate(state["python"])
    kept = state["numpy"]
    key = kept["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, kept["pos"], kept["has_gauss"], kept["gauss"]))
    torch.set_rng_state(state["torch"])
    if devices:
        torch.cuda.set_rng_state_all(state["cuda"])


def rewind_log(path: str | Path, step: int) -> None:
    """Drop from a log of JSON lines, each with a "step", what came after ``step`` and a last line that was torn.

    Rows that a killed run wrote after its last checkpoint are then not written twice. Atomic. No file: nothing to do.
    Raises ValueError for a line that is not such JSON, unless it is the torn last one.
    """
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _gather_states(state: dict[str, Any]) -> list[Any]:
    tree, tensors = pack(state)
    trees, contents = distributed.gather_json(tree), distributed.gather_bytes(save(tensors))
    return [unpack(each, load(content)) for each, content in zip(trees, contents, strict=True)]


def _generator_state(generator: torch.Generator) -> dict[str, Any]:
    return {"device": generator.device.type, "state": generator.get_state()}


def _fits(part: dict[str, Any], saved: Mapping[str, Any], key: str) -> bool:
    own, other = part.get(key), saved.get(key)
    if isinstance(own, Tensor) or isinstance(other, Tensor):
        return (
            isinstance(own, Tensor)
            and isinstance(other, Tensor)
            and (own.shape, own.dtype) == (other.shape, other.dtype)
        )
    return True


@torch.no_grad()
def _restore(name: str, part: Part, saved: Any) -> None:
    if isinstance(part, torch.Generator):
        if saved["device"] != part.device.type:
            raise CheckpointMismatch(f"{name} was a generator on {saved['device']} and is on {part.device.type}")
        part.set_state(saved["state"])
    elif isinstance(part, dict):
        plain = {key: value for key, value in saved.items() if not isinstance(value, Tensor)}
        for key in [key for key, value in part.items() if not isinstance(value, Tensor) and key not in plain]:
            del part[key]
        for key, value in saved.items():
            if isinstance(value, Tensor):
                part[key].copy_(value)
        part.update(plain)
    else:
        try:
            part.load_state_dict(saved)
        except (ValueError, RuntimeError, KeyError) as exc:
            raise CheckpointMismatch(f"{name} does not take the checkpoint's state: {exc}") from exc
