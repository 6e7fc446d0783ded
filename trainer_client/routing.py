"""Which service answers which model: what several services offer, who is well, and what was learnt of them. No I/O.

With several services each is asked for its models (``GET /models``) at first contact, and again when it comes back
after a failure. A model goes to the replicas that have it; the models of one call go to few services, at the same
time. A single service is asked directly: it knows best what it has.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from trainer_client._calls import Job
from trainer_client._retry import FIRST_BACKOFF, Attempts, Budget
from trainer_client.errors import (
    ConnectionFailed,
    FingerprintChanged,
    Overloaded,
    RewardError,
    TransportError,
)
from trainer_client.results import ModelInfo

logger = logging.getLogger("trainer_client")

LONGEST_ABSENCE = 60.0
"""Seconds after which a lost service is asked again at the latest, however often it has failed."""


class Part(NamedTuple):
    """Models of a call that go in one request, and the replicas that have them all."""

    models: tuple[str, ...]
    services: tuple[str, ...]


def cover(offers: Mapping[str, Collection[str]], models: Sequence[str]) -> list[Part]:
    """Few parts that hold every model of ``models`` that somebody offers, exactly once.

    Greedy: the service that has most of what is left takes it, with all who have the same; few parts mean that the
    images are uploaded few times.
    """
    parts, left = [], list(models)
    while left:
        shares = {service: tuple(m for m in left if m in offered) for service, offered in offers.items()}
        most = max(shares.values(), key=len, default=())
        if not most:
            break
        parts.append(Part(most, tuple(service for service, share in shares.items() if share == most)))
        left = [m for m in left if m not in most]
    return parts


@dataclass(eq=False)
class _Service:
    models: dict[str, ModelInfo] = field(default_factory=dict)
    """Those that were loaded when it was last asked."""
    settled: bool = False
    """It said that it was serving; otherwise its models may still come."""
    stale: bool = True
    """It must be asked for its models: never reached, or lost since."""
    free_at: float = float("-inf")
    failures: int = 0
    in_flight: int = 0
    turn: int = -1


class Routes:
    """What a client knows of its services; thread-safe. ``fingerprints`` by job and model are those to insist on."""

    def __init__(
        self,
        services: Sequence[str],
        *,
        clock: Callable[[], float],
        fingerprints: Mapping[Job, Mapping[str, str]],
        allow_fingerprint_change: bool,
    ) -> None:
        self.urls = tuple(dict.fromkeys(services))
        self._services = {url: _Service() for url in self.urls}
        self._clock = clock
        self._fingerprints: dict[Job, dict[str, str]] = {
            "score": dict(fingerprints.get("score", {})),
            "gradient": dict(fingerprints.get("gradient", {})),
        }
        self._allow_change = allow_fingerprint_change
        self._lock = threading.Lock()
        self._turns = itertools.count()
        self._last: RewardError | None = None

    @property
    def several(self) -> bool:
        return len(self.urls) > 1

    @property
    def fingerprints(self) -> dict[Job, dict[str, str]]:
        """A copy of what is remembered: by job, by model."""
        with self._lock:
            return {job: dict(by_model) for job, by_model in self._fingerprints.items()}

    # -- what is learnt -----------------------------------------------------------------------------------------------

    def learn(self, url: str, rows: Sequence[ModelInfo]) -> None:
        """The answer of a service to ``GET /models``."""
        with self._lock:
            service = self._services[url]
            service.models = {row.name: row for row in rows if row.fingerprint is not None}
            service.settled = any(row.ready for row in rows)
            service.stale = not service.settled
            service.failures = service.failures if service.stale else 0
            service.free_at = self._clock() + FIRST_BACKOFF if service.stale else float("-inf")

    def failed(self, url: str, error: RewardError) -> None:
        """A failed attempt: an overloaded service is left alone for a while, a lost one must say what it has."""
        with self._lock:
            service, now = self._services[url], self._clock()
            if isinstance(error, Overloaded):
                service.free_at = now + (error.retry_after or FIRST_BACKOFF)
            elif isinstance(error, TransportError):
                self._last = error
                service.stale = True
                absence = min(LONGEST_ABSENCE, FIRST_BACKOFF * 2.0**service.failures)
                service.free_at = now + max(absence, error.retry_after or 0.0)
                service.failures = min(service.failures + 1, 16)

    def refused(self, url: str) -> None:
        """A service has not the models that it said it had: it was started anew, and is asked at once."""
        with self._lock:
            self._services[url].stale = True
            self._services[url].free_at = float("-inf")

    def check(self, job: Job, model: str, fingerprint: str, service: str) -> None:
        """Remember a model's fingerprint at its first use; another one later raises FingerprintChanged."""
        with self._lock:
            old = self._fingerprints[job].setdefault(model, fingerprint)
            if old == fingerprint:
                return
            changed = FingerprintChanged(model=model, old=old, new=fingerprint, service=service)
            if not self._allow_change:
                raise changed
            logger.warning("%s", changed)
            self._fingerprints[job][model] = fingerprint

    # -- what is known ------------------------------------------------------------------------------------------------

    def due(self) -> list[str]:
        """Lost services whose models should be asked now; each is told to one caller only."""
        with self._lock:
            now = self._clock()
            due = [url for url, service in self._services.items() if service.stale and service.free_at <= now]
            for url in due:
                self._services[url].free_at = now + FIRST_BACKOFF
            return due

    def missing(self, models: Sequence[str]) -> list[str]:
        """The models that no service is known to have."""
        with self._lock:
            return [m for m in models if not any(m in service.models for service in self._services.values())]

    def orphaned(self, models: Sequence[str]) -> bool:
        """Whether one of the models is known only from services that are lost: others may have taken it over."""
        with self._lock:
            return any(
                all(service.stale for service in self._services.values() if model in service.models) for model in models
            )

    def absence(self) -> ConnectionFailed | None:
        """Why a missing model may still turn up; None when every service has said what it has."""
        with self._lock:
            unsettled = [url for url, service in self._services.items() if service.stale]
            if not unsettled:
                return None
            error = ConnectionFailed(f"{', '.join(unsettled)}: lost, or not serving yet")
            error.__cause__ = self._last
            return error

    def rows(self) -> list[ModelInfo]:
        """Every model that any service has loaded, once."""
        with self._lock:
            known = {row.name: row for service in self._services.values() for row in service.models.values()}
            return [known[name] for name in sorted(known)]

    def plan(self, models: Sequence[str]) -> list[Part]:
        """Parts for ``models``, by services that are well where there are such.

        Raises FingerprintChanged when replicas of one model differ.
        """
        with self._lock:
            known = {url: set(service.models) for url, service in self._services.items()}
            well = {url: known[url] for url, service in self._services.items() if self._is_well(service)}
            offered = [
                (model, info.fingerprint, url)
                for model in models
                for url in well
                if (info := self._services[url].models.get(model)) is not None and info.fingerprint is not None
            ]
        for model, fingerprint, url in offered:
            self.check("score", model, fingerprint, url)
        parts = cover(well, models)
        covered = {model for part in parts for model in part.models}
        parts += cover(known, [model for model in models if model not in covered])
        # a replica that is lost may be back by the time that the others are: it is one to fall back on
        return [Part(p.models, tuple(url for url, names in known.items() if names >= set(p.models))) for p in parts]

    def _is_well(self, service: _Service) -> bool:
        return not service.stale and service.free_at <= self._clock()

    def attempts(self, services: Sequence[str], budget: Budget) -> Attempts:
        """Attempts that begin at the replica that is well and has the least to do, then the longest not asked."""
        with self._lock:
            states = [self._services[url] for url in services]
            now = self._clock()
            ranks = [(not self._is_well(s), max(s.free_at, now), s.in_flight, s.turn) for s in states]
            first = ranks.index(min(ranks))
            states[first].turn = next(self._turns)
            free_at = [max(budget.started, state.free_at) for state in states]
        return Attempts(services, budget, first=first, free_at=free_at)

    @contextmanager
    def using(self, url: str) -> Iterator[None]:
        """Count a request that is in flight."""
        with self._lock:
            self._services[url].in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._services[url].in_flight -= 1
