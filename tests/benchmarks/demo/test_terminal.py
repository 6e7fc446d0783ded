"""The terminal's tables."""

from __future__ import annotations

import io

from rich.console import Console

from benchmarks.demo.document import Call, Column, Fact, Row, Section, Table, call_table
from benchmarks.demo.terminal import PROSE_WIDTH, print_section

STAGES_MS = {"decode": 1234.5, "queue": 2345.6, "forward": 3456.7}


def printed(section: Section, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_section(console, section)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_brackets_are_text_and_numbers_stand_under_each_other() -> None:
    columns = (Column("name"), Column("score", numeric=True))
    rows = (Row(("a [red]circle[/red]", "10.25")), Row(("[/]", "-1.50")))
    lines = printed(Section("title", "lead", (Table("[bold]", columns, rows),))).splitlines()
    first, second = (next(line.rstrip() for line in lines if line.rstrip().endswith(n)) for n in ("10.25", "-1.50"))
    assert "a [red]circle[/red]" in first
    assert "[/]" in second
    assert len(first) == len(second)


def test_everything_of_a_section_is_printed_and_prose_stays_narrow() -> None:
    lead = "word " * 60
    text = printed(Section("title", lead, facts=(Fact("0.93", "accuracy"),), failures=("it broke",)), width=200)
    assert "title" in text
    assert "0.93  accuracy" in text
    assert "✗ it broke" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("word")) <= PROSE_WIDTH
    assert text.count("word") == 60


def test_numbers_are_whole_in_a_narrow_window() -> None:
    calls = [Call("a long description of it", "/gradient", ("jpeg-incompressibility",), 252, 9876.5, STAGES_MS)]
    text = printed(Section("title", "", (call_table(calls),)), width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    for number in ("252", "1234.5", "2345.6", "3456.7", "9876.5"):
        assert number in text
