"""reward-trainer: rewards over HTTP for people who fine-tune image generators. Needs no torch."""

from trainer_client.client import AsyncRewardClient, RewardClient
from trainer_client.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    FingerprintChanged,
    ModelNotOffered,
    Overloaded,
    ProtocolError,
    RequestRejected,
    RewardError,
    SampleFailure,
    SamplesFailed,
    ServiceFailed,
    ServiceUnavailable,
    TimedOut,
    TransportError,
)
from trainer_client.items import Candidate, Context, Item
from trainer_client.results import (
    CompareResponse,
    ComparisonResult,
    GradientResponse,
    ItemComparisons,
    ItemGradients,
    ItemScores,
    MaskedArray,
    ModelIdentity,
    ModelInfo,
    SampleWarning,
    ScoreResponse,
)

__version__ = "0.1.0"

__all__ = [
    "AsyncRewardClient",
    "Candidate",
    "CompareResponse",
    "ComparisonResult",
    "ConnectionFailed",
    "Context",
    "DeadlineExceeded",
    "FingerprintChanged",
    "GradientResponse",
    "Item",
    "ItemComparisons",
    "ItemGradients",
    "ItemScores",
    "MaskedArray",
    "ModelIdentity",
    "ModelInfo",
    "ModelNotOffered",
    "Overloaded",
    "ProtocolError",
    "RequestRejected",
    "RewardClient",
    "RewardError",
    "SampleFailure",
    "SampleWarning",
    "SamplesFailed",
    "ScoreResponse",
    "ServiceFailed",
    "ServiceUnavailable",
    "TimedOut",
    "TransportError",
]
