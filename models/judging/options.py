"""Readers of a judge's options: each names the model and the option, and what it may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.judging.templates import Template, TemplateError, list_templates, load_template


@dataclass(frozen=True)
class Options:
    """``models.NAME.options`` of the judge ``model``; every method raises ValueError for a value that cannot be."""

    model: str
    values: Mapping[str, Any]

    def choice(self, name: str, default: str, known: Sequence[str]) -> str:
        """One of ``known``."""
        value = self.values.get(name, default)
        if value not in known:
            raise self._refuse(name, f"one of {', '.join(known)}", value)
        return str(value)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._refuse(name, f"a whole number from {low} to {high}", value)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from ``low`` to ``high``."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self._refuse(name, f"a number from {low} to {high}", value)
        return float(value)

    def text(self, name: str, default: str) -> str:
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self._refuse(name, "a text", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self._refuse(name, "true or false", value)
        return value

    def template(self, name: str, default: str) -> Template:
        """The template ``default``, or the one that the option names: another of this project's, or a file's path.

        Raises :class:`TemplateError`, a ValueError, where it has other fields than ``default``.
        """
        value = self.text(name, default)
        if value not in list_templates():
            return load_template(default, Path(value))
        template, fields = load_template(value), load_template(default).fields
        if template.fields != fields:
            raise TemplateError(
                f"{self.model} fills {sorted(fields)} into its {name}; {value} has the fields {sorted(template.fields)}"
            )
        return template

    def _refuse(self, name: str, wanted: str, value: object) -> ValueError:
        return ValueError(f"the option {name} of {self.model} is {wanted}, not {value!r}")
