"""GenEval's rules: hand-made cases of every task, and laws against a second implementation written from the text."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.backbones.detector import Box, Detection
from models.base import InputError
from models.geneval_rules import (
    COLORS,
    RELATIONS,
    TAGS,
    Expectation,
    Task,
    Verdict,
    judge,
    parse_task,
    relations,
    select,
    wanted_colors,
)

CLASSES = ("cat", "dog", "tv remote")
NO_MASK = np.zeros((1, 1), dtype=np.bool_)


def thing(name: str, confidence: float = 0.95, box: Box = (0, 0, 10, 10)) -> Detection:
    return Detection(name, confidence, box, NO_MASK)


def at(name: str, x: float, y: float, side: float = 10) -> Detection:
    return thing(name, box=(x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def verdict(
    metadata: dict[str, Any],
    things: Sequence[Detection],
    colors: dict[str, list[str]] | None = None,
    relation_quirk: bool = True,
) -> Verdict:
    task = parse_task(metadata, CLASSES)
    return judge(task, select(things, task.confidence), colors or {}, relation_quirk=relation_quirk)


def scores(found: Verdict) -> tuple[bool, bool, float]:
    return found.correct, found.strict, found.soft


def row(tag: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "prompt": "a photo", **more}


CAT = {"class": "cat", "count": 1}
DOG = {"class": "dog", "count": 1}


# -- the six tasks ----------------------------------------------------------------------------------------------------


def test_single_object() -> None:
    single = row("single_object", CAT)
    assert scores(verdict(single, [thing("cat")])) == (True, True, 1.0)
    assert scores(verdict(single, [thing("dog")])) == (False, False, 0.0)
    assert scores(verdict(single, [thing("cat"), thing("cat")])) == (True, False, 0.0)
    assert scores(verdict(single, [thing("cat")] * 3)) == (True, False, -1.0)
    assert scores(verdict(single, [thing("cat", 0.3)])) == (False, False, 0.0)


def test_two_objects_are_judged_one_by_one() -> None:
    two = row("two_object", CAT, DOG)
    assert scores(verdict(two, [thing("cat"), thing("dog")])) == (True, True, 1.0)
    half = verdict(two, [thing("cat")])
    assert scores(half) == (False, False, 0.5)
    assert half.failures == ("found 0 dog, expected 1",)


def test_counting_wants_confident_objects_and_none_too_many() -> None:
    three = row("counting", {"class": "cat", "count": 3}, exclude=[{"class": "cat", "count": 4}])
    assert scores(verdict(three, [thing("cat", 0.91)] * 3)) == (True, True, 1.0)
    assert scores(verdict(three, [thing("cat", 0.9)] * 3)) == (False, False, 0.0)
    assert scores(verdict(three, [thing("cat")] * 2)) == (False, False, pytest.approx(2 / 3))
    four = verdict(three, [thing("cat")] * 4)
    assert scores(four) == (False, False, pytest.approx(2 / 3))
    assert four.failures == ("found 4 cat, expected 3", "found 4 cat, expected fewer than 4")


def test_exclude_counts_for_the_lax_rule_alone() -> None:
    without = row("single_object", CAT, exclude=[{"class": "dog", "count": 1}])
    found = verdict(without, [thing("cat"), thing("dog")])
    assert scores(found) == (False, True, 1.0)
    assert found.failures == ("found 1 dog, expected fewer than 1",)


def test_colors() -> None:
    red = row("colors", CAT | {"color": "red"})
    assert scores(verdict(red, [thing("cat")], {"cat": ["red"]})) == (True, True, 1.0)
    blue = verdict(red, [thing("cat")], {"cat": ["blue"]})
    assert scores(blue) == (False, False, 0.5)
    assert blue.failures == ("expected 1 red cat, their colours: blue",)
    assert scores(verdict(red, [])) == (False, False, 0.0)
    # One too many: the lax rule looks at the most confident one, the others at none of them.
    assert scores(verdict(red, [thing("cat"), thing("cat", 0.5)], {"cat": ["red"]})) == (True, False, 0.0)


def test_color_of_two_objects() -> None:
    both = row("color_attr", CAT | {"color": "red"}, DOG | {"color": "blue"})
    things = [thing("cat"), thing("dog")]
    assert scores(verdict(both, things, {"cat": ["red"], "dog": ["blue"]})) == (True, True, 1.0)
    assert scores(verdict(both, things, {"cat": ["blue"], "dog": ["red"]})) == (False, False, 0.5)
    assert scores(verdict(both, things, {"cat": ["red"], "dog": ["red"]})) == (False, False, 0.75)


@pytest.mark.parametrize(
    ("relation", "x", "y"), [("left of", 20, 50), ("right of", 80, 50), ("above", 50, 20), ("below", 50, 80)]
)
def test_position(relation: str, x: float, y: float) -> None:
    placed = row("position", DOG, CAT | {"position": [relation, 0]})
    right = [at("dog", 50, 50), at("cat", x, y)]
    assert scores(verdict(placed, right)) == (True, True, 1.0)
    wrong = verdict(placed, [at("dog", 50, 50), at("cat", 100 - x, 100 - y)])
    assert scores(wrong) == (False, False, pytest.approx(3 / 4))  # 1, 1, and 0 and 1 for the relation
    assert wrong.failures == (f"expected cat {relation} dog",)
    assert scores(verdict(placed, [at("cat", x, y)])) == (False, False, pytest.approx(1 / 3))
    assert scores(verdict(placed, [at("dog", 50, 50)])) == (False, False, pytest.approx(1 / 3))


def test_the_quirk_of_the_published_reward_can_be_left_out() -> None:
    placed = row("position", DOG, CAT | {"position": ["left of", 0]})
    things = [at("dog", 20, 50), at("cat", 80, 50)]
    assert verdict(placed, things).soft == pytest.approx(3 / 4)
    assert verdict(placed, things, relation_quirk=False).soft == pytest.approx(2 / 3)
    assert verdict(placed, things[::-1], relation_quirk=False).strict is False


# -- what counts as found, what needs a colour, where things are ------------------------------------------------------


def test_the_most_confident_sixteen_count() -> None:
    things = [thing("cat", 0.31 + i / 100) for i in range(20)] + [thing("dog", 0.2)]
    found = select(things, 0.3)
    assert list(found) == ["cat"]
    assert [object.confidence for object in found["cat"]] == sorted((t.confidence for t in things), reverse=True)[:16]


def test_only_objects_whose_colour_decides_something_are_classified() -> None:
    task = parse_task(row("color_attr", {"class": "cat", "count": 2, "color": "red"}, DOG), CLASSES)
    assert wanted_colors(task, select([thing("cat"), thing("dog")], 0.3)) == {}
    assert wanted_colors(task, select([thing("cat")] * 5 + [thing("dog")], 0.3)) == {"cat": 2}
    twice = row("color_attr", {"class": "cat", "count": 2, "color": "red"}, CAT | {"color": "red"})
    assert wanted_colors(parse_task(twice, CLASSES), select([thing("cat")] * 2, 0.3)) == {"cat": 2}


def test_a_relation_needs_more_than_touching_neighbours() -> None:
    assert relations((0, 0, 10, 10), (10, 0, 20, 10)) == {"left of"}
    assert relations((0, 0, 10, 10), (3, 0, 13, 10)) == set()  # offset 3, shortened by a tenth of 20
    assert relations((0, 0, 10, 10), (0, 0, 10, 10)) == set()
    assert relations((0, 0, 10, 10), (90, 90, 100, 100)) == {"left of", "above"}


boxes = st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 40)] * 2).map(
    lambda box: (float(box[0]), float(box[1]), float(box[0] + box[2]), float(box[1] + box[3]))
)


@given(boxes, boxes)
def test_relations_are_mirrored_and_match_the_text(a: Box, b: Box) -> None:
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(a, b) == {mirror[relation] for relation in relations(b, a)} == naive_relations(a, b)


# -- metadata ---------------------------------------------------------------------------------------------------------


def test_a_row_is_understood() -> None:
    metadata = row("position", CAT | {"color": "red"}, DOG | {"position": ["left of", 0]}, target="other models' keys")
    assert parse_task(metadata, CLASSES) == Task(
        "position", (Expectation("cat", 1, "red"), Expectation("dog", 1, None, ("left of", 0)))
    )


@pytest.mark.parametrize(
    ("metadata", "code", "where"),
    [
        ({}, "metadata_missing", "tag and include"),
        ({"target": "READY"}, "metadata_missing", "tag and include"),
        ({"tag": "secret", "include": [CAT]}, "unknown_tag", "metadata.tag"),
        ({"tag": ["counting"], "include": [CAT]}, "unknown_tag", "metadata.tag"),
        ({"include": [CAT]}, "unknown_tag", "metadata.tag"),
        ({"tag": "counting"}, "metadata_invalid", "metadata.include"),
        (row("counting"), "metadata_invalid", "metadata.include"),
        ({"tag": "counting", "include": CAT}, "metadata_invalid", "metadata.include"),
        (row("counting", 7), "metadata_invalid", "metadata.include[0] "),  # type: ignore[arg-type]
        (row("counting", CAT, {"class": "cat"}), "metadata_invalid", "metadata.include[1].count"),
        (row("counting", {"class": "cat", "count": 0}), "metadata_invalid", "metadata.include[0].count"),
        (row("counting", {"class": "cat", "count": True}), "metadata_invalid", "metadata.include[0].count"),
        (row("counting", {"class": "cat", "count": 1.5}), "metadata_invalid", "metadata.include[0].count"),
        (row("counting", {"class": 3, "count": 1}), "metadata_invalid", "metadata.include[0].class"),
        (row("counting", {"class": "secret", "count": 1}), "unknown_class", "metadata.include[0].class"),
        (row("counting", CAT | {"colour": "red"}), "metadata_invalid", "metadata.include[0] "),
        (row("colors", CAT | {"color": "secret"}), "unknown_color", "metadata.include[0].color"),
        (row("colors", CAT | {"color": ["red"]}), "unknown_color", "metadata.include[0].color"),
        (row("position", CAT, DOG | {"position": ["secret", 0]}), "unknown_relation", "metadata.include[1].position"),
        (row("position", CAT, DOG | {"position": [["above"], 0]}), "unknown_relation", "include[1].position"),
        (row("position", CAT, DOG | {"position": "above"}), "metadata_invalid", "metadata.include[1].position"),
        (row("position", CAT, DOG | {"position": ["above", 1]}), "metadata_invalid", "include[1].position[1]"),
        (row("position", CAT, DOG | {"position": ["above", -1]}), "metadata_invalid", "include[1].position[1]"),
        (row("position", CAT, DOG | {"position": ["above", False]}), "metadata_invalid", "include[1].position[1]"),
        (row("counting", CAT, exclude=[{"class": "cat", "count": "4"}]), "metadata_invalid", "exclude[0].count"),
        (row("counting", CAT, exclude=[CAT | {"color": "red"}]), "metadata_invalid", "metadata.exclude[0] "),
        (row("counting", CAT, exclude="cat"), "metadata_invalid", "metadata.exclude"),
        (row("counting", *[CAT] * 33), "metadata_invalid", "metadata.include must have at most 32 entries"),
        (row("counting", CAT, exclude=[CAT] * 33), "metadata_invalid", "metadata.exclude must have at most 32 entries"),
        (row("counting", CAT, exclude={}), "metadata_invalid", "metadata.exclude"),
        (row("counting", CAT, exclude=0), "metadata_invalid", "metadata.exclude"),
    ],
)
def test_bad_metadata_is_a_typed_error_that_names_the_field(metadata: dict[str, Any], code: str, where: str) -> None:
    with pytest.raises(InputError) as error:
        parse_task(metadata, CLASSES)
    assert error.value.code == code
    assert where in error.value.message
    assert "secret" not in error.value.message


# -- a second implementation ------------------------------------------------------------------------------------------


def naive_relations(a: Box, b: Box) -> set[str]:
    dx = (a[0] + a[2]) / 2 - (b[0] + b[2]) / 2
    dy = (a[1] + a[3]) / 2 - (b[1] + b[3]) / 2
    distance = math.sqrt(dx * dx + dy * dy)
    found: set[str] = set()
    if distance == 0:
        return found
    slack_x = 0.1 * ((a[2] - a[0]) + (b[2] - b[0]))
    slack_y = 0.1 * ((a[3] - a[1]) + (b[3] - b[1]))
    if -dx - slack_x > 0.5 * distance:
        found.add("left of")
    if dx - slack_x > 0.5 * distance:
        found.add("right of")
    if -dy - slack_y > 0.5 * distance:
        found.add("above")
    if dy - slack_y > 0.5 * distance:
        found.add("below")
    return found


Named = list[tuple[str, float, Box, str]]
"""Class, confidence, box and colour of each object."""


def naive_found(task: Task, things: Named, name: str) -> Named:
    threshold = 0.9 if task.tag == "counting" else 0.3
    kept = [entry for entry in things if entry[0] == name and entry[1] > threshold]
    return sorted(kept, key=lambda entry: entry[1], reverse=True)[:16]


def naive_correct(task: Task, things: Named) -> bool:
    groups: list[Named | None] = []
    right = True
    for wanted in task.include:
        objects = naive_found(task, things, wanted.name)[: wanted.count]
        good = len(objects) == wanted.count
        if good and wanted.color is not None:
            good = sum(entry[3] == wanted.color for entry in objects) >= wanted.count
        if good and wanted.position is not None:
            target = groups[wanted.position[1]]
            good = target is not None and all(
                wanted.position[0] in naive_relations(a[2], b[2]) for a in objects for b in target
            )
        groups.append(objects if good else None)
        right = right and good
    return right and not any(len(naive_found(task, things, entry.name)) >= entry.count for entry in task.exclude)


def naive_soft_and_strict(task: Task, things: Named) -> tuple[float, bool]:
    parts: list[float] = []
    groups: list[Named | None] = []
    for wanted in task.include:
        objects = naive_found(task, things, wanted.name)
        good = len(objects) == wanted.count
        parts.append(1 - abs(wanted.count - len(objects)) / wanted.count)
        if not good and (wanted.color is not None or wanted.position is not None):
            parts.append(0.0)
        if good and wanted.color is not None:
            of_color = len([entry for entry in objects if entry[3] == wanted.color])
            parts.append(1 - abs(wanted.count - of_color) / wanted.count)
            good = of_color == wanted.count
        if good and wanted.position is not None:
            target = groups[wanted.position[1]]
            if target is None:
                parts.append(0.0)
                good = False
            else:
                for a in objects:
                    for b in target:
                        if good and wanted.position[0] not in naive_relations(a[2], b[2]):
                            parts.append(0.0)
                            good = False
                parts.append(1.0)
        groups.append(objects if good else None)
    return sum(parts) / len(parts), all(group is not None for group in groups)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    include: list[dict[str, Any]] = []
    for index in range(draw(st.integers(1, 3))):
        entry: dict[str, Any] = {"class": draw(st.sampled_from(CLASSES)), "count": draw(st.integers(1, 3))}
        if draw(st.booleans()):
            entry["color"] = draw(st.sampled_from(COLORS[:2]))
        if index and draw(st.booleans()):
            entry["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, index - 1))]
        include.append(entry)
    exclude = draw(
        st.lists(st.fixed_dictionaries({"class": st.sampled_from(CLASSES), "count": st.integers(1, 4)}), max_size=4)
    )
    return {"tag": draw(st.sampled_from(TAGS)), "include": include, "exclude": exclude}


# Confidences are unequal: which of two equal ones comes first is nobody's rule.
named = st.lists(
    st.tuples(st.sampled_from(CLASSES), st.floats(0.2, 1.0), boxes, st.sampled_from(COLORS[:2])),
    max_size=6,
    unique_by=lambda entry: entry[1],
)


@given(rows(), named)
def test_scores_match_a_naive_implementation(metadata: dict[str, Any], things: Named) -> None:
    task = parse_task(metadata, CLASSES)
    found = select([thing(name, confidence, box) for name, confidence, box, _ in things], task.confidence)
    color_of = {confidence: color for _, confidence, _, color in things}
    colors = {
        name: [color_of[object.confidence] for object in found[name][:count]]
        for name, count in wanted_colors(task, found).items()
    }
    result = judge(task, found, colors)
    soft, strict = naive_soft_and_strict(task, things)
    assert result.soft == pytest.approx(soft)
    assert result.strict == strict
    assert result.correct == naive_correct(task, things)
    assert result.soft <= 1
    assert not result.strict or result.soft == 1
    excluded = any(len(found.get(entry.name, ())) >= entry.count for entry in task.exclude)
    assert not result.strict or result.correct or excluded
    assert bool(result.failures) == (not result.strict or excluded)
    assert judge(task, found, colors, relation_quirk=False).soft <= result.soft
