"""One model on one device: prepare samples, pad and run batches, check and scatter outputs, bisect what fails."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from models.base import (
    InputError,
    LoadOptions,
    ModelError,
    Output,
    RewardModel,
    Sample,
    SampleError,
)
from models.preprocessing import to_uint8_tensor
from models.registry import load_model
from models.towers import (
    TowerInput,
    TowerReward,
    text_digest,
)
from service.engine.batcher import Batcher, GradientResult, Job, Outcome, Ticket
from service.engine.compile import BucketedFunction
from service.engine.features import FeatureCache
from service.engine.gradient import TowerGradient
from service.engine.towers import TowerRunner
from service.runtime import reduction_order
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
    """A sample of a gradient request: ``pixels`` float32 [3, H, W] in [0, 1] on the CPU."""

    prompt: str
    pixels: Tensor


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


class Worker:
    """Owns one loaded model. ``load`` and ``process`` run on the lane's thread, ``prepare`` on pool threads."""

    def __init__(
        self,
        options: WorkerOptions,
        batcher: Batcher,
        caches: tuple[FeatureCache, FeatureCache],
        telemetry: Telemetry,
    ) -> None:
        self.name = options.name
        self.options = options
        self.batcher = batcher
        self.model: RewardModel
        self.loaded = False
        self.last_success = 0.0
        self._caches = caches
        self._telemetry = telemetry
        self._towers: TowerRunner | None = None
        self._gradient: TowerGradient | None = None
        self._limit = options.micro_batch
        self._alive: Callable[[], None] = lambda: None

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
        for _ in range(2):  # the first pass pays for allocations
            started = time.monotonic()
            batch = [self.canary_payload() for _ in range(self.full)]
            failures = [outcome for outcome in self._bisect("score", batch) if isinstance(outcome, SampleError)]
            if failures:
                raise RuntimeError(f"{self.name} does not score its own canary: {failures[0].message}")
            self.batcher.rate = len(batch) / max(time.monotonic() - started, 1e-6)
        self.last_success = time.monotonic()

    def canary_payload(self) -> Any:
        """The canary, prepared, under an id of its own: the model must run, not the feature cache."""
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
        """Most samples of one batch."""
        if self._towers is not None:
            return self._towers.images.micro_batch
        return min(self._limit, self.model.max_batch or self._limit)

    @property
    def shape(self) -> str:
        if self._towers is not None:
            return self._towers.shape
        return f"{self.full}:{self.options.invariance}" if self.model.uses_device else "1"

    def fingerprint(self, job: Job = "score") -> str:
        """Names the scoring function: equal fingerprints give equal scores."""
        parts = {
            "model": self.name,
            "weights": self.model.weights_hash,
            "preprocessing": self.model.preprocessing,
            "options": dict(self.options.load.options),
            "dtype": self.dtype(job),
            "shape": self.shape if job == "score" else f"gradient:{self._gradient_batch}:{self.options.invariance}",
            "device": device_class(self.options.load.device) if self.model.uses_device else "host",
        }
        return "sha256:" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def _gradient_batch(self) -> int:
        return self._gradient.micro_batch if self._gradient is not None else self.options.micro_batch

    def dtype(self, job: Job = "score") -> str:
        return "float32" if job == "gradient" else str(self.model.dtype).removeprefix("torch.")

    # -- pool ---------------------------------------------------------------------------------------------------------

    def prepare(self, sample: Sample | TensorSample, job: Job) -> Any:
        """The model's own preparation. Raises SampleError; anything else it raises becomes a ModelError."""
        try:
            if job == "score" and isinstance(sample, Sample):
                return self.model.prepare(sample)
            if job == "gradient" and isinstance(sample, TensorSample) and isinstance(self.model, TowerReward):
                tokens, warnings = self.model.prepare_text(sample.prompt)
                return TowerInput(sample.pixels, tokens, "", text_digest(sample.prompt), warnings)
        except SampleError:
            raise
        except Exception as error:
            log.exception("prepare failed", extra={"model": self.name})
            raise ModelError("the model failed to prepare this sample") from error
        raise InputError(f"{self.name} has no {job} for this kind of sample", code="unsupported_input")

    # -- lane ---------------------------------------------------------------------------------------------------------

    def process(self, batch: list[Ticket], alive: Callable[[], None] = lambda: None) -> None:
        """Run a batch and settle every ticket of it, whatever happens to single samples.

        ``alive`` is called before each forward.
        """
        self._alive = alive
        job = batch[0].job
        outcomes = self._bisect(job, [ticket.payload for ticket in batch])
        if any(not isinstance(outcome, ModelError) for outcome in outcomes):
            self.last_success = time.monotonic()
        self._telemetry.batch.labels(self.name).observe(len(batch))
        self._telemetry.samples.labels(self.name, job).inc(len(batch))
        self.batcher.settle(batch, outcomes)

    def _bisect(self, job: Job, payloads: Sequence[Any]) -> list[Outcome]:
        """Outcomes of ``payloads``; when the batch raises, halves are tried until only the guilty samples fail."""
        if job == "score" and self._towers is None and len(payloads) > self.full:
            return self._halves(job, payloads)  # the batch has shrunk since these were taken
        self._alive()
        shrunk = False
        try:
            outcomes = self._score(payloads) if job == "score" else self._run_gradient(payloads)
            if len(outcomes) != len(payloads):
                raise ValueError(f"{self.name} gave {len(outcomes)} outputs for {len(payloads)} inputs")
            return [checked(outcome) for outcome in outcomes]
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
        if job != "score" or self._towers is not None or self.full == 1:
            return False
        self._limit = self.full // 2
        if self.options.load.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory: halved", extra={"model": self.name, "job": job, "shape": self.shape})
        return True

    def _score(self, payloads: Sequence[Any]) -> list[Outcome]:
        if self._towers is not None:
            return list(self._towers.score(payloads))
        if not self.model.uses_device or self.options.invariance == "fast":
            return list(self.model.run(payloads))
        padded = [*payloads, *[payloads[-1]] * (self.full - len(payloads))]
        outputs = self.model.run(padded)
        if len(outputs) != len(padded):
            raise ValueError(f"{self.name} gave {len(outputs)} outputs for {len(padded)} inputs")
        return list(outputs[: len(payloads)])

    def _run_gradient(self, payloads: Sequence[TowerInput]) -> list[Outcome]:
        if self._gradient is None:
            raise TypeError(f"{self.name} gives no gradients")
        return list(self._gradient.run(payloads))

    def _load_gradient(self) -> TowerGradient | None:
        """Gradients are taken in float32: bfloat16 rounds the differences away that a gradient is made of."""
        if not (self.options.gradients and self.model.info.differentiable):
            return None
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


def checked(outcome: Any) -> Outcome:
    """What a model gave for one sample, or a ModelError if that cannot be answered: not finite, not an output."""
    if isinstance(outcome, SampleError):
        return outcome
    output = outcome.output if isinstance(outcome, GradientResult) else outcome
    if not isinstance(output, Output):
        return ModelError("the model gave something that is not an output")
    numbers = [output.score, *output.outputs.values()]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        return ModelError("the model gave something that is not an output")
    if not all(math.isfinite(number) for number in numbers):
        return ModelError("the model gave a score that is not a finite number", code="not_finite")
    if output.details:
        try:
            json.dumps(output.details, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            return ModelError("the model gave details that are not JSON")
    return cast(Outcome, outcome)


_POISON = ("CUDA error", "device-side assert", "CUDNN_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_INTERNAL_ERROR")


def poisons_device(error: BaseException) -> bool:
    """Whether the device's context is lost after ``error``: every later call would fail too."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in _POISON)
    )


def device_class(device: torch.device) -> str:
    """Devices of one class give the same bits: instruction set on CPU, name and capability on CUDA."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda:{torch.cuda.get_device_name(device)}:sm_{major}{minor}"
    amx = "+amx" if torch.cpu._is_amx_tile_supported() else ""
    bf16 = "+avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"cpu:{torch.backends.cpu.get_cpu_capability()}{bf16}{amx}:mkl={reduction_order()}"
