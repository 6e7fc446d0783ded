"""Rows -> a table for the terminal, JSON for programs, Markdown for the documentation."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.plan import Plan, Row

RESULTS = Path(__file__).resolve().parent / "results"


def environment(plan: Plan, load_before: float) -> dict[str, Any]:
    """What the numbers depend on, and whether the machine was busy with something else. No host name."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "quick": plan.quick,
        "load_average_before": round(load_before, 2),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def number(value: float) -> str:
    """Three significant places, more for what is almost one or almost nothing."""
    if value == 0:
        return "0"
    return f"{value:.3g}" if abs(value) < 0.01 or abs(value) >= 100 else f"{value:.3f}"


def target(row: Row) -> str:
    if row.target is None:
        return ""
    return f"{'≥' if row.direction == 'at least' else '≤'} {row.target:g}"


def print_table(console: Console, rows: Sequence[Row], about: dict[str, Any]) -> None:
    table = Table("", "value", "unit", "target", "", "made of", title="reward-service benchmark", show_lines=False)
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            table.add_section()
            table.add_row(f"[bold]{section}[/bold]")
        colour = {"meets": "green", "misses": "red"}.get(row.verdict, "white")
        mark = f"[{colour}]{row.verdict}[/{colour}]"
        table.add_row(row.name, number(row.value), row.unit, target(row), mark, row.detail)
    console.print(table)
    console.print(", ".join(f"{name}: {value}" for name, value in about.items()), style="dim")


def markdown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The rows as Markdown tables, one a section."""
    lines = ["<!-- written by python -m benchmarks.bench; definitions: benchmarks/README.md -->", ""]
    lines += [f"{about['cores']} cores of {about['cpu']} ({about['instructions']}), torch {about['torch']}"
              + (", quick run" if about["quick"] else "") + ".", ""]  # fmt: skip
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines += ["", f"**{section}**", "", "| | value | target | made of |", "|---|---|---|---|"]
        lines.append(f"| {row.name} | {number(row.value)} {row.unit} | {target(row)} {row.verdict} | {row.detail} |")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], about: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write latest.json and latest.md."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"environment": about, "rows": [row.as_dict() for row in rows]}
    (folder / "latest.json").write_text(json.dumps(document, indent=2) + "\n")
    (folder / "latest.md").write_text(markdown(rows, about))
