"""Three scores of what was found in a picture against what its prompt asks for, and the reasons in words.

``exact``  1.0 if the right objects are there, in the right number and place, and nothing else; 0.0 otherwise.
``geneval`` GenEval's own rule (Ghosh et al. 2023): at least as many as asked for; what else is there doesn't matter,
           except one more of a counted class. 1.0 or 0.0.
``soft``   partial credit in [0, 1]: what agrees over what was asked for or found.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from models.shapes.prompts import Include, Prompt
from models.shapes.world import OBJECT_RADIUS, SceneObject


@dataclass(frozen=True)
class Found:
    """One object in a picture: centre and extent as fractions of the image side, confidence in [0, 1].

    ``shape`` is None for something that is none of the world's shapes, ``color`` None for something without colour.
    """

    shape: str | None
    color: str | None
    x: float
    y: float
    width: float
    height: float
    confidence: float = 1.0

    @classmethod
    def of(cls, entry: SceneObject) -> Found:
        x, y = entry.center
        extent = 2 * OBJECT_RADIUS * entry.scale
        return cls(entry.shape, entry.color, x, y, extent, extent)

    @property
    def name(self) -> str:
        """ "red circle", or "red blob" for no known shape."""
        return f"{self.color or 'grey'} {self.shape or 'blob'}"


def relative_position(placed: Found, target: Found) -> set[str]:
    """Which relations hold of ``placed`` to ``target``, by GenEval's rule: offsets shrunk by a tenth of both extents,
    then more than half of the distance along the axis."""
    dx, dy = placed.x - target.x, placed.y - target.y
    length = math.hypot(dx, dy)
    if length == 0:
        return set()

    def share(offset: float, extents: float) -> float:
        return max(abs(offset) - 0.1 * extents, 0.0) / length * (1 if offset > 0 else -1)

    right, down = share(dx, placed.width + target.width), share(dy, placed.height + target.height)
    holds = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {relation for relation, true in holds.items() if true}


def geneval_score(prompt: Prompt, found: Sequence[Found]) -> float:
    """GenEval's non-strict rule; the objects of a class are taken by falling confidence."""
    groups: list[list[Found]] = []
    for include in prompt.include:
        same = sorted((f for f in found if f.shape == include.shape), key=lambda f: -f.confidence)[: include.count]
        if len(same) < include.count:
            return 0.0
        if include.color and any(f.color != include.color for f in same):
            return 0.0
        if include.position:
            relation, target = include.position
            if any(relation not in relative_position(a, b) for a in same for b in groups[target]):
                return 0.0
        groups.append(same)
    if prompt.task == "counting":
        shape, count = prompt.include[0].shape, prompt.include[0].count
        return float(sum(f.shape == shape for f in found) <= count)
    return 1.0


def _similarity(include: Include, found: Found) -> float:
    """Credit in [0, 1] for taking ``found`` as one of ``include``: half for the shape, half for the colour."""
    if include.color is None:
        return 1.0 if found.shape == include.shape else 0.25
    return 0.5 * (found.shape == include.shape) + 0.5 * (found.color == include.color)


def _assign(prompt: Prompt, found: Sequence[Found]) -> list[tuple[int, int, float]]:
    """(index of include, index of found, credit), most similar first; every object is used once at most."""
    rated = [
        (_similarity(include, thing), i, j) for i, include in enumerate(prompt.include) for j, thing in enumerate(found)
    ]
    free = [include.count for include in prompt.include]
    taken: set[int] = set()
    pairs: list[tuple[int, int, float]] = []
    for credit, i, j in sorted(rated, key=lambda row: -row[0]):
        if credit > 0 and free[i] and j not in taken:
            free[i] -= 1
            taken.add(j)
            pairs.append((i, j, credit))
    return pairs


def _relation_holds(prompt: Prompt, found: Sequence[Found]) -> bool:
    """Whether some fully right object of the placed include stands in its relation to one of the target include."""
    for include in prompt.include:
        if include.position is None:
            continue
        relation, target = include.position[0], prompt.include[include.position[1]]
        if not any(
            relation in relative_position(a, b)
            for a, b in permutations(found, 2)
            if include.matches(a.shape, a.color) and target.matches(b.shape, b.color)
        ):
            return False
    return True


def exact_score(prompt: Prompt, found: Sequence[Found]) -> float:
    """1.0 when the picture holds exactly what is asked for, else 0.0."""
    if len(found) != prompt.count:
        return 0.0
    for include in prompt.include:
        if sum(include.matches(thing.shape, thing.color) for thing in found) != include.count:
            return 0.0
    return float(_relation_holds(prompt, found))


def soft_score(prompt: Prompt, found: Sequence[Found]) -> float:
    """A Jaccard index with partial credit, in [0, 1]; 1.0 exactly where the exact score is 1.0.

    Credit of the best assignment over everything asked for or found; a relation counts as one more thing asked for.
    """
    pairs = _assign(prompt, found)
    credit = sum(pair[2] for pair in pairs)
    union = float(prompt.count + len(found) - len(pairs))
    if prompt.task == "position":
        union += 1.0
        credit += _relation_holds(prompt, found)
    return credit / union


@dataclass(frozen=True)
class Verdict:
    """The three scores and, in words, what is right and what is wrong."""

    exact: float
    geneval: float
    soft: float
    reason: str


def judge(prompt: Prompt, found: Sequence[Found]) -> Verdict:
    """All scores of one picture."""
    return Verdict(
        exact_score(prompt, found), geneval_score(prompt, found), soft_score(prompt, found), explain(prompt, found)
    )


def _numbered(count: int, include: Include) -> str:
    return f"{count} {include.noun(count)}"


def explain(prompt: Prompt, found: Sequence[Found]) -> str:
    """Clauses that are true of ``found``: the count of each thing asked for, each relation, and what else there is."""
    clauses: list[str] = []
    others = list(found)
    for include in prompt.include:
        same = [thing for thing in found if include.matches(thing.shape, thing.color)]
        others = [thing for thing in others if thing not in same]
        if len(same) == include.count:
            clauses.append(f"found {_numbered(len(same), include)}, as asked")
        elif same:
            clauses.append(f"found {_numbered(len(same), include)}, expected {include.count}")
        else:
            clauses.append(f"no {include.noun(1)}")
    for include in prompt.include:
        if include.position and not any(clause.startswith("no ") for clause in clauses):
            relation, target = include.position[0], prompt.include[include.position[1]]
            verb = "is" if _relation_holds(prompt, found) else "is not"
            clauses.append(f"the {include.noun(1)} {verb} {relation} the {target.noun(1)}")
    if others:
        counts = sorted(Counter((thing.color or "grey", thing.shape or "blob") for thing in others).items())
        listed = [_numbered(count, Include(shape, count, color)) for (color, shape), count in counts]
        clauses.append("also found " + ", ".join(listed))
    return "; ".join(clauses)
