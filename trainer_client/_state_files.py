"""States of optimizers, schedules and generators -> JSON and named tensors, and back, without pickle.

A state is made of dict, list, tuple, Counter, str, int, float, bool, None and tensors. What JSON does not have is
written as an object with one key: ``{"$tensor": NAME}``, ``{"$tuple": [...]}``, ``{"$dict": [[key, value], ...]}`` for
keys that are integers, ``{"$counter": ...}``, ``{"$float": "nan"}``.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Json: TypeAlias = Any
"""What json.loads gives."""


def pack(state: Any, name: str = "state") -> tuple[Json, dict[str, Tensor]]:
    """The tree of ``state`` and its tensors, copied to the CPU, under their paths joined by "/".

    Raises TypeError for a value of another type, ValueError where two paths would be equal; both name the place, which
    begins with ``name``.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(state, (name,), tensors), tensors


def unpack(tree: Json, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`pack` was given. Raises KeyError for a tensor that isn't there, ValueError for an unknown mark."""
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    mark = next((key for key in tree if key.startswith("$")), None)
    if mark is None:
        return {key: unpack(value, tensors) for key, value in tree.items()}
    content = tree[mark]
    if mark == "$tensor":
        return tensors[content]
    if mark == "$float":
        return float(content)
    if mark == "$tuple":
        return tuple(unpack(value, tensors) for value in content)
    if mark in ("$dict", "$counter"):
        pairs = {key: unpack(value, tensors) for key, value in content}
        return Counter(pairs) if mark == "$counter" else pairs
    raise ValueError(f"unknown mark {mark!r}")


def _pack(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Json:
    if isinstance(value, Tensor):
        return {"$tensor": _add(value, path, tensors)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if value is None or isinstance(value, str | bool | int):
        return value
    if type(value) is list:
        return _sequence(value, path, tensors)
    if type(value) is tuple:
        return {"$tuple": _sequence(value, path, tensors)}
    if type(value) in (dict, OrderedDict, Counter):
        return _mapping(value, path, tensors)
    raise TypeError(f"{'/'.join(path)} is a {type(value).__name__}, which a checkpoint cannot hold")


def _sequence(values: list[Any] | tuple[Any, ...], path: tuple[str, ...], tensors: dict[str, Tensor]) -> list[Json]:
    return [_pack(value, (*path, str(index)), tensors) for index, value in enumerate(values)]


def _mapping(values: dict[Any, Any], path: tuple[str, ...], tensors: dict[str, Tensor]) -> Json:
    packed = []
    for key, value in values.items():
        if type(key) not in (str, int):
            raise TypeError(f"{'/'.join(path)} has the key {key!r}; keys are strings or integers")
        packed.append([key, _pack(value, (*path, str(key)), tensors)])
    if type(values) is Counter:
        return {"$counter": packed}
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in packed):
        return dict(packed)
    return {"$dict": packed}


def _add(tensor: Tensor, path: tuple[str, ...], tensors: dict[str, Tensor]) -> str:
    name = "/".join(path[1:]) or path[0]
    if name in tensors:
        raise ValueError(f"two tensors of {path[0]} are called {name}")
    # A copy even on the CPU: safetensors refuses tensors that share memory, as tied weights do.
    tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return name
