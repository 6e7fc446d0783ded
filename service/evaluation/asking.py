"""Asks a service for its opinion of preference rows: POST /score for scores, POST /compare for judges of pairs.

Requests hold several rows and run a few at a time; pictures are read when their request is made. A request that is
refused as a whole is asked again in halves, so that one row that cannot be judged fails alone.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import httpx
from scipy.special import expit

from models.fitting.preference_data import Picture, PreferenceRow, RowContext, UnreadableRow
from service.schemas import CompareResponse, ItemPreferences, ItemScores, ModelOut, ModelsResponse, ScoreResponse

Route: TypeAlias = Literal["score", "compare"]
IMAGES_PER_REQUEST = 32
ITEMS_PER_REQUEST = 16
BYTES_PER_REQUEST = 24 << 20
"""Of images in base64; the service's default limit is 128 MiB a body."""
DEADLINE_MS = 600_000
RETRIED = frozenset({429, 503})
FATAL = frozenset({401, 404})


class EvaluationProblem(Exception):
    """The evaluation cannot be made; the message is one line for the person who asked for it."""


@dataclass(frozen=True)
class PairVerdict:
    """``probability`` that image ``first`` is better, in [0, 1]; ``orders``: the same asked with it shown first and
    shown second, where the judge was asked in both. ``margin``: its sign is the verdict."""

    first: int
    second: int
    probability: float
    margin: float
    orders: tuple[float, float] | None = None


@dataclass(frozen=True)
class Failure:
    """Why an image, a pair or a row has no opinion."""

    code: str
    message: str


@dataclass(frozen=True)
class RowVerdict:
    """A model's opinion of one row. ``scores``: scores, or a judge's strengths; None where there is none. Pairs that
    could not be judged are absent from ``pairs``, and the failures say why."""

    scores: tuple[float | None, ...]
    pairs: tuple[PairVerdict, ...] = ()
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Asked:
    """Whom to ask: a model as the service describes it, and by which route."""

    model: ModelOut
    route: Route


class Asker:
    """Asks one service. ``gone`` says why it will never answer again, once it is so; None as long as it may."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        *,
        concurrency: int = 4,
        patience_s: float = 300.0,
        gone: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._client = client
        self._concurrency = concurrency
        self._patience_s = patience_s
        self._gone = gone

    async def find(self, name: str, route: Route | None = None) -> Asked:
        """The model ``name`` and the route (None: what fits its kind); raises EvaluationProblem if it is not there."""
        response = await self._send("GET", "/models", None, patience_s=0)
        if not response.is_success:
            raise EvaluationProblem(_told(response))
        models = ModelsResponse.model_validate(response.json()).models
        for model in models:
            if model.name == name:
                if not model.ready:
                    raise EvaluationProblem(f"the service does not serve {name}: add it to its settings")
                return Asked(model, route or ("compare" if model.kind == "pairwise" else "score"))
        raise EvaluationProblem(
            f"unknown reward model {name}; the service has {', '.join(model.name for model in models if model.ready)}"
        )

    async def ask(
        self, asked: Asked, rows: Sequence[PreferenceRow], advance: Callable[[int], object] = lambda count: None
    ) -> list[RowVerdict]:
        """One verdict a row, in order; ``advance`` is told how many rows were answered.

        Raises EvaluationProblem where the service leaves, or turns the caller away.
        """
        verdicts: list[RowVerdict | None] = [None] * len(rows)
        batches = _batches(rows)

        async def work() -> None:
            for batch in batches:  # shared: each worker takes the next one when it is free
                encoded = await asyncio.to_thread(_encode, [rows[i] for i in batch])
                for i, item in zip(batch, encoded, strict=True):
                    if isinstance(item, Failure):
                        verdicts[i] = RowVerdict((None,) * len(rows[i].images), failures=(item,))
                items = {i: item for i, item in zip(batch, encoded, strict=True) if not isinstance(item, Failure)}
                for part in _within(items, BYTES_PER_REQUEST):
                    for i, verdict in (await self._verdicts(asked, rows, part)).items():
                        verdicts[i] = verdict
                advance(len(batch))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._concurrency):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return [verdict for verdict in verdicts if verdict is not None]

    async def _verdicts(
        self, asked: Asked, rows: Sequence[PreferenceRow], items: dict[int, dict[str, Any]]
    ) -> dict[int, RowVerdict]:
        body: dict[str, Any] = {"items": list(items.values()), "deadline_ms": DEADLINE_MS}
        if asked.route == "score":
            body |= {"models": {asked.model.name: 1.0}}
        else:
            body |= {"model": asked.model.name, "both_orders": True}
        response = await self._send("POST", f"/{asked.route}", body, self._patience_s)
        if response.status_code in FATAL:
            raise EvaluationProblem(_told(response))
        if response.is_success:
            return dict(zip(items, _read(asked, rows, list(items), response), strict=True))
        numbers = list(items)
        if len(numbers) > 1:
            middle = len(numbers) // 2
            halves = [await self._verdicts(asked, rows, {i: items[i] for i in half})
                      for half in (numbers[:middle], numbers[middle:])]  # fmt: skip
            return halves[0] | halves[1]
        failure = Failure(_problem(response).get("code", f"http_{response.status_code}"), _told(response))
        return {numbers[0]: RowVerdict((None,) * len(rows[numbers[0]].images), failures=(failure,))}

    async def _send(self, method: str, path: str, body: Any, patience_s: float) -> httpx.Response:
        """The answer, asked again while the service is full or away, for at most ``patience_s``."""
        end, wait = time.monotonic() + patience_s, 0.5
        while True:
            if reason := self._gone():
                raise EvaluationProblem(f"the service has failed: {reason}")
            try:
                response = await self._client.request(method, path, json=body)
                if response.status_code not in RETRIED or time.monotonic() + wait > end:
                    return response
                wait = max(wait, _retry_after(response))
            except httpx.TransportError as error:
                if time.monotonic() + wait > end:
                    raise EvaluationProblem(
                        f"nothing answers at {self._client.base_url} ({type(error).__name__})"
                    ) from error
            await asyncio.sleep(wait)
            wait = min(2 * wait, 15.0)


def _batches(rows: Sequence[PreferenceRow]) -> Iterator[list[int]]:
    batch: list[int] = []
    images = 0
    for i, row in enumerate(rows):
        full = len(batch) == ITEMS_PER_REQUEST or images + len(row.images) > IMAGES_PER_REQUEST
        if batch and full:
            yield batch
            batch, images = [], 0
        batch.append(i)
        images += len(row.images)
    if batch:
        yield batch


def _encode(rows: Sequence[PreferenceRow]) -> list[dict[str, Any] | Failure]:
    """Items of a request, with the pictures as they lie there; a Failure for a row whose pictures cannot be read."""
    encoded: list[dict[str, Any] | Failure] = []
    for row in rows:
        try:
            item: dict[str, Any] = {"prompt": row.prompt, "images": [_base64(picture) for picture in row.images]}
            if row.context is not None:
                item["context"] = _encode_context(row.context)
            encoded.append(item)
        except UnreadableRow as problem:
            encoded.append(Failure(problem.code, problem.message))
    return encoded


def _encode_context(context: RowContext) -> dict[str, Any]:
    """The context of an item, with what the row has of it."""
    encoded: dict[str, Any] = dict(context.texts)
    if context.image is not None:
        encoded["image"] = _base64(context.image)
    if context.mask is not None:
        encoded["mask"] = _base64(context.mask)
    if context.frames:
        encoded["frames"] = [_base64(frame) for frame in context.frames]
    return encoded


def _base64(picture: Picture) -> str:
    return base64.b64encode(picture.read()).decode()


def _within(items: dict[int, dict[str, Any]], most: int) -> Iterator[dict[int, dict[str, Any]]]:
    """Parts with at most ``most`` bytes of images in base64, or with one item."""
    part: dict[int, dict[str, Any]] = {}
    size = 0
    for i, item in items.items():
        context = item.get("context", {})
        length = sum(map(len, (*item["images"], *context.get("frames", ()))))
        length += sum(len(context.get(name, "")) for name in ("image", "mask"))
        if part and size + length > most:
            yield part
            part, size = {}, 0
        part[i] = item
        size += length
    if part:
        yield part


def _read(
    asked: Asked, rows: Sequence[PreferenceRow], numbers: Sequence[int], response: httpx.Response
) -> list[RowVerdict]:
    if asked.route == "score":
        scored = ScoreResponse.model_validate(response.json()).results
        return [_scored(asked, rows[i], item) for i, item in zip(numbers, scored, strict=True)]
    return [_compared(item) for item in CompareResponse.model_validate(response.json()).results]


def _scored(asked: Asked, row: PreferenceRow, item: ItemScores) -> RowVerdict:
    """P(i better) = sigmoid((s_i - s_j) / temperature), by the model's own calibration."""
    scores = item.scores[asked.model.name]
    temperature = asked.model.calibration.temperature
    pairs = []
    for pair in row.pairs:
        first, second = scores[pair.first], scores[pair.second]
        if first is not None and second is not None:
            probability = float(expit((first - second) / temperature))
            pairs.append(PairVerdict(pair.first, pair.second, probability, first - second))
    return RowVerdict(tuple(scores), tuple(pairs), _failures(item))


def _compared(item: ItemPreferences) -> RowVerdict:
    pairs, failures = [], list(_failures(item))
    for comparison in item.comparisons:
        if comparison.probability is None:
            if comparison.error is not None:
                failures.append(Failure(comparison.error.code, comparison.error.message))
            continue
        if comparison.parse != "ok":
            failures.append(Failure(comparison.parse, "one of the two orders has no verdict; the other one counts"))
        first_shown, second_shown = comparison.orders
        both = None if first_shown is None or second_shown is None else (first_shown, second_shown)
        probability = comparison.probability
        pairs.append(PairVerdict(comparison.i, comparison.j, probability, probability - 0.5, both))
    return RowVerdict(tuple(item.strength), tuple(pairs), tuple(failures))


def _failures(item: ItemScores | ItemPreferences) -> tuple[Failure, ...]:
    return tuple(Failure(error.code, error.message) for errors in item.errors for error in errors)


def _problem(response: httpx.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _told(response: httpx.Response) -> str:
    problem = _problem(response)
    return f"{response.status_code} {problem.get('code', '')}: {problem.get('detail', 'no reason given')}"


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdigit() else 0.0
