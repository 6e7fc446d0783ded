"""The three scores and their reasons, on objects whose truth is written down by hand."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.shapes.prompts import TASKS, Prompt, Task, parse
from models.shapes.rules import Found, exact_score, explain, geneval_score, judge, relative_position, soft_score
from models.shapes.scenes import near_miss, random_prompt, random_scene, right_scene, truth


def prompt_of(text: str) -> Prompt:
    prompt = parse(text)
    assert prompt is not None
    return prompt


def thing(name: str, x: float = 0.5, y: float = 0.5, confidence: float = 1.0) -> Found:
    color, shape = name.split()
    return Found(shape, color, x, y, 0.25, 0.25, confidence)


RIGHT = {
    "a star": ["red star"],
    "a star and a circle": ["red star", "red circle"],
    "two circles": ["red circle", "blue circle"],
    "three blue squares": ["blue square"] * 3,
    "a pink cross": ["pink cross"],
    "a red circle and a blue square": ["red circle", "blue square"],
}


@pytest.mark.parametrize(("text", "names"), RIGHT.items())
def test_right_pictures_score_one_by_every_rule(text: str, names: list[str]) -> None:
    verdict = judge(prompt_of(text), [thing(name) for name in names])
    assert (verdict.exact, verdict.geneval, verdict.soft) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("text", "names"), RIGHT.items())
def test_genevals_rule_is_lax_about_what_was_not_asked_for_and_the_exact_one_is_not(
    text: str, names: list[str]
) -> None:
    prompt = prompt_of(text)
    filled = [thing(name) for name in [*names, "green triangle", "cyan triangle", "green triangle"]]
    assert geneval_score(prompt, filled) == 1.0
    assert exact_score(prompt, filled) == 0.0
    assert 0.0 < soft_score(prompt, filled) < 1.0


def test_geneval_excludes_one_more_of_a_counted_class_but_not_of_another_task() -> None:
    assert geneval_score(prompt_of("two red stars"), [thing("red star")] * 3) == 0.0
    assert geneval_score(prompt_of("a red star"), [thing("red star")] * 3) == 1.0


def test_geneval_takes_the_most_confident_of_a_class() -> None:
    red, blue = thing("red star", confidence=0.9), thing("blue star", confidence=0.6)
    assert geneval_score(prompt_of("a red star"), [blue, red]) == 1.0
    assert geneval_score(prompt_of("a blue star"), [blue, red]) == 0.0


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a star", []),
        ("a star", ["red circle"]),
        ("two circles", ["red circle"]),
        ("three blue squares", ["blue square", "blue square", "red square"]),
        ("a red circle and a blue square", ["blue circle", "red square"]),
    ],
)
def test_what_lacks_something_is_wrong_by_both_rules(text: str, names: list[str]) -> None:
    verdict = judge(prompt_of(text), [thing(name) for name in names])
    assert (verdict.exact, verdict.geneval) == (0.0, 0.0)
    assert verdict.soft < 1.0


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.2, 0.5, {"left of"}),
        (0.8, 0.5, {"right of"}),
        (0.5, 0.2, {"above"}),
        (0.5, 0.8, {"below"}),
        (0.1, 0.1, {"left of", "above"}),
        (0.5, 0.5, set()),
        (0.46, 0.5, set()),  # closer than a tenth of both widths
        (0.4, 0.1, {"above"}),
    ],
)
def test_relative_position_is_genevals(x: float, y: float, expected: set[str]) -> None:
    assert relative_position(thing("red circle", x, y), thing("blue square")) == expected


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_relations_turn_round_when_their_ends_are_swapped(ax: float, ay: float, bx: float, by: float) -> None:
    a, b = thing("red circle", ax, ay), thing("blue square", bx, by)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relative_position(b, a) == {opposite[relation] for relation in relative_position(a, b)}


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_only_the_relation_asked_for_counts(relation: str) -> None:
    prompt = prompt_of(f"a red circle {relation} a blue square")
    places = {"left of": (0.2, 0.5), "right of": (0.8, 0.5), "above": (0.5, 0.2), "below": (0.5, 0.8)}
    for other, place in places.items():
        verdict = judge(prompt, [thing("blue square"), thing("red circle", *place)])
        assert verdict.exact == verdict.geneval == float(other == relation)
        word = "is" if other == relation else "is not"
        assert f"the red circle {word} {relation} the blue square" in verdict.reason


@given(st.integers(0, 2**32), st.sampled_from(TASKS), st.booleans())
def test_soft_is_one_exactly_where_exact_is_and_exact_implies_geneval(seed: int, task: Task, right: bool) -> None:
    rng = np.random.default_rng(seed)
    prompt = random_prompt(rng, task)
    scene = right_scene(prompt, rng) if right else random_scene(rng, int(rng.integers(0, 6)))
    verdict = judge(prompt, truth(scene))
    assert (verdict.soft == 1.0) == (verdict.exact == 1.0)
    assert 0.0 <= verdict.soft <= 1.0
    assert verdict.geneval >= verdict.exact
    assert not right or verdict.exact == 1.0


@given(st.integers(0, 2**32), st.sampled_from(TASKS))
def test_scores_do_not_depend_on_the_order_of_what_was_found(seed: int, task: Task) -> None:
    rng = np.random.default_rng(seed)
    prompt = random_prompt(rng, task)
    found = truth(near_miss(prompt, rng, 1)[0])[:4]
    scores = {(exact_score(prompt, order), round(soft_score(prompt, order), 9)) for order in permutations(found)}
    assert len(scores) == 1


def test_fewer_faults_score_higher_on_average_in_every_task() -> None:
    for task in TASKS:
        rng = np.random.default_rng(11)
        means = []
        for faults in range(4):
            scores = []
            for _ in range(150):
                prompt = random_prompt(rng, task)
                scene = near_miss(prompt, rng, faults)[0] if faults else right_scene(prompt, rng)
                scores.append(soft_score(prompt, truth(scene)))
            means.append(float(np.mean(scores)))
        assert means[0] == 1.0
        assert all(more - fewer > 0.02 for more, fewer in pairwise(means)), (task, means)


@pytest.mark.parametrize(
    ("text", "names", "reason"),
    [
        ("three red circles", ["red circle", "red circle"], "found 2 red circles, expected 3"),
        ("a blue square", [], "no blue square"),
        ("a blue square", ["blue square"], "found 1 blue square, as asked"),
        (
            "a red circle and a blue square",
            ["red circle", "red square", "red square"],
            "found 1 red circle, as asked; no blue square; also found 2 red squares",
        ),
        ("two crosses", ["red cross", "pink cross", "red cross"], "found 3 crosses, expected 2"),
    ],
)
def test_reasons_say_what_is_right_and_wrong(text: str, names: list[str], reason: str) -> None:
    assert explain(prompt_of(text), [thing(name) for name in names]) == reason


@given(st.integers(0, 2**32), st.sampled_from(TASKS))
def test_every_clause_of_a_reason_is_true(seed: int, task: Task) -> None:
    rng = np.random.default_rng(seed)
    prompt = random_prompt(rng, task)
    found = truth(near_miss(prompt, rng, int(rng.integers(1, 4)))[0])
    clauses = explain(prompt, found).split("; ")
    asked = sum(any(i.matches(f.shape, f.color) for i in prompt.include) for f in found)
    listed = 0
    for clause in clauses:
        if clause.startswith("found "):
            listed += int(clause.split()[1])
        elif clause.startswith("also found "):
            others = [entry.split(" ", 1) for entry in clause.removeprefix("also found ").split(", ")]
            for count, name in others:
                names = {f.name: f for f in found}
                singular = name if count == "1" else name.removesuffix("s").replace("crosse", "cross")
                assert singular in names
                assert int(count) == sum(f.name == singular for f in found)
            assert sum(int(count) for count, _ in others) == len(found) - asked
    assert listed == asked
    assert any("expected" in c or "is not" in c or c.startswith(("no ", "also ")) for c in clauses)
