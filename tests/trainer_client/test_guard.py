"""The guard on simulated runs: honest ones trip nothing, hacking of several shapes is caught; resume; missing data.

A simulated run has 96 prompts x 4 seeds and 24 evaluations with 10 training steps before each. A sample's score is the
mean that the run prescribes + its prompt's level + its own quality + noise of the reward. Quality (shared by training
and held-out reward, which makes them agree) and noise move slowly, each image being much like the one before; all
scores of an evaluation wobble together, and a prompt's level takes a random walk. The unit is about the standard
deviation of the scores of one evaluation.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.trainer_client.example_run import write_run
from trainer_client.guard import SEVERITY, Guard, GuardConfig, Verdict
from trainer_client.guard_metrics import TrainingMetrics
from trainer_client.run_log import EVENTS

PROMPTS, SEEDS, EVALUATIONS, WINDOW = 96, 4, 24, 10
CONFIG = GuardConfig(reward="train", heldout=("quality", "taste"), drift_limit=1.0)
Array = npt.NDArray[np.float64]
Curve = Callable[[Array], Array]


def improving(time: Array) -> Array:
    """From 0 to 1.2 standard deviations."""
    return 1.2 * (1 - np.exp(-time / 8))


def flat(time: Array) -> Array:
    return np.zeros_like(time)


def honest_std(time: Array) -> Array:
    """A reward that is nearly solved: half of the spread is left at the end."""
    return 1 - 0.5 * time / EVALUATIONS


def honest_diversity(time: Array) -> Array:
    return 0.25 * (1 - 0.3 * time / EVALUATIONS)


def honest_drift(time: Array) -> Array:
    return 0.8 * (1 - np.exp(-time / 10))


@dataclass(frozen=True)
class Run:
    """Curves over time, counted in evaluations; ``shared``: how much of the training reward is true quality."""

    train: Curve = improving
    quality: Curve = improving
    taste: Curve = improving
    std: Curve = honest_std
    diversity: Curve = honest_diversity
    drift: Curve = honest_drift
    shared: Curve = np.ones_like
    wobble: float = 0.03
    failing: float = 0.0


def simulate(run: Run, seed: int) -> Iterator[tuple[int, list[TrainingMetrics], dict[str, Array]]]:
    """(step, the training steps before, scores by name) of each evaluation; failed scores are NaN."""
    random = np.random.default_rng(seed)
    names = ("train", "quality", "taste")
    shape = (PROMPTS, SEEDS)
    level = 0.6 * random.normal(size=(3, PROMPTS, 1))
    own, noise = random.normal(size=shape), random.normal(size=(3, *shape))
    log_noise = np.zeros(3)
    for i in range(EVALUATIONS):
        steps = []
        for k in range(WINDOW):
            log_noise = 0.5 * log_noise + random.normal(size=3) * (0.1, 0.05, 0.1)
            now = np.array([i + k / WINDOW])
            std, diversity, drift = (
                curve(now)[0] * math.exp(each)
                for curve, each in zip((run.std, run.diversity, run.drift), log_noise, strict=True)
            )
            steps.append(TrainingMetrics(0.0, std, 0.0, 0.0, diversity, drift))
        own = 0.8 * own + 0.6 * random.normal(size=shape)
        noise = 0.8 * noise + 0.6 * random.normal(size=noise.shape)
        level = level + 0.05 * random.normal(size=level.shape)
        time = np.array([float(i)])
        shared = run.shared(time)[0]
        scores = {}
        for j, name in enumerate(names):
            mean = getattr(run, name)(time)[0] + run.wobble * random.normal()
            quality = (shared if name == "train" else 1.0) * own
            scores[name] = mean + level[j] + 0.6 * quality + 0.5 * noise[j]
            scores[name][random.random(shape) < run.failing] = math.nan
        yield i * WINDOW, steps, scores


def feed(guard: Guard, step: int, steps: list[TrainingMetrics], scores: dict[str, Array]) -> list[Verdict]:
    verdicts = [guard.observe(step - WINDOW + k, metrics) for k, metrics in enumerate(steps)]
    tensors = {name: torch.from_numpy(values) for name, values in scores.items()}
    ok = {name: ~values.isnan() for name, values in tensors.items()}
    return [*verdicts, guard.evaluate(step, tensors, ok)]


def watch(run: Run, seed: int, config: GuardConfig = CONFIG) -> list[list[Verdict]]:
    """The verdicts of each evaluation and of the training steps before it."""
    guard = Guard(config)
    return [feed(guard, *each) for each in simulate(run, seed)]


def first(verdicts: list[list[Verdict]], signal: str, *actions: str) -> int | None:
    """The evaluation at or before which a signal first had one of the actions."""
    for i, each in enumerate(verdicts):
        for verdict in each:
            if any(found.signal == signal and found.action in actions for found in verdict.findings):
                return i
    return None


def tripped(verdicts: list[list[Verdict]]) -> bool:
    return any(SEVERITY.index(verdict.action) >= SEVERITY.index("warn") for each in verdicts for verdict in each)


HONEST = (
    Run(),
    Run(quality=flat, taste=flat),
    Run(train=flat, quality=flat, taste=flat, std=np.ones_like),
    Run(failing=0.05),
)
"""A run that works, one that the held-out rewards don't notice, one that learns nothing, one with failing samples."""


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 200), marks=pytest.mark.slow)], ids=len)
def test_honest_runs_trip_nothing_and_end_with_ok(seeds: range) -> None:
    ends = []
    alarms = []
    for seed in seeds:
        verdicts = watch(HONEST[seed % len(HONEST)], seed)
        ends.append(verdicts[-1][-1].action)
        if tripped(verdicts):
            alarms.append(seed)
    assert alarms == []
    assert set(ends) == {"ok"}


def test_the_same_noise_trips_a_guard_without_its_safeguards() -> None:
    careless = replace(CONFIG, alpha=0.9, patience=1, heldout_fall=0.0, agreement_fall=0.0)
    assert sum(tripped(watch(HONEST[1], seed, careless)) for seed in range(10)) >= 4


def falling(start: float, rate: float) -> Curve:
    """Improves until ``start``, then also loses ``rate`` per evaluation."""
    return lambda time: improving(time) - rate * np.maximum(time - start, 0)


def dropping(curve: Curve, at: float, factor: float) -> Curve:
    return lambda time: curve(time) * np.where(time >= at, factor, 1.0)


HACKED: dict[str, tuple[Run, str, int, int, int | None]] = {
    "held-out falls slowly": (Run(quality=falling(8, 0.1)), "heldout/quality", 8, 14, None),
    "held-out falls suddenly": (
        Run(quality=lambda time: improving(time) - 0.8 * (time >= 10)),
        "heldout/quality",
        10,
        2,
        6,
    ),
    "held-out falls from the start": (Run(quality=lambda time: -0.1 * time), "heldout/quality", 0, 8, 11),
    "held-out falls when the training reward is saturated": (
        Run(
            train=lambda time: improving(np.minimum(time, 6)),
            quality=lambda time: improving(np.minimum(time, 6)) - 0.1 * np.maximum(time - 6, 0),
        ),
        "heldout/quality",
        6,
        11,
        14,
    ),
    "diversity collapses suddenly": (Run(diversity=dropping(honest_diversity, 10, 0.25)), "diversity", 10, 1, 4),
    "diversity collapses slowly": (
        Run(diversity=lambda time: 0.25 * 0.85 ** np.maximum(time - 5, 0)),
        "diversity",
        5,
        8,
        11,
    ),
    "drift grows": (Run(drift=lambda time: 0.2 + 0.15 * np.maximum(time - 10, 0)), "drift", 10, 10, 13),
}
"""Run, signal, evaluation at which it begins, and how many later raise_kl and stop must have been said.

Of the slow fall no stop is asked: the run ends before.
"""


@pytest.mark.parametrize("shape", HACKED)
def test_hacking_is_caught_in_every_run(shape: str) -> None:
    run, signal, start, raised_within, stopped_within = HACKED[shape]
    for seed in range(10):
        verdicts = watch(run, seed)
        raised, stopped = first(verdicts, signal, "raise_kl"), first(verdicts, signal, "stop")
        assert raised is not None, seed
        assert start <= raised <= start + raised_within, seed
        if stopped_within is not None:
            assert stopped is not None, seed
            assert raised < stopped <= start + stopped_within, seed


@pytest.mark.parametrize("seed", range(3))
def test_a_plain_hack_is_stopped_with_twenty_prompts_and_the_defaults(tmp_path: Path, seed: int) -> None:
    """The held-out mean rises from 0.3 to 0.5 until step 50, then falls steadily; the training reward rises."""
    events = [json.loads(line) for line in open_events(write_run(tmp_path / "hacked", hacked=True, seed=seed, side=8))]
    said = {word: [each["step"] for each in events if each["text"].startswith(word)] for word in ("raise_kl", "stop")}
    assert 60 < said["raise_kl"][0] <= 90
    assert said["raise_kl"][0] < said["stop"][0] <= 120
    honest = open_events(write_run(tmp_path / "honest", seed=seed, side=8))
    assert not any(json.loads(line)["kind"] == "guard" for line in honest)


def open_events(run: Path) -> list[str]:
    return (run / EVENTS).read_text(encoding="utf-8").splitlines()


WARNED = {
    "the groups lose their spread": (Run(std=dropping(honest_std, 10, 0.1)), "group_std", 10, 1),
    "the rewards disagree": (
        Run(shared=lambda time: np.where(time >= 10, -0.5, 1.0)),
        "agreement/quality",
        10,
        2,
    ),
    "the run breaks": (Run(train=lambda time: -0.1 * time, quality=lambda time: -0.1 * time), "heldout/quality", 0, 8),
}
"""Run, signal, evaluation at which it begins, and how many later there must have been a warning."""


@pytest.mark.parametrize("shape", WARNED)
def test_what_may_have_other_causes_is_warned_of_and_no_more(shape: str) -> None:
    run, signal, start, within = WARNED[shape]
    for seed in range(10):
        verdicts = watch(run, seed)
        warned = first(verdicts, signal, "warn")
        assert warned is not None, seed
        assert start <= warned <= start + within, seed
        assert first(verdicts, signal, "raise_kl", "stop") is None, seed


def test_raise_kl_is_said_once_for_each_firing_that_asks_for_it() -> None:
    verdicts = watch(Run(diversity=dropping(honest_diversity, 10, 0.25)), seed=0)
    said = [verdict.action for each in verdicts[11:14] for verdict in each]
    # The blocks of evaluations 10 to 14 fire; the block is full at its last step, before the evaluation.
    assert [i for i, action in enumerate(said) if action == "raise_kl"] == [WINDOW - 1, 2 * (WINDOW + 1) + WINDOW - 1]
    assert set(said[WINDOW : 2 * (WINDOW + 1) + WINDOW - 1]) == {"warn"}
    assert verdicts[14][-1].action == "stop"
    assert any(reason.startswith("diversity: ") for reason in verdicts[14][-1].reasons)


def quiet(**changes: object) -> Guard:
    """Only one held-out reward; the training steps have been fine for two blocks."""
    guard = Guard(replace(GuardConfig(reward="train", heldout=("quality",)), **changes))  # type: ignore[arg-type]
    for step in range(2 * WINDOW):
        guard.observe(step, TrainingMetrics(0.0, 1.0 + 0.01 * (step % 3), 0.0, 0.0))
    return guard


def scores(i: int, quality: float, train: float | None = None) -> dict[str, torch.Tensor]:
    """20 prompts x 2 seeds, standard deviation 1, small noise; the training reward rises by 0.1 an evaluation."""
    levels = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    noise = 0.02 * torch.randn(2, 20, 2, generator=torch.Generator().manual_seed(i + 1))
    return {"train": levels + noise[0] + (0.1 * i if train is None else train), "quality": levels + noise[1] + quality}


def evaluated(guard: Guard, qualities: list[float], start: int = 0) -> list[str]:
    return [guard.evaluate(i, scores(i, quality)).action for i, quality in enumerate(qualities, start)]


def test_an_alarm_outlasts_a_single_good_evaluation_and_ends_after_two() -> None:
    guard = quiet()
    assert evaluated(guard, [0.0] * 6)[-1] == "ok"
    assert evaluated(guard, [-1.0, -1.0], 6) == ["ok", "raise_kl"]
    # -0.15 is no longer beyond the limit of 0.2, and not well within it either.
    assert evaluated(guard, [-0.15, -0.15, 0.0], 8) == ["warn"] * 3
    assert evaluated(guard, [-0.15, 0.0, 0.0], 11) == ["warn", "warn", "ok"]


def test_one_bad_evaluation_is_not_enough() -> None:
    guard = quiet()
    evaluated(guard, [0.0] * 6)
    assert evaluated(guard, [-1.0, 0.0, -1.0, 0.0, -1.0, 0.0], 6) == ["ok"] * 6


def test_a_significant_fall_that_is_small_does_not_count() -> None:
    guard = quiet()
    evaluated(guard, [0.0] * 6)
    assert evaluated(guard, [-0.15] * 4, 6) == ["ok"] * 4
    finding = guard.evaluate(10, scores(10, -0.15)).findings[0]
    assert finding.numbers["p_value"] < finding.numbers["level"]
    assert -finding.numbers["change"] < finding.numbers["limit"]


def test_a_mean_that_jumps_about_by_itself_has_to_fall_further() -> None:
    steady, restless = quiet(), quiet()
    evaluated(steady, [0.0] * 8)
    evaluated(restless, [0.0, -0.3, 0.1, -0.2, 0.2, -0.1, 0.0, -0.2])
    assert evaluated(steady, [-0.4, -0.4], 8)[-1] == "raise_kl"
    assert evaluated(restless, [-0.4, -0.4], 8)[-1] == "ok"


def test_too_little_data_is_never_ok() -> None:
    guard = Guard(GuardConfig(reward="train", heldout=("quality",)))
    metrics = TrainingMetrics(0.0, 1.0, 0.0, 0.0)
    assert guard.observe(0, metrics).action == "not_enough_data"
    guard = quiet()
    # The first evaluation has nothing before it, and the next three don't tell how much the mean varies by itself.
    assert evaluated(guard, [0.0] * 6) == ["not_enough_data"] * 4 + ["ok"] * 2
    few = quiet(min_prompts=21)
    assert set(evaluated(few, [0.0] * 6)) == {"not_enough_data"}


def test_without_training_steps_or_with_failed_ones_there_is_no_ok() -> None:
    guard = Guard(GuardConfig(reward="train", heldout=("quality",)))
    assert set(evaluated(guard, [0.0] * 6)) == {"not_enough_data"}
    guard = quiet()
    evaluated(guard, [0.0] * 6)
    failed = TrainingMetrics(math.nan, math.nan, math.nan, 1.0)
    said = [guard.observe(step, failed).action for step in range(WINDOW)]
    assert said == ["ok"] * (WINDOW - 1) + ["not_enough_data"]


def test_a_reward_without_spread_from_the_start_has_nothing_to_lose() -> None:
    guard = Guard(GuardConfig(reward="train", heldout=("quality",)))
    for step in range(3 * WINDOW):
        verdict = guard.observe(step, TrainingMetrics(0.0, 0.0, 1.0, 0.0))
    assert "0 from the start" in next(found.reason for found in verdict.findings if found.signal == "group_std")


def test_failed_samples_are_left_out_and_a_failed_evaluation_ends_no_alarm() -> None:
    guard = quiet()
    evaluated(guard, [0.0] * 6)
    nothing = {name: torch.full_like(values, math.nan) for name, values in scores(6, 0.0).items()}
    failed = {name: torch.zeros(20, 2, dtype=torch.bool) for name in nothing}
    assert guard.evaluate(6, nothing, failed).action == "not_enough_data"
    half = scores(7, -1.0)
    ok = torch.ones(20, 2, dtype=torch.bool)
    ok[:, 1] = False
    half["quality"] = torch.where(ok, half["quality"], math.nan)
    verdicts = [guard.evaluate(i, half, {"quality": ok}) for i in (7, 8)]
    assert [verdict.action for verdict in verdicts] == ["ok", "raise_kl"]
    assert verdicts[-1].findings[0].numbers["change"] == pytest.approx(-1.0, abs=0.05)
    assert guard.evaluate(9, nothing, failed).action == "warn"


def test_an_evaluation_that_lost_many_prompts_never_becomes_the_best() -> None:
    guard = quiet()
    evaluated(guard, [0.0] * 6)
    ok = torch.ones(20, 2, dtype=torch.bool)
    ok[16:] = False
    assert guard.evaluate(6, scores(6, 1.0), {"quality": ok}).action == "ok"
    assert guard.evaluate(7, scores(7, 0.0)).findings[0].numbers["count"] == 20
    assert evaluated(guard, [0.0, 0.0], 8) == ["ok", "ok"]


def test_the_order_of_prompts_and_seeds_changes_nothing() -> None:
    run = Run(quality=falling(4, 0.15), failing=0.05)
    prompts, seeds = np.random.default_rng(0).permutation(PROMPTS), [2, 0, 3, 1]
    one, other = Guard(CONFIG), Guard(CONFIG)
    actions = set()
    for step, steps, values in simulate(run, 5):
        permuted = {name: array[prompts][:, seeds] for name, array in values.items()}
        for before, after in zip(feed(one, step, steps, values), feed(other, step, steps, permuted), strict=True):
            assert before.action == after.action
            actions.add(before.action)
            assert after.metrics() == pytest.approx(before.metrics(), rel=1e-6, abs=1e-9, nan_ok=True)
    assert {"not_enough_data", "ok", "raise_kl", "warn", "stop"} == actions


def test_a_guard_that_is_saved_and_restored_says_the_same() -> None:
    run = Run(quality=falling(4, 0.15), diversity=dropping(honest_diversity, 12, 0.25), failing=0.05)
    unbroken, resumed = Guard(CONFIG), Guard(CONFIG)
    for step, steps, values in simulate(run, 6):
        resumed = Guard.from_json(resumed.to_json())
        for metrics in steps[:4]:
            assert unbroken.observe(step, metrics) == resumed.observe(step, metrics)
        resumed = Guard.from_json(resumed.to_json())  # in the middle of a block
        assert feed(unbroken, step, steps[4:], values) == feed(resumed, step, steps[4:], values)
    assert unbroken.to_json() == resumed.to_json()
    assert resumed.config == CONFIG


def test_what_was_said_last_outlasts_a_restart() -> None:
    """So that whoever reports the guard's words does not report an old warning as a new one."""
    assert Guard(CONFIG).verdict.action == "not_enough_data"
    guard, actions = Guard(CONFIG), set()
    for step, steps, values in simulate(Run(quality=falling(4, 0.15)), 12):
        said = feed(guard, step, steps, values)[-1]
        assert guard.verdict == said
        assert Guard.from_json(guard.to_json()).verdict == said
        actions.add(said.action)
    assert {"ok", "warn", "raise_kl", "stop"} <= actions


def test_the_state_is_plain_json_of_a_known_version() -> None:
    guard = quiet()
    values = scores(0, 0.0)
    ok = torch.ones(20, 2, dtype=torch.bool)
    ok[0] = False
    guard.evaluate(0, {**values, "quality": torch.where(ok, values["quality"], math.nan)}, {"quality": ok})
    state = json.loads(guard.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    with pytest.raises(ValueError, match="version 99"):
        Guard.from_json(json.dumps({**state, "version": 99}))


def test_the_verdict_says_why_in_words_and_numbers() -> None:
    guard = quiet()
    evaluated(guard, [0.0] * 6)
    evaluated(guard, [-1.0], 6)
    verdict = guard.evaluate(7, scores(7, -1.0))
    assert re.match(
        r"raise_kl: heldout/quality: -(0\.99|1\.0)\d* \(standard error .* its best, at step \d", str(verdict)
    )
    logged = verdict.metrics()
    assert (logged["guard/action"], logged["guard/heldout/quality/fires"]) == (3.0, 2.0)
    assert logged["guard/heldout/quality/change"] == pytest.approx(-1.0, abs=0.1)
    assert logged["guard/heldout/quality/reward_change"] == pytest.approx(0.7, abs=0.05)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    guard = quiet(drift_limit=None)
    evaluated(guard, [0.0] * 3)
    before = guard.to_json()
    good = scores(3, 0.0)
    with pytest.raises(ValueError, match="not of"):
        guard.evaluate(3, {"train": good["train"]})
    with pytest.raises(ValueError, match="the same at every evaluation"):
        guard.evaluate(3, {name: values[:10] for name, values in good.items()})
    with pytest.raises(ValueError, match="not marked as failed"):
        guard.evaluate(3, {**good, "quality": good["quality"] * math.nan})
    with pytest.raises(ValueError, match="infinite"):
        guard.observe(3, TrainingMetrics(0.0, math.inf, 0.0, 0.0))
    assert guard.to_json() == before
    with pytest.raises(ValueError, match="reports no drift"):
        Guard(CONFIG).observe(0, TrainingMetrics(0.0, 1.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heldout": ()}, "at least one"),
        ({"heldout": ("train",)}, "not the training reward"),
        ({"alpha": 0.0}, "alpha"),
        ({"diversity_fall": 1.0}, "diversity_fall"),
        ({"release": 1.5}, "release"),
        ({"patience": 6}, "patience"),
        ({"min_prompts": 1}, "min_prompts"),
        ({"heldout_fall": -0.1}, "heldout_fall"),
        ({"drift_limit": 0.0}, "drift_limit"),
        ({"alpha": math.nan}, "alpha"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **wrong)  # type: ignore[arg-type]
