"""Prompts to train on and to evaluate with, read from the forms in which the field's sets come.

text   one prompt a line (DrawBench as plain text, Flow-GRPO's OCR set with its targets in quotes)
jsonl  one JSON object a line (GenEval's ``evaluation_metadata.jsonl``)
json   a list of strings or objects
csv    a table with a header (DrawBench, Pick-a-Pic); tsv (PartiPrompts) likewise
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias, get_args

Form: TypeAlias = Literal["auto", "text", "jsonl", "json", "csv", "tsv"]

SHIPPED = {"shapes:train": "shapes_train.jsonl", "shapes:heldout": "shapes_heldout.jsonl"}
"""Names of the sets that come with the package; ``python -m benchmarks.shapes_prompts`` writes them."""

PROMPT_FIELDS = ("prompt", "prompts", "text", "caption")
"""Where a row keeps its prompt: the first of these that it has, in any case of letters."""
TAG_FIELDS = ("tag", "category")
"""Where a row says what kind of prompt it is."""

_BY_SUFFIX = {"": "text", ".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"} | {
    f".{form}": form for form in ("json", "csv", "tsv")
}


@dataclass(frozen=True)
class Prompt:
    """One prompt: its text, what a reward needs to know beside it (JSON values), and the kind of prompt it is."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tag: str = ""


Row: TypeAlias = tuple[str, Any]
"""Where an entry stands ("line 3"), and what stands there: a text, or an object with fields."""


def load_prompts(path: str | Path, form: Form = "auto") -> list[Prompt]:
    """The prompts of a file, or of a shipped set (``"shapes:train"``, ``"shapes:heldout"``), in their order.

    ``form`` "auto" goes by the file's ending. The text of a row is its ``prompt``, ``prompts``, ``text`` or
    ``caption``, without surrounding blanks; its other fields are the metadata, and GenEval's rows (those with
    ``include``) are metadata as a whole; ``tag`` or ``category`` is the tag. Raises ValueError, in one line that names
    file and place, for what cannot be read, a row without a prompt, and a file without prompts.
    """
    if form not in get_args(Form):
        raise ValueError(f"unknown form {form!r} of prompts; known are {', '.join(get_args(Form))}")
    name = str(path)
    text = _read(name)
    chosen = form if form != "auto" else "jsonl" if name in SHIPPED else _BY_SUFFIX.get(Path(name).suffix.lower())
    if chosen is None:
        _refuse(name, "", f"its ending tells no form; name one of {', '.join(get_args(Form)[1:])}")
    prompts = [_prompt(name, place, row) for place, row in _READERS[chosen](name, text)]
    if not prompts:
        _refuse(name, "", "has no prompts")
    return prompts


def _refuse(name: str, place: str, why: str) -> NoReturn:
    raise ValueError(f"{name}: {place}{': ' if place else ''}{why}")


def _read(name: str) -> str:
    if name in SHIPPED:
        return (files("trainer_client") / "prompt_sets" / SHIPPED[name]).read_text(encoding="utf-8")
    if name.startswith("shapes:"):
        _refuse(name, "", f"no such set is shipped; there are {', '.join(SHIPPED)}")
    try:
        return Path(name).read_text(encoding="utf-8-sig")  # spreadsheets begin their files with a mark
    except UnicodeDecodeError as exc:
        raise ValueError(f"{name}: is no UTF-8 text ({exc.reason} at byte {exc.start})") from exc
    except OSError as exc:
        raise ValueError(f"{name}: {exc.strerror or exc}") from exc


def _lines(text: str) -> Iterator[tuple[str, str]]:
    # Not splitlines(): JSON may hold U+2028 and the like within a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if stripped := line.strip():
            yield f"line {number}", stripped


def _text_rows(name: str, text: str) -> Iterator[Row]:
    yield from _lines(text)


def _jsonl_rows(name: str, text: str) -> Iterator[Row]:
    for place, line in _lines(text):
        yield place, _json(name, place, line)


def _json_rows(name: str, text: str) -> Iterator[Row]:
    if not text.strip():
        return
    listed = _json(name, "", text)
    if not isinstance(listed, list):
        _refuse(name, "", f"a list of strings or objects is due, not {_kind(listed)}")
    for number, row in enumerate(listed, start=1):
        yield f"entry {number}", row


def _csv_rows(name: str, text: str) -> Iterator[Row]:
    yield from _table_rows(name, text, ",")


def _tsv_rows(name: str, text: str) -> Iterator[Row]:
    yield from _table_rows(name, text, "\t")


def _table_rows(name: str, text: str, delimiter: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row:
                _refuse(name, place, f"more fields than the header's {len(reader.fieldnames or ())}")
            yield place, {key: value for key, value in row.items() if value is not None}
    except csv.Error as exc:
        _refuse(name, f"line {reader.reader.line_num}", f"is no row of a table ({exc})")


_READERS: dict[str, Callable[[str, str], Iterator[Row]]] = {
    "text": _text_rows,
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "tsv": _tsv_rows,
}


def _json(name: str, place: str, text: str) -> Any:
    def constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON")  # Python's parser lets NaN pass; a service does not

    try:
        return json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as exc:
        where = place or f"line {exc.lineno}"
        _refuse(name, where, f"broken JSON ({exc.msg} at character {exc.colno})")
    except (ValueError, RecursionError) as exc:
        _refuse(name, place, f"broken JSON ({exc})")


def _prompt(name: str, place: str, row: Any) -> Prompt:
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        _refuse(name, place, f"a text or an object with fields is due, not {_kind(row)}")
    by_lower = {key.strip().lower(): key for key in reversed(row)}
    key = next((by_lower[known] for known in PROMPT_FIELDS if known in by_lower), None)
    if key is None:
        _refuse(name, place, f"no prompt: none of the fields {', '.join(PROMPT_FIELDS)} among {', '.join(row) or '()'}")
    if not isinstance(row[key], str):
        _refuse(name, place, f"field {key!r}: a prompt is a text, not {_kind(row[key])}")
    text = row[key].strip()
    if not text:
        _refuse(name, place, f"field {key!r}: the prompt is empty")
    tag = next((row[by_lower[known]] for known in TAG_FIELDS if known in by_lower), "")
    metadata = row if "include" in row else {other: value for other, value in row.items() if other != key}
    return Prompt(text, metadata, tag if isinstance(tag, str) else "")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
