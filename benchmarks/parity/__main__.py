"""The command: :mod:`models.parity`'s handlers and tables, and the trainer's cases beside them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

# Importing them registers their handlers.
from benchmarks.parity import (  # noqa: F401
    advantages,
    grpo,
    judge_text,
    nft,
    pairwise,
    preference_losses,
    refl,
    sampling,
)
from models import parity
from models.parity import Report, Topic


def merged(report: Report) -> Report:
    """Topics of one name from the .npz files of one folder as one: these folders hold a file per case."""
    together: dict[tuple[Path, str, float, str], list[Topic]] = {}
    for path, topic in report.topics:
        where = path.parent if path.suffix == ".npz" else path
        together.setdefault((where, topic.name, topic.tolerance, topic.note), []).append(topic)
    topics = tuple(
        (where, Topic(name, sum(t.cases for t in found), parity.largest(t.error for t in found), tolerance, note))
        for (where, name, tolerance, note), found in together.items()
    )
    return Report(topics, report.unhandled, report.left_out)


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Compare, print, and return the exit status of :mod:`models.parity`."""
    return parity.main(arguments, console, module="benchmarks.parity", arrange=merged)


if __name__ == "__main__":
    sys.exit(main())
