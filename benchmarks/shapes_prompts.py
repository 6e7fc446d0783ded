"""Writes the prompts of the shapes world that come with the trainer: ``python -m benchmarks.shapes_prompts``.

A request is what a prompt asks for, whatever its wording: "a circle left of a square" is the request of "a square right
of a circle". The requests of each task are divided first, so that nothing asked for in training is asked for among the
held-out prompts; then both sets are filled with random wordings, no text twice. The world's five single objects have 25
wordings, all of which are taken; the other tasks share the rest evenly. Both sets are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Hashable
from itertools import combinations, permutations
from pathlib import Path

import numpy as np

from models.shapes.prompts import COUNTS, RELATIONS, TASKS, Include, Prompt, Task, compose
from models.shapes.scenes import random_prompt
from models.shapes.world import COLORS, SHAPES

FOLDER = Path(__file__).resolve().parents[1] / "trainer_client" / "prompt_sets"
SEED = 20_261_122
HELD_OUT_SHARE = 0.4
"""Share of each task's requests that training never asks for: 2 of the 5 single objects, 4 of the 10 pairs."""

TRAINING: dict[Task, int] = {**dict.fromkeys(TASKS, 117), "single_object": 15}
HELD_OUT: dict[Task, int] = {**dict.fromkeys(TASKS, 46), "single_object": 10}
"""Prompts a task: 600 and 240 in all."""

_MIRRORED = {"right of": "left of", "below": "above"}


def request(prompt: Prompt) -> Hashable:
    """What the prompt asks for, equal for all wordings and orders that the oracle judges alike."""
    things = [(include.shape, include.color, include.count) for include in prompt.include]
    relation = prompt.include[-1].position
    if relation is None:
        return prompt.task, frozenset(things)
    target, placed = things
    if relation[0] in _MIRRORED:
        return prompt.task, _MIRRORED[relation[0]], target, placed
    return prompt.task, relation[0], placed, target


def requests(task: Task) -> list[Hashable]:
    """Every request of the task that :func:`~models.shapes.scenes.random_prompt` can make, once."""
    includes: list[tuple[Include, ...]] = []
    color_pairs = list(permutations(COLORS, 2))
    if task == "single_object":
        includes = [(Include(shape),) for shape in SHAPES]
    elif task == "colors":
        includes = [(Include(shape, 1, color),) for shape in SHAPES for color in COLORS]
    elif task == "counting":
        colors = (None, *COLORS)
        includes = [(Include(shape, n, color),) for shape in SHAPES for n in COUNTS.values() for color in colors]
    elif task == "two_object":
        includes = [(Include(first), Include(second)) for first, second in combinations(SHAPES, 2)]
    elif task == "color_attr":
        pairs = combinations(SHAPES, 2)
        includes = [(Include(a, 1, one), Include(b, 1, two)) for a, b in pairs for one, two in color_pairs]
    else:
        includes = [
            (Include(a, 1, one), Include(b, 1, two, (relation, 0)))
            for a, b in permutations(SHAPES, 2)
            for one, two in [(None, None), *color_pairs]
            for relation in RELATIONS
        ]
    return list(dict.fromkeys(request(compose(task, entry)) for entry in includes))


def make_sets(seed: int = SEED) -> tuple[list[Prompt], list[Prompt]]:
    """The training and the held-out prompts, task after task."""
    rng = np.random.default_rng(seed)
    training: list[Prompt] = []
    held_out: list[Prompt] = []
    for task in TASKS:
        every = requests(task)
        chosen = rng.choice(len(every), round(len(every) * HELD_OUT_SHARE), replace=False).tolist()
        withheld = {every[i] for i in chosen}
        # (is held out) -> the texts so far, in order
        found: dict[bool, dict[str, Prompt]] = {False: {}, True: {}}
        wanted = {False: TRAINING[task], True: HELD_OUT[task]}
        while any(len(found[side]) < wanted[side] for side in found):
            prompt = random_prompt(rng, task)
            side = request(prompt) in withheld
            if len(found[side]) < wanted[side]:
                found[side].setdefault(prompt.text, prompt)
        training += found[False].values()
        held_out += found[True].values()
    return training, held_out


def to_jsonl(prompts: list[Prompt]) -> str:
    """GenEval's form, a row a line."""
    return "".join(json.dumps(prompt.to_metadata()) + "\n" for prompt in prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in zip(("shapes_train", "shapes_heldout"), make_sets(), strict=True):
        (folder / f"{name}.jsonl").write_text(to_jsonl(prompts))
        print(f"{folder / name}.jsonl: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
