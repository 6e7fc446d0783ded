"""``python -m benchmarks.bench`` (make bench): every number of the service as a ratio, measured in one run.

README.md beside this file defines the numbers. A run takes under twelve minutes on two cores, ``--quick`` about two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import models.catalog  # noqa: F401  (registers the reward models)
from benchmarks import dtypes, exactness, http_throughput, limit, report, samples
from benchmarks.http_throughput import Bench
from benchmarks.plan import QUICK, Plan, Row

PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "throughput": http_throughput.throughput,
    "overload": http_throughput.overload,
    "exactness": exactness.exactness,
    "dtypes": dtypes.dtypes,
    "compile": dtypes.compilation,
}
SLOW = "compile"


def run(plan: Plan, parts: list[str], step: Callable[[str], None]) -> list[Row]:
    """Run the ``parts`` in order, all on one model object and one set of images."""
    step("loading")
    offline = limit.OfflineLimit(dtypes.load_tower(samples.MODEL, torch.float32))
    offline.calibrate()
    bench = Bench(plan, offline, step, images=samples.crops(plan.images))
    return [row for part in parts for row in PARTS[part](bench)]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="about two minutes; numbers are rough")] = False,
    with_compile: Annotated[bool, typer.Option("--with-compile", help="also torch.compile on against off")] = False,
    part: Annotated[list[str] | None, typer.Option(help=f"only these: {', '.join(PARTS)}; may repeat")] = None,
) -> None:
    """Measure the service and print ratios; writes benchmarks/results/latest.json and latest.md."""
    console = Console()
    parts = part or [name for name in PARTS if name != SLOW or with_compile]
    if unknown := sorted(set(parts) - set(PARTS)):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}", param_hint="--part")
    plan = QUICK if quick else Plan()
    about = report.environment(plan, os.getloadavg()[0])
    started = time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        rows = run(plan, parts, lambda text: progress.update(task, description=text))
    about["minutes"] = round((time.perf_counter() - started) / 60, 1)
    about["load_average_after"] = round(os.getloadavg()[0], 2)
    report.write(rows, about)
    report.print_table(console, rows, about)


if __name__ == "__main__":
    typer.run(main)
