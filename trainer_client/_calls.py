"""A call of the client as a value: where it goes, what it carries, how its answers are read and put together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeAlias, TypeVar

from trainer_client import _parse, _wire
from trainer_client._retry import Answer
from trainer_client.items import ItemLike, build_items
from trainer_client.results import (
    CompareResponse,
    GradientResponse,
    ModelIdentity,
    ScoreResponse,
    merge_gradients,
    merge_scores,
)

Models: TypeAlias = str | Sequence[str] | Mapping[str, float]
"""One reward model, several of weight 1, or weights by name."""
Pairs: TypeAlias = Literal["all", "adaptive"] | Sequence[Sequence[int]]
"""Which comparisons to ask within an item: all, those that a tournament finds worth asking, or these."""
Items: TypeAlias = ItemLike | Sequence[ItemLike]
Job: TypeAlias = Literal["score", "gradient"]
"""A model has a fingerprint for each: gradients are taken in float32 and along a twin of the preprocessing."""
Result = TypeVar("Result")
Judged = TypeVar("Judged", ScoreResponse, CompareResponse, GradientResponse)


@dataclass(frozen=True, eq=False)
class Call(Generic[Result]):
    """One request: where it goes, what it carries, how its answer is read."""

    method: str
    path: str
    parse: Callable[[Answer], Result]
    body: _wire.Body | None = None
    accept: str = _wire.JSON


@dataclass(frozen=True, eq=False)
class Question(Generic[Result]):
    """What is asked of reward models, before it is known which services have them.

    ``call`` makes the request about some of ``models``; ``merge`` puts the answers about all of them together and
    ``identities`` reads from an answer who gave it. ``deadline`` is in seconds from when the question is asked.
    """

    models: tuple[str, ...]
    job: Job
    call: Callable[[Sequence[str]], Call[Result]]
    merge: Callable[[Sequence[Result]], Result]
    identities: Callable[[Result], Mapping[str, ModelIdentity]]
    deadline: float | None


def _weights(models: Models) -> dict[str, float]:
    if isinstance(models, str):
        models = [models]
    weights = dict(models) if isinstance(models, Mapping) else dict.fromkeys(models, 1.0)
    if not weights:
        raise ValueError("at least one reward model is needed")
    for name, weight in weights.items():
        if not isinstance(name, str) or not math.isfinite(weight):
            raise ValueError(f"models maps names to finite weights; got {name!r}: {weight!r}")
    return {name: float(weight) for name, weight in weights.items()}


def _check_deadline(deadline: float | None) -> float | None:
    if deadline is not None and not (math.isfinite(deadline) and deadline > 0):
        raise ValueError(f"a deadline is a positive number of seconds from now, not {deadline!r}")
    return deadline


def score_question(
    items: Items, models: Models, deadline: float | None, explain: bool, wire: _wire.Wire
) -> Question[ScoreResponse]:
    built, weights = build_items(items), _weights(models)
    counts = [len(item) for item in built]
    body = _wire.encode(built, {"models": weights, "explain": explain}, wire=wire)

    def call(names: Sequence[str]) -> Call[ScoreResponse]:
        part = {name: weights[name] for name in names}
        return Call(
            "POST",
            "/score",
            lambda answer: _parse.parse_scores(_wire.decode_json(answer.content), part, counts),
            _about(body, part),
        )

    merge = lambda answers: merge_scores(weights, answers)  # noqa: E731
    return Question(tuple(weights), "score", call, merge, _identities, _check_deadline(deadline))


def gradient_question(
    items: Items, models: Models, deadline: float | None, both_orders: bool
) -> Question[GradientResponse]:
    built, weights = build_items(items), _weights(models)
    if any(item.images is None for item in built):
        raise ValueError("gradients are of images: every item needs images, not candidates")
    # Said only where it is not the default: a service that knows no orders takes the request too.
    request = {"models": weights} if both_orders else {"models": weights, "both_orders": False}
    body = _wire.encode(built, request, wire="safetensors", floats=True)
    tensors = body.tensors or {}
    shapes = [
        {name: tensors[name].shape for name in (f"item{i}.image{k}" for k in range(len(item)))}
        for i, item in enumerate(built)
    ]

    def call(names: Sequence[str]) -> Call[GradientResponse]:
        part = {name: weights[name] for name in names}
        return Call(
            "POST",
            "/gradient",
            lambda answer: _parse.parse_gradients(*_wire.decode_safetensors(answer.content), part, shapes),
            _about(body, part),
            accept=_wire.SAFETENSORS,
        )

    merge = lambda answers: merge_gradients(weights, answers)  # noqa: E731
    return Question(tuple(weights), "gradient", call, merge, _identities, _check_deadline(deadline))


def _about(body: _wire.Body, weights: Mapping[str, float]) -> _wire.Body:
    """The same images, and these models."""
    return replace(body, request={**body.request, "models": weights})


def _identities(answer: Judged) -> Mapping[str, ModelIdentity]:
    return answer.models


def compare_question(
    items: Items,
    model: str,
    pairs: Pairs,
    both_orders: bool,
    explain: bool,
    deadline: float | None,
    wire: _wire.Wire,
) -> Question[CompareResponse]:
    built = build_items(items)
    counts = [len(item) for item in built]
    asked = [_asked_pairs(pairs, count) for count in counts]
    sent = pairs if isinstance(pairs, str) else [[int(i), int(j)] for i, j in pairs]
    request = {"model": model, "both_orders": both_orders, "explain": explain}
    call = Call(
        "POST",
        "/compare",
        lambda answer: _parse.parse_comparisons(_wire.decode_json(answer.content), model, counts, asked),
        _wire.encode(built, request, wire=wire, per_item=[{"pairs": sent}] * len(built)),
    )
    # One model never has more than one part to put together.
    only = lambda answers: answers[0]  # noqa: E731
    return Question((model,), "score", lambda names: call, only, _identities, _check_deadline(deadline))


def _asked_pairs(pairs: Pairs, count: int) -> Sequence[Sequence[int]] | None:
    """The pairs that must be answered; None leaves them to the service. Raises ValueError for impossible ones."""
    if count < 2:
        raise ValueError(f"a comparison needs two candidates; an item has {count}")
    if isinstance(pairs, str):
        if pairs not in ("all", "adaptive"):
            raise ValueError(f"pairs is 'all', 'adaptive' or a list of [i, j], not {pairs!r}")
        return list(itertools.combinations(range(count), 2)) if pairs == "all" else None
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1] or not all(0 <= k < count for k in pair):
            raise ValueError(f"{list(pair)} is no pair of two of the {count} candidates")
    if not pairs:
        raise ValueError("at least one pair is needed")
    if len({frozenset(pair) for pair in pairs}) != len(pairs):
        raise ValueError("a pair is given twice; (j, i) is the same pair as (i, j)")
    return pairs


MODELS_CALL = Call("GET", "/models", lambda answer: _parse.parse_models(_wire.decode_json(answer.content)))
READY_CALL = Call("GET", "/health/ready", lambda answer: None)
