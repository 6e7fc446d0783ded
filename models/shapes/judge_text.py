"""What shapes-judge is asked and what it says: true reasons about two pictures, the verdict, and descriptions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from models.shapes.prompts import COUNTS, Include, Prompt
from models.shapes.rules import Found, exact_score, explain, soft_score
from models.shapes.scenes import truth
from models.shapes.world import COLORS, SHAPES, Scene

BEST = 10
"""The score of a picture that shows what is asked for and nothing else."""
DESCRIBE = "Describe the image."
KNOWN = 0.1
"""Weight, in the last stage of training, of what is known by then: what is seen, and the form of the answer."""

_NOUNS = tuple(Include(shape).noun(count) for shape in SHAPES for count in (1, 2))
_PLAIN = (
    *COLORS, *_NOUNS, *COUNTS, "a", "an", "the", "one", "single", "exactly", "colored", "coloured", "that", "is", "are",
    "photo", "picture", "image", "drawing", "of", "showing", "and", "also", "with", "together", "to", "on", "left",
    "right", "above", "over", "below", "under", "beneath", "found", "as", "asked", "expected", "no", "not", "yes",
    "nothing", "top", "middle", "bottom", "center", "better", "than", "which", "following", "images", "or",
)  # fmt: skip
_OTHER = (
    "Image", "image", "Which", "Text", "Caption", "Is", "Answer", "Describe", "Yes", "No", "/", ":", ";", ",", ".", "?",
    "[", "]", "-", "user", "assistant", "<think>\n", "</think>\n", "<answer>", "</answer>", " [", ".\n",
)  # fmt: skip
WORDS = tuple(dict.fromkeys([*_PLAIN, *(f" {word}" for word in _PLAIN), *_OTHER, *(f" {word}" for word in _OTHER[:10]),
                             *map(str, range(10)), *(f" {digit}" for digit in range(10))]))  # fmt: skip

_LINE = re.compile(r"Image ([12]): ([^.]*)\. (.*)\. (10|[0-9])/10")
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


def points(prompt: Prompt, found: Sequence[Found]) -> int:
    """What a picture is worth, 0 to 10: 10 when it is exactly as asked, at most 5 for what agrees otherwise."""
    return round(5 * exact_score(prompt, found) + 5 * soft_score(prompt, found))


def reasons(prompt: Prompt, scenes: tuple[Scene, Scene]) -> str:
    """One line a picture: what stands where, what that means for the prompt, and its points.

    What is seen comes first: whoever writes from left to right can then read the rest from it.
    """
    lines = []
    for number, scene in enumerate(scenes, start=1):
        found = truth(scene)
        lines.append(f"Image {number}: {describe(scene)} {_finding(prompt, found)}")
    return "\n".join(lines)


def findings(prompt: Prompt, scenes: tuple[Scene, Scene]) -> str:
    """As :func:`reasons`, without what stands where."""
    return "\n".join(
        f"Image {number}: {_finding(prompt, truth(scene))}" for number, scene in enumerate(scenes, start=1)
    )


def _finding(prompt: Prompt, found: Sequence[Found]) -> str:
    return f"{explain(prompt, found)}. {points(prompt, found)}/{BEST}"


def think_answer(prompt: Prompt, scenes: tuple[Scene, Scene]) -> str:
    """The whole answer in UnifiedReward-Think's form; ValueError where neither picture is worth more."""
    first, second = (points(prompt, truth(scene)) for scene in scenes)
    if first == second:
        raise ValueError("pictures of equal worth have no better one")
    return (
        f"<think>\n{reasons(prompt, scenes)}\n</think>\n<answer>Image {1 if first > second else 2} is better</answer>"
    )


def weighted_answer(prompt: Prompt, scenes: tuple[Scene, Scene]) -> list[tuple[str, float]]:
    """:func:`think_answer` in pieces, and how much each counts in the last stage of training: what is seen is known by
    then, what follows from it is not."""
    first, second = (points(prompt, truth(scene)) for scene in scenes)
    pieces = [("<think>\n", KNOWN)]
    for number, scene in enumerate(scenes, start=1):
        found = truth(scene)
        pieces += [
            (f"Image {number}: {describe(scene)}", KNOWN),
            (f" {explain(prompt, found)}.", 1.0),
            (f" {points(prompt, found)}/{BEST}", 2.0),
            ("\n", KNOWN),
        ]
    winner = 1 if first > second else 2
    return [
        *pieces,
        ("</think>\n", KNOWN),
        ("<answer>Image", KNOWN),
        (f" {winner}", 4.0),
        (" is better</answer>", KNOWN),
    ]


def check_reasons(said: str, prompt: Prompt, scenes: tuple[Scene, Scene]) -> list[bool]:
    """Whether each statement of the reasons is true of the scenes: every object with its place, every clause about the
    prompt, and the points.

    One false statement more: for each picture whose objects are not all told, that no line is about, and for each line
    that has not the form.
    """
    checks: list[bool] = []
    spoken: set[int] = set()
    for line in said.strip().splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None:
            checks.append(False)
            continue
        number = int(match[1])
        spoken.add(number)
        scene = scenes[number - 1]
        found = truth(scene)
        seen, objects = match[2].split(", "), describe(scene).removesuffix(".").split(", ")
        checks += [entry in objects for entry in seen]
        checks += [False] * (len(set(seen)) < len(objects))
        clauses = explain(prompt, found).split("; ")
        checks += [clause in clauses for clause in match[3].split("; ")]
        checks.append(int(match[4]) == points(prompt, found))
    return [*checks, *[False] * (2 - len(spoken))]


def describe(scene: Scene) -> str:
    """Every object with its place, row by row; "nothing" for an empty scene."""
    ordered = sorted(scene.objects, key=lambda entry: entry.cell)
    told = [f"{_ROWS[o.cell[0]]} {_COLUMNS[o.cell[1]]} {o.color} {o.shape}" for o in ordered]
    return (", ".join(told) or "nothing") + "."
