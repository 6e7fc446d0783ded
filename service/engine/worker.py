"""One model on one device: prepare samples, pad and run batches, check and scatter outputs, bisect what fails."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.base import Candidate, Context, InputError, LoadOptions, ModelError, RewardModel, Sample, SampleError
from models.judge import AnswerError, Comparison, Judge
from models.preprocessing import to_uint8_tensor
from models.registry import load_model
from models.towers import TowerInput, TowerReward, text_digest
from service.engine.batcher import Batcher, Job, Outcome, Ticket
from service.engine.checks import checked, device_class, poisons_device
from service.engine.compile import BucketedFunction
from service.engine.features import FeatureCache
from service.engine.gradient import JudgeGradient, TowerGradient
from service.engine.judging import JudgeRunner, Probe
from service.engine.remote import RemoteChat
from service.engine.towers import TowerRunner
from service.telemetry import Telemetry

log = logging.getLogger(__name__)


class CanaryId(str):
    """An id of features that is equal to itself alone: neither another canary nor a caller's prompt can have it."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class DevicePoisoned(RuntimeError):
    """The device cannot be trusted any more; only a new process can use it."""


@dataclass(frozen=True, eq=False)
class TensorSample:
    """A sample of a gradient request: ``pixels`` float32 [3, H, W] in [0, 1] on the CPU.

    Judges compare it with ``reference``, in both orders or with it first; ``context`` is what both were made from.
    """

    prompt: str
    pixels: Tensor
    reference: Candidate | None = None
    context: Context | None = None
    both_orders: bool = True


@dataclass(frozen=True)
class WorkerOptions:
    """What the engine decided for one model, from the settings."""

    name: str
    load: LoadOptions
    micro_batch: int
    invariance: Any
    compile: Any
    watchdog_s: float
    gradients: bool = True
    token_budget: int = 4096
    """Of a judge's batch."""


class Worker:
    """Owns one loaded model. ``load`` and ``process`` run on the lane's thread, ``prepare`` on pool threads."""

    def __init__(
        self,
        options: WorkerOptions,
        batcher: Batcher,
        caches: tuple[FeatureCache, FeatureCache],
        telemetry: Telemetry,
        prefixes: FeatureCache | None = None,
    ) -> None:
        """``caches``: features of images and texts; ``prefixes``: beginnings of a judge's turns (None keeps none)."""
        self.name = options.name
        self.options = options
        self.batcher = batcher
        self.model: RewardModel
        self.loaded = False
        self.last_success = 0.0
        self.writes = False
        """Whether its batches were seen to take many steps: answers in words."""
        self._caches = caches
        self._prefixes = FeatureCache("prefix", 0, telemetry) if prefixes is None else prefixes
        self._telemetry = telemetry
        self._towers: TowerRunner | None = None
        self._judge: JudgeRunner | None = None
        self._gradient: TowerGradient | JudgeGradient | None = None
        self._limit = options.micro_batch
        self._alive: Callable[[], None] = lambda: None
        self._breathe: Callable[[], None] = lambda: None

    # -- life ---------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the weights, compile, find usable shapes and score the canary; raises what the model raises."""
        started = time.monotonic()
        self.model = load_model(self.name, self.options.load)
        if isinstance(self.model, TowerReward):
            self._towers = TowerRunner(
                self.model, self._bucket, *self._caches, text_micro_batch=self.options.micro_batch
            )
            self._towers.warm_up(self.prepare(self.model.canary(), "score"))
        elif isinstance(self.model, Judge):
            images, _ = self._caches
            self._judge = JudgeRunner(
                self.model, images, self._prefixes, rows=self.options.micro_batch, on_step=self._between_tokens
            )
        self._gradient = self._load_gradient()
        self.warm()
        self.loaded = True
        seconds = time.monotonic() - started
        self._telemetry.warmup.labels(self.name).set(seconds)
        log.info(
            "model ready",
            extra={"model": self.name, "seconds": round(seconds, 2), "fingerprint": self.fingerprint(),
                   "dtype": self.dtype(), "shape": self.shape, "samples_per_s": round(self.batcher.rate or 0)},
        )  # fmt: skip

    def warm(self) -> None:
        """Score a full batch of the canary: proves the model and measures the rate that Retry-After starts from."""
        for probe in (True, False):  # the first pass pays for allocations
            started = time.monotonic()
            rows = self.full if self._judge is None else self._judge.rows
            batch = [self.canary_payload(probe=probe) for _ in range(rows)]
            outcomes = self._bisect(self.canary_job, batch)
            failures = [outcome for outcome in outcomes if isinstance(outcome, SampleError) and not healthy(outcome)]
            if failures:
                raise RuntimeError(f"{self.name} does not score its own canary: {failures[0].message}")
            self.batcher.rate = len(batch) / max(time.monotonic() - started, 1e-6)
        self.last_success = time.monotonic()

    def close(self) -> None:
        """Close the connection of a judge that asks a server."""
        if isinstance(self.options.load.chat, RemoteChat):
            self.options.load.chat.close()

    @property
    def judges(self) -> bool:
        """Whether the model compares candidates."""
        return self._judge is not None

    @property
    def canary_job(self) -> Job:
        """What the canary asks of the model."""
        return "score" if self._judge is None else "compare"

    def canary_payload(self, *, probe: bool = True) -> Any:
        """The canary, prepared, under an id of its own: the model must run, not the feature cache.

        As a ``probe`` a judge writes a few tokens of its answer.
        """
        if isinstance(self.model, Judge):
            prepared = self.prepare(self.model.canary_comparison(), "compare")
            return Probe(prepared) if probe else prepared
        payload = self.prepare(self.model.canary(), "score")
        if isinstance(payload, TowerInput):
            return replace(payload, image_id=CanaryId(), text_id=CanaryId())
        return payload

    @property
    def differentiable(self) -> bool:
        """Whether this worker answers gradient jobs."""
        return self._gradient is not None

    def _bucket(self, part: str, function: Callable[..., Tensor], micro_batch: int | None) -> BucketedFunction:
        return BucketedFunction(
            f"{self.name}.{part}",
            function,
            device=self.options.load.device,
            micro_batch=micro_batch or self.options.micro_batch,
            invariance=self.options.invariance,
            compile=self.options.compile,
        )

    @property
    def full(self) -> int:
        """Most samples of one batch, for a judge most tokens."""
        if self._towers is not None:
            return self._towers.images.micro_batch
        if self._judge is not None:
            return self.options.token_budget
        return min(self._limit, self.model.max_batch or self._limit)

    @property
    def shape(self) -> str:
        if self._towers is not None:
            return self._towers.shape
        if self._judge is not None:
            return f"{self._judge.rows}:exact"
        return f"{self.full}:{self.options.invariance}" if self.model.uses_device else "1"

    def fingerprint(self, job: Job = "score") -> str:
        """Names the scoring function: equal fingerprints give equal scores."""
        parts = {
            "model": self.name,
            "weights": self.model.weights_hash,
            "preprocessing": self.model.preprocessing,
            "options": dict(self.options.load.options),
            "dtype": self.dtype(job),
            "shape": self.shape if job != "gradient" else f"gradient:{self._gradient_batch}:{self.options.invariance}",
            **({} if self._judge is None else {"chat": self._judge.identity}),
            # Gradients were once of one order, whatever was asked.
            **({"orders": "as asked"} if self._judge is not None and job == "gradient" else {}),
            "device": device_class(self.options.load.device) if self.model.uses_device else "host",
        }
        return "sha256:" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def _gradient_batch(self) -> int:
        return self._gradient.micro_batch if self._gradient is not None else self.options.micro_batch

    def dtype(self, job: Job = "score") -> str:
        return "float32" if job == "gradient" else str(self.model.dtype).removeprefix("torch.")

    # -- pool ---------------------------------------------------------------------------------------------------------

    def prepare(self, sample: Sample | Comparison | TensorSample, job: Job) -> Any:
        """The model's own preparation. Raises SampleError; anything else it raises becomes a ModelError."""
        try:
            if job == "score" and isinstance(sample, Sample):
                return self.model.prepare(sample)
            if job == "compare" and isinstance(sample, Comparison) and isinstance(self.model, Judge):
                return self.model.prepare_comparison(sample)
            if job == "gradient" and isinstance(sample, TensorSample) and isinstance(self.model, Judge):
                return JudgeGradient.prepare(
                    sample.prompt, sample.pixels, sample.reference, sample.context, sample.both_orders
                )
            if job == "gradient" and isinstance(sample, TensorSample) and isinstance(self.model, TowerReward):
                tokens, warnings = self.model.prepare_text(sample.prompt)
                return TowerInput(sample.pixels, tokens, "", text_digest(sample.prompt), warnings)
        except SampleError:
            raise
        except Exception as error:
            log.exception("prepare failed", extra={"model": self.name})
            raise ModelError("the model failed to prepare this sample") from error
        raise InputError(f"{self.name} has no {job} for this kind of sample", code="unsupported_input")

    def weight(self, payload: Any) -> int:
        """What a prepared sample takes of :attr:`full`."""
        asked = payload.prepared if isinstance(payload, Probe) else payload
        return int(asked.tokens) if self._judge is not None and hasattr(asked, "tokens") else 1

    # -- lane ---------------------------------------------------------------------------------------------------------

    def process(
        self,
        batch: list[Ticket],
        alive: Callable[[], None] = lambda: None,
        breathe: Callable[[], None] = lambda: None,
    ) -> None:
        """Run a batch and settle every ticket of it, whatever happens to single samples.

        ``alive`` is called before each forward, ``breathe`` between the tokens of a long answer.
        """
        self._alive, self._breathe = alive, breathe
        job = batch[0].job
        payloads = [ticket.payload for ticket in batch]
        outcomes = self._bisect(job, payloads)
        if any(not isinstance(outcome, ModelError) for outcome in outcomes):
            self.last_success = time.monotonic()
        self._telemetry.batch.labels(self.name).observe(len(batch))
        self._telemetry.samples.labels(self.name, job).inc(len(batch))
        if self.judges and job != "gradient":
            self._telemetry.judge_tokens.labels(self.name).inc(sum(ticket.weight for ticket in batch))
        # A probe is quicker than what is asked: nothing is learned of the rate.
        self.batcher.settle(batch, outcomes, learn=not all(isinstance(payload, Probe) for payload in payloads))

    def _bisect(self, job: Job, payloads: Sequence[Any]) -> list[Outcome]:
        """Outcomes of ``payloads``; when the batch raises, halves are tried until only the guilty samples fail."""
        if job == "score" and self._towers is None and self._judge is None and len(payloads) > self.full:
            return self._halves(job, payloads)  # the batch has shrunk since these were taken
        self._alive()
        shrunk = False
        try:
            outcomes = self._run_gradient(payloads) if job == "gradient" else self._score(payloads, job)
            if len(outcomes) != len(payloads):
                raise ValueError(f"{self.name} gave {len(outcomes)} outputs for {len(payloads)} inputs")
            return [checked(outcome) for outcome in outcomes]
        except DevicePoisoned:  # by a batch that ran between this one's tokens
            raise
        except Exception as error:
            if poisons_device(error):
                raise DevicePoisoned(f"{self.name} poisoned its device: {error}") from error
            shrunk = isinstance(error, torch.OutOfMemoryError) and self._shrink(job)
            if not shrunk and len(payloads) == 1:
                if isinstance(error, SampleError):
                    return [error]
                log.exception("forward failed on one sample", extra={"model": self.name})
                return [ModelError("the model failed on this sample")]
            if not shrunk:
                log.warning(
                    "batch failed, bisecting",
                    extra={"model": self.name, "size": len(payloads), "error": type(error).__name__},
                )
        # Not in the handler: the error's traceback holds what the failed batch had in memory.
        return self._bisect(job, payloads) if shrunk else self._halves(job, payloads)

    def _halves(self, job: Job, payloads: Sequence[Any]) -> list[Outcome]:
        middle = len(payloads) // 2
        return [*self._bisect(job, payloads[:middle]), *self._bisect(job, payloads[middle:])]

    def _shrink(self, job: Job) -> bool:
        """Halve the batch and remember it; False when it is one already. Towers and gradients halve their own."""
        if self._judge is not None and job != "gradient":
            return self._judge.halve()
        if job != "score" or self._towers is not None or self.full == 1:
            return False
        self._limit = self.full // 2
        if self.options.load.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory: halved", extra={"model": self.name, "job": job, "shape": self.shape})
        return True

    def _between_tokens(self) -> None:
        """A token was written: the model lives, however long its answer takes. Waiting for a server proves nothing."""
        if self.model.uses_device:
            self.writes = True
            self.last_success = time.monotonic()
        self._alive()
        self._breathe()

    def _score(self, payloads: Sequence[Any], job: Job) -> list[Outcome]:
        if self._judge is not None:
            return self._judge.compare(payloads) if job == "compare" else self._judge.score(payloads)
        if self._towers is not None:
            return list(self._towers.score(payloads))
        if not self.model.uses_device or self.options.invariance == "fast":
            return list(self.model.run(payloads))
        padded = [*payloads, *[payloads[-1]] * (self.full - len(payloads))]
        outputs = self.model.run(padded)
        if len(outputs) != len(padded):
            raise ValueError(f"{self.name} gave {len(outputs)} outputs for {len(padded)} inputs")
        return list(outputs[: len(payloads)])

    def _run_gradient(self, payloads: Sequence[Any]) -> list[Outcome]:
        if self._gradient is None:
            raise TypeError(f"{self.name} gives no gradients")
        return list(self._gradient.run(payloads))

    def _load_gradient(self) -> TowerGradient | JudgeGradient | None:
        """Gradients are taken in float32: bfloat16 rounds the differences away that a gradient is made of."""
        if not (self.options.gradients and self.model.info.differentiable):
            return None
        if isinstance(self.model, Judge):
            return JudgeGradient(self.model, lambda: self._alive()) if self.model.gives_gradients else None
        model: RewardModel = self.model
        if model.dtype != torch.float32:
            model = load_model(self.name, replace(self.options.load, dtype=torch.float32))
        if not isinstance(model, TowerReward):
            raise TypeError(f"{self.name} calls itself differentiable and has no towers")
        gradient = TowerGradient(model, self.options.micro_batch)
        if self.options.invariance == "exact":
            canary = model.canary()
            gradient.warm_up(canary.prompt, to_uint8_tensor(canary.image(self.name).convert("RGB")) / 255)
        else:
            gradient.use_every_size()
        return gradient


def healthy(error: SampleError) -> bool:
    """Whether a canary with this outcome proves the model: a judge that was not trained need not give a verdict."""
    return isinstance(error, AnswerError)
