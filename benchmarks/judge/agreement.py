"""How well an adaptive tournament of a truly trained judge agrees with its whole one: shapes-judge in its own world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.judge.timing import orders
from benchmarks.measures import kendall_tau
from models.base import Candidate, LoadOptions, SampleError
from models.judge import Comparison, Judge
from models.registry import get_model
from models.shapes.preferences import admitted_prompt, draw, group
from models.shapes.scenes import EVERYTHING
from service.adaptive import Adaptive
from service.tournament import CompareResult, JudgedComparison, compare_by_judge

Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Of one group: comparisons asked, rounds, Kendall's tau of the strengths to those of all pairs in both orders."""

    comparisons: int
    rounds: int
    tau: float


def probabilities_of(judge: Judge, count: int, seed: int) -> Probabilities:
    """P(first preferred) [N, N] for ``count`` pictures of one random caption, nan on the diagonal."""
    rng = np.random.default_rng(seed)
    prompt = admitted_prompt(rng, EVERYTHING)
    candidates = [Candidate(image=image) for image in draw(group(prompt, rng, count, EVERYTHING), rng)]
    pairs = orders(count)
    asked = [judge.prepare_comparison(Comparison(prompt.text, candidates[i], candidates[j])) for i, j in pairs]
    found = np.full((count, count), np.nan)
    for (i, j), answer in zip(pairs, judge.compare(asked), strict=True):
        if isinstance(answer, SampleError):
            raise answer
        found[i, j] = answer.probability
    return found


def whole(probabilities: Probabilities) -> CompareResult:
    """The tournament of all pairs in both orders."""
    count = len(probabilities)
    return compare_by_judge([JudgedComparison(i, j, float(probabilities[i, j])) for i, j in orders(count)], count)


def agreement(probabilities: Probabilities, seed: int, budget: int | None = None) -> Agreement:
    """Play the adaptive tournament with known answers. Raises ValueError where a ranking has only ties."""
    count = len(probabilities)
    schedule, judged, rounds = Adaptive(count, seed=seed, budget=budget), list[JudgedComparison](), 0
    while pairs := schedule.next_pairs(judged):
        judged += [JudgedComparison(i, j, float(probabilities[i, j])) for i, j in pairs]
        rounds += 1
    few = [value or 0.0 for value in compare_by_judge(judged, count, position=True).strength]
    every = [value or 0.0 for value in whole(probabilities).strength]
    return Agreement(len(judged), rounds, kendall_tau(few, every))


def measure(groups: int, count: int, mode: str) -> list[Agreement]:
    """``groups`` groups of shapes-judge in one of its modes, each of one caption."""
    judge = get_model("shapes-judge").load(LoadOptions(options={"mode": mode}))
    assert isinstance(judge, Judge)
    return [agreement(probabilities_of(judge, count, seed), seed) for seed in range(groups)]
