"""The contracts of judges: reward models that compare two candidates, and the chat models that they ask.

A :class:`Judge` knows what to ask and how to read the answer; a :class:`ChatModel` answers. The second is a network on
this machine (``models.backbones.vlm``) or one behind a server (``service.engine.remote``): judges do not know which.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from models.base import Candidate, Context, ModelError, Output, RewardModel, Sample, SampleError, UnsupportedInput


class AnswerError(ModelError):
    """The judge answered, and its answer has no verdict: it is empty, cut off, contradicts itself, or refuses.

    ``code`` is ``answer_STATUS`` with a status of :data:`models.judging.answers.Status`; ``texts`` are the answers.
    """

    def __init__(self, status: str, message: str, texts: Sequence[str] = ()) -> None:
        super().__init__(message, code=f"answer_{status}")
        self.status = status
        self.texts = tuple(texts)


@dataclass(frozen=True, eq=False)
class Comparison:
    """One ordered (prompt, first candidate, second candidate, context): the unit of a pairwise batch.

    Comparisons of one item share their Candidate objects: what is prepared of a candidate is prepared once.
    """

    prompt: str
    first: Candidate
    second: Candidate
    context: Context | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preference:
    """What a judge says of one comparison: ``probability`` in [0, 1] that the first candidate is preferred.

    ``outputs`` holds further numbers (preferences by dimension; ``mass``, the probability of all words that count as an
    answer), ``details`` what is not a number: ``texts``, the answers, and ``reasons``.
    """

    probability: float
    outputs: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


Place: TypeAlias = Literal["first", "second"]
"""Of a candidate in a comparison."""
Part: TypeAlias = str | Candidate | Tensor
"""Of a turn: text, an image or video, or float32 pixels [3, H, W] in [0, 1] whose gradient is asked for."""


@dataclass(frozen=True, eq=False)
class Turn:
    """What a chat model is asked: one user turn of texts, images and videos in the order in which it sees them.

    ``system`` is a system text ("" leaves the checkpoint's own default), ``reply`` what the answer begins with. The
    template of the chat is the checkpoint's. ``independent``: its pictures do not see each other, which a checkpoint
    must be trained for.
    """

    parts: tuple[Part, ...]
    system: str = ""
    reply: str = ""
    independent: bool = False


@dataclass(frozen=True)
class Generation:
    """How an answer in words is made: at most ``max_tokens``, until one of ``stop`` appears (kept in the text).

    ``temperature`` 0 is greedy; ``samples`` answers are drawn of one question, the k-th with a seed made of ``seed``, k
    and the turn, never of the turn's neighbours in a batch.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer in words; ``finished`` is False where it was cut off at the budget of tokens."""

    text: str
    finished: bool


@dataclass(frozen=True)
class WordScores:
    """Natural log-probabilities that the answer's first token is each of the words asked for, in their order.

    The spellings of a word (case, leading blank) are summed. -inf for a word that a server did not list.
    """

    log_probs: tuple[float, ...]


class PreparedTurn(Protocol):
    """A turn as token ids and pixels, or as a request. ``tokens``: what it costs, those of its images included."""

    @property
    def tokens(self) -> int: ...

    @property
    def prefix(self) -> Hashable:
        """Equal where the turns begin alike up to their last image: worth running one after the other."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]: ...


class FeatureStore(Protocol):
    """Tensors under keys, bounded in bytes: what is put may be gone at the next get. Thread-safe."""

    def get(self, key: Hashable) -> Tensor | None: ...

    def put(self, key: Hashable, feature: Tensor) -> None: ...


@runtime_checkable
class ChatModel(Protocol):
    """A vision-language model that answers turns. One thread at a time calls ``score`` and ``generate``.

    Results have the length and order of the turns; a turn that failed alone has a :class:`SampleError` in its place. An
    answer does not depend on the turns beside it.
    """

    @property
    def weights_hash(self) -> str: ...

    @property
    def identity(self) -> str:
        """What beside the tensors the answers depend on (template of the chat, processor, server): for the
        fingerprint."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def uses_device(self) -> bool: ...

    def prepare(self, turn: Turn) -> PreparedTurn:
        """Thread-safe, on the CPU. Raises InputError for what the model cannot take: videos, too long a context."""
        ...

    def score(self, turns: Sequence[Any], words: Sequence[str]) -> list[WordScores | SampleError]:
        """The words of each of the prepared ``turns``, which are this model's own."""
        ...

    def generate(self, turns: Sequence[Any], how: Generation) -> list[list[Answer] | SampleError]:
        """``how.samples`` answers to each of the prepared ``turns``."""
        ...

    def attach(self, *, features: FeatureStore, prefixes: FeatureStore, rows: int, on_step: Callable[[], None]) -> None:
        """Before the first call: where image features and the keys and values of shared beginnings are kept, how many
        rows a forward has (padded to, so that bits do not depend on neighbours), and what to call between the steps of
        a long answer. ``on_step`` may run other models meanwhile, and this one's ``score``.
        """
        ...


class DifferentiableChat(ChatModel, Protocol):
    """A chat model on this machine that gives gradients."""

    def score_gradient(self, turn: Turn, words: Sequence[str]) -> tuple[WordScores, Tensor]:
        """Word scores of a turn with one tensor part, and the gradient of P(first word) among the words.

        The gradient is d[p(words[0]) / sum p(words)] / d(pixels), float32 [3, H, W], in float32 arithmetic.
        """
        ...


class Judge(RewardModel):
    """A reward model of kind ``pairwise``.

    ``prepare_comparison`` (thread-safe, CPU) and ``compare`` answer comparisons; ``prepare`` and ``run`` score single
    candidates where the judge was trained to (``pointwise``), and raise :class:`UnsupportedInput` where it was not: the
    service then scores by comparisons. Prepared things of both kinds tell their cost in tokens and their ``prefix``.
    """

    pointwise: ClassVar[bool] = False
    chat: ChatModel

    @property
    def gives_gradients(self) -> bool:
        """Whether :meth:`gradient` works as the judge is set: its answer is scored, by a network on this machine."""
        return False

    @abstractmethod
    def prepare_comparison(self, comparison: Comparison) -> Any: ...

    @abstractmethod
    def compare(self, batch: Sequence[Any]) -> Sequence[Preference | SampleError]:
        """As many answers as comparisons, in the same order; none depends on the batch's others."""

    def prepare(self, sample: Sample) -> Any:
        raise UnsupportedInput(f"{self.info.name} compares two candidates; it does not score one alone")

    def run(self, batch: Sequence[Any]) -> Sequence[Output | SampleError]:
        raise UnsupportedInput(f"{self.info.name} compares two candidates; it does not score one alone")

    def canary_comparison(self) -> Comparison:
        """A small comparison that a healthy judge answers; no verdict is demanded of a random network."""
        sample = self.canary()
        return Comparison(sample.prompt, sample.candidate, sample.candidate, sample.context, sample.metadata)

    def gradient(self, comparison: Comparison, pixels: Tensor, place: Place = "first") -> tuple[Output, Tensor]:
        """P(first candidate preferred) and its gradient with respect to ``pixels``.

        ``pixels`` float32 [3, H, W] in [0, 1] stand for the candidate in ``place``, whose own content is not looked at.
        Only judges whose ``info.differentiable`` says so.
        """
        raise UnsupportedInput(f"{self.info.name} gives no gradients")
