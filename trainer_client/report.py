"""The report of a run as one HTML file that needs nothing else: no network, no script, pictures and curves inside.

:func:`write_report` tells of one run, :func:`write_comparison` of several on the same page. Both read what
:class:`trainer_client.run_log.RunLog` wrote, also while the run goes on or after it was killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from trainer_client import _report_curves as curves
from trainer_client import _report_pictures as pictures
from trainer_client._report_parts import Table, charts, escaped, page, section, table, tiles
from trainer_client._report_summary import (
    changes_table,
    events_table,
    reward_changes,
    runs_table,
    settings_rows,
    stages_table,
    state,
    tiles_of,
)
from trainer_client._run_folder import TOTAL, RunFolder, read_run

REPORT = "report.html"
BOTH: tuple[Literal["images"], Literal["seconds"]] = ("images", "seconds")
Curves: TypeAlias = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
"""Title -> run -> (step, value) points."""
_COMPARED = ("group_std", "diversity", "kl", "approx_kl", "clip_fraction", "grad_norm")


def write_report(run_dir: str | Path) -> Path:
    """Write RUN_DIR/report.html, whole or not at all, and return its path.

    Raises ValueError for a folder that is not a run's, and for files in it that are no JSON.
    """
    run = read_run(run_dir)
    name = run.path.resolve().name
    runs = {name: run}
    said, tone = state(run)
    title = f"{run.algorithm}: {name}"
    header = (
        f'<header><h1>{escaped(title)}</h1><p class="state {tone}">{escaped(said)}</p>{tiles(tiles_of(run))}</header>'
    )
    parts = [header, _pictures(run), _rewards(runs), _health(run), _time(runs), _events(runs), _settings(run)]
    return _write(Path(run_dir) / REPORT, page(title, parts))


def write_comparison(
    run_dirs: Mapping[str, Path], out: Path, title: str, *, lead: str = "", extra: Curves | None = None
) -> Path:
    """Write several runs as one page to ``out``, curves over each other, by the names of ``run_dirs``; returns ``out``.

    ``lead`` is a paragraph of text; ``extra`` gives further charts of points by step, such as shares that were counted
    on the samples. Raises ValueError as :func:`write_report`, for no runs, and for an extra curve of an unknown run.
    """
    if not run_dirs:
        raise ValueError("there are no runs to compare")
    if unknown := sorted({name for chart in (extra or {}).values() for name in chart} - run_dirs.keys()):
        raise ValueError(f"there is no run {unknown[0]!r} among {', '.join(run_dirs)}")
    runs = {name: read_run(folder) for name, folder in run_dirs.items()}
    said = f'<p class="lead">{escaped(lead)}</p>' if lead else ""
    header = f"<header><h1>{escaped(title)}</h1>{said}{table(runs_table(runs))}</header>"
    given = [curves.step_chart(name, "", points, runs) for name, points in (extra or {}).items()]
    parts = [
        header,
        _changes(runs),
        _compared_pictures(runs),
        _rewards(runs),
        section("Counted on the samples", [charts(given)]),
    ]
    parts += [_compared_health(runs), _time(runs), _events(runs), *(_settings(run, name) for name, run in runs.items())]
    return _write(Path(out), page(title, parts))


def report_command(
    run_dirs: Annotated[list[Path], typer.Argument(help="A run's folder; several are compared on one page.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; RUN_DIR/report.html for one run, comparison.html here for several.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of a comparison.")] = "Runs compared",
) -> None:
    """Write the report of a run, or compare several, as one HTML file."""
    try:
        if len(run_dirs) == 1:
            written = write_report(run_dirs[0])
            if out is not None:
                written = written.replace(out)
        else:
            names = [folder.resolve().name for folder in run_dirs]
            unique = len(set(names)) == len(names)
            named = dict(zip(names if unique else map(str, run_dirs), run_dirs, strict=True))
            written = write_comparison(named, out or Path("comparison.html"), title)
    except (ValueError, OSError) as error:
        typer.echo(f"reward-trainer report: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(written)


def _pictures(run: RunFolder) -> str:
    columns = pictures.before_and_after(run)
    if not columns:
        return ""
    first = next(iter(columns.values()))
    names = pictures.shown_names(first)
    shown = _of(len(first.prompts), pictures.MOST_PROMPTS, "prompts, evenly spaced")
    drawn = _of(len(first.seeds), pictures.MOST_SEEDS, "seeds")
    lead = f"The same prompts and the same noise: {shown}, with {drawn}. Nothing was chosen by its score."
    strips = pictures.pairs(pictures.through(run), names, prompts=pictures.STRIPS, seeds=1)
    return section("Before and after", [pictures.pairs(columns, names)], lead) + section("Through the run", [strips])


def _of(count: int, most: int, what: str) -> str:
    return f"{most} of {count} {what}" if count > most else f"all {count} {what.split(',')[0]}"


def _compared_pictures(runs: Mapping[str, RunFolder]) -> str:
    columns = pictures.side_by_side(runs)
    names = list(dict.fromkeys(name for samples in columns.values() for name in pictures.shown_names(samples)))
    lead = "The same prompts and the same noise in every column; prompts evenly spaced, none chosen by its score."
    return section("Where the runs ended", [pictures.pairs(columns, names, prompts=pictures.COMPARED, seeds=1)], lead)


def _rewards(runs: Mapping[str, RunFolder]) -> str:
    trained = list(dict.fromkeys(name for run in runs.values() for name in run.trained))
    if any(len(run.trained) > 1 for run in runs.values()):
        trained.insert(0, TOTAL)
    evaluated = list(dict.fromkeys(name for run in runs.values() for name in run.evaluated))
    training = charts([curves.training_chart(runs, name, by) for name in trained for by in BOTH])
    fixed = charts([curves.evaluation_chart(runs, name, by) for name in evaluated for by in BOTH])
    return section(
        "Rewards while training", [training], "Means over the samples of each step, failed ones left out."
    ) + section(
        "Rewards on fixed prompts", [fixed], "The policy on the evaluation's prompts and seeds, always the same."
    )


def _changes(runs: Mapping[str, RunFolder]) -> str:
    if not any(reward_changes(run) for run in runs.values()):
        return ""
    lead = "Differences are paired by prompt and seed; Student's t intervals over prompts."
    return section("Rewards before and after", [table(changes_table(runs))], lead)


def _health(run: RunFolder) -> str:
    runs = {"": run}
    shown = [q for q in curves.HEALTH if q.name not in ("kl_weight", "lr") or len(set(run.numbers(q.name))) > 1]
    agreed = [name for name in run.evaluated if any(f"guard/agreement/{name}/mean" in row for row in run.evaluations)]
    figures = [
        curves.guard_chart(run),
        *(curves.quantity_chart(runs, quantity) for quantity in shown),
        _evaluated_diversity(runs),
        *(_agreement(runs, name) for name in agreed),
    ]
    others = charts([curves.quantity_chart(runs, quantity) for quantity in curves.other_quantities(run)])
    folded = f"<details><summary>Other numbers</summary>{others}</details>" if others else ""
    return section("What the policy and its guard do", [charts(figures), folded])


def _compared_health(runs: Mapping[str, RunFolder]) -> str:
    figures = [curves.quantity_chart(runs, quantity) for quantity in curves.HEALTH if quantity.name in _COMPARED]
    return section("What the policies do", [charts([*figures, _evaluated_diversity(runs)])])


def _evaluated_diversity(runs: Mapping[str, RunFolder]) -> str:
    title = "Diversity of a prompt's seeds at evaluations"
    return curves.eval_quantity_chart(runs, "eval/diversity", title, "RMS distance of pixels")


def _agreement(runs: Mapping[str, RunFolder], name: str) -> str:
    title = f"Agreement of {name} with the training reward"
    return curves.eval_quantity_chart(runs, f"guard/agreement/{name}/mean", title, "Kendall's tau-b")


def _time(runs: Mapping[str, RunFolder]) -> str:
    figures = [curves.time_chart(run) for run in runs.values() if len(runs) == 1]
    figures += [curves.wait_chart(runs), *(curves.quantity_chart(runs, quantity) for quantity in curves.TROUBLE)]
    figures.append(
        curves.eval_quantity_chart(runs, "eval/failed_ratio", "Failed samples of evaluations", "share of samples", 0.05)
    )
    stages = stages_table(next(iter(runs.values()))) if len(runs) == 1 else None
    return section("Time and failures", [charts(figures), table(stages) if stages else ""])


def _events(runs: Mapping[str, RunFolder]) -> str:
    found = events_table(runs)
    return section("Events", [table(found)]) if found else ""


def _settings(run: RunFolder, name: str = "") -> str:
    parts = []
    for key, value in run.config.items():
        if key != "algorithm" and (rows := settings_rows(value)):
            shown = table(Table(("setting", "value"), rows))
            parts.append(f"<details><summary>{escaped(key)}</summary>{shown}</details>")
    return section(f"Configuration of {name}" if name else "Configuration", parts)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)
