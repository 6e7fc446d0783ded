"""Reward hacking, seen while it happens: a guard that watches a run and says ok, warn, raise_kl or stop, and why.

Two things are told to it: every training step (:meth:`Guard.observe`), and now and then an evaluation of the policy on
fixed prompts and seeds by the training reward and by held-out rewards (:meth:`Guard.evaluate`). It watches signals:

``heldout/NAME``     fires when the held-out reward fell below its best: its change, paired by prompt and seed, is
                     significant (t-test over prompts) and at least ``heldout_fall`` standard deviations of its scores
``agreement/NAME``   the same test on the rank correlation (Kendall's tau-b) of training and held-out reward within the
                     samples of each prompt, with an absolute ``agreement_fall``; needs three seeds of each prompt
``group_std``        spread of the training reward within groups: fires when its mean over a block of ``window`` steps
                     lies below (1 - ``group_std_fall``) of the first block's (Welch's t-test over steps)
``diversity``        the same test on the pairwise distance of images within groups, with ``diversity_fall``
``drift``            fires when the mean over a block lies above ``drift_limit`` (t-test over steps)

How noise is kept from tripping it:

- The standard error of a change between evaluations is that over prompts and, in quadrature, what the prompts share: a
  policy wobbles with all its prompts together, which no number of prompts tells. It is seen in the bends of the mean's
  course (:func:`trainer_client.guard_metrics.with_wobble`), so a steady fall is no wobble. Judging begins with the
  fifth evaluation, when three jumps from one to the next are known.
- Each signal raises a false alarm in a whole run with probability ``alpha`` at most: Bonferroni over the looks, with a
  ``patience`` times larger level since an alarm takes that many in a row (:func:`guard_signals.level_of_look`). The
  k-th look at a block is tested at alpha patience / (k (k + 1)); the comparison with the best of k evaluations, of
  which the fourth is the first to be judged, at 4 alpha patience / (k^2 (k + 1)), since the best one was chosen. This
  holds as far as the t-tests do: prompts (steps) independent, means near normal, and no fall that is real: a policy
  that loses quality by an aimless walk has lost it. ``python -m benchmarks.hacking.guard_rates`` measures it.
- A signal must fire ``patience`` times in a row before anything is said. Looks without enough data neither count nor
  break the row.
- Once it has, only ``recovery`` looks in a row with at most ``release`` of the limit end the alarm; looks in between
  leave it as it is.

What is said at the n-th firing in a row: ``raise_kl`` at n = patience, 2 patience, ..., ``warn`` between, ``stop`` from
n = ``stop_after``. Three cases never get beyond ``warn``: agreement and group_std (a reward that is nearly solved shows
both), and a held-out reward that falls although the training reward of the same evaluation did not rise (p < alpha)
since the first one (that is a run that breaks, and no hacking). ``raise_kl`` is given once at each such firing, to be
obeyed once. The answer is the worst of all signals; one that lacks data makes it ``not_enough_data`` rather than ok
(agreement excepted: rewards that are constant within groups have no ranks).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor

from trainer_client.guard_metrics import LEAST_RANKED, TrainingMetrics, masked, paired_change, rank_correlations
from trainer_client.guard_signals import (
    Best,
    Block,
    GuardConfig,
    Look,
    as_scores,
    known_prompts,
    look_at_drift,
    look_at_fall,
    look_at_scores,
)

__all__ = ["Action", "Finding", "Guard", "GuardConfig", "Verdict"]

Action: TypeAlias = Literal["ok", "not_enough_data", "warn", "raise_kl", "stop"]
"""What to do, from best to worst."""
SEVERITY: tuple[Action, ...] = ("ok", "not_enough_data", "warn", "raise_kl", "stop")
VERSION = 2
"""Of the saved state."""


@dataclass(frozen=True)
class Finding:
    """The last look at one signal: its action, the reason in words, and the numbers behind it.

    ``fires`` is the number of firings in a row. Numbers of a comparison: ``change``, ``standard_error``, ``count``
    (prompts or steps), ``p_value``, ``level`` (which the p-value must be below), ``limit`` (of the fall or drift).
    """

    signal: str
    action: Action
    reason: str
    step: int | None = None
    fires: int = 0
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The worst of all findings. ``str()`` gives it in words; :meth:`metrics` gives numbers for a log."""

    action: Action
    findings: tuple[Finding, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Of the findings that have this action."""
        return tuple(f"{found.signal}: {found.reason}" for found in self.findings if found.action == self.action)

    def metrics(self) -> dict[str, float]:
        """``guard/action`` (0 ok ... 4 stop), and ``guard/SIGNAL/NUMBER`` for each number and for ``fires``."""
        logged = {"guard/action": float(SEVERITY.index(self.action))}
        for found in self.findings:
            for name, value in {**found.numbers, "fires": float(found.fires)}.items():
                logged[f"guard/{found.signal}/{name}"] = value
        return logged

    def __str__(self) -> str:
        return f"{self.action}: " + "; ".join(self.reasons)


@dataclass
class _Signal:
    """Firings in a row, clear looks in a row since, and what was found last."""

    finding: Finding
    fires: int = 0
    calm: int = 0


class Guard:
    """The state machine: give it steps and evaluations in their order, obey its verdicts, save it with a checkpoint."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._first: list[list[float]] | None = None
        self._bests: dict[str, Best] = {}
        self._blocks: dict[str, Block] = {}
        self._signals: dict[str, _Signal] = {}
        for name in (*(f"heldout/{heldout}" for heldout in config.heldout), "group_std"):
            self._watch(name)
        if config.drift_limit is not None:
            self._watch("drift")

    def observe(self, step: int, metrics: TrainingMetrics) -> Verdict:
        """Take one training step in; signals are judged when a block is full.

        Diversity is watched from the first step that has it. Raises ValueError for an infinite metric, and for a
        missing drift where a limit is set.
        """
        watched = {"group_std": metrics.group_std, "diversity": metrics.diversity}
        if self.config.drift_limit is not None:
            if metrics.drift is None:
                raise ValueError("drift_limit is set, and the step reports no drift")
            watched["drift"] = metrics.drift
        known = {name: value for name, value in watched.items() if value is not None}
        if any(math.isinf(value) for value in known.values()):
            raise ValueError(f"a metric is infinite: {known}")
        self._age()
        for name, value in known.items():
            self._watch(name)
            if (look := self._look_at_block(name, value)) is not None:
                self._take(name, step, look)
        return self.verdict

    def evaluate(self, step: int, scores: Mapping[str, Tensor], ok: Mapping[str, Tensor] | None = None) -> Verdict:
        """Take one evaluation in: [prompts, seeds] of the training reward and every held-out reward, by name.

        Row and column must mean the same prompt and seed at every evaluation. ``ok`` is False where a sample failed.
        Raises ValueError for other names, shapes that differ, and scores neither finite nor masked.
        """
        names = {self.config.reward, *self.config.heldout}
        if set(scores) != names or not set(ok or {}) <= names:
            raise ValueError(f"scores {sorted(scores)} and ok {sorted(ok or {})} are not of {sorted(names)}")
        known = {
            name: masked(values, (ok or {}).get(name, torch.ones_like(values, dtype=torch.bool)))
            for name, values in scores.items()
        }
        shapes = {tuple(values.shape) for values in known.values()}
        if self._first is not None:
            shapes.add(tuple(as_scores(self._first).shape))
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(f"scores are [prompts, seeds], the same at every evaluation; got {sorted(shapes)}")
        self._age()
        reward_PS = known[self.config.reward]
        if self._first is None and known_prompts(reward_PS) >= self.config.min_prompts:
            self._first = reward_PS.tolist()
        for name in self.config.heldout:
            self._take(f"heldout/{name}", step, self._look_at_heldout(name, step, known[name], reward_PS))
            if reward_PS.shape[1] >= LEAST_RANKED:
                both = ~(reward_PS.isnan() | known[name].isnan())
                tau_P1 = rank_correlations(reward_PS, known[name], both)[:, None]
                signal = f"agreement/{name}"
                self._watch(signal)
                look = self._look_at_scores(signal, step, tau_P1, self.config.agreement_fall, pooled=False)
                self._take(signal, step, replace(look, only_warn=True))
        return self.verdict

    @property
    def verdict(self) -> Verdict:
        """What was said last; a restored guard knows it too. Before anything was seen: ``not_enough_data``."""
        findings = tuple(signal.finding for signal in self._signals.values())
        # A reward that is constant within groups has no ranks: an answer must not wait for them forever.
        actions = [
            found.action
            for found in findings
            if not (found.action == "not_enough_data" and found.signal.startswith("agreement/"))
        ]
        return Verdict(max(actions, key=SEVERITY.index), findings)

    def to_json(self) -> str:
        """Configuration and state; :meth:`from_json` goes on with the same decisions."""
        state = {
            "version": VERSION,
            "config": asdict(self.config),
            "first": self._first,
            "bests": {name: asdict(best) for name, best in self._bests.items()},
            "blocks": {name: asdict(block) for name, block in self._blocks.items()},
            "signals": {name: asdict(signal) for name, signal in self._signals.items()},
        }
        return json.dumps(_without_nan(state), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError for a state of another version, KeyError or TypeError for one that is no state."""
        state = json.loads(text)
        if state["version"] != VERSION:
            raise ValueError(f"the guard's state is of version {state['version']}, not {VERSION}")
        guard = cls(GuardConfig(**{**state["config"], "heldout": tuple(state["config"]["heldout"])}))
        guard._first = None if state["first"] is None else _rows(state["first"])
        guard._bests = {name: _best(best) for name, best in state["bests"].items()}
        guard._blocks = {name: Block(**block) for name, block in state["blocks"].items()}
        guard._signals = {name: _signal(signal) for name, signal in state["signals"].items()}
        return guard

    def _look_at_heldout(self, name: str, step: int, scores_PS: Tensor, reward_PS: Tensor) -> Look:
        """A fall of a held-out reward is a reason to act only where the training reward rose."""
        look = self._look_at_scores(f"heldout/{name}", step, scores_PS, self.config.heldout_fall, pooled=True)
        if look.state == "unknown" or self._first is None:
            return replace(look, only_warn=True)
        rise = paired_change(as_scores(self._first), reward_PS)
        # The level of the fall keeps false alarms rare, whatever this test says: it only tells hacking from breaking.
        rose = rise.count >= self.config.min_prompts and rise.p_rise < self.config.alpha
        reason = (
            f"{look.reason}; the training reward changed by {rise.mean:+.4g} since the first evaluation "
            f"(p = {rise.p_rise:.2g} for a rise)"
        )
        numbers = {**look.numbers, "reward_change": rise.mean, "reward_p_rise": rise.p_rise}
        return replace(look, reason=reason, numbers=numbers, only_warn=not rose)

    def _look_at_scores(self, signal: str, step: int, scores_PS: Tensor, limit: float, *, pooled: bool) -> Look:
        if signal in self._bests:
            return look_at_scores(
                self._bests[signal],
                step,
                scores_PS,
                limit=limit,
                pooled=pooled,
                alpha=self.config.alpha,
                patience=self.config.patience,
                release=self.config.release,
                least=self.config.min_prompts,
            )
        known = known_prompts(scores_PS)
        if known < self.config.min_prompts:
            return Look("unknown", f"{known} prompts have a value, {self.config.min_prompts} are needed")
        rows = scores_PS.tolist()
        self._bests[signal] = Best(rows, step, rows)
        return Look("unknown", "this is the first evaluation: there is none to compare with")

    def _look_at_block(self, signal: str, value: float) -> Look | None:
        """None until the block is full."""
        config, block = self.config, self._blocks.setdefault(signal, Block())
        values = block.add(value, config.window)
        if values is None:
            return None
        if len(values) < 2 or 2 * len(values) < config.window:
            return Look("unknown", f"only {len(values)} of the last {config.window} steps have a value")
        if signal == "drift" and config.drift_limit is not None:
            return look_at_drift(
                block,
                values,
                limit=config.drift_limit,
                alpha=config.alpha,
                patience=config.patience,
                release=config.release,
            )
        limit = config.group_std_fall if signal == "group_std" else config.diversity_fall
        look = look_at_fall(
            block, values, limit=limit, alpha=config.alpha, patience=config.patience, release=config.release
        )
        return replace(look, only_warn=signal == "group_std")

    def _take(self, name: str, step: int, look: Look) -> None:
        """Count the look and turn the count into an action."""
        signal = self._signals[name]
        alarmed = signal.fires >= self.config.patience
        if look.state == "fires":
            signal.fires, signal.calm = signal.fires + 1, 0
        elif look.state == "holds":
            signal.fires, signal.calm = (signal.fires if alarmed else 0), 0
        elif look.state == "clear":
            signal.calm += 1
            if not alarmed or signal.calm >= self.config.recovery:
                signal.fires = 0
        if look.state == "unknown":
            # Silence of the measurement is no end of an alarm.
            action = signal.finding.action if alarmed else "not_enough_data"
        else:
            action = _action(signal.fires, look, self.config)
        signal.finding = Finding(name, action, look.reason, step, signal.fires, look.numbers)

    def _watch(self, name: str) -> None:
        self._signals.setdefault(name, _Signal(Finding(name, "not_enough_data", "nothing was seen yet")))

    def _age(self) -> None:
        """What was said before is no new instruction."""
        for signal in self._signals.values():
            if signal.finding.action == "raise_kl":
                signal.finding = replace(signal.finding, action="warn")


def _action(fires: int, look: Look, config: GuardConfig) -> Action:
    if fires < config.patience:
        return "ok"
    if look.only_warn:
        return "warn"
    if fires >= config.stop_after:
        return "stop"
    return "raise_kl" if look.state == "fires" and fires % config.patience == 0 else "warn"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _rows(state: list[list[float | None]]) -> list[list[float]]:
    return [[math.nan if score is None else score for score in row] for row in state]


def _best(state: dict[str, Any]) -> Best:
    return Best(**{**state, "scores_PS": _rows(state["scores_PS"]), "last_PS": _rows(state["last_PS"])})


def _signal(state: dict[str, Any]) -> _Signal:
    numbers = {name: math.nan if value is None else value for name, value in state["finding"]["numbers"].items()}
    return _Signal(Finding(**{**state["finding"], "numbers": numbers}), state["fires"], state["calm"])
