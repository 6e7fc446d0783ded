"""What the scoring routes share: dependencies, deadlines, disconnects, and results -> wire."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import math
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from models.base import Output, RewardModel, SampleError
from models.judge import Judge
from service import items, scoring
from service.engine.batcher import GradientResult, Outcome
from service.engine.engine import Engine
from service.engine.request import SampleResult, Timing
from service.errors import ClientDisconnected, Unauthorized
from service.schemas import ErrorOut, ItemIn, ModelUsed, TimingOut, WarningOut
from service.settings import Settings
from service.telemetry import Telemetry
from service.wire import ByteBudget, Incoming

T = TypeVar("T")

WARNINGS = {
    "animated_first_frame": "the image is animated; its first frame was used",
    "prompt_truncated": "the prompt is longer than the model's context and was truncated",
    "unknown_words": "the prompt holds words that the model was never trained on",
    "context_ignored": "the model does not look at the item's context",
    "reference_ignored": "the model does not look at the item's reference",
    "is_reference": "the group was compared with this candidate; it has 0.5, as compared with itself",
    "comparisons_failed": "some comparisons of the candidate failed; the score is that of the others",
    "low_answer_mass": "the judge gave the words that count as an answer little probability",
}


@dataclass(frozen=True, eq=False)
class Service:
    """What a route needs; made once by create_app."""

    settings: Settings
    engine: Engine
    telemetry: Telemetry
    budget: ByteBudget
    key_digests: tuple[bytes, ...]


async def get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]


async def authorize(request: Request, service: ServiceDep) -> None:
    """Bearer keys, compared in constant time; no keys configured means that everyone may."""
    if not service.key_digests:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
    matches = [hmac.compare_digest(given, digest) for digest in service.key_digests]
    if scheme.lower() != "bearer" or not any(matches):
        raise Unauthorized("this service wants a bearer key in the Authorization header")


def deadline_at(arrival: float, deadline_ms: int | None, settings: Settings) -> float:
    """The end of a request that arrived at ``arrival`` (time.monotonic() seconds)."""
    queue = settings.queue
    return arrival + min(deadline_ms or queue.default_deadline_ms, queue.max_deadline_ms) / 1000


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; when the client leaves first, cancel it and raise ClientDisconnected."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected("the client left before its answer was ready")
    finally:
        for pending in (task, gone):
            if not pending.done():
                pending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await pending


async def _disconnected(request: Request) -> None:
    """Return when the client has left; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def compares(model: RewardModel) -> bool:
    """Whether the model scores by comparisons alone."""
    return isinstance(model, Judge) and not model.pointwise


def scores_of(
    service: Service, models: Sequence[str], incoming: Incoming, asked: Sequence[ItemIn], deadline: float
) -> Coroutine[Any, Any, tuple[list[SampleResult], Timing]]:
    """The work of scoring every candidate by every model, judges among them; unknown models and tensors raise now."""
    limits = service.settings.limits
    image_limits = items.image_limits(limits)
    workers = [service.engine.worker(model) for model in models]
    comparing = [worker.name for worker in workers if compares(worker.model)]
    if comparing:
        groups = items.groups(incoming, asked, image_limits)
        return scoring.score_all(service.engine, models, comparing, groups, deadline=deadline, limits=limits)
    with_context = any("context" in worker.model.info.inputs for worker in workers)
    makers = items.makers(incoming, asked, image_limits, with_context=with_context)
    return service.engine.submit(models, makers, job="score", deadline=deadline)


AnyItem = TypeVar("AnyItem", bound=ItemIn)


def split(items: Sequence[AnyItem], results: list[SampleResult]) -> list[tuple[AnyItem, list[SampleResult]]]:
    """Results of all samples, in order -> each item with its own; raises ValueError when the counts differ."""
    parts: list[tuple[AnyItem, list[SampleResult]]] = []
    start = 0
    for item in items:
        count = len(item.all_candidates())
        parts.append((item, results[start : start + count]))
        start += count
    if start != len(results):
        raise ValueError(f"{len(results)} results for {start} candidates")
    return parts


def errors_of(results: Sequence[SampleResult], models: Sequence[str]) -> list[list[ErrorOut]]:
    """Per candidate: why it has no score, an unreadable candidate once for all models."""
    rows = []
    for result in results:
        if result.unreadable is not None:
            rows.append([ErrorOut(model=None, code=result.unreadable.code, message=result.unreadable.message)])
            continue
        row = []
        for model in models:
            outcome = result.outcomes[model]
            if isinstance(outcome, SampleError):
                row.append(ErrorOut(model=model, code=outcome.code, message=outcome.message))
        rows.append(row)
    return rows


def warnings_of(
    service: Service,
    results: Sequence[SampleResult],
    models: Sequence[str],
    item: ItemIn | None = None,
    *,
    compared: bool = False,
) -> list[list[WarningOut]]:
    """Per candidate: what the caller should know about a score that is there. ``compared``: with the reference."""
    unused = [(model, code) for model in models for code in ignored(service, model, item)] if item else []
    unused = [(model, code) for model, code in unused if not (compared and code == "reference_ignored")]
    rows = []
    for result in results:
        codes: list[tuple[str | None, str]] = [(None, code) for code in result.warnings]
        for model in models:
            outcome = result.outcomes[model]
            output = outcome.output if isinstance(outcome, GradientResult) else outcome
            if isinstance(output, Output):
                codes += [(model, code) for code in output.warnings]
        rows.append([WarningOut(model=m, code=c, message=WARNINGS.get(c, c)) for m, c in [*codes, *unused]])
    return rows


def ignored(service: Service, model: str, item: ItemIn) -> list[str]:
    """Codes of what the item has and the model does not look at."""
    inputs = service.engine.worker(model).model.info.inputs
    given = {"context_ignored": item.context is not None, "reference_ignored": item.reference is not None}
    if isinstance(service.engine.worker(model).model, Judge):
        del given["reference_ignored"]
    return [code for code, present in given.items() if present and "context" not in inputs]


def score_of(outcome: Outcome) -> float | None:
    """The score, or None for a failed sample."""
    if isinstance(outcome, GradientResult):
        return outcome.output.score
    return outcome.score if isinstance(outcome, Output) else None


def total_of(result: SampleResult, models: Mapping[str, float]) -> float | None:
    """The weighted sum of one candidate's scores; None when one of them failed."""
    scores = [score_of(result.outcomes[model]) for model in models]
    if any(score is None for score in scores):
        return None
    return math.fsum(weight * (score or 0.0) for weight, score in zip(models.values(), scores, strict=True))


def used(service: Service, model: str, job: Any = "score") -> ModelUsed:
    worker = service.engine.worker(model)
    return ModelUsed(fingerprint=worker.fingerprint(job), dtype=worker.dtype(job))


def timing_out(timing: Timing) -> TimingOut:
    return TimingOut(decode=timing.decode, queue=timing.queue, forward=timing.forward)


async def arrival_time() -> float:
    return time.monotonic()


ArrivalDep = Annotated[float, Depends(arrival_time)]
