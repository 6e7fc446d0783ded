"""Prompt files in the forms of the field, what is wrong with them in one line, and the sets that are shipped."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import tomllib
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shapes_prompts import HELD_OUT, TRAINING, make_sets, request, to_jsonl
from models.shapes.prompts import TASKS, parse
from trainer_client.prompts import SHIPPED, Prompt, load_prompts

ROOT = Path(__file__).parents[2]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---------------------------------------------------------------------------------------------------- forms


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    """With a byte order mark, Windows line ends, blank lines and blanks around. Quotes stay: OCR reads them."""
    text = '\ufeffa red circle  \r\n\r\n   \r\n  A sign that says "STOP, now"\r\nlast, without an end'
    prompts = load_prompts(written(tmp_path, "train.txt", text))
    assert prompts == [Prompt("a red circle"), Prompt('A sign that says "STOP, now"'), Prompt("last, without an end")]
    assert [prompt.metadata for prompt in prompts] == [{}, {}, {}]


def test_genevals_rows_are_metadata_as_a_whole(tmp_path: Path) -> None:
    row = {
        "tag": "counting", "include": [{"class": "bench", "count": 2}], "exclude": [{"class": "bench", "count": 3}],
        "prompt": "a photo of two benches",
    }  # fmt: skip
    [prompt] = load_prompts(written(tmp_path, "evaluation_metadata.jsonl", json.dumps(row) + "\n\n"))
    assert prompt == Prompt("a photo of two benches", row, "counting")


def test_other_fields_of_json_lines_are_metadata(tmp_path: Path) -> None:
    """A line separator of Unicode within a string ends no line."""
    lines = ['{"caption": "a fox\u2028at night", "target": "X", "n": [1, {"a": null}]}', '"only a text"']
    found = load_prompts(written(tmp_path, "p.jsonl", "\n".join(lines)))
    assert found == [Prompt("a fox\u2028at night", {"target": "X", "n": [1, {"a": None}]}), Prompt("only a text")]


def test_drawbench_and_pick_a_pic_are_tables_with_a_header(tmp_path: Path) -> None:
    drawbench = 'Prompts,Category\n"A red car, and a white sheep.",Colors\n"A ""quoted""\nword",Text\n'
    assert load_prompts(written(tmp_path, "drawbench.csv", drawbench)) == [
        Prompt("A red car, and a white sheep.", {"Category": "Colors"}, "Colors"),
        Prompt('A "quoted"\nword', {"Category": "Text"}, "Text"),
    ]
    pick = "image_uid,caption,label_0\n7,a cat,1\n8, a dog ,0.5\n"
    assert load_prompts(written(tmp_path, "pick.csv", pick)) == [
        Prompt("a cat", {"image_uid": "7", "label_0": "1"}),
        Prompt("a dog", {"image_uid": "8", "label_0": "0.5"}),
    ]
    parti = "Prompt\tCategory\tChallenge\nbond\tAbstract\tBasic\n"
    [prompt] = load_prompts(written(tmp_path, "PartiPrompts.tsv", parti))
    assert prompt == Prompt("bond", {"Category": "Abstract", "Challenge": "Basic"}, "Abstract")


def test_a_json_list_holds_strings_or_objects(tmp_path: Path) -> None:
    content = json.dumps(["a cat", {"text": "a dog", "tag": "animals"}])
    expected = [Prompt("a cat"), Prompt("a dog", {"tag": "animals"}, "animals")]
    assert load_prompts(written(tmp_path, "p.json", content)) == expected


def test_the_prompt_wins_over_a_caption_and_numbers_are_no_tags(tmp_path: Path) -> None:
    row = {"caption": "seen", "Prompt": "asked", "tag": 3}
    [prompt] = load_prompts(written(tmp_path, "p.jsonl", json.dumps(row)))
    assert prompt == Prompt("asked", {"caption": "seen", "tag": 3}, "")


def test_a_form_that_is_named_wins_over_the_ending(tmp_path: Path) -> None:
    path = written(tmp_path, "prompts.list", '{"prompt": "a cat"}\n')
    assert load_prompts(path, "jsonl") == [Prompt("a cat")]
    assert load_prompts(str(path), form="text") == [Prompt('{"prompt": "a cat"}')]
    with pytest.raises(ValueError, match=r"prompts.list: its ending tells no form; name one of text, jsonl"):
        load_prompts(path)
    with pytest.raises(ValueError, match=r"unknown form 'yaml' of prompts; known are auto, text"):
        load_prompts(path, "yaml")  # type: ignore[arg-type]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip() == text)


@given(st.lists(st.tuples(texts, st.dictionaries(st.sampled_from(["a", "tag", "seed"]), texts)), min_size=1))
def test_what_is_written_as_json_lines_or_a_list_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, dict[str, str]]]
) -> None:
    folder = tmp_path_factory.mktemp("prompts")
    objects = [{"prompt": text, **others} for text, others in rows]
    expected = [Prompt(text, others, others.get("tag", "")) for text, others in rows]
    lines = written(folder, "p.jsonl", "\n".join(json.dumps(row) for row in objects))
    unescaped = written(folder, "p.json", json.dumps(objects, ensure_ascii=False))
    assert load_prompts(lines) == load_prompts(unescaped) == expected


@given(st.lists(st.lists(st.text("ab ,\"'\t\n", min_size=1).filter(str.strip), min_size=2, max_size=2), min_size=1))
def test_what_is_written_as_a_table_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("prompts")
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["prompt", "other"], *rows])
    found = load_prompts(written(folder, "p.csv", buffer.getvalue()))
    assert found == [Prompt(text.strip(), {"other": other}) for text, other in rows]


# ---------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "", "has no prompts"),
        ("p.txt", " \n\t\n", "has no prompts"),
        ("p.jsonl", "\n", "has no prompts"),
        ("p.json", "", "has no prompts"),
        ("p.json", "[]", "has no prompts"),
        ("p.csv", "", "has no prompts"),
        ("p.csv", "prompt,tag\n", "has no prompts"),
        ("p.jsonl", '"a"\n{"prompt": "b"', "line 2: broken JSON (Expecting ',' delimiter at character 15)"),
        (
            "p.jsonl",
            '"a"\n\n{"prompts_of": "b"}',
            "line 3: no prompt: none of the fields prompt, prompts, text, caption",
        ),
        ("p.jsonl", '{"prompt": "b", "x": NaN}', "line 1: broken JSON (NaN is no JSON)"),
        ("p.jsonl", '{"prompt": 3}', "line 1: field 'prompt': a prompt is a text, not a number"),
        ("p.jsonl", '{"text": null}', "line 1: field 'text': a prompt is a text, not null"),
        ("p.jsonl", '{"caption": "  "}', "line 1: field 'caption': the prompt is empty"),
        ("p.jsonl", "[1]", "line 1: a text or an object with fields is due, not a list"),
        ("p.json", '["a", 7]', "entry 2: a text or an object with fields is due, not a number"),
        ("p.json", '{"prompt": "a"}', "a list of strings or objects is due, not an object"),
        ("p.json", '[\n"a"\n"b"]', "line 3: broken JSON (Expecting ',' delimiter at character 1)"),
        ("p.csv", "prompt,tag\na,b,c\n", "line 2: more fields than the header's 2"),
        ("p.csv", "tag,prompt\na\n", "line 2: no prompt: none of the fields"),
        ("p.csv", 'tag,prompt\na,"b\n', "line 2: is no row of a table (unexpected end of data)"),
        ("p.csv", "tag,Prompts\na,b\nc,\n", "line 3: field 'Prompts': the prompt is empty"),
        ("p.txt", b"a\xffb", "is no UTF-8 text (invalid start byte at byte 1)"),
        ("p.jsonl", "[" * 100_000, "line 1: broken JSON ("),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {said}')}") as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "no.txt", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=said) as caught:
            load_prompts(path)
        assert str(caught.value).startswith(f"{path}: ")


@given(st.binary(max_size=60), st.sampled_from(["text", "jsonl", "json", "csv", "tsv"]))
def test_no_bytes_make_anything_but_prompts_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, form: Any
) -> None:
    path = written(tmp_path_factory.mktemp("prompts"), "p", content)
    with contextlib.suppress(ValueError):
        prompts = load_prompts(path, form)
        assert prompts
        assert all(prompt.text.strip() == prompt.text != "" for prompt in prompts)


# ---------------------------------------------------------------------------------------------------- shipped sets


def test_the_shipped_sets_are_what_the_generator_writes() -> None:
    for name, made in zip(("shapes:train", "shapes:heldout"), make_sets(), strict=True):
        shipped = files("trainer_client") / "prompt_sets" / SHIPPED[name]
        assert shipped.read_text(encoding="utf-8") == to_jsonl(made)
        assert [(prompt.text, prompt.metadata) for prompt in load_prompts(name)] == [
            (each.text, each.to_metadata()) for each in made
        ]


def test_the_sets_share_no_text_and_no_request_and_cover_all_tasks() -> None:
    """No text twice; what a held-out prompt asks for, training never asks for, in any wording or order."""
    training, held_out = ([parse(prompt.text) for prompt in load_prompts(name)] for name in SHIPPED)
    texts = [prompt.text for prompt in [*training, *held_out] if prompt is not None]
    assert len(texts) == len(set(texts)) == 840
    asked, withheld = ({request(prompt) for prompt in each if prompt is not None} for each in (training, held_out))
    assert not asked & withheld
    for prompts, wanted in ((training, TRAINING), (held_out, HELD_OUT)):
        assert Counter(prompt.task for prompt in prompts if prompt is not None) == wanted
        assert set(wanted) == set(TASKS)
    assert (sum(TRAINING.values()), sum(HELD_OUT.values())) == (600, 240)


def test_a_request_is_the_same_in_other_words_and_other_in_other_meaning() -> None:
    same = ["a red star left of a circle", "a circle to the right of a star that is red"]
    other = ["a circle left of a red star", "a red star above a circle", "a red star below a circle"]
    first, second, *others = [request(prompt) for text in [*same, *other] if (prompt := parse(text))]
    assert first == second
    assert len({first, *others}) == 4
    swapped = [request(prompt) for text in ("a star and a cross", "a cross with a star") if (prompt := parse(text))]
    assert swapped[0] == swapped[1]


def test_a_tag_of_a_shipped_prompt_is_its_task() -> None:
    for prompt in load_prompts("shapes:heldout"):
        read = parse(prompt.text)
        assert read is not None
        assert prompt.tag == prompt.metadata["tag"] == read.task


def test_an_unknown_set_is_told_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="shapes:test: no such set is shipped; there are shapes:train, shapes:heldout"):
        load_prompts("shapes:test")


def test_the_sets_travel_with_the_package() -> None:
    data = tomllib.loads((ROOT / "trainer_client" / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "prompt_sets/*.jsonl" in data["trainer_client"]
