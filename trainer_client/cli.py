"""``reward-trainer``: train, evaluate, report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from trainer_client.config import ConfigError, RunConfig, load_config
from trainer_client.errors import RewardError
from trainer_client.evaluate import evaluate_command
from trainer_client.report import report_command, write_report


class Algorithm(NamedTuple):
    """Where an algorithm is: a module with ``train`` and the class of its configuration."""

    module: str
    config: str
    what: str


ALGORITHMS = {
    "flow-grpo": Algorithm("trainer_client.flow_grpo", "FlowGRPOConfig", "policy gradient on SDE steps of a flow"),
    "pref-grpo": Algorithm("trainer_client.pref_grpo", "PrefGRPOConfig", "the same with win rates from a judge"),
    "nft": Algorithm("trainer_client.nft", "NFTConfig", "DiffusionNFT: on the forward process, any solver"),
    "refl": Algorithm("trainer_client.refl", "ReFLConfig", "the gradient of a differentiable reward"),
}

STOPS = (ConfigError, RewardError, OSError, ValueError)
"""What a user can mend: one line and exit code 2. The classes below them need torch, and are found by their names."""
TRACED = "the trace is in "
"""How a run that had begun notes where its folder has the trace."""
_STOP_NAMES = frozenset({"RunFailed", "RankFailed", "CheckpointError"})

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command("evaluate")(evaluate_command)
app.command("report")(report_command)
Name = Annotated[str, typer.Argument(metavar="ALGORITHM", help=", ".join(ALGORITHMS))]


def chosen(name: str) -> tuple[Callable[..., Path], type[RunConfig]]:
    """(train, configuration) of an algorithm; raises ConfigError for an unknown name."""
    if name not in ALGORITHMS:
        raise ConfigError(f"there is no algorithm {name!r}; there are {', '.join(ALGORITHMS)}")
    module = import_module(ALGORITHMS[name].module)
    return module.train, getattr(module, ALGORITHMS[name].config)


@app.command()
def train(
    algorithm: Name,
    out: Annotated[Path, typer.Option(help="folder of the run")],
    config: Annotated[
        Path | None, typer.Option(help="TOML file; `reward-trainer options ALGORITHM` lists its keys")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="overrides the file: optimizer.lr=1e-4")
    ] = None,
    resume: Annotated[bool, typer.Option(help="go on from the last checkpoint in the folder, if there is one")] = False,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="a difference from the checkpoint's run that is meant")
    ] = None,
) -> None:
    """Fine-tune a text-to-image model by rewards of a service."""
    with one_line():
        run, kind = chosen(algorithm)
        distributed = import_module("trainer_client.distributed")
        leave = import_module("trainer_client.run_setup").leave_ranks
        try:
            folder = run(load_config(kind, config, set_ or ()), out, resume=resume, allow=allow or ())
            if distributed.is_main():
                typer.echo(f"report: {write_report(folder)}")
        except BaseException:
            leave(together=False)
            raise
        leave(together=True)


@app.command()
def options(algorithm: Name) -> None:
    """What can be set for an algorithm, with defaults."""
    with one_line():
        _, kind = chosen(algorithm)
        table = Table("key", "default", "meaning", title=algorithm)
        for row in rows(kind):
            table.add_row(*row)
        Console().print(table)


def rows(kind: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, meaning) of every value of a configuration."""
    found: list[tuple[str, str, str]] = []
    for name, field in kind.model_fields.items():
        inner: Any = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += rows(inner, f"{prefix}{name}.")
        else:
            default = "needed" if field.is_required() else str(field.default)
            found.append((prefix + name, default, field.description or ""))
    return found


@contextmanager
def one_line() -> Iterator[None]:
    """Say in one line what stopped a command, and end with 2, or with 1 in the middle of a run, whose folder has the
    trace; with 130 for an interrupt. Faults keep their trace."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        known = isinstance(error, STOPS) or _STOP_NAMES & {kind.__name__ for kind in type(error).__mro__}
        if not known:
            raise
        traced = [note for note in getattr(error, "__notes__", []) if note.startswith(TRACED)]
        said = "; ".join(" ".join(text.split()) for text in (str(error), *traced))
        Console(stderr=True, soft_wrap=True).print(f"reward-trainer: {said}", highlight=False, markup=False)
        # Without a trace nothing had begun.
        sys.exit(1 if traced else 2)
