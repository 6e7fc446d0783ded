"""Random scenes fulfil their prompts; near misses fail them in the ways they name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.shapes.prompts import TASKS, Task, parse
from models.shapes.rules import exact_score, geneval_score
from models.shapes.scenes import FAULTS, Split, near_miss, random_prompt, random_scene, right_scene, truth

SEEDS = st.integers(0, 2**32)


@given(SEEDS, st.sampled_from(TASKS))
def test_right_scenes_are_right_and_near_misses_wrong(seed: int, task: Task) -> None:
    rng = np.random.default_rng(seed)
    prompt = random_prompt(rng, task)
    assert exact_score(prompt, truth(right_scene(prompt, rng))) == 1.0
    for faults in (1, 2, 3):
        scene, names = near_miss(prompt, rng, faults)
        assert len(names) == faults
        assert exact_score(prompt, truth(scene)) == 0.0


@pytest.mark.parametrize(
    ("kind", "text", "change"),
    [
        ("missing_object", "three red stars", -1),
        ("one_too_many", "three red stars", 1),
        ("extra_object", "a star", 1),
        ("wrong_color", "a red star and a blue cross", 0),
        ("wrong_shape", "a star and a cross", 0),
        ("swapped_attributes", "a red star and a blue cross", 0),
        ("wrong_relation", "a star above a cross", 0),
    ],
)
def test_each_fault_does_what_its_name_says(kind: str, text: str, change: int) -> None:
    prompt = parse(text)
    assert prompt is not None
    wanted = [(include.shape, include.color) for include in prompt.include for _ in range(include.count)]
    for seed in range(20):
        scene, names = near_miss(prompt, np.random.default_rng(seed), kinds=(kind,))
        assert names == (kind,)
        assert len(scene.objects) == prompt.count + change
        shapes, colors = [o.shape for o in scene.objects], [o.color for o in scene.objects]
        if kind in ("wrong_color", "swapped_attributes", "wrong_relation"):
            assert sorted(shapes) == sorted(shape for shape, _ in wanted)
        if kind == "swapped_attributes":
            assert [(o.shape, o.color) for o in scene.objects] == [("star", "blue"), ("cross", "red")]
        if kind == "wrong_color":
            assert colors != ["red", "blue"]
        # GenEval's rule overlooks an extra object, unless it is one more of a counted class.
        assert geneval_score(prompt, truth(scene)) == float(kind == "extra_object")


def test_all_faults_have_a_test_above() -> None:
    assert set(FAULTS) == {
        "missing_object",
        "one_too_many",
        "extra_object",
        "wrong_color",
        "wrong_shape",
        "swapped_attributes",
        "wrong_relation",
    }


def test_a_fault_that_cannot_be_made_raises() -> None:
    prompt = parse("a star")
    assert prompt is not None
    with pytest.raises(ValueError, match="no admissible near miss"):
        near_miss(prompt, np.random.default_rng(0), kinds=("wrong_relation",))


@given(SEEDS)
def test_a_seed_gives_the_same_scenes(seed: int) -> None:
    def make() -> object:
        rng = np.random.default_rng(seed)
        prompt = random_prompt(rng)
        return prompt, right_scene(prompt, rng), near_miss(prompt, rng, 2), random_scene(rng, 4)

    assert make() == make()


def test_a_split_keeps_out_what_it_holds_out() -> None:
    split = Split(frozenset({("star", "red")}), frozenset({frozenset({"blue", "green"})}))
    red_star, pair = parse("a red star"), parse("a blue cross and a green circle")
    assert red_star is not None
    assert pair is not None
    assert not split.admits(red_star)
    assert not split.admits(pair)
    with pytest.raises(ValueError, match="no admissible scene"):
        right_scene(red_star, np.random.default_rng(0), split)
    rng = np.random.default_rng(1)
    unsplit = [random_scene(rng, 4) for _ in range(60)]
    assert not all(split.admits(scene) for scene in unsplit)
    assert all(split.admits(random_scene(rng, 4, split)) for _ in range(60))
