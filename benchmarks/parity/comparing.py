"""Cases of an ``index.json`` with their arrays, and comparisons collected into topics.

An error is the largest |found - wanted| / (atol scale + rtol |wanted|) over all elements: 1 is what is accepted. The
scale is the largest |wanted| of the array, at most 1: gradients of 1e-6 are not lost in an atol of 1e-5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.parity import Topic, largest, parity_kind


@dataclass(frozen=True)
class Tolerance:
    """Relative part, and the part that is absolute for arrays with values of 1 or more."""

    rtol: float
    atol: float

    def __str__(self) -> str:
        return f"in units of rtol {self.rtol:g}, atol {self.atol:g}"


FLOAT32 = Tolerance(1e-4, 1e-5)
LOG_PROB = Tolerance(0.0, 1e-4)
DANCE = Tolerance(5e-4, 1e-5)
FLOAT64 = Tolerance(1e-6, 1e-9)
EXACT = Tolerance(0.0, 0.0)


@dataclass(frozen=True)
class Case:
    """One case: its hyper-parameters and its arrays, as tensors of the stored dtype (texts stay numpy)."""

    cfg: dict[str, Any]
    arrays: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        found = self.arrays[name]
        if not isinstance(found, Tensor):
            raise TypeError(f"{name} holds text: {found}")
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.arrays


@dataclass
class Comparisons:
    """Errors by topic, in the order in which topics come."""

    prefix: str = ""
    errors: dict[tuple[str, Tolerance, str], list[float]] = field(default_factory=dict)

    def add(self, topic: str, found: Any, wanted: Any, tolerance: Tolerance, note: str = "") -> None:
        """Compare arrays, tensors or numbers of equal shape; another shape is an infinite error."""
        self.errors.setdefault((self.prefix + topic, tolerance, note), []).append(_error(found, wanted, tolerance))

    def require(self, topic: str, holds: bool, note: str = "") -> None:
        """A yes-or-no comparison."""
        self.add(topic, 1.0 if holds else 0.0, 1.0, EXACT, note)

    def topics(self) -> list[Topic]:
        """One topic for each name, tolerance and note."""
        return [
            Topic(name, len(errors), largest(errors), 1.0 if tolerance != EXACT else 0.0, note or _note(tolerance))
            for (name, tolerance, note), errors in self.errors.items()
        ]


def _note(tolerance: Tolerance) -> str:
    return "exact" if tolerance == EXACT else str(tolerance)


def _error(found: Any, wanted: Any, tolerance: Tolerance) -> float:
    a, b = _array(found), _array(wanted)
    if a.shape != b.shape:
        return float("inf")
    if tolerance == EXACT:
        return 0.0 if np.array_equal(a, b) else float("inf")
    scale = min(1.0, float(np.abs(b).max(initial=0.0)))
    accepted = tolerance.atol * scale + tolerance.rtol * np.abs(b)
    # Where nothing is accepted, equal numbers have no error and others an infinite one.
    scaled = np.divide(np.abs(a - b), accepted, out=np.where(a == b, 0.0, np.inf), where=accepted != 0)
    return largest(float(value) for value in scaled.ravel())


def _array(values: Any) -> Any:
    values = values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(values, dtype=np.float64)


Check = Callable[[Case, Comparisons], None]
_CHECKS: dict[str, Check] = {}


def case_kind(kind: str) -> Callable[[Check], Check]:
    """Register what checks the cases of one ``kind`` of an index."""

    def add(check: Check) -> Check:
        _CHECKS[kind] = check
        return check

    return add


def topics_of_npz(file: Path) -> Sequence[Topic]:
    """Topics of one case file; raises ValueError for one that the index beside it doesn't list or nobody handles."""
    index = json.loads((file.parent / "index.json").read_text("utf-8"))
    entry = next((entry for entry in index.values() if entry["file"] == file.name), None)
    if entry is None:
        raise ValueError(f"{file} is not in the index.json beside it")
    if entry["kind"] not in _CHECKS:
        raise ValueError(f"{file} is of the unknown kind {entry['kind']!r}")
    with np.load(file, allow_pickle=False) as stored:
        arrays = {name: _tensor(stored[name]) for name in stored.files}
    comparisons = Comparisons(f"{entry['kind']}: ")
    _CHECKS[entry["kind"]](Case(entry["cfg"], arrays), comparisons)
    return comparisons.topics()


def _tensor(array: Any) -> Any:
    return array if array.dtype.kind in "US" else torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def register_folder(folder: str) -> None:
    """Handle the .npz files of every folder of this name."""
    parity_kind(f"{folder}/*.npz")(topics_of_npz)


def numbers(values: Any) -> Tensor:
    """Nested lists of a JSON file -> float32 tensor; infinities and NaN are written there as strings."""
    if isinstance(values, list):
        return torch.tensor([numbers(value).tolist() for value in values])
    return torch.tensor(float(values))
