"""One evaluation from files to results: reads the rows, asks the service, writes the folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from models.fitting.preference_data import DataProblem, PreferenceData, PreferenceRow
from models.fitting.preference_readers import Schema, read_preferences
from service.evaluation.asking import Asked, Asker, EvaluationProblem, Route
from service.evaluation.report import render
from service.evaluation.results import Judged, TieThreshold, disagreements, document, row_lines, tuned_threshold
from service.settings import Settings

RESULTS, ROWS, REPORT = "results.json", "rows.jsonl", "report.html"
TIMEOUT_S = 900.0


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated on what. ``url`` None loads the model in this process, as ``settings`` say."""

    model: str
    data: Path
    settings: Settings | None = None
    url: str | None = None
    key: str | None = None
    schema: Schema | None = None
    images: Path | None = None
    out: Path | None = None
    limit: int | None = None
    seed: int = 0
    ties_threshold: float | None = None
    validation: Path | None = None
    route: Route | None = None
    concurrency: int = 4
    worst: int = 24


Advance = Callable[[int], object]
Progress = Callable[[str, int], Advance]
"""(what, how many rows) -> what is told how many more were answered."""


def silent(what: str, rows: int) -> Advance:
    return lambda count: None


async def evaluate(config: EvaluationConfig, progress: Progress = silent) -> dict[str, Any]:
    """The document of results.json; writes the folder ``config.out`` where one is given.

    Raises EvaluationProblem for a model or service that cannot be asked, and DataProblem for files that cannot be used.
    """
    if config.out is not None and (config.out / RESULTS).exists():
        raise EvaluationProblem(f"{config.out} holds an evaluation already: take another folder")
    data = read_preferences(config.data, config.images, config.schema)
    validation = (
        None if config.validation is None else read_preferences(config.validation, config.images, config.schema)
    )
    rows = sample(data, config.limit, config.seed)
    gone: list[str] = []
    async with _client(config, gone) as client:
        asker = Asker(client, concurrency=config.concurrency, gone=lambda: gone[0] if gone else None)
        asked = await asker.find(config.model, config.route)
        ties = await _ties(config, validation, asker, asked, progress)
        judged = Judged(rows, await asker.ask(asked, rows, progress(config.data.name, len(rows))))
    about = {"file": config.data.name, "limit": config.limit, "seed": config.seed}
    found = document(asked, data, judged, ties, about)
    if config.out is not None:
        _write(config.out, found, data, judged, config.worst)
    return found


def sample(data: PreferenceData, limit: int | None, seed: int) -> list[PreferenceRow]:
    """``limit`` rows drawn without replacement, in the file's order; all of them for None."""
    if limit is None or limit >= len(data.rows):
        return list(data.rows)
    chosen = np.random.default_rng(seed).choice(len(data.rows), limit, replace=False)
    return [data.rows[i] for i in np.sort(chosen)]


async def _ties(
    config: EvaluationConfig, validation: PreferenceData | None, asker: Asker, asked: Asked, progress: Progress
) -> TieThreshold:
    if config.ties_threshold is not None:
        return TieThreshold(config.ties_threshold, "given")
    if validation is None or config.validation is None:
        return TieThreshold()
    rows = sample(validation, config.limit, config.seed)
    judged = Judged(rows, await asker.ask(asked, rows, progress(config.validation.name, len(rows))))
    try:
        return tuned_threshold(judged, config.validation.name)
    except ValueError as error:
        raise DataProblem(f"{config.validation.name}: {error}") from error


@contextlib.asynccontextmanager
async def _client(config: EvaluationConfig, gone: list[str]) -> AsyncIterator[httpx.AsyncClient]:
    """To the service at ``config.url``, or to one that lives in this process as long as the client does."""
    headers = {"Authorization": f"Bearer {config.key}"} if config.key else {}
    timeout = httpx.Timeout(TIMEOUT_S, connect=10)
    if config.url is not None:
        async with httpx.AsyncClient(base_url=config.url, headers=headers, timeout=timeout) as client:
            yield client
        return
    from models.base import WeightsError
    from service.app import create_app

    app = create_app(config.settings, on_fatal=gone.append)
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(app.router.lifespan_context(app))
        except (WeightsError, ValueError, ImportError) as problem:
            raise EvaluationProblem(" ".join(str(problem).split())) from problem
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        yield await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://in-process", headers=headers, timeout=timeout)
        )


def _write(out: Path, found: dict[str, Any], data: PreferenceData, judged: Judged, worst: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / ROWS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in row_lines(judged))
        file.writelines(json.dumps({"key": row.key, "unreadable": asdict(row)}) + "\n" for row in data.skipped)
    page = render(found, data.skipped, judged, disagreements(judged, worst))
    (out / REPORT).write_text(page, encoding="utf-8")
    # Last: a folder that holds it is whole.
    (out / RESULTS).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
