"""Templates are the published bytes, say so, and refuse to be filled wrongly."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.base import InputError
from models.judging.templates import (
    FOLDER,
    MissingField,
    Template,
    TemplateError,
    UnknownField,
    list_templates,
    load_template,
)

# The first 16 digits that were published beside the texts; the others have none.
PUBLISHED = {
    "hpsv3": "f6ee57479d4e9eee", "ur_point_v1": "f56f919ce3bc6aab", "ur_point_flowgrpo": "d68ab1dcf4dc3a39",
    "ur_pair_qwen": "0fd2f5c43a065165", "ur_acs_v15": "88d1d1c5f0fba9dc", "ur2_acs": "75d52d3ae771f89b",
    "ur2_pair": "828e9ab2f81c3b6d", "think_v1": "342f6a4bd0efdae0", "think_qwen3vl": "a8a0d80818246406",
}  # fmt: skip
UNVERIFIED = {name for name in list_templates() if name.startswith(("understanding_", "reward_dance", "one_reward"))}


def values(template: Template) -> dict[str, str]:
    return {field: f"<{field}>" for field in template.fields}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_texts_are_byte_exact(name: str) -> None:
    text = load_template(name).text
    assert hashlib.sha256(text.encode()).hexdigest().startswith(PUBLISHED[name])
    assert load_template(name).verified


def test_every_file_is_a_template_and_every_template_a_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(list_templates())


def test_what_comes_from_papers_is_not_verified() -> None:
    assert len(UNVERIFIED) == 11
    assert {name for name in list_templates() if not load_template(name).verified} == UNVERIFIED | {
        "ur_pair_video", "ur_point_video",
    }  # fmt: skip


@pytest.mark.parametrize("name", list_templates())
def test_filling_changes_the_placeholders_and_nothing_else(name: str) -> None:
    template = load_template(name)
    filled = template.fill(**values(template))
    unfilled = filled
    for field in template.fields:
        assert f"{{{field}}}" not in filled
        assert f"<{field}>" in filled
        unfilled = unfilled.replace(f"<{field}>", f"{{{field}}}")
    assert unfilled == template.text


@given(st.text(), st.text())
def test_values_are_never_read_as_templates(question: str, answer: str) -> None:
    template = load_template("understanding_image_point")
    before, between, after = (
        part.split(mark)[i]
        for part, mark, i in (
            (template.text, "{question}", 0),
            (template.text.split("{question}")[1], "{answer}", 0),
            (template.text, "{answer}", 1),
        )
    )
    assert template.fill(question=question, answer=answer) == before + question + between + answer + after


def test_a_placeholder_inside_a_value_stays() -> None:
    filled = load_template("understanding_image_point").fill(question="{answer} \\1 {prompt}", answer="{question}")
    assert filled.endswith("Question: [{answer} \\1 {prompt}]\nAnswer: [{question}]")


def test_the_order_of_reward_dance_is_a_parameter() -> None:
    text = load_template("reward_dance").fill(prompt="a cat", instruction="", candidate="1", reference="2")
    assert "Is image 1 better than image 2?" in text


def test_missing_and_unknown_fields_are_errors_of_the_input() -> None:
    template = load_template("understanding_image_pair")
    with pytest.raises(MissingField, match="understanding_image_pair needs answer_1, answer_2") as missing:
        template.fill(question="?")
    with pytest.raises(UnknownField, match="has no criterion") as unknown:
        template.fill(question="?", answer_1="a", answer_2="b", criterion="c")
    assert isinstance(missing.value, InputError)
    assert (missing.value.code, unknown.value.code) == ("template_field_missing", "template_field_unknown")


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(b'Rate {prompt}\r\n{not a field} {"json": {}}')
    template = load_template("ur_point_v1", file)
    assert template.fill(prompt="x") == 'Rate x\r\n{not a field} {"json": {}}'
    assert not template.verified
    file.write_bytes((FOLDER / "ur_point_v1.txt").read_bytes())
    assert load_template("ur_point_v1", file).verified
    assert not load_template("ur2_acs", file).verified


@pytest.mark.parametrize(
    ("content", "match"), [(b"no field", "has the fields"), (b"{prompt} {promt}", "promt"), (b"\xff{prompt}", "read")]
)
def test_texts_that_cannot_be_templates(tmp_path: Path, content: bytes, match: str) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(TemplateError, match=match):
        load_template("ur_point_v1", file)


def test_unknown_templates_and_files(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="no template 'nope'"):
        load_template("nope")
    with pytest.raises(TemplateError, match="cannot be read"):
        load_template("ur_point_v1", tmp_path / "none.txt")
