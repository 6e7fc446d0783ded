"""``reward-service evaluate``: the options, the progress bar, and the table."""

from __future__ import annotations

import asyncio
import importlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console()
progress = Console(stderr=True)

DataFile = Annotated[Path, typer.Option(help="preferences: .json, .jsonl, .parquet or .tar (webdataset)")]
Format = Literal["auto", "jsonl", "hpdv2", "pickapic", "imagerewarddb", "hpdv3"]


def evaluate(
    model: Annotated[str, typer.Argument(help="a reward model")],
    data: DataFile,
    schema: Annotated[Format, typer.Option("--format", help="schema of the rows; auto: by their columns")] = "auto",
    images: Annotated[Path | None, typer.Option(help="folder of the images; default: the data file's own")] = None,
    out: Annotated[Path | None, typer.Option(help="new folder: report.html, results.json, rows.jsonl")] = None,
    limit: Annotated[int | None, typer.Option(help="rows to draw at random", min=1)] = None,
    seed: Annotated[int, typer.Option(help="of the draw and of the bootstrap", min=0)] = 0,
    ties_threshold: Annotated[
        float | None, typer.Option(help="probability gap that counts as the model's tie", min=0, max=1)
    ] = None,
    validation: Annotated[Path | None, typer.Option(help="preferences to tune that threshold on")] = None,
    route: Annotated[
        Literal["auto", "score", "compare"], typer.Option(help="how to ask; auto: compare for judges of pairs")
    ] = "auto",
    concurrency: Annotated[int, typer.Option(help="requests at once", min=1, max=64)] = 4,
    worst: Annotated[int, typer.Option(help="disagreements shown in the report", min=0)] = 24,
    url: Annotated[str | None, typer.Option(help="a running service; default: load the model here")] = None,
    key: Annotated[str | None, typer.Option(help="bearer key of that service", envvar="REWARD_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print results.json instead of a table")] = False,
) -> None:
    """Measure how well a model agrees with people's preferences; without --url the model is loaded here."""
    from models.fitting.preference_data import DataProblem
    from service.evaluation.asking import EvaluationProblem
    from service.evaluation.run import EvaluationConfig
    from service.evaluation.run import evaluate as run
    from service.settings import SettingsProblem

    try:
        if ties_threshold is not None and validation is not None:
            raise EvaluationProblem("the threshold of ties is either given or tuned on a validation file")
        config = EvaluationConfig(
            model=model,
            data=data,
            settings=_settings(model) if url is None else None,
            url=url,
            key=key if url is not None else None,
            schema=None if schema == "auto" else schema,
            images=images,
            out=out,
            limit=limit,
            seed=seed,
            ties_threshold=ties_threshold,
            validation=validation,
            route=None if route == "auto" else route,
            concurrency=concurrency,
            worst=worst,
        )
        with _bars() as bars:
            found = asyncio.run(run(config, lambda what, rows: _advance(bars, what, rows)))
    except (EvaluationProblem, DataProblem) as problem:
        _stop(str(problem))
    except SettingsProblem as problem:
        _stop(f"settings: {problem}")
    except OSError as problem:
        _stop(f"{problem.filename}: {problem.strerror}")
    if as_json:
        console.print_json(json.dumps(found))
    else:
        _print(found, out)
    if not found["measures"]["pairs"]:
        raise typer.Exit(1)


def _settings(model: str) -> Any:
    """The settings of the environment, with this model alone, and no keys: nobody else can reach it."""
    from service.evaluation.asking import EvaluationProblem
    from service.runtime import set_library_variables
    from service.settings import ModelSettings, load_settings

    given = load_settings()
    settings = load_settings(
        models={model: given.models.get(model, ModelSettings()).model_dump()},
        compute={"models": {}},
        api_keys=[],
        api_keys_file=None,
    )
    set_library_variables(settings)  # before torch is imported
    try:
        for plugin in settings.plugins:
            importlib.import_module(plugin)
    except ImportError as problem:
        raise EvaluationProblem(f"settings: plugins: {problem}") from problem
    import models.catalog  # noqa: F401
    from models.registry import list_models

    known = list_models(hidden=True)
    if model not in known:
        raise EvaluationProblem(f"unknown reward model {model}; known: {', '.join(known)}")
    return settings


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=progress)


def _advance(bars: Progress, what: str, rows: int) -> Any:
    task = bars.add_task(what, total=rows)
    return lambda count: bars.advance(task, count)


def _print(found: dict[str, Any], out: Path | None) -> None:
    from service.evaluation.wording import counted, measure_rows

    name, data = found["model"]["name"], found["data"]
    table = Table("measure", "value", "95 % interval", "of", title=Text(f"{name} on {data['file']} ({data['schema']})"))
    for row in measure_rows(found):
        style = "bold" if row.headline else None
        table.add_row(row.label, row.value, row.interval, row.count, style=style)
    console.print(table)
    for line in counted(found):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if out is not None:
        console.print(f"report: {out / 'report.html'}", soft_wrap=True, markup=False, highlight=False)


def _stop(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(message, style="red", markup=False, highlight=False)
    raise typer.Exit(2)
