"""``python -m benchmarks.demo`` (make demo): start the service, score real pictures over HTTP, leave a report."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from benchmarks.demo import agreement, gradients, mistakes, report, scoring, terminal, training
from benchmarks.demo.document import Call, Document, Section, call_table
from benchmarks.demo.pictures import PHOTOS
from benchmarks.demo.session import DidNotStopCleanly, Session, service
from benchmarks.plan import QUICK
from benchmarks.report import environment
from benchmarks.server import ROOT, ServerFailed
from trainer_client import RewardError

# The embedded models are too small to gain from a second thread; on a busy machine of two cores, waiting for it cost
# nine tenths of the throughput (24 drawings a second in place of 190).
SETTINGS = {"REWARD_THREADS": "1"}
REPORT = ROOT / "demo" / "report.html"


@dataclass(frozen=True)
class Part:
    """One part of the demo: what it needs from the service, and the function that makes its section."""

    title: str
    needs: frozenset[str]
    make: Callable[[Session], Section]


PARTS = (
    Part("Photographs", frozenset({"jpeg-compressibility", "jpeg-incompressibility"}), scoring.photographs),
    Part("Text rendering", frozenset({"ocr"}), scoring.signs),
    Part("Groups of drawings", frozenset({"shapes-oracle", "shapes-clip"}), scoring.drawings),
    Part("Agreement with the truth", frozenset({"shapes-oracle", "shapes-clip"}), agreement.agreement),
    Part("Gradients over HTTP", frozenset({"shapes-oracle", "shapes-clip"}), gradients.gradient),
    Part("Training: DiffusionNFT", frozenset({"shapes-oracle", "shapes-clip"}), training.training),
    Part("Mistakes", frozenset({"jpeg-compressibility", "ocr", "shapes-oracle"}), mistakes.mistakes),
)


def run_part(part: Part, session: Session, offered: frozenset[str]) -> Section:
    """The part's section; one that cannot be made says why, and the other parts go on."""
    if missing := sorted(part.needs - offered):
        return Section(part.title, "", failures=(f"the service does not offer {', '.join(missing)}",))
    try:
        return part.make(session)
    except RewardError as error:
        return Section(part.title, "", failures=(f"{type(error).__name__}: {error}",))


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """A spinner with what is being waited for and for how long; it leaves no trace."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


@dataclass
class Outcome:
    """What a run leaves; ``ready_s`` is None where the service ran already."""

    sections: list[Section] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    ready_s: float | None = None


def run(console: Console, url: str | None) -> Outcome:
    """All parts, printed as they come, on a service of our own (or the one at ``url``), which is stopped in the end."""
    outcome = Outcome()
    try:
        with ExitStack() as stack:
            if url is None:
                started = time.perf_counter()
                with waiting(console, "starting the service and loading its models"):
                    url = stack.enter_context(service(SETTINGS)).url
                outcome.ready_s = time.perf_counter() - started
                console.print(f"service ready at {url} after {outcome.ready_s:.1f} s", highlight=False)
            session = stack.enter_context(closing(Session(url)))
            outcome.calls = session.calls
            offered = frozenset(session.models())
            console.print(f"it offers {', '.join(sorted(offered))}", highlight=False)
            for part in PARTS:
                with waiting(console, part.title):
                    outcome.sections.append(run_part(part, session, offered))
                terminal.print_section(console, outcome.sections[-1])
    except DidNotStopCleanly as error:  # what was scored before is worth a report
        outcome.sections.append(Section("The end of the service", "", failures=(str(error),)))
        terminal.print_section(console, outcome.sections[-1])
    return outcome


def about(ready_s: float | None, total_s: float) -> dict[str, str]:
    """What the times depend on. No host name."""
    found = environment(QUICK, os.getloadavg()[0])
    return {
        "machine": f"{found['cores']} cores of {found['cpu']}",
        "service": "ran already" if ready_s is None else "a process of its own, one CPU thread for torch",
        "load average": f"{found['load_average_before']:.1f}",
        "software": f"torch {found['torch']}, Python {found['python']}",
        "time": ("" if ready_s is None else f"{ready_s:.1f} s until the service was ready, ")
        + f"{total_s:.1f} s in all",
        "photographs": "from scikit-image's wheel: " + "; ".join(photo.credit for photo in PHOTOS),
    }


def main(
    output: Annotated[Path, typer.Option(help="the HTML report")] = REPORT,
    url: Annotated[str | None, typer.Option(help="use the service that runs there instead of starting one")] = None,
) -> None:
    """Score and compare real pictures over HTTP with every embedded reward model; exit 1 if anything failed."""
    console = Console()
    started = time.perf_counter()
    try:
        outcome = run(console, url)
    except (ServerFailed, RewardError) as error:
        console.print(Text(f"✗ {type(error).__name__}: {error}", style="bold red"))
        sys.exit(1)
    terminal.print_section(console, Section("Timing", "", (call_table(outcome.calls),)))
    document = Document(
        "reward-service demo",
        "Real pictures, scored and compared by every embedded reward model over HTTP.",
        tuple(outcome.sections),
        about(outcome.ready_s, time.perf_counter() - started),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report.render(document, outcome.calls), encoding="utf-8")
    console.print()
    console.print(f"report: {output}  ({output.stat().st_size / 1000:.0f} kB)", highlight=False, soft_wrap=True)
    terminal.print_failures(console, document.failures)
    if not document.failures:
        seconds, calls = time.perf_counter() - started, len(outcome.calls)
        console.print(Text(f"✓ every check passed: {calls} calls in {seconds:.1f} s", style="green"))
    sys.exit(1 if document.failures else 0)


if __name__ == "__main__":
    # Python would end at once on SIGTERM and leave the service running; as an exception it unwinds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    typer.run(main)
