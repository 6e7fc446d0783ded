"""``python -m benchmarks.hacking`` (make hacking-demo): two flawed rewards, each trained on without and with the guard.

Every run is the product's own DiffusionNFT on the embedded policy, with rewards over HTTP; the exact score of
shapes-oracle is held out. The unguarded run's guard looks on and may say what it sees, but changes nothing. What was
expected and what came out stand beside each other in the report and on the terminal; exit code 1 if they differ.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.hacking.counting import (
    Outcome,
    Points,
    Shown,
    all_samples,
    by_step,
    exact_without_signature,
    outcome,
    signatures,
)
from benchmarks.hacking.findings import Finding, findings
from benchmarks.hacking.plans import HACKED, HONEST, SERVICE, SIGNATURE, Plan, write_prompts
from benchmarks.hacking.signing_policy import SigningConfig, write_policy
from benchmarks.server import ROOT, serve
from trainer_client.config import parse_config
from trainer_client.nft import NFTConfig, train
from trainer_client.report import write_comparison
from trainer_client.run_log import METRICS

TITLE = "Two flawed rewards, without and with the guard"


def run_plans(plans: Sequence[Plan], folder: Path, console: Console, *, keep: bool) -> None:
    """Train one plan after the other on one service; with ``keep`` those that are finished are left alone."""
    prompts = write_prompts(folder / "prompts.jsonl")
    policy = folder / "policy"
    if any(plan.reward == SIGNATURE for plan in plans):
        write_policy(policy, SigningConfig(), console)
    with serve(SERVICE) as server:
        for plan in plans:
            out = folder / plan.folder
            if keep and (out / "finished").exists():
                continue
            shutil.rmtree(out, ignore_errors=True)
            console.print(f"{plan.name}: DiffusionNFT on {plan.reward}, {plan.steps} steps at most", highlight=False)
            train(parse_config(NFTConfig, plan.configuration(server.url, prompts, policy)), out)
            (out / "finished").touch()


def outcomes_of(plans: Sequence[Plan], folder: Path) -> dict[str, Outcome]:
    """By the plans' names; runs that are not there are left out."""
    found = {plan.name: folder / plan.folder for plan in plans}
    return {name: outcome(run) for name, run in found.items() if (run / METRICS).exists()}


def write_html(plans: Sequence[Plan], folder: Path, out: Path, told: Sequence[Finding]) -> Path:
    """The comparison of all runs, with what was counted on their samples and whether it came out as expected."""
    runs = {plan.name: folder / plan.folder for plan in plans}
    samples = {name: all_samples(run) for name, run in runs.items()}
    extra: dict[str, dict[str, Points]] = {
        "Share of pictures with a signature": {name: by_step(shown, signatures) for name, shown in samples.items()},
        "Exact score with the signature's place painted over": {
            name: by_step(shown, exact_without_signature) for name, shown in samples.items()
        },
    }
    verdicts = [f"{'As expected' if each.held else 'NOT AS EXPECTED'}: {each.text}" for each in told]
    start = next((shown[0] for plan in plans if plan.reward == SIGNATURE and (shown := samples[plan.name])), None)
    return write_comparison(
        runs, out, TITLE, lead=" ".join([*([] if start is None else [planted(start)]), *verdicts]), extra=extra
    )


def planted(start: Shown) -> str:
    """What must be known of the runs on the signature: their first policy was made to sign."""
    return (
        "The runs on shapes-signature start from a policy that was trained to sign now and then: the mark is planted, "
        f"{signatures(start):.0%} of its pictures carry it before the first step."
    )


def table_of(outcomes: dict[str, Outcome]) -> Table:
    """One line a run: steps, images, minutes, and every reward before and after."""
    table = Table("run", "steps", "images", "minutes", "reward", "before", "after", "change, 95 % interval", "guard")
    for name, found in outcomes.items():
        said = "stopped it" if found.stopped else f"spoke {len(found.alarms)} times" if found.alarms else "silent"
        for reward, change in found.change.items():
            if reward == "total":
                continue
            interval = f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
            cells = (f"{found.before[reward]:.3f}", f"{found.after[reward]:.3f}", interval)
            head = (name, str(found.steps), str(found.images), f"{found.seconds / 60:.1f}")
            table.add_row(*head, reward, *cells, said)
    return table


def main(
    honest: Annotated[
        bool, typer.Option(help="also three runs on the exact reward, where the guard is silent")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="names of runs, such as 'lax, guarded'")] = None,
    keep: Annotated[bool, typer.Option(help="finished runs of an earlier demo are not run again")] = False,
    folder: Annotated[Path, typer.Option(help="where the runs go")] = ROOT / "build" / "hacking",
    out: Annotated[Path, typer.Option(help="the report")] = ROOT / "demo" / "hacking.html",
) -> None:
    """Train on flawed rewards without and with guard, and compare; exit 1 if it came out otherwise than expected."""
    console = Console()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    known = (*HACKED, *HONEST)
    if wrong := sorted({*(only or ())} - {plan.name for plan in known}):
        raise typer.BadParameter(f"there is no run {wrong[0]!r}; there are {'; '.join(plan.name for plan in known)}")
    plans = [plan for plan in known if (plan.name in only if only else honest or plan in HACKED)]
    run_plans(plans, folder, console, keep=keep)
    there = [plan for plan in known if (folder / plan.folder / "finished").exists()]
    outcomes = outcomes_of(there, folder)
    told = findings(there, outcomes, {plan.name: all_samples(folder / plan.folder) for plan in there})
    console.print(table_of(outcomes))
    for each in told:
        console.print(Text(f"{'✓' if each.held else '✗'} {each.text}", style="green" if each.held else "bold red"))
    written = write_html(there, folder, out, told)
    console.print(f"report: {written}", highlight=False, soft_wrap=True)
    sys.exit(0 if all(each.held for each in told) else 1)


if __name__ == "__main__":
    # Python would end at once on SIGTERM and leave the service running; as an exception it unwinds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    typer.run(main)
