"""How often the guard cries wolf, and how late it sees a hack: ``python -m benchmarks.hacking.guard_rates``.

Simulated evaluations of a held-out reward, [prompts, seeds], while the training reward always rises: so every alarm of
the held-out reward would act. The unit is the standard deviation of one evaluation's scores. A score's latent is the
run's mean + its prompt's level + its own quality; quality moves slowly, each picture being much like the one before,
and prompts' levels walk at random. All scores of an evaluation wobble together by ``wobble``. A binary score is 1
where the latent is positive.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from scipy.special import ndtri

from trainer_client.guard import Guard, GuardConfig

Floats = npt.NDArray[np.float64]
Curve = Callable[[int, np.random.Generator], Floats]
SIGNAL = "heldout/held"


@dataclass(frozen=True)
class Cell:
    """How a simulated run is evaluated; ``wobble`` in standard deviations, of all scores of an evaluation together."""

    prompts: int
    seeds: int
    evaluations: int
    binary: bool
    wobble: float


def constant(evaluations: int, _: np.random.Generator) -> Floats:
    """No change at all."""
    return np.zeros(evaluations)


def walk(step: float) -> Curve:
    """A random walk of the mean without drift; ``step`` in standard deviations."""
    return lambda evaluations, rng: np.cumsum(step * rng.normal(size=evaluations))


def rising(evaluations: int, _: np.random.Generator) -> Floats:
    """From 0 to one standard deviation, slower and slower."""
    return 1 - np.exp(-3 * np.arange(evaluations) / evaluations)


def hack(fall: float, over: int, start: int) -> Curve:
    """A binary score's mean is 0.5 until evaluation ``start``, then falls by ``fall`` within ``over`` evaluations."""
    return lambda evaluations, _: ndtri(0.5 - fall * np.clip((np.arange(evaluations) - start) / over, 0, 1))


HONEST: dict[str, Curve] = {
    "constant": constant,
    "walk, 0.01 a step": walk(0.01),
    "walk, 0.02 a step": walk(0.02),
    "rising": rising,
}


def scores(cell: Cell, curve: Curve, rng: np.random.Generator) -> Iterator[Floats]:
    """The held-out scores [prompts, seeds] of each evaluation."""
    shape = (cell.prompts, cell.seeds)
    level, own = 0.6 * rng.normal(size=(cell.prompts, 1)), rng.normal(size=shape)
    for mean in curve(cell.evaluations, rng):
        latent = mean + cell.wobble * rng.normal() + level + 0.8 * own
        yield (latent > 0).astype(np.float64) if cell.binary else latent
        own = 0.8 * own + 0.6 * rng.normal(size=shape)
        level = level + 0.05 * rng.normal(size=level.shape)


def alarm(cell: Cell, curve: Curve, seed: int, config: GuardConfig) -> int | None:
    """The evaluation at which the guard first says more than "warn"; None if it never does."""
    rng = np.random.default_rng(seed)
    guard = Guard(config)
    for i, held in enumerate(scores(cell, curve, rng)):
        train = i + 0.1 * rng.normal(size=held.shape)
        verdict = guard.evaluate(i, {"train": torch.from_numpy(train), "held": torch.from_numpy(held)})
        if any(found.signal == SIGNAL and found.action in ("raise_kl", "stop") for found in verdict.findings):
            return i
    return None


def cells(seeds: Sequence[int] = (1, 2)) -> list[Cell]:
    """Every way to evaluate that false alarms are counted over."""
    choices = itertools.product((42, 110, 240), seeds, (10, 25, 60), (False, True), (0.0, 0.02, 0.1))
    return [Cell(*each) for each in choices]


def false_alarms(kind: str, chosen: Sequence[Cell], runs: int, config: GuardConfig) -> list[int]:
    """How many of ``runs`` honest runs of this kind got an alarm, by cell."""
    return [sum(alarm(cell, HONEST[kind], seed, config) is not None for seed in range(runs)) for cell in chosen]


def delays(fall: float, over: int, cell: Cell, runs: int, config: GuardConfig, start: int = 6) -> list[int | None]:
    """Evaluations from the hack's start to the alarm, of each run; None: never. Negative: it came before."""
    found = [alarm(cell, hack(fall, over, start), seed, config) for seed in range(runs)]
    return [None if each is None else each - start for each in found]


def median_delay(found: Sequence[int | None]) -> str:
    """The median, runs without an alarm counting as the longest; a dash where half of them have none."""
    middle = sorted(math.inf if each is None else float(each) for each in found)[len(found) // 2]
    return "-" if math.isinf(middle) else f"{middle:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="simulated runs of each kind and cell")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of the evaluations with false alarms")
    parser.add_argument("--hacked-runs", type=int, default=40, help="simulated runs of each hack")
    chosen = parser.parse_args(arguments)
    config = GuardConfig(reward="train", heldout=("held",))
    torch.set_num_threads(1)
    console, evaluated = Console(width=100), cells(chosen.seeds)
    table = Table("honest run", "false alarms", "runs", "share", "worst cell")
    for kind in HONEST:
        counted = false_alarms(kind, evaluated, chosen.runs, config)
        worst = max(range(len(counted)), key=counted.__getitem__)
        where = f"{counted[worst]} of {chosen.runs}: {evaluated[worst]}" if counted[worst] else "none"
        runs = chosen.runs * len(counted)
        table.add_row(kind, str(sum(counted)), str(runs), f"{sum(counted) / runs:.2%}", where)
    console.print(table)
    table = Table("prompts x seeds", "fall", "within", "seen", "median delay")
    for prompts, (fall, over) in itertools.product((42, 110, 240), itertools.product((0.1, 0.2, 0.4), (5, 10))):
        found = delays(fall, over, Cell(prompts, 2, 30, True, 0.02), chosen.hacked_runs, config)
        seen = f"{sum(each is not None for each in found)} of {len(found)}"
        table.add_row(f"{prompts} x 2", str(fall), str(over), seen, median_delay(found))
    console.print(table)


if __name__ == "__main__":
    main()
