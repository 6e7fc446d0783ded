"""The JSON object in a judge's text, whatever stands around it."""

from __future__ import annotations

import json
from typing import Any


def find_object(text: str) -> dict[str, Any] | None:
    """The object that the text is, or else that its outermost braces hold; None where there is none.

    An object that was written as a JSON string is unwrapped once. Numbers that are not finite are no JSON.
    """
    first, last = text.find("{"), text.rfind("}")
    for candidate in (text, text[first : last + 1] if 0 <= first < last else ""):
        found = _load(candidate)
        if isinstance(found, str):
            found = _load(found)
        if isinstance(found, dict):
            return found
        if isinstance(found, list):
            return None  # braces inside a list are not the answer
    return None


def _load(text: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # not JSON, or made to exhaust the parser
        return None


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def is_cut_off(text: str) -> bool:
    """Whether the text opens a brace and ends before it is closed."""
    depth, in_string, escaped = 0, False, False
    for character in text[text.find("{") :] if "{" in text else "":
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return False
    return depth > 0
