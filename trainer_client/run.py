"""What the algorithms share: a run's policy, rewards, optimizer, averages, log, checkpoints, evaluations and guard.

An algorithm reads from top to bottom in its own file::

    with Run("nft", config, out) as run:
        for step in run.steps():
            batch = run.next_batch()
            for rows in batch.pieces(size):
                ...sample and decode...
                run.submit(images, batch, rows)
            advantages = run.advantages(batch)
            ...loss.backward()...
            run.update()

All ranks of a run on several devices make the same calls. Noise follows from (seed, step, index of the sample), so that
neither the number of ranks nor a restart changes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from trainer_client import distributed
from trainer_client.checkpoint import Checkpoints, RunIdentity, package_versions, policy_identity
from trainer_client.config import ConfigError, RewardsSection, RunConfig
from trainer_client.distributed import derived_seed
from trainer_client.ema import ema_update_, power_decay
from trainer_client.guard import Guard
from trainer_client.guard_metrics import TrainingMetrics
from trainer_client.policies import Conditioning
from trainer_client.policies.conditioning import PromptCache
from trainer_client.policies.weights import TRAINED
from trainer_client.prompt_order import PromptOrder
from trainer_client.prompts import Prompt, load_prompts
from trainer_client.rewards import Rewards, served
from trainer_client.run_batch import Advantages, Batch, draw_batch
from trainer_client.run_evaluation import Evaluation
from trainer_client.run_log import METRICS, RunLog, write_trace
from trainer_client.run_scoring import RunFailed, Scoring, compare_rewards
from trainer_client.run_setup import (
    EMA,
    build_guard,
    build_policy,
    check_sampling,
    choose_weights,
    join_ranks,
    offered_models,
    write_config,
)
from trainer_client.run_state import RunState
from trainer_client.run_watch import Watch

Settings = TypeVar("Settings", bound=RunConfig)
MakeRewards = Callable[[RewardsSection, Sequence[str], Mapping[str, str]], Rewards]
"""(settings, names of pointwise models, fingerprints by name) -> where the run gets its rewards."""
_BAD_GRADIENTS = 3
"""Updates in a row without a finite gradient that end a run."""


class Run(Generic[Settings]):
    """One training run in the folder ``out``; use it as a context manager.

    ``copies`` are names of further weights that the algorithm keeps, such as "old". ``make_rewards`` replaces scores by
    the services' models; ``needs_gradient``: those models must be differentiable. With ``resume`` the run goes on from
    its last checkpoint, if there is one; ``allow`` as in :meth:`RunState.load`. Raises before anything is trained:
    ConfigError, RewardError for services and models, CheckpointError.
    """

    def __init__(
        self,
        algorithm: str,
        config: Settings,
        out: str | Path,
        *,
        copies: Sequence[str] = (),
        make_rewards: MakeRewards = served,
        needs_gradient: bool = False,
        kl_weight: float = 0.0,
        resume: bool = False,
        allow: Sequence[str] = (),
    ) -> None:
        self.algorithm, self.config, self.out, self._resume = algorithm, config, Path(out), resume
        self._checkpoints = Checkpoints(self.out / "checkpoints", keep=config.checkpoints.keep)
        found = self._checkpoints.latest()
        log = self.out / METRICS  # empty where a run was refused after its log was opened
        if not resume and (found is not None or (log.exists() and log.stat().st_size > 0)):
            raise ConfigError(f"{self.out} holds a run already: go on with --resume, or take another folder")
        self.device = join_ranks(config.policy.device)
        if config.images_per_step < distributed.world_size():
            raise ConfigError(
                f"{config.images_per_step} images a step cannot be shared by {distributed.world_size()} ranks"
            )
        self.prompts = load_prompts(config.prompts)
        evaluated = load_prompts(config.evaluation.prompts) if config.evaluation.prompts else []
        trained = list(config.rewards.models)
        watched = list(config.evaluation.heldout) if evaluated else []
        self.models = offered_models(config.rewards, [*trained, *config.judges, *watched])
        dull = [name for name in trained if not self.models[name].differentiable]
        if needs_gradient and dull:
            raise ConfigError(f"{algorithm} differentiates through its rewards, and {', '.join(dull)} has no gradient")
        fingerprints = {name: info.fingerprint or "" for name, info in self.models.items()}
        torch.manual_seed(derived_seed(config.seed, "weights"))  # fresh adapters come from the global generator
        self.policy = build_policy(config.policy, self.device)
        check_sampling(self.policy, config)
        self.identity = RunIdentity(
            algorithm,
            **policy_identity(self.policy.network),
            configuration=config.identity(),
            fingerprints=fingerprints,
            versions=package_versions(),
        )
        choose_weights(self.policy, config.policy)
        for name in [*copies, *([EMA] if config.ema.decay > 0 else [])]:
            self.policy.weights.add(name)
        self.parameters = self.policy.weights.tensors()
        chosen = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=chosen.lr, betas=chosen.betas, weight_decay=chosen.weight_decay, eps=chosen.eps
        )
        guard = build_guard(config, evaluated, kl_weight)
        self._order = PromptOrder([prompt.text for prompt in self.prompts], config.seed)
        self.counters: dict[str, Any] = {
            "step": 0, "updates": 0, "skipped": 0, "bad_in_a_row": 0, "images": 0, "seconds": 0.0,
            "kl_weight": kl_weight, "stopped": "", "guard": guard.to_json() if guard else "",
            "score": None,
        }  # fmt: skip
        self._state = RunState(
            **{name: self.policy.weights.named_tensors(name) for name in self.policy.weights.names if name != TRAINED},
            weights=self.policy.weights.named_tensors(),
            optimizer=self.optimizer,
            order=self._order,
            counters=self.counters,
        )
        if found is not None:
            changed = ["fingerprints"] if config.rewards.allow_fingerprint_change else []
            self._state.load(self._checkpoints, self.identity, allow=[*allow, *changed])
        if self.counters["stopped"]:
            if "stopped" not in allow:
                reason = self.counters["stopped"]
                raise ConfigError(f"the guard stopped this run at step {self.step} (--allow stopped goes on): {reason}")
            self.counters["stopped"] = ""
        with ExitStack() as closing:  # whatever fails below, the queues are closed
            self._connect(closing, make_rewards, evaluated, watched, guard, kept=found)
            self._closing = closing.pop_all()

    def _connect(
        self,
        closing: ExitStack,
        make_rewards: MakeRewards,
        evaluated: Sequence[Prompt],
        watched: Sequence[str],
        guard: Guard | None,
        *,
        kept: int | None,
    ) -> None:
        """Rewards, evaluation and log, which ``closing`` closes; ``kept``: the step of the checkpoint to go on from."""
        config, log = self.config, self.out / METRICS
        trained, fingerprints = list(config.rewards.models), dict(self.identity.fingerprints)
        self.rewards = make_rewards(config.rewards, trained, fingerprints)
        closing.callback(self.rewards.close)
        self._scoring = Scoring(self.rewards)
        evaluation: Evaluation | None = None
        if evaluated:
            asked = served(config.rewards, [*trained, *watched], fingerprints)
            closing.callback(asked.close)
            evaluation = Evaluation(config, evaluated, self.policy, asked)
        sampling = config.sampling
        guided = self.policy.needs_negative(sampling.guidance_scale)
        self._encode = PromptCache(self.policy.encode_prompts, negative=sampling.negative if guided else None)
        self._numbers: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._watched: TrainingMetrics | None = None
        distributed.on_main(lambda: write_config(self.out, config, self.identity, self.policy))
        self.log = closing.enter_context(
            RunLog(
                self.out,
                total_steps=config.steps,
                resume_step=kept if kept is not None else -1 if log.exists() or self._resume else None,
                tensorboard=config.logging.tensorboard,
                wandb_project=config.logging.wandb_project,
                progress=config.logging.progress,
                name=f"{self.algorithm} {self.out.name}",
            )
        )
        self._watch = Watch(config, self.policy, self.counters, self.log, evaluation, guard)
        told = f"{self.algorithm}, {config.steps} steps in all"
        self.log.event(self.step, "start" if kept is None else "resume", told)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.log.event(self.step, "failure", f"{type(error).__name__}: {error}")
        if isinstance(error, Exception) and not isinstance(error, ConfigError):
            error.add_note(f"the trace is in {write_trace(self.out, self.step, error)}")
        self._closing.__exit__(kind, error, trace)

    # The loop

    @property
    def step(self) -> int:
        """Finished steps."""
        return int(self.counters["step"])

    @property
    def kl_weight(self) -> float:
        """Weight of the KL term; the guard may have raised it."""
        return float(self.counters["kl_weight"])

    def steps(self) -> Iterator[int]:
        """The steps that are still to do; around them it logs, evaluates, saves and asks the guard."""
        config = self.config
        if self.step == 0:
            self._watch.evaluate()
        while self.step < config.steps and not self.counters["stopped"]:
            self._numbers, self._seconds, self.counters["score"] = {}, {}, None
            before, started = self.rewards.stats(), time.perf_counter()
            yield self.step
            if self._scoring.pending:
                raise RunFailed("rewards were submitted and not collected")
            self.report(**self._watch.observe(self._watched, self._numbers))
            self._seconds["step"] = time.perf_counter() - started
            after = self.rewards.stats()
            self.counters["step"] += 1
            self.counters["seconds"] += self._seconds["step"]
            self.report(
                **{f"time/{stage}": seconds for stage, seconds in self._seconds.items()},
                **{
                    "kl_weight": self.kl_weight,
                    "wire/cpu_seconds": after.cpu_seconds - before.cpu_seconds,
                    "wire/retries": float(after.retries - before.retries),
                    "wire/bytes_sent": float(after.bytes_sent - before.bytes_sent),
                },
            )
            self.log.train(self.step, self._numbers, seconds=self.counters["seconds"], images=self.counters["images"])
            due = self.step == config.steps or bool(self.counters["stopped"])
            if due or (config.evaluation.every and self.step % config.evaluation.every == 0):
                self._watch.evaluate()
            if due or self.counters["stopped"] or self.step % config.checkpoints.every == 0:
                self.save()
        if not self.counters["stopped"]:
            seconds = self.counters["seconds"]
            self.log.event(self.step, "finish", f"{self.counters['images']} images in {seconds:.0f} s of training")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds within to ``time/NAME`` of this step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def report(self, **numbers: float | Tensor) -> None:
        """Numbers of this step for the log; one that is given again replaces the one before."""
        self._numbers |= {name: float(value) for name, value in numbers.items()}

    def generator(self, *names: str | int) -> torch.Generator:
        """A CPU generator that follows from the seed, the step and ``names`` alone: equal on every rank."""
        return torch.Generator().manual_seed(derived_seed(self.config.seed, self.step, *names))

    # Samples and their rewards

    def next_batch(self) -> Batch:
        """This rank's samples of the next rollout."""
        self.counters["images"] += self.config.images_per_step
        return draw_batch(self.config, self.step, self.prompts, self._order)

    def conditioning(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Encoded prompts, with the negative prompt where guidance needs one."""
        return self._encode([prompt.text for prompt in prompts])

    def submit(self, images_B3HW: Tensor, batch: Batch, rows: Sequence[int]) -> None:
        """Start scoring the decoded images [b, 3, H, W] in [0, 1] of some rows of the batch."""
        self._scoring.submit(images_B3HW, batch, rows)

    def advantages(self, batch: Batch) -> Advantages:
        """Wait for the rewards of the whole batch, and compare each sample with its group, over all ranks.

        Raises RunFailed where not one image has a reward, RewardError where the services gave none within the patience.
        """
        with self.stage("reward_wait"):
            found = self._scoring.collect()
        compared = compare_rewards(*found, batch, self.config)
        self.report(**compared.numbers)
        self._watched = compared.watched
        if compared.failed:
            self.log.event(self.step, "warning", f"{compared.failed} scores failed; the first: {compared.reason}")
        return compared.advantages

    # Weights

    def update(self) -> None:
        """One optimizer step with the gradients that every rank has gathered, averaged over ranks; none counts as 0.

        A gradient that is not finite is left out and counted. Raises RunFailed after three in a row.
        """
        settings, done = self.config.optimizer, int(self.counters["updates"])
        for parameter in self.parameters:
            if parameter.grad is None:  # AdamW would leave it alone, and on several ranks it would not
                parameter.grad = torch.zeros_like(parameter)
        distributed.average_gradients_(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
        lr = settings.lr * min(1.0, (done + 1) / settings.warmup_steps) if settings.warmup_steps else settings.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if bool(norm.isfinite()):
            self.optimizer.step()
            self.counters["updates"], self.counters["bad_in_a_row"] = done + 1, 0
            if self.config.ema.decay > 0 and (done + 1) % self.config.ema.every == 0:
                weights = self.policy.weights
                decay = power_decay(done + 1, self.config.ema.decay)
                ema_update_(weights.tensors(EMA), weights.tensors(), decay)
        else:
            self.counters["skipped"] += 1
            self.counters["bad_in_a_row"] += 1
            self.log.event(self.step, "warning", "the gradient is not finite: this update is left out")
            if self.counters["bad_in_a_row"] >= _BAD_GRADIENTS:
                raise RunFailed(f"step {self.step}: the gradient was not finite {_BAD_GRADIENTS} times in a row")
        self.optimizer.zero_grad(set_to_none=True)
        self.report(grad_norm=norm, lr=lr, updates=float(self.counters["updates"]))

    def save(self) -> None:
        """Save a checkpoint of this step; the score by which the best one is kept is the first held-out reward's.

        With adapters in diffusers' format, or, at the end, with the whole network: both the averaged ones if there are.
        """
        name = EMA if self.config.ema.decay > 0 else TRAINED
        exports: dict[str, Callable[[Path], object]] = {}
        if self.config.policy.weights == "lora":
            exports["lora"] = lambda folder: self.policy.save_lora(folder, name)
        elif self.step == self.config.steps or self.counters["stopped"]:
            exports[self.policy.network_name] = lambda folder: self.policy.save_network(folder, name)
        self._watch.remember()
        self._state.save(self._checkpoints, self.step, self.identity, score=self.counters["score"], exports=exports)
