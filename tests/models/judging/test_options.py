"""Options of judges: defaults, bounds, and messages that name the model and the option."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from models.judging.options import Options
from models.judging.templates import TemplateError, load_template


def options(**values: object) -> Options:
    return Options("the-judge", values)


def test_defaults() -> None:
    own = options()
    assert own.choice("mode", "a", ("a", "b")) == "a"
    assert own.whole("count", 3, 1, 5) == 3
    assert own.number("heat", 0.5, 0, 1) == 0.5
    assert (own.text("say", "x"), own.flag("on", True)) == ("x", True)
    assert own.template("template", "think_v1") is load_template("think_v1")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("c", lambda own: own.choice("it", "a", ("a", "b"))), (0, lambda own: own.whole("it", 1, 1, 5)),
        (6, lambda own: own.whole("it", 1, 1, 5)), (True, lambda own: own.whole("it", 1, 1, 5)),
        (2.0, lambda own: own.whole("it", 1, 1, 5)), (math.nan, lambda own: own.number("it", 0, 0, 1)),
        (False, lambda own: own.number("it", 0, 0, 1)), ("1", lambda own: own.number("it", 0, 0, 1)),
        (None, lambda own: own.text("it", "")), (1, lambda own: own.flag("it", True)),
    ],
)  # fmt: skip
def test_other_values_are_refused_by_name(value: object, read: Callable[[Options], object]) -> None:
    with pytest.raises(ValueError, match=r"the option it of the-judge is .*, not "):
        read(options(it=value))


def test_a_template_is_another_of_the_same_fields_or_a_file(tmp_path: Path) -> None:
    assert options(it="think_qwen3vl").template("it", "think_v1").name == "think_qwen3vl"
    with pytest.raises(TemplateError, match=r"\['prompt'\].*'question'"):
        options(it="understanding_image_point").template("it", "think_v1")
    (tmp_path / "own.txt").write_text("[{prompt}]", "utf-8")
    own = options(it=str(tmp_path / "own.txt")).template("it", "think_v1")
    assert (own.text, own.verified) == ("[{prompt}]", False)
    with pytest.raises(TemplateError, match="cannot be read"):
        options(it=str(tmp_path / "none.txt")).template("it", "think_v1")
