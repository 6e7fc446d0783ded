"""The demo in the terminal: rich tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.demo.document import Section, Table

PROSE_WIDTH = 100
LONGEST_WORD = 10
"""Characters that a word may claim before it is cut in a narrow window."""
_TONES = {"good": "green", "bad": "", "": ""}


def print_section(console: Console, section: Section) -> None:
    """Title, lead, facts and tables of one section, and in red what failed."""
    console.print()
    console.rule(Text(section.title, style="bold"), align="left", style="dim")
    if section.lead:
        print_prose(console, section.lead)
    for fact in section.facts:
        console.print(Text.assemble((f"{fact.value}  ", "bold cyan"), fact.label))
    for i, table in enumerate(section.tables):
        if i:
            console.print()
        print_table(console, table)
    print_failures(console, section.failures)


def print_table(console: Console, table: Table) -> None:
    console.print(rich_table(table))
    if table.note:
        print_prose(console, table.note)


def print_prose(console: Console, text: str) -> None:
    """In lines that the eye can follow, however wide the window is."""
    console.print(Text(text, style="dim"), width=min(PROSE_WIDTH, console.width))


def rich_table(table: Table) -> RichTable:
    """Cells are texts, not markup: a prompt may hold brackets."""
    made = RichTable(
        title=Text(table.title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, column in enumerate(table.columns):
        if column.numeric:
            # a number is narrower than its title: words under each other leave the room to the texts
            title = Text(column.title.replace(" ", "\n").replace("-", "-\n"))
            made.add_column(title, justify="right", no_wrap=True)
        else:
            words = (word for row in table.rows for word in row.cells[i].split())
            longest = max((len(word) for word in words), default=0)
            made.add_column(Text(column.title), min_width=min(longest, LONGEST_WORD), overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(cell) for cell in row.cells), style=_TONES[row.tone])
    return made


def print_failures(console: Console, failures: Sequence[str]) -> None:
    for failure in failures:
        console.print(Text(f"✗ {failure}", style="bold red"))
