"""Where pictures stand in a turn, and what a context is made into."""

import gc
from weakref import ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.base import Candidate, Context
from models.judge import Turn
from models.judging.templates import MissingField, Template, TemplateError, UnknownField, load_template
from models.judging.turns import ContextPictures, lay_out, marked, with_pixels

A, B = (Candidate(image=Image.new("RGB", (8, 8), color)) for color in ("red", "blue"))


def test_pictures_come_first_where_the_template_has_no_markers() -> None:
    assert lay_out(load_template("think_v1"), [A, B], prompt="x")[:2] == (A, B)
    assert len(lay_out(load_template("think_v1"), [A, B], prompt="x")) == 3


@given(st.text())
def test_markers_become_pictures_and_every_other_byte_stays(prompt: str) -> None:
    template = load_template("ur_pair_llava")
    first, between, second, text = lay_out(template, [A, B], prompt=prompt)
    assert (first, between, second) == (A, "\n ", B)
    assert f"<image>{between}<image>{text}" == template.fill(prompt=prompt)


def test_a_marker_inside_a_value_is_text() -> None:
    parts = lay_out(load_template("ur_pair_llava"), [A, B], prompt="<image>")
    assert str(parts[-1]).endswith("Text Caption: [<image>]")
    assert lay_out(load_template("think_v1"), [A], prompt="<image>")[0] is A


def test_markers_and_pictures_are_as_many() -> None:
    with pytest.raises(TemplateError, match="2 <image> markers for 1 pictures"):
        lay_out(load_template("ur_pair_llava"), [A], prompt="x")


def test_fields_are_checked_with_markers_too() -> None:
    template = load_template("ur_pair_llava")
    with pytest.raises(MissingField, match="prompt"):
        lay_out(template, [A, B])
    with pytest.raises(UnknownField, match="question"):
        lay_out(template, [A, B], prompt="x", question="y")


def test_a_field_may_stand_on_either_side_of_a_marker() -> None:
    template = Template("own", "{a}<image>{b}{a}", frozenset("ab"), "", False)
    assert lay_out(template, [A], a="{b}", b="2") == ("{b}", A, "2{b}")


def test_the_form_of_one_picture() -> None:
    point = load_template("ur_point_v1")
    assert marked(point).text == f"<image>\n{point.text}"
    flow_grpo = load_template("ur_point_flowgrpo")
    assert marked(flow_grpo) is flow_grpo


def test_pixels_take_the_place_of_one_candidate_alone() -> None:
    twin = Candidate(image=A.image, digest=A.digest)
    pixels = torch.zeros(3, 8, 8)
    turn = with_pixels(Turn(("x", A, twin), system="s", reply="r"), A, pixels)
    assert turn.parts[1] is pixels
    assert (turn.parts[0], turn.parts[2], turn.system, turn.reply) == ("x", twin, "s", "r")


def test_a_context_gives_the_same_candidate_every_time_and_is_not_kept_alive() -> None:
    pictures = ContextPictures()
    image = Image.new("L", (8, 8))
    context = Context(image=A.image, frames=(image, image), mask=image)
    assert pictures.image(context, "m") is pictures.image(context, "m")
    assert pictures.frames(context, "m").kind == "video"
    mask = pictures.mask(context)
    assert mask is not None
    assert mask.image is not None
    assert mask.image.mode == "RGB"
    assert pictures.mask(Context()) is None
    gone = ref(context)
    del context
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("context", [None, Context()])
def test_what_a_context_lacks_is_named(context: Context | None) -> None:
    with pytest.raises(MissingField, match=r"judge needs .*context\.image"):
        ContextPictures().image(context, "judge")
    with pytest.raises(MissingField, match=r"judge needs .*context\.frames"):
        ContextPictures().frames(context, "judge")
