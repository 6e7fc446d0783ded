"""How often the learned reward orders drawings as the oracle does, asked over HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.demo import pictures
from benchmarks.demo.agreement_statistics import bootstrap_interval, pairwise_outcomes
from benchmarks.demo.document import Column, Fact, Row, Section, Table
from benchmarks.demo.scoring import failures_of
from benchmarks.demo.session import Session
from benchmarks.measures import kendall_tau
from models.shapes.prompts import TASKS, Task
from trainer_client import Item, ItemScores

PER_TASK, IMAGES, ITEMS_PER_CALL = 7, 6, 7
FLOOR = 0.8
"""Least pairwise accuracy of healthy weights. Chance is 0.5; what the model reaches is printed and in the README."""

TASK_NAMES: dict[Task, str] = {
    "single_object": "single object", "two_object": "two objects", "counting": "counting", "colors": "colours",
    "position": "position", "color_attr": "colour attribution",
}  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """One caption: pairs ordered as the oracle does, Kendall's tau, whether the favourite is exactly right."""

    task: Task
    outcomes: list[bool]
    tau: float
    favourite_exact: bool


def judge(task: Task, scores: Sequence[float], exact: Sequence[float], soft: Sequence[float]) -> Judged:
    """One caption's scores against the oracle's: exact plus soft score is the truth, as in training."""
    truth = [a + b for a, b in zip(exact, soft, strict=True)]
    favourite = max(range(len(scores)), key=scores.__getitem__)
    return Judged(task, pairwise_outcomes(scores, truth), kendall_tau(scores, truth), exact[favourite] == 1.0)


def agreement(session: Session) -> Section:
    """42 captions, 6 drawings each: pairwise accuracy, Kendall's tau and best-of-6 by GenEval's six tasks."""
    captions = pictures.captions(PER_TASK, IMAGES)
    items = [Item(caption.prompt.text, caption.images) for caption in captions]
    started = time.perf_counter()
    results: list[ItemScores] = []
    for first in range(0, len(items), ITEMS_PER_CALL):
        part = items[first : first + ITEMS_PER_CALL]
        results += session.score(f"{len(items)} captions", part, ["shapes-clip", "shapes-oracle"])
    seconds = time.perf_counter() - started
    if failures := failures_of(*results):
        return Section("Agreement with the truth", "", failures=failures)
    judged = [
        judge(
            caption.prompt.task,
            result.as_array("shapes-clip").values.tolist(),
            result.as_array("shapes-oracle").values.tolist(),
            [output["soft"] for output in result.outputs["shapes-oracle"] if output is not None],
        )
        for caption, result in zip(captions, results, strict=True)
    ]
    return _section(judged, images=sum(map(len, items)), seconds=seconds)


def _section(judged: Sequence[Judged], images: int, seconds: float) -> Section:
    columns = ("GenEval task", "captions", "pairs", "pairwise accuracy", "Kendall's tau", "best of 6 is right")
    groups = [(TASK_NAMES[task], [entry for entry in judged if entry.task == task]) for task in TASKS]
    rows = [_row(name, entries) for name, entries in groups] + [_row("all", judged)]
    outcomes = [entry.outcomes for entry in judged]
    accuracy = fmean(right for group in outcomes for right in group)
    low, high = bootstrap_interval(outcomes)
    failures = () if accuracy >= FLOOR else (f"pairwise accuracy {accuracy:.3f} is below {FLOOR}",)
    return Section(
        "Agreement with the truth",
        f"{len(judged)} random captions with {IMAGES} drawings each: right ones, near misses, blurred and noisy ones. "
        "Over all pairs whose true order is known from the oracle (exact plus soft score), how often does shapes-clip "
        "put the better one first?",
        (
            Table(
                "shapes-clip against shapes-oracle",
                tuple(Column(title, numeric=i > 0) for i, title in enumerate(columns)),
                tuple(rows),
                "Chance is 0.500 for a pair and 0 for tau (tau-b, mean over captions). Drawings that the oracle rates "
                "alike form no pair. Small samples: a task's row has seven captions. The README has the accuracy "
                "on thousands of pairs.",
            ),
        ),
        facts=(
            Fact(f"{accuracy:.3f}", f"pairwise accuracy (95 % interval {low:.3f} to {high:.3f}, captions redrawn)"),
            Fact(f"{fmean(entry.tau for entry in judged):.3f}", "Kendall's tau, mean over captions"),
            Fact(f"{images / seconds:.0f}", "drawings a second by both models, one call at a time"),
        ),
        failures=failures,
    )


def _row(name: str, entries: Sequence[Judged]) -> Row:
    pairs = [right for entry in entries for right in entry.outcomes]
    best = sum(entry.favourite_exact for entry in entries)
    cells = (
        name, str(len(entries)), str(len(pairs)), f"{fmean(pairs):.3f}",
        f"{fmean(entry.tau for entry in entries):.3f}", f"{best} of {len(entries)}",
    )  # fmt: skip
    return Row(cells)
