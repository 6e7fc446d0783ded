"""Rewards for other people's training loops: one client behind the signatures that they call.

    reward_fn          Flow-GRPO, DiffusionNFT, ddpo-pytorch: f(images, prompts, metadata) -> (scores, info)
    FlowFactory...     Flow-Factory: model(prompt=..., image=...) -> output with ``rewards``; pointwise and groupwise
    trl_reward_func    TRL: f(prompts, completions, **columns) -> list[float | None]

None of those projects is imported, and torch only where a tensor is handed back. A sample that failed raises
:class:`~trainer_client.SamplesFailed` unless ``failed`` says what it becomes instead (NaN, or None for TRL); it is
never a number. Images are taken as :class:`~trainer_client.Item` takes them. docs/adapters.md has examples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from trainer_client._samples import Metadata, Models, SampleScores, Scores, group, image_candidates, score_samples
from trainer_client.client import RewardClient
from trainer_client.errors import SampleFailure, SamplesFailed
from trainer_client.items import Candidate

__all__ = [
    "FlowFactoryGroupwise",
    "FlowFactoryPointwise",
    "RewardFn",
    "RewardOutput",
    "SampleScores",
    "TrlRewardFunc",
    "reward_fn",
    "score_samples",
    "trl_reward_func",
]

# -- Flow-GRPO, DiffusionNFT, ddpo-pytorch -----------------------------------------------------------------------------


class RewardFn(Protocol):
    """What :func:`reward_fn` returns."""

    def __call__(
        self, images: Any, prompts: Sequence[str], metadata: Metadata = None, only_strict: bool = True
    ) -> tuple[dict[str, Scores] | Scores, dict[str, Any]]: ...


def reward_fn(
    client: RewardClient,
    models: Models,
    *,
    form: Literal["dict", "array"] = "dict",
    failed: Literal["raise", "nan"] = "raise",
    deadline: float | None = None,
) -> RewardFn:
    """A reward function of ``(images, prompts, metadata)`` that returns ``(scores, info)``.

    Images: a tensor or array [B, 3, H, W] or (numpy) [B, H, W, 3], or a sequence of B images. Metadata: a mapping a
    sample, an empty mapping or None. ``form`` "dict" gives each model's scores by name and the weighted total as
    "avg" (Flow-GRPO, DiffusionNFT), "array" the total alone (ddpo-pytorch, TRL's DDPO); both float64 [B]. ``info`` has
    ``ok`` bool [B], ``failures`` by place and ``fingerprints``.

    ``failed`` "nan" leaves NaN for a sample without a score: only for loops that mask it, as one NaN makes the mean of
    its batch NaN. ``only_strict``, which Flow-GRPO passes to its GenEval, changes nothing: each model has one score.
    """
    if form not in ("dict", "array"):
        raise ValueError(f"form is 'dict' or 'array', not {form!r}")
    _check_failed(failed, "nan")
    if form == "dict" and "avg" in _names(models):
        raise ValueError("a reward model named 'avg' would be hidden by the total")

    def score(
        images: Any, prompts: Sequence[str], metadata: Metadata = None, only_strict: bool = True
    ) -> tuple[dict[str, Scores] | Scores, dict[str, Any]]:
        found = score_samples(client, models, prompts, image_candidates(images), metadata, deadline=deadline)
        if failed == "raise":
            found.raise_for_errors()
        if form == "array":
            return found.total, found.info()
        return found.scores | {"avg": found.total}, found.info()

    return score


def _check_failed(failed: str, other: str) -> None:
    if failed not in ("raise", other):
        raise ValueError(f"failed is 'raise' or {other!r}, not {failed!r}")


# -- Flow-Factory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RewardOutput:
    """The fields of Flow-Factory's RewardModelOutput: ``rewards`` float32 [B], and ``extra_info``."""

    rewards: Any
    extra_info: dict[str, Any] = field(default_factory=dict)


class _FlowFactoryReward:
    """Mixed in before a base of Flow-Factory, which sets ``config``, ``accelerator`` and ``device``."""

    required_fields: tuple[str, ...] = ("prompt", "image")
    use_tensor_inputs: bool = False
    output_type: ClassVar[Callable[..., Any]] = RewardOutput
    device: Any

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)  # type: ignore[call-arg]  # the base beside this class takes them
        for name in ("server_url", "models"):
            if not getattr(config, name, None):
                raise ValueError(f"the reward's configuration has no {name}")
        models = config.models
        self.models: Models = models if isinstance(models, str | Mapping) else list(models)
        self.failed: str = getattr(config, "failed", None) or "raise"
        _check_failed(self.failed, "nan")
        self.deadline: float | None = getattr(config, "deadline", None)
        self.client = self.connect(config)

    def connect(self, config: Any) -> RewardClient:
        """The client; override it to take the key from elsewhere, or to set patience."""
        return RewardClient(config.server_url, api_key=getattr(config, "api_key", None))

    def _samples(
        self, prompt: Sequence[str], image: Any, others: Mapping[str, Any]
    ) -> tuple[Sequence[str], list[Candidate], list[dict[str, Any]]]:
        metadata = others.get("metadata")
        unknown = [name for name, value in others.items() if name != "metadata" and value is not None]
        if image is None or unknown:
            raise ValueError(f"this reward looks at prompt, image and metadata; given: {', '.join(unknown) or 'none'}")
        rows = [_from_text(row) for row in metadata] if metadata is not None else [{} for _ in prompt]
        return prompt, image_candidates(image), rows

    def _output(self, rewards: Scores, info: dict[str, Any]) -> Any:
        import torch

        tensor = torch.as_tensor(rewards, dtype=torch.float32, device=getattr(self, "device", None))
        return type(self).output_type(rewards=tensor, extra_info=info)


def _from_text(row: Any) -> dict[str, Any]:
    """A sample's metadata, which datasets keep as JSON text, with lists and objects inside it as text again."""
    loaded = json.loads(row) if isinstance(row, str) else row or {}
    if not isinstance(loaded, Mapping):
        raise TypeError(f"metadata is a JSON object per sample, not {type(loaded).__name__}")
    return {name: _unpacked(value) for name, value in loaded.items()}


def _unpacked(value: Any) -> Any:
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value  # words that begin with a bracket


class FlowFactoryPointwise(_FlowFactoryReward):
    """A pointwise reward: the weighted total of each sample, float32 [B].

    Written before Flow-Factory's own base: ``class Remote(FlowFactoryPointwise, PointwiseRewardModel)``. The
    configuration has ``server_url``, ``models`` (a name, names, or weights by name) and optionally ``api_key``,
    ``failed`` ("raise" or "nan") and ``deadline`` (seconds). Set ``output_type`` to have rewards in Flow-Factory's own
    class, add "metadata" to ``required_fields`` for rewards that need it, and set ``use_tensor_inputs`` to skip PIL.
    """

    def __call__(self, prompt: Sequence[str], image: Any = None, **others: Any) -> Any:
        """Raises ValueError for a video, a condition or a field that this reward does not look at."""
        prompts, candidates, rows = self._samples(prompt, image, others)
        found = score_samples(self.client, self.models, prompts, candidates, rows, deadline=self.deadline)
        if self.failed == "raise":
            found.raise_for_errors()
        return self._output(found.total, found.info())


class FlowFactoryGroupwise(_FlowFactoryReward):
    """A groupwise reward: each sample's win rate in its group, [0, 1] (weighted where there are several models).

    Used as :class:`FlowFactoryPointwise` is, before GroupwiseRewardModel. Each model compares all pairs of the group
    in both orders; a pointwise model prefers by its calibrated score difference.
    """

    def __call__(self, prompt: Sequence[str], image: Any = None, **others: Any) -> Any:
        """Raises ValueError for samples of several groups, and as :class:`FlowFactoryPointwise` does."""
        groups = group(*self._samples(prompt, image, others))
        if len(groups) != 1:
            raise ValueError(f"a group has one prompt and one metadata, not {len(groups)} of them")
        item, _ = groups[0]
        weights = self.models if isinstance(self.models, Mapping) else dict.fromkeys(_names(self.models), 1.0)
        total = np.zeros(len(item))
        fingerprints: dict[str, str] = {}
        failures: list[tuple[str, SampleFailure]] = []
        for model, weight in weights.items():
            response = self.client.compare(item, model, deadline=self.deadline)
            total += weight * response[0].as_array("win_rate").values
            fingerprints |= response.fingerprints
            failures += response[0].failures()
        if failures and self.failed == "raise":
            raise SamplesFailed(failures)
        return self._output(total, {"ok": ~np.isnan(total), "failures": failures, "fingerprints": fingerprints})


def _names(models: Models) -> list[str]:
    return [models] if isinstance(models, str) else list(models)


# -- TRL ---------------------------------------------------------------------------------------------------------------


class TrlRewardFunc(Protocol):
    """What :func:`trl_reward_func` returns."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]: ...


def trl_reward_func(
    client: RewardClient,
    models: Models,
    *,
    metadata: Sequence[str] = (),
    failed: Literal["raise", "none"] = "raise",
    name: str | None = None,
    deadline: float | None = None,
) -> TrlRewardFunc:
    """A reward function for TRL's trainers: the weighted total per completion.

    A completion is a text, an image (PIL, numpy, torch), or a list of messages, of which the last counts: its image, if
    its content has one, else its text. A prompt is a text or a list of messages, of which the last user's text counts.
    ``metadata`` names the columns that go along; TRL passes all, and the others are not sent. ``name`` is what TRL logs
    the reward as (default: the models' names, joined by "+").

    ``failed`` "none" gives None, which TRL reads as "not scored by this function": right beside other functions. Where
    every function returns None for a completion, TRL warns and sums nothing to 0.
    """
    _check_failed(failed, "none")

    def reward_func(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        missing = [column for column in metadata if column not in columns]
        if missing:
            raise ValueError(f"the dataset has no column {missing[0]!r}")
        rows = [{column: columns[column][place] for column in metadata} for place in range(len(completions))]
        candidates = [_completion(completion) for completion in completions]
        texts = [_prompt(prompt) for prompt in prompts]
        found = score_samples(client, models, texts, candidates, rows, deadline=deadline)
        if failed == "raise":
            found.raise_for_errors()
        return [None if np.isnan(value) else float(value) for value in found.total]

    reward_func.__name__ = name or "+".join(_names(models))
    return reward_func


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _completion(completion: Any) -> Candidate:
    if isinstance(completion, str):
        return Candidate(text=completion)
    if not _is_messages(completion):
        return Candidate(image=completion)
    content = completion[-1].get("content")
    images = [part["image"] for part in content if part.get("type") == "image"] if isinstance(content, list) else []
    if len(images) > 1:
        raise ValueError(f"a completion has one image, not {len(images)}")
    return Candidate(image=images[0]) if images else Candidate(text=_text(content))


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if not _is_messages(prompt):
        raise TypeError(f"a prompt is a text or a list of messages, not {type(prompt).__name__}")
    asked = [message for message in prompt if message.get("role") == "user"]
    if not asked:
        raise ValueError("a prompt has no message of a user")
    return _text(asked[-1].get("content"))


def _text(content: Any) -> str:
    """The text of a message's content: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError(f"the content of a message is a text or a list of parts, not {type(content).__name__}")
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
