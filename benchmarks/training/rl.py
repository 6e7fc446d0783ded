"""``python -m benchmarks.training.rl`` (make bench-rl): four algorithms from one start, three seeds, equal images.

Each run is the product's own: ``reward-trainer train`` as a process of one thread, rewards from one service over HTTP.
Runs that are there already are not run again. What is printed and written to benchmarks/results/rl.md: the change of
the exact score (shapes-oracle) on 240 held-out prompts x 2 seeds, paired by prompt and seed, with a 95 % interval;
curves against images and against seconds are in the report.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.report import RESULTS
from benchmarks.server import ROOT, serve
from benchmarks.training.plans import EXACT, LEARNED, PLANS, Plan
from trainer_client.eval_statistics import Interval, paired_difference
from trainer_client.report import write_comparison

SERVICE = {"REWARD_MODELS": json.dumps([EXACT, LEARNED]), "REWARD_THREADS": "1"}
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """Scores [prompts, seeds] of one run before and after, by reward, with its seconds of training and images."""

    folder: Path
    before: dict[str, Scores]
    after: dict[str, Scores]
    seconds: float
    images: int


def evaluated(folder: Path, step: int) -> dict[str, Scores]:
    """Scores of one evaluation of a run."""
    found = json.loads((folder / "samples" / f"step-{step:08d}" / "samples.json").read_text())
    return {name: np.array(rows, dtype=np.float64) for name, rows in found["scores"].items()}


def run_once(plan: Plan, url: str, steps: int, seed: int, folder: Path) -> Outcome:
    """Train, unless the folder holds the finished run; raises RuntimeError with the end of its log when it fails."""
    last = folder / "samples" / f"step-{steps:08d}" / "samples.json"
    # A clone that has moved has the same runs.
    plain = json.dumps(plan.configuration("", steps, seed), sort_keys=True).replace(str(ROOT), "")
    made_by = folder.with_suffix(".json")
    if made_by.exists() and made_by.read_text(encoding="utf-8") != plain:
        raise RuntimeError(f"{folder} is a run with other settings: remove it, or take another folder (--out)")
    if not last.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made_by.write_text(plain, encoding="utf-8")
        settings = folder.with_suffix(".toml")
        settings.write_text("\n".join(as_toml(plan.configuration(url, steps, seed))), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "trainer_client", "train", plan.algorithm]
        command += ["--config", str(settings), "--out", str(folder)]
        done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{plan.name}, seed {seed}: exit code {done.returncode}: {done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    end = [row for row in rows if row["kind"] == "train"][-1]
    return Outcome(folder, evaluated(folder, 0), evaluated(folder, end["step"]), end["seconds"], end["images"])


def as_toml(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines of TOML: JSON's literals are TOML's for what a configuration holds."""
    plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items()]
    for name, section in values.items():
        if isinstance(section, dict):
            lines += [f"[{prefix}{json.dumps(name)}]", *as_toml(section, f"{prefix}{json.dumps(name)}.")]
    return lines


def change(outcomes: Sequence[Outcome], reward: str) -> Interval:
    """Change of a reward, paired by prompt and noise; runs of several seeds are further columns of a prompt."""
    after = np.concatenate([outcome.after[reward] for outcome in outcomes], axis=1)
    before = np.concatenate([outcome.before[reward] for outcome in outcomes], axis=1)
    return paired_difference(after, before).difference


def percent(interval: Interval) -> str:
    """Points with the interval's ends."""
    return f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def row_of(plan: Plan, outcomes: Sequence[Outcome]) -> list[str]:
    """One line of the table."""
    exact = [change([outcome], EXACT) for outcome in outcomes]
    # A judge's run has no absolute score of its judge.
    learned = change(outcomes, LEARNED) if LEARNED in outcomes[0].before else None
    start = float(np.nanmean([outcome.before[EXACT].mean() for outcome in outcomes]))
    return [
        plan.name,
        plan.reward,
        f"{100 * start:.1f}",
        percent(change(outcomes, EXACT)),
        ", ".join(f"{100 * each.mean:+.1f}" for each in exact),
        f"{learned.mean:+.2f} [{learned.low:+.2f}, {learned.high:+.2f}]" if learned else "",
        f"{outcomes[0].images}",
        f"{np.mean([outcome.seconds for outcome in outcomes]):.0f}",
    ]


HEAD = (
    "algorithm", "trained on", "exact before, %", "change of the exact score, points", "by seed",
    "change of shapes-clip", "images", "seconds",
)  # fmt: skip


def main(
    steps: Annotated[int, typer.Option(help="rollouts of 192 images")] = 18,
    seeds: Annotated[int, typer.Option(help="runs of each kind")] = 3,
    jobs: Annotated[int, typer.Option(help="runs at a time, one thread each")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="names of plans; all by default")] = None,
    out: Annotated[Path, typer.Option(help="folder of the runs and the report")] = ROOT / "build" / "bench-rl",
    write: Annotated[bool, typer.Option(help="write benchmarks/results/rl.md")] = False,
) -> None:
    """Train, compare and plot."""
    console = Console()
    plans = [plan for plan in PLANS if not only or plan.name in only]
    with serve(SERVICE) as server, ThreadPoolExecutor(jobs) as pool:
        wanted = [(plan, seed) for seed in range(seeds) for plan in plans]
        futures = {
            (plan.name, seed): pool.submit(
                run_once,
                plan,
                server.url,
                steps,
                seed,
                out / f"{plan.folder}-{seed}",
            )
            for plan, seed in wanted
        }
        for (name, seed), future in futures.items():
            outcome = future.result()
            console.print(f"{name}, seed {seed}: {percent(change([outcome], EXACT))} points", highlight=False)
    outcomes = {plan.name: [futures[plan.name, seed].result() for seed in range(seeds)] for plan in plans}
    table = Table(
        *HEAD, title=f"{steps} rollouts of 192 images, {seeds} seeds, {jobs} runs at a time on {os.cpu_count()} cores"
    )
    rows = [row_of(plan, outcomes[plan.name]) for plan in plans]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    runs = {f"{plan.name}, seed {seed}": outcomes[plan.name][seed].folder for plan in plans for seed in range(seeds)}
    report = write_comparison(runs, out / "report.html", "Four algorithms from one start")
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
    if write:
        lines = [" | ".join(HEAD), " | ".join("---" for _ in HEAD), *(" | ".join(row) for row in rows)]
        text = "\n".join(f"| {line} |" for line in lines)
        head = "<!-- written by python -m benchmarks.training.rl --write -->\n\n"
        (RESULTS / "rl.md").write_text(f"{head}{table.title}.\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
