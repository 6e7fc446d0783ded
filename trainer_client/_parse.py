"""Answers of the service -> results, believing nothing: every length, name and number is checked against the question.

Whatever does not fit raises :class:`ProtocolError`, which says where and, for a size, both numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from trainer_client.errors import ProtocolError, SampleFailure
from trainer_client.results import (
    CompareResponse,
    ComparisonResult,
    GradientResponse,
    ItemComparisons,
    ItemGradients,
    ItemScores,
    ModelIdentity,
    ModelInfo,
    SampleWarning,
    ScoreResponse,
)

T = TypeVar("T")
Pairs = Sequence[Sequence[int]] | None
"""The pairs of an item that must be answered; None where the service chose them."""


def parse_scores(answer: Any, weights: Mapping[str, float], counts: Sequence[int]) -> ScoreResponse:
    """The answer to /score about items of ``counts`` candidates."""
    results = []
    for where, result, count in _results(answer, counts):
        scores, total, errors, warnings = _scored(result, weights, count, where)
        results.append(
            ItemScores(
                scores,
                total,
                errors,
                warnings,
                outputs=_by_model(result.get("outputs"), weights, count, f"{where}.outputs", _numbers),
                details=_by_model(result.get("details"), weights, count, f"{where}.details", _object),
            )
        )
    return ScoreResponse(results, _identities(answer, weights), _timing(answer))


def parse_gradients(
    answer: Any,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    weights: Mapping[str, float],
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
) -> GradientResponse:
    """The answer to /gradient; ``shapes`` gives per item the tensor names of its images and their shapes."""
    results = []
    unclaimed = set(tensors)
    for (where, result, count), named in zip(_results(answer, [len(s) for s in shapes]), shapes, strict=True):
        scores, total, errors, warnings = _scored(result, weights, count, where)
        gradients: list[npt.NDArray[np.float32] | None] = []
        for (name, shape), value in zip(named.items(), total, strict=True):
            gradient = tensors.get(name)
            unclaimed.discard(name)
            if (gradient is None) != (value is None):
                has = "a total but no gradient" if gradient is None else "a gradient but no total"
                raise ProtocolError(f"{name}: the service sent {has}")
            if gradient is not None and gradient.shape != shape:
                raise ProtocolError(f"{name}: the gradient has shape {gradient.shape}, the image {shape}")
            if gradient is not None and not np.isfinite(gradient).all():
                raise ProtocolError(f"{name}: the gradient is not finite")
            gradients.append(gradient)
        results.append(ItemGradients(scores, total, errors, warnings, gradients))
    if unclaimed:
        raise ProtocolError(f"the service sent {len(unclaimed)} tensors that were not asked, {min(unclaimed)!r} first")
    return GradientResponse(results, _identities(answer, weights), _timing(answer))


def parse_comparisons(answer: Any, model: str, counts: Sequence[int], asked: Sequence[Pairs]) -> CompareResponse:
    """The answer to /compare by ``model`` about items of ``counts`` candidates."""
    results = [
        _comparisons(result, model, count, pairs, where)
        for (where, result, count), pairs in zip(_results(answer, counts), asked, strict=True)
    ]
    about = _object(_get(answer, "model", "the answer"), "model")
    if about.get("name") != model:
        raise ProtocolError(f"the service answered by model {about.get('name')!r} where {model!r} was asked")
    return CompareResponse(results, {model: _identity(about, "model")}, _timing(answer))


def parse_models(answer: Any) -> list[ModelInfo]:
    """The answer to /models."""
    return [
        _model_info(_object(row, f"models[{i}]"), f"models[{i}]")
        for i, row in enumerate(_list(_get(answer, "models", "the answer"), "models"))
    ]


def _model_info(row: dict[str, Any], where: str) -> ModelInfo:
    bounds = row.get("range")
    if bounds is not None:
        low, high = (_number(v, f"{where}.range") for v in _sized(bounds, 2, "bounds", f"{where}.range"))
        bounds = (low, high)
    return ModelInfo(
        name=_string(_get(row, "name", where), f"{where}.name"),
        kind=_nullable(row.get("kind"), f"{where}.kind", _string),
        inputs=tuple(_string(v, f"{where}.inputs") for v in _list(row.get("inputs", []), f"{where}.inputs")),
        differentiable=_bool(row.get("differentiable", False), f"{where}.differentiable"),
        range=bounds,
        license=_nullable(row.get("license"), f"{where}.license", _string),
        fingerprint=_nullable(row.get("fingerprint"), f"{where}.fingerprint", _string),
        ready=_bool(_get(row, "ready", where), f"{where}.ready"),
        raw=row,
    )


def _results(answer: Any, counts: Sequence[int]) -> list[tuple[str, dict[str, Any], int]]:
    results = _sized(_get(answer, "results", "the answer"), len(counts), "items", "results")
    return [
        (f"results[{i}]", _object(result, f"results[{i}]"), count)
        for i, (result, count) in enumerate(zip(results, counts, strict=True))
    ]


def _scored(
    result: dict[str, Any], weights: Mapping[str, float], count: int, where: str
) -> tuple[dict[str, list[float | None]], list[float | None], list[list[SampleFailure]], list[list[SampleWarning]]]:
    by_model = _object(_get(result, "scores", where), f"{where}.scores")
    if set(by_model) != set(weights):
        raise ProtocolError(f"{where}.scores: the service sent models {sorted(by_model)} for {sorted(weights)}")
    scores = {m: _nullable_numbers(by_model[m], count, f"{where}.scores[{m!r}]") for m in weights}
    total = _nullable_numbers(_get(result, "total", where), count, f"{where}.total")
    errors = _notes(result, "errors", count, where, SampleFailure)
    for k in range(count):
        blamed = {failure.model for failure in errors[k]}
        for model, values in scores.items():
            if (values[k] is None) != bool(blamed & {model, None}):
                said = "no score and no error" if values[k] is None else "a score and an error"
                raise ProtocolError(f"{where}: candidate {k} has {said} for {model!r}")
        # a model of weight 0 is only watched: whether its failure voids the total is the service's choice
        failed = [m for m, values in scores.items() if values[k] is None]
        if total[k] is None and not failed:
            raise ProtocolError(f"{where}: candidate {k} has every score but no total")
        if total[k] is not None and any(weights[m] != 0 for m in failed):
            raise ProtocolError(f"{where}: candidate {k} has a total without the score of {failed[0]!r}")
    return scores, total, errors, _notes(result, "warnings", count, where, SampleWarning)


def _comparisons(result: dict[str, Any], model: str, count: int, asked: Pairs, where: str) -> ItemComparisons:
    def column(name: str) -> list[float | None]:
        return _nullable_numbers(_get(result, name, where), count, f"{where}.{name}")

    errors = _notes(result, "errors", count, where, SampleFailure)
    listed = _list(_get(result, "comparisons", where), f"{where}.comparisons")
    reference = result.get("reference")
    shown = count if reference is None else count + 1  # the index after the last candidate is the item's reference
    comparisons = [_comparison(c, model, shown, f"{where}.comparisons[{n}]") for n, c in enumerate(listed)]
    answered = {frozenset((c.i, c.j)) for c in comparisons}
    for i, j in asked or ():
        if not errors[i] and not errors[j] and frozenset((i, j)) not in answered:
            raise ProtocolError(f"{where}: the comparison of candidates {i} and {j} was asked but not answered")
    ranking = [_index(v, count, f"{where}.ranking") for v in _list(_get(result, "ranking", where), f"{where}.ranking")]
    if len(set(ranking)) != len(ranking):
        raise ProtocolError(f"{where}.ranking names a candidate twice: {ranking}")
    rows = _sized(_get(result, "probabilities", where), count, "candidates", f"{where}.probabilities")
    return ItemComparisons(
        probabilities=[
            [_nullable(p, f"{where}.probabilities[{i}][{j}]", _probability) for j, p in enumerate(row)]
            for i, row in enumerate(
                _sized(row, count, "candidates", f"{where}.probabilities[{i}]") for i, row in enumerate(rows)
            )
        ],
        win_rate=column("win_rate"),
        strength=column("strength"),
        strength_stderr=column("strength_stderr"),
        ranking=ranking,
        reference=None
        if reference is None
        else [
            _nullable(p, f"{where}.reference", _probability)
            for p in _sized(reference, count, "candidates", f"{where}.reference")
        ],
        position_bias=_nullable(result.get("position_bias"), f"{where}.position_bias", _number),
        comparisons=comparisons,
        errors=errors,
        warnings=_notes(result, "warnings", count, where, SampleWarning),
    )


def _comparison(value: Any, model: str, count: int, where: str) -> ComparisonResult:
    entry = _object(value, where)
    first, second = (
        _nullable(p, f"{where}.orders", _probability)
        for p in _sized(_get(entry, "orders", where), 2, "orders", f"{where}.orders")
    )
    text = entry.get("text")
    if text is not None:
        text = tuple(_nullable(t, f"{where}.text", _string) for t in _list(text, f"{where}.text"))
    error = entry.get("error")
    if error is not None:
        error = _note(SampleFailure, {"model": model, **_object(error, f"{where}.error")}, f"{where}.error")
    result = ComparisonResult(
        i=_index(_get(entry, "i", where), count, f"{where}.i"),
        j=_index(_get(entry, "j", where), count, f"{where}.j"),
        probability=_nullable(_get(entry, "probability", where), f"{where}.probability", _probability),
        orders=(first, second),
        text=text,
        parse=_string(_get(entry, "parse", where), f"{where}.parse"),
        error=error,
    )
    if result.i == result.j:
        raise ProtocolError(f"{where} compares candidate {result.i} with itself")
    if result.probability is None and error is None:
        raise ProtocolError(f"{where} has no probability and no error")
    return result


def _identities(answer: Any, weights: Mapping[str, float]) -> dict[str, ModelIdentity]:
    models = _object(_get(answer, "models", "the answer"), "models")
    return {m: _identity(_get(models, m, "models"), f"models[{m!r}]") for m in weights}


def _identity(value: Any, where: str) -> ModelIdentity:
    about = _object(value, where)
    fingerprint = _string(_get(about, "fingerprint", where), f"{where}.fingerprint")
    return ModelIdentity(fingerprint, _string(_get(about, "dtype", where), f"{where}.dtype"))


def _timing(answer: Any) -> dict[str, float]:
    return _numbers(answer.get("timing_ms", {}), "timing_ms")


def _notes(result: dict[str, Any], key: str, count: int, where: str, kind: Callable[..., T]) -> list[list[T]]:
    path = f"{where}.{key}"
    per_candidate = _sized(_get(result, key, where), count, "candidates", path)
    return [[_note(kind, note, path) for note in _list(notes, path)] for notes in per_candidate]


def _note(kind: Callable[..., T], value: Any, where: str) -> T:
    note = _object(value, where)
    model = _nullable(note.get("model"), f"{where}.model", _string)
    code = _string(_get(note, "code", where), f"{where}.code")
    return kind(model=model, code=code, message=_string(_get(note, "message", where), f"{where}.message"))


def _by_model(
    value: Any, weights: Mapping[str, float], count: int, where: str, each: Callable[[Any, str], dict[str, T]]
) -> dict[str, list[dict[str, T] | None]]:
    """Per-model lists of objects; a model that has nothing to add is absent."""
    by_model = _object({} if value is None else value, where)
    if not set(by_model) <= set(weights):
        raise ProtocolError(f"{where}: the service sent models {sorted(by_model)} for {sorted(weights)}")
    return {
        m: [_nullable(v, f"{where}[{m!r}]", each) for v in _sized(values, count, "candidates", f"{where}[{m!r}]")]
        for m, values in by_model.items()
    }


def _nullable_numbers(value: Any, count: int, where: str) -> list[float | None]:
    return [_nullable(v, where, _number) for v in _sized(value, count, "candidates", where)]


def _nullable(value: Any, where: str, each: Callable[[Any, str], T]) -> T | None:
    return None if value is None else each(value, where)


def _get(value: Any, key: str, where: str) -> Any:
    if key not in _object(value, where):
        raise ProtocolError(f"{where}: {key!r} is missing")
    return value[key]


def _sized(value: Any, count: int, what: str, where: str) -> list[Any]:
    if len(_list(value, where)) != count:
        raise ProtocolError(f"{where}: the service sent {len(value)} entries for {count} {what}")
    return list(value)


def _numbers(value: Any, where: str) -> dict[str, float]:
    return {key: _number(v, f"{where}[{key!r}]") for key, v in _object(value, where).items()}


def _number(value: Any, where: str) -> float:
    # bool is an int in Python; an integer too large for a float is as little a score as infinity
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unexpected(value, "a number", where)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _unexpected(value, "a finite number", where)
    return number


def _probability(value: Any, where: str) -> float:
    number = _number(value, where)
    if not 0 <= number <= 1:
        raise _unexpected(value, "a probability", where)
    return number


def _index(value: Any, count: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise _unexpected(value, f"an index below {count}", where)
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _unexpected(value, "an object", where)
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _unexpected(value, "a list", where)
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _unexpected(value, "a string", where)
    return value


def _bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _unexpected(value, "true or false", where)
    return value


def _unexpected(value: Any, expected: str, where: str) -> ProtocolError:
    return ProtocolError(f"{where}: expected {expected}, got {str(value)[:80]!r}")
