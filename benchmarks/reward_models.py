"""``python -m benchmarks.reward_models`` (make bench-models): images per second of every reward model at its true size.

Published weights cannot be had on every machine, and speed does not depend on them: models that fetch theirs run on
random checkpoints of the published structure, written to a temporary folder and loaded like published ones. Every model
is driven through the engine (prepare, batch, forward), without HTTP and decoding.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image as PILImage
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import models.catalog  # noqa: F401  (registers the reward models)
from benchmarks import report, samples
from benchmarks.measures import kendall_tau, ratio
from benchmarks.plan import Plan
from models.base import Candidate, CheckpointSize, LoadOptions, Output, Sample, SampleError
from models.registry import get_info, get_model, list_models
from service.engine.engine import Engine
from service.engine.request import Made, Maker
from service.settings import ModelSettings, Settings
from service.telemetry import Telemetry

GROUP = 8
GROUPS = 2
TOO_LARGE = {"hpsv3": "8.3 billion weights: 17 GB in bfloat16"}
"""Left out unless named: their full size does not fit every machine."""
SAME = {"hpsv2.1": "hpsv2"}
"""Left out unless named: other weights of the same network."""
SHARED = ("clip-score", "aesthetic")


@dataclass(frozen=True)
class Speed:
    """Of one model in one dtype: images/s of groups of GROUP that share a prompt (best group), seconds to load."""

    model: str
    dtype: str
    images_per_s: float
    load_s: float
    scores: tuple[tuple[float, ...], ...]
    """One row for each prompt."""


def makers(engine: Engine, name: str, photos: Sequence[PILImage.Image], prompt_number: int) -> list[Maker]:
    """Samples of ``photos`` under one caption; under ids of their own, so that no feature cache holds them."""
    model = engine.workers[name].model
    template = Sample(samples.caption(prompt_number), Candidate(image=photos[0]))
    try:
        model.prepare(template)
    except SampleError:  # it wants metadata, or prompts of its own kind
        template = model.canary()

    def make(photo: PILImage.Image, place: int) -> Maker:
        candidate = Candidate(image=photo, digest=f"{prompt_number}/{place}/{time.monotonic_ns()}")
        return lambda: Made(Sample(template.prompt, candidate, metadata=template.metadata))

    return [make(photo, place) for place, photo in enumerate(photos)]


async def ask(engine: Engine, names: list[str], work: list[Maker]) -> tuple[float, dict[str, tuple[float, ...]]]:
    """Seconds and scores of one request; raises RuntimeError where a sample has no score."""
    started = time.perf_counter()
    results, _ = await engine.submit(names, work, job="score", deadline=time.monotonic() + 3600)
    seconds = time.perf_counter() - started
    scores: dict[str, tuple[float, ...]] = {}
    for name in names:
        outcomes = [result.outcomes[name] for result in results]
        failures = [outcome for outcome in outcomes if not isinstance(outcome, Output)]
        if failures:
            raise RuntimeError(f"{name}: {failures[0]}")
        scores[name] = tuple(outcome.score for outcome in outcomes if isinstance(outcome, Output))
    return seconds, scores


def settings(loads: dict[str, LoadOptions], dtype: str) -> Settings:
    chosen = {
        name: ModelSettings(weights=load.weights, options=dict(load.options), gradients=False)
        for name, load in loads.items()
    }
    return Settings(models=chosen, dtype=dtype, invariance="fast", micro_batch=GROUP, watchdog_s=3600)


async def speed(name: str, dtype: str, load: LoadOptions, photos: Sequence[PILImage.Image]) -> Speed:
    """Load one model in ``dtype`` and time it."""
    photos = photos[: get_model(name).max_batch or GROUP]
    engine = Engine(settings({name: load}, dtype), Telemetry(), _fail)
    started = time.perf_counter()
    try:
        await engine.start()
        load_s = time.perf_counter() - started
        times, tables = [], []
        for number in range(GROUPS):
            seconds, scores = await ask(engine, [name], makers(engine, name, photos, number))
            times.append(seconds)
            tables.append(scores[name])
    finally:
        await engine.stop()
    return Speed(name, dtype, len(photos) / min(times), load_s, tuple(tables))


async def sharing(loads: dict[str, LoadOptions], photos: Sequence[PILImage.Image]) -> dict[str, float]:
    """Both rewards of one tower in one request over the first alone: with equal preprocessing, and as published."""
    found = {}
    for label, options in (("equal preprocessing", {"preprocessing": "hf"}), ("as published", {})):
        first = loads[SHARED[0]]
        chosen = loads | {SHARED[0]: LoadOptions(weights=first.weights, options={**first.options, **options})}
        engine = Engine(settings(chosen, "float32"), Telemetry(), _fail)
        try:
            await engine.start()
            alone, both = [], []
            for number in range(2 * GROUPS):
                alone.append((await ask(engine, [SHARED[0]], makers(engine, SHARED[0], photos, number)))[0])
                both.append((await ask(engine, list(SHARED), makers(engine, SHARED[0], photos, number + 100)))[0])
        finally:
            await engine.stop()
        found[label] = ratio(min(both), min(alone))
    return found


def _fail(reason: str) -> None:
    raise RuntimeError(reason)


def rank_agreement(first: Speed, second: Speed) -> float:
    """Mean Kendall tau over the prompts; 1 where a model gives all images one score in both."""
    taus = [
        1.0 if len(set(a)) == 1 and a == b else kendall_tau(a, b)
        for a, b in zip(first.scores, second.scores, strict=True)
    ]
    return statistics.fmean(taus)


def markdown(rows: list[list[str]], shared: dict[str, float], about: dict[str, Any]) -> str:
    """The table, what it was measured on, and what two rewards on one tower cost."""
    machine = f"{about['cores']} cores of {about['cpu']} ({about['instructions']}, AMX: {about['amx']})"
    request = f"groups of {GROUP} images of {samples.SIDE} x {samples.SIDE} that share a prompt"
    lines = ["<!-- written by python -m benchmarks.reward_models; definitions: benchmarks/README.md -->", ""]
    lines += [f"{machine}, torch {about['torch']}, {request}.", ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *rows)]
    if shared:
        ratios = ", ".join(f"{label} {value:.2f}" for label, value in shared.items())
        lines += ["", f"`{SHARED[0]}` and `{SHARED[1]}` in one request over `{SHARED[0]}` alone: {ratios}."]
    return "\n".join(lines) + "\n"


HEADER = ["model", "float32 images/s", "bfloat16 images/s", "Kendall tau bf16/fp32", "load fp32, s", "weights"]


def main(
    model: Annotated[list[str] | None, typer.Option(help="only these; may repeat")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="default: float32 and bfloat16")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny checkpoints: measures nothing")] = False,
    share: Annotated[bool, typer.Option(help="also two rewards on one tower")] = True,
) -> None:
    """Time the reward models; writes benchmarks/results/reward_models.md unless only some were asked for."""
    console = Console()
    pointwise = [name for name in list_models() if get_info(name).kind == "pointwise"]
    names = model or [name for name in pointwise if name not in TOO_LARGE | SAME]
    if unknown := sorted(set(names) - set(list_models(hidden=True))):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}", param_hint="--model")
    about = report.environment(Plan(), os.getloadavg()[0])
    photos = [PILImage.fromarray(pixels) for pixels in samples.crops(GROUP)]
    size: CheckpointSize = "tiny" if tiny else "full"
    rows, shared = [], {}
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console,
                  transient=True) as progress:  # fmt: skip
        task = progress.add_task("starting", total=None)
        for name in names:
            rows.append(_row(name, dtype or ["float32", "bfloat16"], size, photos,
                             lambda text: progress.update(task, description=text)))  # fmt: skip
            console.print("  ".join(rows[-1]), highlight=False)
        if share and set(SHARED) <= set(names):
            progress.update(task, description="two rewards on one tower")
            with tempfile.TemporaryDirectory() as folder:
                shared = asyncio.run(sharing(_one_tower(Path(folder), size), photos))
    table = Table(*HEADER, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for label, value in shared.items():
        console.print(f"both rewards of one tower over one, {label}: {value:.2f}")
    if model is None and not tiny:
        (report.RESULTS / "reward_models.md").write_text(markdown(rows, shared, about))


def _one_tower(folder: Path, size: CheckpointSize) -> dict[str, LoadOptions]:
    """Load options of the two rewards on one and the same tower file."""
    loads = {}
    for name in SHARED:
        (folder / name).mkdir()
        loads[name] = get_model(name).random_checkpoint(folder / name, size)
    tower = loads[SHARED[0]].weights
    loads[SHARED[1]] = LoadOptions(weights=tower, options=loads[SHARED[1]].options)
    return loads


def _row(name: str, dtypes: list[str], size: CheckpointSize, photos: list[PILImage.Image], step: Any) -> list[str]:
    """One line of the table; the checkpoint is deleted afterwards."""
    info = get_model(name).info
    with tempfile.TemporaryDirectory() as folder:
        step(f"{name}: random checkpoint")
        load = get_model(name).random_checkpoint(Path(folder), size)
        weights = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) or info.weights_bytes
        found: dict[str, Speed] = {}
        # Only models that compute on the torch device have a dtype.
        for dtype in dtypes if get_model(name).uses_device else dtypes[:1]:
            step(f"{name}: {dtype}")
            found[dtype] = asyncio.run(speed(name, dtype, load, photos))
    full, half = found.get("float32"), found.get("bfloat16")
    return [
        f"`{name}`",
        f"{full.images_per_s:.2f}" if full else "",
        f"{half.images_per_s:.2f}" if half else "",
        f"{rank_agreement(full, half):.3f}" if full and half else "",
        f"{full.load_s:.0f}" if full else "",
        f"{weights / 1e6:,.0f} MB",
    ]


if __name__ == "__main__":
    typer.run(main)
