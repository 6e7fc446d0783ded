"""``reward-service fit``: the options, the progress bar, and what came out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import track as rich_track

console = Console()
progress = Console(stderr=True)

Format = Literal["auto", "jsonl", "hpdv2", "pickapic", "imagerewarddb", "hpdv3"]


def fit(
    model: Annotated[str, typer.Argument(help="a reward model on towers, such as pickscore, imagereward or hpsv3")],
    data: Annotated[Path, typer.Option(help="preferences: .json, .jsonl, .parquet or .tar (webdataset)")],
    out: Annotated[Path, typer.Option(help="new folder: the fitted checkpoint and fit.json")],
    validation: Annotated[
        Path | None, typer.Option(help="preferences to hold out: half to choose the epoch by, half to measure on")
    ] = None,
    train: Annotated[Literal["head", "lora", "all"], typer.Option(help="what changes")] = "head",
    loss: Annotated[Literal["bt", "kl", "uncertainty"], typer.Option(help="Bradley-Terry, KL, HPSv3's")] = "bt",
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    lr: Annotated[float, typer.Option(help="learning rate of AdamW")] = 1e-3,
    batch: Annotated[int, typer.Option(help="pairs in memory at once", min=1)] = 16,
    accumulate: Annotated[int, typer.Option(help="batches whose gradients add up to one step", min=1)] = 1,
    held_out: Annotated[float, typer.Option(help="share of the prompts, without --validation")] = 0.2,
    lora_rank: Annotated[int, typer.Option(min=1)] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    schema: Annotated[Format, typer.Option("--format", help="schema of the rows; auto: by their columns")] = "auto",
    images: Annotated[Path | None, typer.Option(help="folder of the images; default: the data file's own")] = None,
) -> None:
    """Fit a reward model to people's preferences; the result is a checkpoint that models.NAME.weights takes."""
    from models.base import WeightsError
    from models.fitting.config import FitConfig, FitProblem
    from models.fitting.fit import fit as run
    from models.fitting.preference_data import DataProblem
    from models.fitting.preference_readers import read_preferences

    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        _stop(f"{out} is there already: name a new folder")
    named = None if schema == "auto" else schema
    try:
        config = FitConfig(
            train=train, loss=loss, epochs=epochs, learning_rate=lr, batch=batch, accumulate=accumulate,
            held_out=held_out, lora_rank=lora_rank, seed=seed,
        )  # fmt: skip
        options = _options(model)
        rows = read_preferences(data, images, named)
        other = None if validation is None else read_preferences(validation, images, named)
        held = () if other is None else other.rows
        result = run(model, options, rows.rows, out, config, validation=held, report=_report, track=_track)
    except (FitProblem, DataProblem, WeightsError, ValueError) as problem:
        _stop(str(problem))
    except OSError as problem:
        _stop(f"{problem.filename}: {problem.strerror}")
    before, after = result.before, result.after
    skipped = len(rows.skipped) + (0 if other is None else len(other.skipped)) + result.skipped
    console.print(
        f"held-out accuracy {before.accuracy:.4f} [{before.low:.4f}, {before.high:.4f}] -> {after.accuracy:.4f} "
        f"[{after.low:.4f}, {after.high:.4f}] on {after.pairs} pairs, the checkpoint read back"
    )
    if skipped:
        console.print(f"{skipped} rows could not be used")
    told = "those pairs leave it open" if result.temperature is None else f"{result.temperature:.4g}"
    console.print(f"temperature on the same pairs: {told}; others ({result.choosing.pairs}) chose the epoch")
    console.print(
        f"serve it with models.{model}.weights = {result.options.weights} ({out / 'fit.json'})", soft_wrap=True
    )


def _options(model: str) -> Any:
    """How the settings of the environment would load the model, in float32."""
    import torch

    import models.catalog  # noqa: F401
    from models.base import LoadOptions
    from models.fitting.config import FitProblem
    from models.registry import list_models
    from service.engine.plan import resolve_device
    from service.settings import ModelSettings, load_settings

    known = list_models(hidden=True)
    if model not in known:
        raise FitProblem(f"unknown reward model {model}; known: {', '.join(known)}")
    settings = load_settings()
    own = settings.models.get(model, ModelSettings())
    device = resolve_device(settings.device)
    return LoadOptions(device, torch.float32, own.weights, own.options, settings.weights_dir, own.sha256)


def _track(items: Sequence[Any], what: str) -> Iterator[Any]:
    return iter(rich_track(items, what, console=progress, transient=True))


def _report(line: str) -> None:
    progress.print(line, markup=False, highlight=False, soft_wrap=True)


def _stop(message: str) -> NoReturn:
    progress.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)
