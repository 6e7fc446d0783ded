"""GenEval's rules: from the objects found in a picture and their colours to its three scores.

Source: Ghosh et al., GenEval, 2023 (arXiv:2310.11513) for the non-strict rule, and the reward server of Flow-GRPO
(Liu et al., 2025, arXiv:2505.05470) for the strict rule and the soft score that policies are trained with. Pure
functions over plain values: nothing here sees a picture or a network.

A row of GenEval's own jsonl says what is asked for::

    {"tag": "position", "include": [{"class": "dog", "count": 1},
     {"class": "cat", "count": 1, "position": ["left of", 0]}], "exclude": [...], "prompt": "..."}

``correct``  GenEval's rule, 0 or 1: at least ``count`` objects; the ``count`` most confident ones all have the colour
             and stand in the relation; no class of ``exclude`` is there ``count`` times.
``strict``   0 or 1: exactly ``count`` objects; ``exclude`` is not looked at.
``soft``     the strict rule with partial credit, at most 1. It is below 0 where many more objects are found than asked
             for (16 instead of 1 give -14).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.backbones.detector import Box, Detection
from models.base import InputError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

CONFIDENCE = 0.3
COUNTING_CONFIDENCE = 0.9
MAX_OBJECTS = 16
MAX_ENTRIES = 32
"""Most entries of include and of exclude. GenEval has two; a thousand relations of 16 objects take seconds to judge."""
_EXTENT_SHARE = 0.1
_AXIS_SHARE = 0.5

Found = Mapping[str, Sequence[Detection]]
"""The objects of each class that was found, by falling confidence."""

Colors = Mapping[str, Sequence[str]]
"""For each class of :func:`wanted_colors`: the colours of its most confident objects, in the order of ``Found``."""


@dataclass(frozen=True)
class Expectation:
    """``count`` objects of the class ``name``; all of one colour; all in a relation to those of an earlier one."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Exclusion:
    """Wrong where ``count`` or more objects of the class ``name`` are found."""

    name: str
    count: int


@dataclass(frozen=True)
class Task:
    """What a picture should show."""

    tag: str
    include: tuple[Expectation, ...]
    exclude: tuple[Exclusion, ...] = ()

    @property
    def confidence(self) -> float:
        """Objects count above this confidence."""
        return COUNTING_CONFIDENCE if self.tag == "counting" else CONFIDENCE


@dataclass(frozen=True)
class Verdict:
    """The three scores, and what failed in words: by the strict rule, then excluded classes that were found."""

    correct: bool
    strict: bool
    soft: float
    failures: tuple[str, ...]


def parse_task(metadata: Mapping[str, Any], classes: Collection[str]) -> Task:
    """The task of a sample's metadata; ``classes`` are those that the detector knows.

    Raises :class:`InputError`: ``metadata_missing`` (neither tag nor include), ``unknown_tag``, ``unknown_class``,
    ``unknown_color``, ``unknown_relation``, or ``metadata_invalid`` naming the field. Other keys of the metadata are
    not GenEval's and are left alone; inside an expectation they are an error.
    """
    if "tag" not in metadata and "include" not in metadata:
        raise InputError("geneval needs the metadata of the prompt: tag and include", code="metadata_missing")
    tag = metadata.get("tag")
    if tag not in TAGS:
        raise InputError(f"metadata.tag must be one of {', '.join(TAGS)}", code="unknown_tag")
    excluded = metadata.get("exclude")
    include = [
        _expectation(entry, index, classes) for index, entry in enumerate(_entries(metadata.get("include"), "include"))
    ]
    if not include:
        raise _invalid("include must not be empty")
    exclude = [
        _exclusion(entry, f"exclude[{index}]", classes)
        for index, entry in enumerate(_entries([] if excluded is None else excluded, "exclude"))
    ]
    return Task(tag, tuple(include), tuple(exclude))


def _invalid(message: str) -> InputError:
    return InputError(f"metadata.{message}", code="metadata_invalid")


def _entries(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise _invalid(f"{name} must be a list")
    if len(value) > MAX_ENTRIES:
        raise _invalid(f"{name} must have at most {MAX_ENTRIES} entries")
    return value


def _class_and_count(entry: Any, where: str, classes: Collection[str], keys: Collection[str]) -> tuple[str, int]:
    if not isinstance(entry, Mapping):
        raise _invalid(f"{where} must be an object")
    if not entry.keys() <= set(keys):
        raise _invalid(f"{where} may hold {', '.join(keys)} and nothing else")
    name, count = entry.get("class"), entry.get("count")
    if not isinstance(name, str):
        raise _invalid(f"{where}.class must be a string")
    if name not in classes:
        raise InputError(f"metadata.{where}.class is not a class that the detector knows", code="unknown_class")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise _invalid(f"{where}.count must be a positive integer")
    return name, count


def _exclusion(entry: Any, where: str, classes: Collection[str]) -> Exclusion:
    return Exclusion(*_class_and_count(entry, where, classes, ("class", "count")))


def _expectation(entry: Any, index: int, classes: Collection[str]) -> Expectation:
    where = f"include[{index}]"
    name, count = _class_and_count(entry, where, classes, ("class", "count", "color", "position"))
    color = entry.get("color")
    if color is not None and color not in COLORS:
        raise InputError(f"metadata.{where}.color must be one of {', '.join(COLORS)}", code="unknown_color")
    position = entry.get("position")
    if position is None:
        return Expectation(name, count, color)
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise _invalid(f"{where}.position must be a relation and the index of an earlier include")
    relation, target = position
    if relation not in RELATIONS:
        raise InputError(f"metadata.{where}.position[0] must be one of {', '.join(RELATIONS)}", code="unknown_relation")
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < index:
        raise _invalid(f"{where}.position[1] must be the index of an earlier include")
    return Expectation(name, count, color, (relation, target))


def select(detections: Iterable[Detection], confidence: float) -> dict[str, list[Detection]]:
    """What counts as found: by class, above ``confidence``, most confident first, at most 16 of a class; no NMS."""
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.confidence):
        if detection.confidence > confidence:
            found.setdefault(detection.name, []).append(detection)
    return {name: objects[:MAX_OBJECTS] for name, objects in found.items()}


def wanted_colors(task: Task, found: Found) -> dict[str, int]:
    """Class -> how many of its most confident objects need their colour known for :func:`judge`."""
    wanted: dict[str, int] = {}
    for expectation in task.include:
        if expectation.color is not None and len(found.get(expectation.name, ())) >= expectation.count:
            wanted[expectation.name] = max(expectation.count, wanted.get(expectation.name, 0))
    return wanted


def relations(placed: Box, target: Box) -> set[str]:
    """Which of the four relations hold of ``placed`` to ``target``.

    The offset of the centres is shortened per axis by a tenth of both extents (not below 0) and divided by the length
    of the whole offset; more than half of it along an axis makes the relation.
    """
    offsets = [(placed[i] + placed[i + 2]) / 2 - (target[i] + target[i + 2]) / 2 for i in (0, 1)]
    extents = [placed[i + 2] - placed[i] + target[i + 2] - target[i] for i in (0, 1)]
    length = math.hypot(*offsets)
    if length == 0:
        return set()
    dx, dy = (
        math.copysign(max(abs(offset) - _EXTENT_SHARE * extent, 0.0), offset) / length
        for offset, extent in zip(offsets, extents, strict=True)
    )
    holds = {
        "left of": dx < -_AXIS_SHARE,
        "right of": dx > _AXIS_SHARE,
        "above": dy < -_AXIS_SHARE,
        "below": dy > _AXIS_SHARE,
    }
    return {relation for relation, true in holds.items() if true}


def judge(task: Task, found: Found, colors: Colors, *, relation_quirk: bool = True) -> Verdict:
    """The scores of what was ``found``; ``colors`` holds what :func:`wanted_colors` asked for.

    ``relation_quirk``: the published training reward credits a relation that does not hold with 0 and then with 1 all
    the same, so that it loses half; False leaves the 1 out.
    """
    credits, failures = _strictly(task, found, colors, relation_quirk)
    excluded = [
        f"found {len(found[entry.name])} {entry.name}, expected fewer than {entry.count}"
        for entry in task.exclude
        if len(found.get(entry.name, ())) >= entry.count
    ]
    return Verdict(
        correct=_leniently(task, found, colors) and not excluded,
        strict=not failures,
        soft=sum(credits) / len(credits),
        failures=(*failures, *excluded),
    )


def _holds(relation: str, objects: Sequence[Detection], targets: Sequence[Detection]) -> bool:
    return all(relation in relations(placed.box, target.box) for placed in objects for target in targets)


def _leniently(task: Task, found: Found, colors: Colors) -> bool:
    matched: list[Sequence[Detection]] = []
    for expectation in task.include:
        objects = found.get(expectation.name, ())[: expectation.count]
        if len(objects) < expectation.count:
            return False
        if expectation.color and _with_color(expectation, colors) < expectation.count:
            return False
        if expectation.position and not _holds(expectation.position[0], objects, matched[expectation.position[1]]):
            return False
        matched.append(objects)
    return True


def _with_color(expectation: Expectation, colors: Colors) -> int:
    return list(colors[expectation.name][: expectation.count]).count(str(expectation.color))


def _strictly(task: Task, found: Found, colors: Colors, relation_quirk: bool) -> tuple[list[float], list[str]]:
    """Credits (their mean is the soft score) and failures (none is the strict rule)."""
    credits: list[float] = []
    failures: list[str] = []
    matched: list[Sequence[Detection] | None] = []  # None: this expectation failed, nothing can be placed by it
    for expectation in task.include:
        objects = found.get(expectation.name, ())
        before = len(failures)
        credits.append(1 - abs(expectation.count - len(objects)) / expectation.count)
        if len(objects) != expectation.count:
            failures.append(f"found {len(objects)} {expectation.name}, expected {expectation.count}")
            if expectation.color or expectation.position:
                credits.append(0.0)
        elif expectation.color:
            right = _with_color(expectation, colors)
            credits.append(1 - abs(expectation.count - right) / expectation.count)
            if right != expectation.count:
                seen = ", ".join(colors[expectation.name][: expectation.count])
                failures.append(
                    f"expected {expectation.count} {expectation.color} {expectation.name}, their colours: {seen}"
                )
        if expectation.position and len(failures) == before:
            relation, target = expectation.position
            targets = matched[target]
            wanted = f"{expectation.name} {relation} {task.include[target].name}"
            if targets is None:
                credits.append(0.0)
                failures.append(f"expected {wanted}, which was not found as asked")
            elif _holds(relation, objects, targets):
                credits.append(1.0)
            else:
                credits += [0.0, 1.0] if relation_quirk else [0.0]
                failures.append(f"expected {wanted}")
        matched.append(objects if len(failures) == before else None)
    return credits, failures
