"""What a prompt of the shapes world asks for, its English, and the grammar that reads it back.

The tasks are GenEval's six (Ghosh et al. 2023, "GenEval: an object-focused framework"), on shapes in place of COCO
classes. ``Prompt.to_metadata`` gives GenEval's own metadata form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from models.shapes.world import COLORS, SHAPES

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]
TASKS: tuple[Task, ...] = get_args(Task)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
COUNTS = {"two": 2, "three": 3, "four": 4}
COUNT_WORDS = {count: word for word, count in COUNTS.items()}


@dataclass(frozen=True)
class Include:
    """``count`` objects of ``shape``, of ``color`` where one is named, placed as ``position`` says where it does.

    ``position`` is (relation, index of an earlier include): these objects are ``relation`` the objects of that one.
    """

    shape: str
    count: int = 1
    color: str | None = None
    position: tuple[Relation, int] | None = None

    def matches(self, shape: str | None, color: str | None) -> bool:
        """Whether an object of this shape and colour is one of those asked for."""
        return shape == self.shape and self.color in (None, color)

    def noun(self, count: int | None = None) -> str:
        """ "red circle" or, for another count than one, "red circles"."""
        plural = "" if (self.count if count is None else count) == 1 else "s"
        stem = self.shape + ("e" if plural and self.shape.endswith("s") else "")
        return f"{self.color} {stem}{plural}" if self.color else f"{stem}{plural}"


@dataclass(frozen=True)
class Prompt:
    """One request: its GenEval task, what a picture must include (and nothing else, for the exact score), its text."""

    task: Task
    include: tuple[Include, ...]
    text: str

    @property
    def count(self) -> int:
        """How many objects are asked for."""
        return sum(include.count for include in self.include)

    def to_metadata(self) -> dict[str, Any]:
        """GenEval's metadata: tag, include and prompt, and for counting the exclusion of one more than asked for."""
        include: list[dict[str, Any]] = []
        for entry in self.include:
            row: dict[str, Any] = {"class": entry.shape, "count": entry.count}
            if entry.color:
                row["color"] = entry.color
            if entry.position:
                row["position"] = list(entry.position)
            include.append(row)
        metadata: dict[str, Any] = {"tag": self.task, "include": include, "prompt": self.text}
        if self.task == "counting":
            metadata["exclude"] = [{"class": row["class"], "count": row["count"] + 1} for row in include]
        return metadata


# ---------------------------------------------------------------------------------------------------- writing

_PREFIXES = ("", "", "", "a photo of ", "a picture of ", "an image of ", "a drawing of ")
_RELATION_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _phrase(include: Include, rng: np.random.Generator) -> str:
    """One noun phrase in one of its wordings."""
    if include.count > 1:
        number = COUNT_WORDS[include.count] if rng.random() < 0.8 else str(include.count)
        return f"{number} {include.noun()}"
    if include.color and rng.random() < 0.15:
        return f"a {include.shape} that is {include.color}"
    if include.color and rng.random() < 0.1:
        return f"{_article(include.color)}-colored {include.shape}"
    return _article(include.noun())


def compose(task: Task, include: tuple[Include, ...], rng: np.random.Generator | None = None) -> Prompt:
    """Write the prompt for ``include``: the plain wording without ``rng``, else a random paraphrase.

    For a position task the first include is the one that the second is placed against, as in GenEval's metadata.
    """
    if rng is None:
        phrases = [f"{COUNT_WORDS[e.count]} {e.noun()}" if e.count > 1 else _article(e.noun()) for e in include]
        prefix, link, verb = "", "and", ""
    else:
        phrases = [_phrase(entry, rng) for entry in include]
        prefix = str(rng.choice(_PREFIXES))
        link = str(rng.choice(("and", "and", "and", "with", "together with")))
        verb = "is " if not prefix and rng.random() < 0.1 else ""
    if task == "position":
        position = include[1].position
        if position is None:
            raise ValueError("the second include of a position prompt has a position")
        wordings = _RELATION_PHRASES[position[0]]
        relation = wordings[0] if rng is None else str(rng.choice(wordings))
        text = f"{prefix}{phrases[1]} {verb}{relation} {phrases[0]}"
    else:
        text = prefix + f" {link} ".join(phrases)
    return Prompt(task, include, text)


# ---------------------------------------------------------------------------------------------------- reading

_SHAPE_WORDS = {form: shape for shape in SHAPES for form in (Include(shape).noun(1), Include(shape).noun(2))}
_COLOR = "|".join(COLORS)
_SHAPE = "|".join(sorted(_SHAPE_WORDS, key=len, reverse=True))
_NUMBER = "|".join((*COUNTS, *map(str, COUNT_WORDS)))
_NOUN_PHRASE = re.compile(
    rf"(?:(?:exactly )?(?P<number>{_NUMBER}) |(?:a single|an|a|one|the) )?"
    rf"(?:(?P<color>{_COLOR})(?:[- ]colou?red)? )?(?P<shape>{_SHAPE})(?: that (?:is|are) (?P<late>{_COLOR}))?"
)
_PREFIX = re.compile(r"^(?:an?|the) (?:photo|picture|image|drawing) (?:of|showing) ")
_LINK = re.compile(r" (?:and also|and|together with|with) ")
_RELATION_WORDS = {phrase: relation for relation, phrases in _RELATION_PHRASES.items() for phrase in phrases}
_RELATION = re.compile(rf" (?:(?:that )?is )?({'|'.join(sorted(_RELATION_WORDS, key=len, reverse=True))}) ")


def _read_phrase(text: str) -> Include | None:
    match = _NOUN_PHRASE.fullmatch(text)
    if match is None or (match["color"] and match["late"]):
        return None
    number = match["number"]
    count = 1 if number is None else COUNTS.get(number) or int(number)
    shape = _SHAPE_WORDS[match["shape"]]
    if (match["shape"] != shape) != (count > 1):
        return None
    return Include(shape, count, match["color"] or match["late"])


def _distinguishable(first: Include, second: Include) -> bool:
    """Whether no object can be both: the shapes differ, or both colours are named and differ."""
    return first.shape != second.shape or (None not in (first.color, second.color) and first.color != second.color)


def parse(text: str) -> Prompt | None:
    """Read any caption that this world writes; None for a text outside the grammar.

    Case, runs of blanks and a final full stop don't matter. The prompt keeps the text as it was given.
    """
    plain = _PREFIX.sub("", re.sub(r"\s+", " ", text.lower()).strip().removesuffix("."))
    related = _RELATION.split(plain)
    if len(related) == 3:
        placed, target = _read_phrase(related[0]), _read_phrase(related[2])
        if placed is None or target is None or placed.count > 1 or target.count > 1:
            return None
        relation = _RELATION_WORDS[related[1]]
        include = (target, Include(placed.shape, 1, placed.color, (relation, 0)))
        return Prompt("position", include, text) if _distinguishable(*include) else None
    parts = [_read_phrase(part) for part in _LINK.split(plain)]
    includes = tuple(part for part in parts if part is not None)
    if len(includes) != len(parts) or len(includes) > 2:
        return None
    if len(includes) == 1:
        only = includes[0]
        return Prompt("counting" if only.count > 1 else "colors" if only.color else "single_object", includes, text)
    if not _distinguishable(*includes) or any(include.count > 1 for include in includes):
        return None
    return Prompt("color_attr" if any(include.color for include in includes) else "two_object", includes, text)
