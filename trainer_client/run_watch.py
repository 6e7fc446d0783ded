"""Watching a run: evaluations on fixed prompts, the guard's verdicts, and what is done about them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from trainer_client.config import RunConfig
from trainer_client.guard import SEVERITY, Action, Guard, Verdict
from trainer_client.guard_metrics import TrainingMetrics
from trainer_client.policies import Policy
from trainer_client.policies.weights import TRAINED
from trainer_client.run_evaluation import Evaluation, guard_scores
from trainer_client.run_log import RunLog
from trainer_client.run_setup import EMA, TOTAL


class Watch:
    """Evaluates, and lets the guard change the run's ``counters``: "kl_weight", and "stopped" with the reason.

    ``counters["guard"]`` is the guard's state, which it starts from and :meth:`remember` writes.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        counters: dict[str, Any],
        log: RunLog,
        evaluation: Evaluation | None,
        guard: Guard | None,
    ) -> None:
        self._config, self._policy, self._counters, self._log = config, policy, counters, log
        self._evaluation = evaluation
        self._guard = None if guard is None else Guard.from_json(counters["guard"])
        self._said: Action = "ok" if self._guard is None else self._guard.verdict.action

    def evaluate(self) -> None:
        """Draw the fixed prompts, log their rewards and samples, and tell the guard."""
        if self._evaluation is None:
            return
        config, started, step = self._config.evaluation, time.perf_counter(), self._counters["step"]
        averaged = config.weights == "ema" and self._config.ema.decay > 0
        with self._policy.use(EMA if averaged else TRAINED):
            found = self._evaluation.run()
        numbers = found.numbers()
        if found.failures:
            reason = f"evaluation: {len(found.failures)} scores failed; the first: {found.failures[0]}"
            self._log.event(step, "warning", reason)
        if self._guard is not None:
            names = [TOTAL, *config.heldout]
            scores, ok = guard_scores(found, names)
            numbers |= self._obey(self._guard.evaluate(step, scores, ok))
        if config.heldout:
            score = numbers[f"eval/{config.heldout[0]}"]
            self._counters["score"] = score if math.isfinite(score) else None
        numbers["time/evaluate"] = time.perf_counter() - started
        self._log.evaluation(step, numbers, seconds=self._counters["seconds"], images=self._counters["images"])
        scores_PS = {name: torch.where(found.ok[name], values, torch.nan) for name, values in found.scores.items()}
        texts = [prompt.text for prompt in self._evaluation.prompts]
        self._log.samples(step, texts, self._evaluation.seeds, found.images_PS3HW, scores_PS)

    def observe(self, watched: TrainingMetrics | None, numbers: Mapping[str, float]) -> dict[str, float]:
        """Tell the guard of the step that just ended; what it says, in numbers. None: a step without groups."""
        if self._guard is None or watched is None:
            return {}
        # Where every sample was left out there is no KL to tell, and nothing was trained.
        drift = numbers.get("kl", 0.0 if self._guard.config.drift_limit is not None else None)
        seen = replace(watched, drift=None if drift is None else max(drift, 0.0))
        return self._obey(self._guard.observe(self._counters["step"] + 1, seen))

    def remember(self) -> None:
        """Write the guard's state to the counters, before they are saved."""
        if self._guard is not None:
            self._counters["guard"] = self._guard.to_json()

    def _obey(self, verdict: Verdict) -> dict[str, float]:
        """Do what the guard says, as far as ``guard.mode`` lets it, and say so when it changes; numbers for the log."""
        settings, step = self._config.guard, self._counters["step"]
        said = str(verdict) if verdict.action in ("warn", "raise_kl", "stop") else ""
        # After a raise the same words come again as a warning.
        worse = SEVERITY.index(verdict.action) > SEVERITY.index(self._said)
        if said and (worse or verdict.action == "raise_kl"):
            self._log.event(step, "guard", said)
        self._said = verdict.action
        if settings.mode == "act" and verdict.action == "raise_kl":
            weight = self._counters["kl_weight"]
            raised = weight * settings.kl_factor or settings.kl_start
            self._log.event(step, "guard", f"the KL weight is now {raised:g}, it was {weight:g}")
            self._counters["kl_weight"] = raised
        if settings.mode == "act" and verdict.action == "stop" and not self._counters["stopped"]:
            self._counters["stopped"] = said
            self._log.event(step, "stop", said)
        return verdict.metrics()
