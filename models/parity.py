"""Puts reference cases through the product's own functions: ``python -m models.parity FOLDER [--full]``.

A fixtures folder holds files of numbers that reference implementations gave. A *kind* is a file that has a handler,
found by its name anywhere below the folder, so that any other folder of the same form works: other seeds, sizes,
images. A handler registers with :func:`parity_kind` in one of :data:`HANDLER_MODULES`. Files of models of the true
size (``*_full.json``) need gigabytes of memory and disk and minutes each: they are left out unless asked for.

Exit status: 0, every handled case agrees; 1, at least one does not; 2, the folder holds nothing that is handled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

HANDLER_MODULES = ("models.parity_embedded", "models.parity_pointwise", "models.parity_hpsv3")
"""Modules that register handlers when they are imported: one line a file."""

# Files that describe cases or feed them, and hold no reference results of their own.
_NOT_CASES = ("inputs.json", "MANIFEST.json", "index.json", "manifests/*.json", "hpsv3_small.npz")
_CASE_SUFFIXES = {".json", ".npz"}
_FULL_SIZE = "*_full.json"


@dataclass(frozen=True)
class Topic:
    """The largest ``error`` over ``cases`` of one compared quantity, and the largest that is accepted.

    An error that is not a number is off.
    """

    name: str
    cases: int
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Report:
    """What a folder gave: topics by file, the case files that nobody handles, and those left out for their size."""

    topics: tuple[tuple[Path, Topic], ...]
    unhandled: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()

    @property
    def exit_status(self) -> int:
        if not self.topics:
            return 2
        return 0 if all(topic.ok for _, topic in self.topics) else 1


Handler = Callable[[Path], Sequence[Topic]]
_HANDLERS: dict[str, Handler] = {}


def parity_kind(pattern: str) -> Callable[[Handler], Handler]:
    """Register a handler for files whose path ends in ``pattern`` (as ``PurePath.match`` has it: ``jpeg.json``).

    The handler gets the file's path and returns at least one topic; it raises for a file of another form. A second
    handler for one pattern raises ValueError.
    """

    def add(handler: Handler) -> Handler:
        if pattern in _HANDLERS:
            raise ValueError(f"the kind {pattern!r} has two handlers")
        _HANDLERS[pattern] = handler
        return handler

    return add


def largest(errors: Iterable[float]) -> float:
    """The largest error, and not-a-number if any is: Python's max would lose it. 0 for none."""
    errors = list(errors)
    nan = [error for error in errors if error != error]
    return nan[0] if nan else max(errors, default=0.0)


def run(folder: Path, *, full: bool = False) -> Report:
    """Compare every case file below ``folder`` that has a handler; raises what a handler raises.

    Files of models of the true size are compared only with ``full``.
    """
    for module in HANDLER_MODULES:
        import_module(module)
    topics: list[tuple[Path, Topic]] = []
    unhandled: list[Path] = []
    left_out: list[Path] = []
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if file.suffix not in _CASE_SUFFIXES or any(path.match(pattern) for pattern in _NOT_CASES):
            continue
        handler = next((handler for pattern, handler in _HANDLERS.items() if file.match(pattern)), None)
        if handler is None:
            unhandled.append(path)
            continue
        if path.match(_FULL_SIZE) and not full:
            left_out.append(path)
            continue
        found = handler(file)
        if not any(topic.cases for topic in found):
            raise ValueError(f"{path} holds no case")
        topics += [(path, topic) for topic in found]
    return Report(tuple(topics), tuple(unhandled), tuple(left_out))


def show(report: Report, console: Console) -> None:
    """Print a table for each file with the largest error of each topic, then which files were not compared and why."""
    for path in dict.fromkeys(path for path, _ in report.topics):
        table = Table("topic", "cases", "largest error", "accepted", "", "note", title=str(path), title_justify="left")
        for topic in (topic for file, topic in report.topics if file == path):
            verdict = "[green]ok[/green]" if topic.ok else "[bold red]off[/bold red]"
            error, tolerance = f"{topic.error:.3g}", f"{topic.tolerance:.3g}"
            table.add_row(topic.name, str(topic.cases), error, tolerance, verdict, topic.note)
        console.print(table)
    for reason, files in (
        ("full size, left out without --full", report.left_out),
        ("nobody handles yet", report.unhandled),
    ):
        for folder, names in _by_folder(files).items():
            console.print(f"{reason}: {folder}: {', '.join(names)}", highlight=False)
    if not report.topics:
        console.print("[bold red]nothing here is handled[/bold red]")


def _by_folder(files: Iterable[Path]) -> dict[Path, list[str]]:
    folders: dict[Path, list[str]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file.name)
    return folders


def main(
    arguments: Sequence[str] | None = None,
    console: Console | None = None,
    *,
    module: str = "models.parity",
    arrange: Callable[[Report], Report] = lambda report: report,
) -> int:
    """The command line of ``python -m module``, which may ``arrange`` the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description="Compare with reference numbers.")
    parser.add_argument("folder", type=Path, help="a fixtures folder")
    parser.add_argument("--full", action="store_true", help="also models of the true size: gigabytes and minutes each")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder")
    report = arrange(run(folder, full=options.full))
    show(report, console or Console())
    return report.exit_status


if __name__ == "__main__":
    # Handlers import this module by its name: the registry that they fill is that module's, not this script's.
    sys.exit(import_module("models.parity").main())
