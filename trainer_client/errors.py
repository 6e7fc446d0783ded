"""What can go wrong between a trainer and its reward service.

    RewardError
    ├── TransportError            no usable answer arrived; the call was repeated until its patience ended
    │   ├── ConnectionFailed      could not connect, or the connection broke
    │   ├── TimedOut              the service was silent for too long
    │   └── ServiceUnavailable    502, 503, or the 504 of a proxy
    ├── Overloaded                429 until the client's patience ended
    ├── DeadlineExceeded          the call's deadline passed, on either side
    ├── RequestRejected           4xx: the request itself is wrong, and was not repeated
    ├── ServiceFailed             500 and the like: a fault of the service, not repeated
    ├── ProtocolError             the service answered, but not with an answer to this request
    ├── ModelNotOffered           none of several services has the model
    ├── FingerprintChanged        a model's scores are no longer comparable with those before
    └── SamplesFailed             raise_for_errors() found samples without a score

Wrong arguments (an image of an unknown kind, a weight that is not finite) raise ``TypeError`` or ``ValueError`` before
anything is sent. A sample that failed alone is no exception: it is a :class:`SampleFailure` beside the other scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SampleFailure:
    """Why one sample (or one comparison) has no score. ``model`` is None when it failed for every model.

    ``code`` is stable and machine-readable; ``message`` is for people.
    """

    model: str | None
    code: str
    message: str


class RewardError(Exception):
    """Any failure of a call to a reward service."""


class TransportError(RewardError):
    """No usable answer arrived. Scoring is idempotent, so the client repeated the call until its patience ended."""

    retry_after: float | None = None
    """Seconds that the service asked to wait, where it said so."""


class ConnectionFailed(TransportError):
    """The connection could not be made, or broke before the whole answer had arrived."""


class TimedOut(TransportError):
    """The service was silent for longer than the client's timeout."""


class ServiceUnavailable(TransportError):
    """The service, or a proxy before it, answered 502, 503 or 504."""

    def __init__(self, message: str, *, status: int, code: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after


class Overloaded(RewardError):
    """The service answered 429 until the client's patience ended; ``retry_after`` is its last hint in seconds."""

    def __init__(self, message: str, *, code: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class DeadlineExceeded(RewardError):
    """The deadline of the call passed. ``__cause__`` is what the last attempt met, where one was made."""


class _AnsweredWithError(RewardError):
    def __init__(
        self, message: str, *, service: str, status: int, code: str, detail: str, problem: Mapping[str, Any]
    ) -> None:
        super().__init__(message)
        self.service = service
        self.status = status
        self.code = code
        self.detail = detail
        self.problem = problem


class RequestRejected(_AnsweredWithError):
    """The service refused the request (4xx). Repeating it cannot help.

    ``service`` is its address, ``status`` the HTTP status, ``code`` the service's stable code (``http_<status>`` where
    something else than the service answered), ``detail`` its explanation and ``problem`` the whole RFC 9457 document.
    """


class ServiceFailed(_AnsweredWithError):
    """The service broke on the request (500 and the like); the fields are those of :class:`RequestRejected`."""


class ProtocolError(RewardError):
    """The service answered with something that is no answer to this request: never taken for a score."""


class ModelNotOffered(RewardError):
    """None of the services offers a model: ``models`` are those that are missing.

    Raised only where several services are used; a single one answers 404, which is :class:`RequestRejected`.
    """

    def __init__(self, models: Sequence[str], services: Sequence[str]) -> None:
        super().__init__(f"{', '.join(map(repr, models))}: offered by none of {', '.join(services)}")
        self.models = tuple(models)


class FingerprintChanged(RewardError):
    """``service`` scores with another ``model`` than before, or than its replicas: ``old`` and ``new`` fingerprint.

    Scores of the two are not comparable, and a run that mixed them would train on a moved target.
    """

    def __init__(self, *, model: str, old: str, new: str, service: str) -> None:
        super().__init__(
            f"{service}: {model!r} has fingerprint {new}, not {old} as before: its scores are not comparable "
            "(allow_fingerprint_change=True accepts them)"
        )
        self.model = model
        self.old = old
        self.new = new
        self.service = service


class SamplesFailed(RewardError):
    """Samples have no score. ``failures`` pairs where ("item 0 candidate 2") with the :class:`SampleFailure`."""

    def __init__(self, failures: Sequence[tuple[str, SampleFailure]]) -> None:
        self.failures = tuple(failures)
        where, first = self.failures[0]
        model = "every model" if first.model is None else first.model
        count = f"{len(self.failures)} failure{'s' if len(self.failures) > 1 else ''}"
        super().__init__(f"{count}, the first at {where}, {model}: {first.code}: {first.message}")
