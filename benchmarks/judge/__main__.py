"""``python -m benchmarks.judge`` (make bench-judge): what comparisons cost, in one run; writes results/judge.md."""

from __future__ import annotations

import os
import tempfile
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

import models.catalog  # noqa: F401  (registers the judges)
from benchmarks import report
from benchmarks.judge import agreement, timing
from benchmarks.judge.summary import Case, markdown
from benchmarks.plan import Plan
from models.backbones.vlm_loading import write_random_chat

NAIVE_PAIRS = 24
"""Comparisons that are measured one by one, by chance among all; half before the others, half after."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(folder: Path, count: int, tokens: int, dtype: str, layout: str, naive_pairs: int) -> Case:
    """One case; what is compared takes turns: naive, all pairs, adaptive, naive."""
    model, processor = timing.random_model(folder, DTYPES[dtype])
    shared, plain = (timing.group_of(model, processor, count, tokens, shared=on, layout=layout) for on in (True, False))
    chosen = timing.some_orders(count, naive_pairs, seed=count)
    timing.one_by_one(plain, chosen[:1])  # the first forward of a process is slower
    before = timing.one_by_one(plain, chosen[: naive_pairs // 2])
    every = timing.all_pairs_of(shared, count)
    few = timing.adaptive(shared, count)
    after = timing.one_by_one(plain, chosen[naive_pairs // 2 :])
    return Case(count, tokens, dtype, (before, after), every, few, layout)


def main(
    count: Annotated[list[int] | None, typer.Option(help="candidates; default 8 and 24")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="tokens of an image; default 64 and 256")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="default float32 and bfloat16")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="'images first' or 'text first'; default both")] = None,
    naive_pairs: Annotated[int, typer.Option(min=2)] = NAIVE_PAIRS,
    groups: Annotated[int, typer.Option(min=1, help="captions of shapes-judge")] = 12,
    write: Annotated[bool, typer.Option(help="write results/judge.md")] = True,
    under_load: Annotated[bool, typer.Option(help="say in the results that the machine was not quiet")] = False,
) -> None:
    """Measure and print; the report is Markdown."""
    console = Console()
    load = os.getloadavg()[0]
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_chat(Path(folder), "qwen2_vl", "bench")
        for kind in dtype or DTYPES:
            for number in tokens or timing.SIDES:
                for candidates, asked in product(count or (8, 24), layout or timing.MODES):
                    cases.append(measure(Path(folder), candidates, number, kind, asked, naive_pairs))
                    console.print(cases[-1].line())
    modes = [timing.MODES[each] for each in layout or timing.MODES]
    found = {mode: agreement.measure(groups, max(count or (24,)), mode) for mode in modes}
    for mode, each in found.items():
        console.print(f"shapes-judge, {mode}: tau {np.mean([one.tau for one in each]):.3f} over {groups} groups")
    about = report.environment(Plan(), load) | {"threads": torch.get_num_threads(), "under_load": under_load}
    text = markdown(cases, found, about)
    console.print(text, markup=False)
    if write:
        (report.RESULTS / "judge.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
