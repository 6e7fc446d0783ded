"""The contracts that every reward model keeps.

A *reward model* is a named function from (prompt, image) to a score. It sees a batch of prepared samples of any
requests and answers one :class:`Output` for each, in the same order. Nothing here knows of HTTP.

Errors raised for one sample derive from :class:`SampleError`: they carry a stable ``code`` and a fixed message, and
the service reports them beside the scores of the other samples. An error is never a number.

    SampleError                 this sample has no score; the others keep theirs
    ├── InputError              the caller's input cannot be scored: do not retry
    │   └── UnsupportedInput    the model does not take this kind of candidate or context
    └── ModelError              the model failed on a sample that was in order
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from PIL import Image as PILImage

if TYPE_CHECKING:
    from models.judge import ChatModel

Kind = Literal["pointwise", "pairwise"]
CheckpointSize = Literal["tiny", "full"]
Input = Literal["prompt", "image", "video", "text", "context", "metadata"]


class SampleError(Exception):
    """One sample has no score. ``code`` is stable and machine-readable, ``message`` is fixed text for people."""

    code: str = "sample_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class InputError(SampleError):
    """The input cannot be scored by this model; asking again gives the same answer."""

    code = "invalid_input"


class UnsupportedInput(InputError):
    """The model does not take this kind of candidate or context."""

    code = "unsupported_input"


class ModelError(SampleError):
    """The model failed on a sample that was in order."""

    code = "model_error"


@dataclass(frozen=True, eq=False)
class Candidate:
    """What is judged: an image, a video (``frames`` at ``fps`` frames a second) or a text answer; exactly one of them.

    ``digest`` names the content: candidates with equal digests are equal, and the engine encodes them once. Where the
    maker of the candidate gives none it is computed from the pixels.
    """

    image: PILImage.Image | None = None
    frames: tuple[PILImage.Image, ...] = ()
    fps: float | None = None
    text: str | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        given = (self.image is not None) + bool(self.frames) + (self.text is not None)
        if given != 1:
            raise ValueError(f"a candidate is one of image, frames or text; {given} were given")
        if not self.digest:
            object.__setattr__(self, "digest", self._content_digest())

    @property
    def kind(self) -> Literal["image", "video", "text"]:
        if self.image is not None:
            return "image"
        return "video" if self.frames else "text"

    def _content_digest(self) -> str:
        hasher = hashlib.blake2b(digest_size=16)
        if self.text is not None:
            hasher.update(b"text")
            hasher.update(self.text.encode("utf-8", "surrogatepass"))
        for image in (self.image, *self.frames):
            if image is not None:
                hasher.update(f"{image.mode}{image.size}{self.fps}".encode())
                hasher.update(image.tobytes())
        return hasher.hexdigest()


@dataclass(frozen=True, eq=False)
class Context:
    """What the candidates were made from, where the task has it: source image or frames, mask, question, task."""

    image: PILImage.Image | None = None
    frames: tuple[PILImage.Image, ...] = ()
    mask: PILImage.Image | None = None
    question: str | None = None
    task: str | None = None
    criterion: str | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """One (prompt, candidate, context) of an item: the unit of a pointwise batch."""

    prompt: str
    candidate: Candidate
    context: Context | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def image(self, model: str) -> PILImage.Image:
        """The candidate's image, or :class:`UnsupportedInput` naming ``model``."""
        if self.candidate.image is None:
            raise UnsupportedInput(f"{model} scores images; this candidate is a {self.candidate.kind}")
        return self.candidate.image


@dataclass(frozen=True)
class Output:
    """What a reward model says of one sample.

    ``outputs`` holds further numbers (uncertainty, alignment, distance ...), ``details`` what is not a number
    (recognised text, reasons), ``warnings`` what the caller should know about this score (a truncated prompt).
    """

    score: float
    outputs: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """How a score difference becomes a preference: P(i preferred to j) = sigmoid((s_i - s_j) / temperature)."""

    temperature: float
    source: str


@dataclass(frozen=True)
class WeightSource:
    """One published file or folder that a model needs, and where it comes from unless the settings say otherwise.

    ``source`` is ``hf:OWNER/NAME[@REVISION][/FILE]``, ``https://...`` or a local path. The settings override the role
    ``weights`` by ``models.NAME.weights`` and any other role by ``models.NAME.options.ROLE``. ``files`` are the glob
    patterns that matter of a source without FILE (a whole repository). ``bytes`` is the published size as far as it is
    known, 0 otherwise. Each of ``files`` must match something.
    """

    source: str
    bytes: int = 0
    role: str = "weights"
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class RewardInfo:
    """What ``GET /models`` tells about a reward model. ``range`` is the usual one, not a bound, unless stated.

    ``weights`` says in a word where the weights come from; ``sources`` are the files to fetch, none for models whose
    weights ship with a package. ``options`` names what ``models.NAME.options`` may hold beside the roles of the
    sources; anything else is refused. ``verified`` is false where something could not be checked against a published
    checkpoint; the description then says what.
    """

    name: str
    description: str
    kind: Kind
    inputs: tuple[Input, ...]
    range: tuple[float, float]
    citation: str
    license: str
    calibration: Calibration
    weights: str | None = None
    weights_bytes: int = 0
    differentiable: bool = False
    verified: bool = True
    hidden: bool = False
    outputs: tuple[str, ...] = ()
    sources: tuple[WeightSource, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadOptions:
    """Where and how a model is loaded. ``weights`` overrides the model's own source; ``options`` are the model's.

    ``weights_dir`` is where fetched files lie (None: the hub library's own cache). ``sha256`` (hex) is what the file of
    the role ``weights`` must have. ``chat`` is what a judge asks in place of its own weights: a server.
    """

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weights_dir: Path | None = None
    sha256: str | None = None
    chat: ChatModel | None = None

    def source(self, default: WeightSource) -> str:
        """The source of ``default.role``: the settings' own, or the default one."""
        given = self.weights if default.role == "weights" else self.options.get(default.role)
        if given is not None and not isinstance(given, str):
            raise ValueError(f"the option {default.role} names a source of weights, not {given!r}")
        return given or default.source


@runtime_checkable
class Reward(Protocol):
    """Every reward model.

    ``prepare`` runs on the CPU in a thread pool, one sample at a time, must be thread-safe, and raises a
    :class:`SampleError` for a sample that cannot be scored. ``run`` takes prepared samples of any requests and returns
    as many outputs in the same order; a score may not depend on the batch's other samples. It may return a
    :class:`SampleError` in place of an output for a sample that failed alone.
    """

    info: RewardInfo
    preprocessing: str
    """Version of prepare() and of the formula; a change of either changes it, and with it the fingerprint."""
    weights_hash: str
    """sha256 over the tensors (see ``models.weights.hash_tensors``), or "" for a model without weights."""
    dtype: torch.dtype
    uses_device: bool
    """Whether run() computes on the torch device (models that do share one thread) or on the CPU by itself."""
    max_batch: int | None
    """Most samples that run() should be given at once; None leaves it to the engine."""

    def prepare(self, sample: Sample) -> Any: ...

    def run(self, batch: Sequence[Any]) -> Sequence[Output | SampleError]: ...

    def canary(self) -> Sample:
        """A small sample that a healthy model scores: warm-up and readiness use it."""
        ...


class RewardModel(ABC):
    """The common part of pointwise reward models; implements what :class:`Reward` asks except prepare and run."""

    info: ClassVar[RewardInfo]
    preprocessing: ClassVar[str] = "1"
    uses_device: ClassVar[bool] = False
    max_batch: ClassVar[int | None] = None
    cpu_batch: ClassVar[int | None] = None
    """Largest default batch on a CPU; for large networks, whose batches there take long and gain nothing."""
    weights_hash: str = ""
    dtype: torch.dtype = torch.float32

    @classmethod
    @abstractmethod
    def load(cls, options: LoadOptions) -> RewardModel:
        """Build the model on ``options.device``; raises :class:`WeightsError` when its weights cannot be had."""

    @classmethod
    def random_checkpoint(cls, folder: Path, size: CheckpointSize = "tiny") -> LoadOptions:
        """Write files of the published structure into ``folder``, filled at random; the options load them.

        ``tiny`` is of reduced depth and width, for tests; ``full`` of the true size, for measurements on a machine that
        has no published weights. A model whose weights ship with a package needs none of it.
        """
        return LoadOptions()

    @abstractmethod
    def prepare(self, sample: Sample) -> Any: ...

    @abstractmethod
    def run(self, batch: Sequence[Any]) -> Sequence[Output | SampleError]: ...

    def canary(self) -> Sample:
        gradient = PILImage.linear_gradient("L").resize((64, 64)).convert("RGB")
        return Sample(prompt='a sign that says "OK"', candidate=Candidate(image=gradient))


class WeightsError(RuntimeError):
    """Weights are missing, damaged or unsafe; the message names the source, the setting and the remedy."""
