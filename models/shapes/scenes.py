"""Random prompts, scenes that fulfil them, and scenes that fail them in a known number of ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from models.shapes.prompts import RELATIONS, TASKS, Include, Prompt, Relation, Task, compose
from models.shapes.rules import Found, exact_score
from models.shapes.world import BACKGROUNDS, COLORS, GRID, SHAPES, Scene, SceneObject, place

Cell = tuple[int, int]
CELLS: tuple[Cell, ...] = tuple((row, column) for row in range(GRID) for column in range(GRID))
_ATTEMPTS = 1000


@dataclass(frozen=True)
class Split:
    """Which compositions may occur: no (shape, colour) of ``held_out`` and no two colours of ``held_out_pairs``.

    ``admits`` is asked of every scene and every prompt, so a held-out composition is absent by construction.
    """

    held_out: frozenset[tuple[str, str]] = frozenset()
    held_out_pairs: frozenset[frozenset[str]] = frozenset()

    def admits(self, things: Prompt | Scene) -> bool:
        """Whether neither a held-out (shape, colour) nor a held-out pair of colours occurs."""
        entries = things.include if isinstance(things, Prompt) else things.objects
        if any((entry.shape, entry.color) in self.held_out for entry in entries):
            return False
        colors = {entry.color for entry in entries if entry.color}
        return not any(frozenset(pair) in self.held_out_pairs for pair in combinations(colors, 2))


EVERYTHING = Split()


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _two(rng: np.random.Generator, options: list[str]) -> tuple[str, str]:
    first, second = rng.choice(len(options), 2, replace=False).tolist()
    return options[first], options[second]


def random_prompt(rng: np.random.Generator, task: Task | None = None, *, paraphrase: bool = True) -> Prompt:
    """A random prompt of ``task``, or of a random one. Colours are named where the task needs them, and in three of
    four counting and position prompts."""
    task = TASKS[int(rng.integers(len(TASKS)))] if task is None else task
    shapes, colors = list(SHAPES), list(COLORS)
    (first, second), (one, two) = _two(rng, shapes), _two(rng, colors)
    colored = rng.random() < 0.75
    if task == "single_object":
        include: tuple[Include, ...] = (Include(first),)
    elif task == "colors":
        include = (Include(first, 1, one),)
    elif task == "counting":
        include = (Include(first, int(rng.integers(2, 5)), one if colored else None),)
    elif task == "two_object":
        include = (Include(first), Include(second))
    elif task == "color_attr":
        include = (Include(first, 1, one), Include(second, 1, two))
    else:
        relation: Relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
        include = (
            Include(first, 1, one if colored else None),
            Include(second, 1, two if colored else None, (relation, 0)),
        )
    return compose(task, include, rng if paraphrase else None)


def _cells_in_relation(relation: Relation) -> list[tuple[Cell, Cell]]:
    """(cell of the target, cell of the placed object) for which the relation is the main direction."""
    sign = -1 if relation in ("left of", "above") else 1
    horizontal = relation in ("left of", "right of")
    pairs = []
    for target in CELLS:
        for placed in CELLS:
            down, right = placed[0] - target[0], placed[1] - target[1]
            along, across = (right, down) if horizontal else (down, right)
            if along * sign > 0 and abs(across) < abs(along):
                pairs.append((target, placed))
    return pairs


_RELATED_CELLS = {relation: _cells_in_relation(relation) for relation in RELATIONS}


def _random_color(rng: np.random.Generator, color: str | None) -> str:
    return color or _pick(rng, list(COLORS))


def _build(prompt: Prompt, rng: np.random.Generator) -> Scene:
    wanted = [include for include in prompt.include for _ in range(include.count)]
    if prompt.task == "position" and prompt.include[1].position:
        pairs = _RELATED_CELLS[prompt.include[1].position[0]]
        cells: list[Cell] = list(pairs[int(rng.integers(len(pairs)))])
    else:
        cells = [CELLS[i] for i in rng.choice(len(CELLS), len(wanted), replace=False).tolist()]
    objects = [place(i.shape, _random_color(rng, i.color), cell, rng) for i, cell in zip(wanted, cells, strict=True)]
    return Scene(tuple(objects), int(rng.integers(len(BACKGROUNDS))))


def _until_admitted(make: Callable[[], Scene | None], split: Split) -> Scene:
    for _ in range(_ATTEMPTS):
        scene = make()
        if scene is not None and split.admits(scene):
            return scene
    raise ValueError(f"no admissible scene in {_ATTEMPTS} attempts")


def right_scene(prompt: Prompt, rng: np.random.Generator, split: Split = EVERYTHING) -> Scene:
    """A scene with exactly what the prompt asks for, admitted by ``split``; ValueError if there is none."""
    return _until_admitted(lambda: _build(prompt, rng), split)


def random_scene(rng: np.random.Generator, objects: int, split: Split = EVERYTHING) -> Scene:
    """A scene of ``objects`` random objects in at most four colours, admitted by ``split``."""

    def make() -> Scene:
        cells = rng.choice(len(CELLS), objects, replace=False).tolist()
        palette = [list(COLORS)[i] for i in rng.choice(len(COLORS), int(rng.integers(1, 5)), replace=False).tolist()]
        things = [place(_pick(rng, list(SHAPES)), _pick(rng, palette), CELLS[i], rng) for i in cells]
        return Scene(tuple(things), int(rng.integers(len(BACKGROUNDS))))

    return _until_admitted(make, split)


# ---------------------------------------------------------------------------------------------------- faults

Objects = list[SceneObject]


def _other(rng: np.random.Generator, options: list[str], than: str) -> str:
    return _pick(rng, [option for option in options if option != than])


def _wrong_color(prompt: Prompt, objects: Objects, rng: np.random.Generator) -> Objects | None:
    if not objects or not any(include.color for include in prompt.include):
        return None
    i = int(rng.integers(min(len(objects), prompt.count)))
    objects[i] = replace(objects[i], color=_other(rng, list(COLORS), objects[i].color))
    return objects


def _wrong_shape(prompt: Prompt, objects: Objects, rng: np.random.Generator) -> Objects | None:
    if not objects:
        return None
    i = int(rng.integers(min(len(objects), prompt.count)))
    objects[i] = replace(objects[i], shape=_other(rng, list(SHAPES), objects[i].shape))
    return objects


def _missing_object(prompt: Prompt, objects: Objects, rng: np.random.Generator) -> Objects | None:
    if not objects:
        return None
    objects.pop(int(rng.integers(len(objects))))
    return objects


def _free_cell(objects: Objects, rng: np.random.Generator) -> Cell | None:
    taken = {entry.cell for entry in objects}
    free = [cell for cell in CELLS if cell not in taken]
    return free[int(rng.integers(len(free)))] if free else None


def _extra_object(prompt: Prompt, objects: Objects, rng: np.random.Generator) -> Objects | None:
    cell = _free_cell(objects, rng)
    if cell is None:
        return None
    return [*objects, place(_pick(rng, list(SHAPES)), _pick(rng, list(COLORS)), cell, rng)]


def _one_too_many(prompt: Prompt, objects: Objects, rng: np.random.Generator) -> Objects | None:
    cell = _free_cell(objects, rng)
    if cell is None:
        return None
    include = prompt.include[int(rng.integers(len(prompt.include)))]
    return [*objects, place(include.shape, _random_color(rng, include.color), cell, rng)]


def _wrong_relation(prompt: Prompt, objects: Objects, rng: np.random.Generator) -> Objects | None:
    if prompt.task != "position" or len(objects) < 2:
        return None
    position = prompt.include[1].position
    relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
    if position is None or relation == position[0]:
        return None
    pairs = _RELATED_CELLS[relation]
    target, placed = pairs[int(rng.integers(len(pairs)))]
    if {target, placed} & {entry.cell for entry in objects[2:]}:
        return None
    return [replace(objects[0], cell=target), replace(objects[1], cell=placed), *objects[2:]]


def _swapped_attributes(prompt: Prompt, objects: Objects, rng: np.random.Generator) -> Objects | None:
    if len(prompt.include) != 2 or None in (i.color for i in prompt.include) or len(objects) < 2:
        return None
    first, second = objects[:2]
    return [replace(first, color=second.color), replace(second, color=first.color), *objects[2:]]


FAULTS: dict[str, Callable[[Prompt, Objects, np.random.Generator], Objects | None]] = {
    "wrong_color": _wrong_color,
    "wrong_shape": _wrong_shape,
    "missing_object": _missing_object,
    "extra_object": _extra_object,
    "one_too_many": _one_too_many,
    "wrong_relation": _wrong_relation,
    "swapped_attributes": _swapped_attributes,
}
"""Names to (prompt, objects, rng) -> changed objects, or None where the fault doesn't apply."""

_ADDING = frozenset({"extra_object", "one_too_many"})
_SPOILING = frozenset({"wrong_color", "wrong_shape", "swapped_attributes", "missing_object"})


def _undoes(kind: str, names: list[str]) -> bool:
    """Whether this fault may repair or repeat one that was made: what is missing comes back as one too many."""
    if kind == "one_too_many":
        return bool(_SPOILING & set(names))
    if kind in _SPOILING and "one_too_many" in names:
        return True
    if (kind == "missing_object" and _ADDING & set(names)) or (kind in _ADDING and "missing_object" in names):
        return True
    return kind in ("swapped_attributes", "wrong_relation") and kind in names


def near_miss(
    prompt: Prompt,
    rng: np.random.Generator,
    faults: int = 1,
    *,
    kinds: tuple[str, ...] = tuple(FAULTS),
    split: Split = EVERYTHING,
) -> tuple[Scene, tuple[str, ...]]:
    """A right scene changed by ``faults`` random faults of ``kinds``, and their names; the result is never exact.

    Faults that would undo each other aren't combined. Raises ValueError where nothing of the kind can be made.
    """
    found = find_near_miss(prompt, rng, faults, kinds=kinds, split=split)
    if found is None:
        raise ValueError(f"no admissible near miss of {prompt.text!r} with faults {kinds}")
    return found


def find_near_miss(
    prompt: Prompt,
    rng: np.random.Generator,
    faults: int,
    *,
    kinds: tuple[str, ...],
    split: Split,
    attempts: int = _ATTEMPTS,
) -> tuple[Scene, tuple[str, ...]] | None:
    """Like :func:`near_miss`, with None where ``attempts`` found nothing."""
    for _ in range(attempts):
        scene = _build(prompt, rng)
        objects: Objects = list(scene.objects)
        names: list[str] = []
        while len(names) < faults:
            changed = None
            for i in rng.permutation(len(kinds)).tolist():
                changed = None if _undoes(kinds[i], names) else FAULTS[kinds[i]](prompt, list(objects), rng)
                if changed is not None:
                    names.append(kinds[i])
                    break
            if changed is None:
                break
            objects = changed
        broken = Scene(tuple(objects), scene.background)
        if len(names) == faults and split.admits(broken) and not exact_score(prompt, truth(broken)):
            return broken, tuple(names)
    return None


def truth(scene: Scene) -> tuple[Found, ...]:
    """What a perfect detector would find in the scene's picture."""
    return tuple(Found.of(entry) for entry in scene.objects)
