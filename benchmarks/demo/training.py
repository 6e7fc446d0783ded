"""DiffusionNFT on the embedded policy with a learned reward over HTTP, and what the oracle, held out, says of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image as PILImage

from benchmarks.demo.document import Column, Fact, Figure, Row, Section, Table
from benchmarks.demo.session import Session
from benchmarks.server import ROOT
from benchmarks.training.plans import EXACT, LEARNED, PLANS
from benchmarks.training.rl import as_toml, evaluated, percent
from models.shapes.policy_evaluation import grid
from trainer_client.eval_statistics import mean_interval, paired_difference

RUN = ROOT / "demo" / "training"
STEPS = 12
"""Rollouts of 192 images: under five minutes on two cores."""
SHOWN = 8
"""Prompts of the picture."""
TIMEOUT_S = 1800
PLAN = next(plan for plan in PLANS if plan.name == "DiffusionNFT")


def training(session: Session) -> Section:
    """Train through the command line; the reward is shapes-clip, the exact score is only looked at."""
    shutil.rmtree(RUN, ignore_errors=True)  # an earlier demo is no run to go on from
    RUN.parent.mkdir(parents=True, exist_ok=True)
    settings = RUN.with_suffix(".toml")
    settings.write_text("\n".join(as_toml(PLAN.configuration(session.url, STEPS, seed=0))), encoding="utf-8")
    command = [sys.executable, "-m", "trainer_client", "train", PLAN.algorithm]
    command += ["--config", str(settings), "--out", str(RUN)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=ROOT)
    title = "Training: DiffusionNFT"
    if done.returncode != 0:
        return Section(title, "", failures=(f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}",))
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    end = [row for row in rows if row["kind"] == "train"][-1]
    before, after = evaluated(RUN, 0), evaluated(RUN, STEPS)
    gain = paired_difference(after[EXACT], before[EXACT]).difference
    table_rows = []
    for name, digits in ((EXACT, 3), (LEARNED, 2)):
        found = paired_difference(after[name], before[name])
        cells = [f"{mean_interval(scores).mean:.{digits}f}" for scores in (before[name], after[name])]
        interval = found.difference
        cells += [f"{interval.mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"]
        table_rows.append(Row((name, "held out" if name == EXACT else "trained on", *cells)))
    columns = (
        Column("reward"),
        Column("role"),
        *(Column(each, numeric=True) for each in ("before", "after", "change, 95 % interval")),
    )
    prompts, seeds = before[EXACT].shape
    failures = () if gain.low > 0 else (f"the exact score changed by {percent(gain)} points, not surely upwards",)
    return Section(
        title,
        f"reward-trainer drew {end['images']} images for the prompts of the training set and learned from the scores "
        f"of {LEARNED} alone. Before and after, {prompts} other prompts were drawn from {seeds} fixed noises each.",
        (Table("Held-out prompts", columns, tuple(table_rows), "Paired by prompt and noise; prompts are the unit."),),
        (Figure(_before_and_after(before[EXACT], after[EXACT]), "before (above) and after (below), same noise", 720),),
        (
            Fact(percent(gain), "points of the exact score on held-out prompts, with its 95 % interval"),
            Fact(f"{end['seconds']:.0f} s", f"of training: {STEPS} steps, {end['images']} images"),
        ),
        failures,
    )


def _before_and_after(before_PS: np.ndarray, after_PS: np.ndarray) -> PILImage.Image:
    """Prompts whose first image became right or wrong, evenly taken over the set: as many of each as there are."""
    change_P = after_PS[:, 0] - before_PS[:, 0]
    changed = [int(p) for p in np.flatnonzero(change_P != 0)]
    chosen = [changed[i] for i in np.linspace(0, len(changed) - 1, min(SHOWN, len(changed))).astype(int)]
    folders = [RUN / "samples" / f"step-{step:08d}" for step in (0, STEPS)]
    return grid([PILImage.open(folder / f"{p:03d}-00.png") for folder in folders for p in chosen], len(chosen) or 1)
