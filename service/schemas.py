"""What travels on the wire. Images are strings here: base64, or the name of a tensor in a safetensors body."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Weight = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
ImageData = Annotated[str, Field(description="base64 of a PNG, JPEG or WebP file; in a safetensors body a tensor name")]


class Schema(BaseModel):
    """Unknown fields are refused: a misspelt option must not be dropped in silence."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class CandidateIn(Schema):
    """What is judged: exactly one of image, frames (with fps) and text."""

    image: ImageData | None = None
    frames: list[ImageData] | None = Field(None, min_length=1)
    fps: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> CandidateIn:
        given = [name for name in ("image", "frames", "text") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a candidate is exactly one of image, frames and text; {len(given)} were given")
        if (self.fps is not None) != (self.frames is not None):
            raise ValueError("frames and fps belong together")
        return self


class ContextIn(Schema):
    """What the candidates were made from."""

    image: ImageData | None = None
    frames: list[ImageData] | None = Field(None, min_length=1)
    mask: ImageData | None = None
    question: str | None = None
    task: str | None = None
    criterion: str | None = None


class ItemIn(Schema):
    """One prompt with its K candidates; ``images`` is the short form of ``candidates``."""

    prompt: str
    images: list[ImageData] | None = Field(None, min_length=1)
    candidates: list[CandidateIn] | None = Field(None, min_length=1)
    context: ContextIn | None = None
    reference: CandidateIn | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_form(self) -> ItemIn:
        if (self.images is None) == (self.candidates is None):
            raise ValueError("an item has either images or candidates")
        return self

    def all_candidates(self) -> list[CandidateIn]:
        if self.candidates is not None:
            return self.candidates
        return [CandidateIn(image=image) for image in self.images or []]


class ScoreRequest(Schema):
    """``models`` maps reward model names to their weights in the total."""

    models: dict[str, Weight] = Field(min_length=1, max_length=32)
    items: list[ItemIn] = Field(min_length=1)
    deadline_ms: int | None = Field(None, ge=1)
    explain: bool = False


class ErrorOut(Schema):
    """Why a candidate has no score. ``model`` null: none of the request's models has one."""

    model: str | None
    code: str
    message: str


class WarningOut(Schema):
    """What the caller should know about a score that is there."""

    model: str | None
    code: str
    message: str


class ModelUsed(Schema):
    """What scored: equal fingerprints give equal scores."""

    fingerprint: str
    dtype: str


class TimingOut(Schema):
    """The longest that any sample spent in each stage, milliseconds."""

    decode: float
    queue: float
    forward: float


class ItemScores(Schema):
    """Lists run over the item's candidates. A failed score is null and has an entry in ``errors``."""

    scores: dict[str, list[float | None]]
    total: list[float | None]
    outputs: dict[str, list[dict[str, float] | None]]
    details: dict[str, list[dict[str, Any] | None]] | None = None
    errors: list[list[ErrorOut]]
    warnings: list[list[WarningOut]]


class ScoreResponse(Schema):
    results: list[ItemScores]
    models: dict[str, ModelUsed]
    timing_ms: TimingOut


class CompareItemIn(ItemIn):
    """``pairs``: all, adaptive, or a list of [i, j]."""

    pairs: Literal["all", "adaptive"] | Annotated[list[tuple[int, int]], Field(min_length=1)] = "all"


class CompareRequest(Schema):
    model: str
    items: list[CompareItemIn] = Field(min_length=1)
    both_orders: bool = True
    explain: bool = False
    deadline_ms: int | None = Field(None, ge=1)


class ComparisonOut(Schema):
    """``probability`` that i is preferred to j; ``orders``: as asked with i first, and with j first (flipped back).

    The index after the last candidate is the item's reference. ``text`` (with ``explain``) holds the judge's answers in
    both orders, ``parse`` is "ok" or the code of what failed in one of them; ``error`` is there when both did.
    ``parse_orders`` says the same of each order, null for one that was not asked.
    """

    i: int
    j: int
    probability: float | None
    orders: tuple[float | None, float | None]
    text: list[str] | None = None
    parse: str
    parse_orders: tuple[str | None, str | None] = (None, None)
    error: ErrorOut | None = None


class ItemPreferences(Schema):
    """Preferences within one item; ``strength`` is Bradley-Terry's (logits, mean zero).

    ``reference``: the probability that each candidate is preferred to the item's reference. ``position_bias``: by how
    much the first of two is preferred for its place, the mean over pairs judged in both orders; 0 without bias, null
    where none was.
    """

    probabilities: list[list[float | None]]
    win_rate: list[float | None]
    strength: list[float | None]
    strength_stderr: list[float | None]
    ranking: list[int]
    reference: list[float | None] | None = None
    position_bias: float | None = None
    comparisons: list[ComparisonOut]
    errors: list[list[ErrorOut]]
    warnings: list[list[WarningOut]]


class NamedModelUsed(ModelUsed):
    name: str


class CompareResponse(Schema):
    results: list[ItemPreferences]
    model: NamedModelUsed
    timing_ms: TimingOut


class GradientRequest(Schema):
    """The metadata ``request`` of a /gradient body: images name float32 [3, H, W] tensors in [0, 1], each once.

    ``both_orders``: a judge sees each image before the reference and after it, and the mean counts; else before it.
    """

    models: dict[str, Weight] = Field(min_length=1, max_length=32)
    items: list[ItemIn] = Field(min_length=1)
    both_orders: bool = True
    deadline_ms: int | None = Field(None, ge=1)


class ItemGradients(Schema):
    """As ItemScores; the gradient of ``total`` is the tensor of the image's own name (absent where total is null)."""

    scores: dict[str, list[float | None]]
    total: list[float | None]
    errors: list[list[ErrorOut]]
    warnings: list[list[WarningOut]]


class GradientResponse(Schema):
    """The metadata ``response`` of a /gradient answer."""

    results: list[ItemGradients]
    models: dict[str, ModelUsed]
    timing_ms: TimingOut


class CalibrationOut(Schema):
    temperature: float
    source: str


class WeightSourceOut(Schema):
    """A file or folder that a model needs. ``bytes``: published size, 0 where unknown; ``present``: on this machine."""

    role: str
    source: str
    bytes: int
    present: bool


class ModelOut(Schema):
    """One row of GET /models. ``ready``: loaded here and answering; ``weights_present``: they need no download."""

    name: str
    description: str
    kind: Literal["pointwise", "pairwise"]
    inputs: list[str]
    outputs: list[str]
    differentiable: bool
    range: tuple[float, float]
    calibration: CalibrationOut
    citation: str
    license: str
    weights: str | None
    weights_bytes: int
    weights_present: bool
    sources: list[WeightSourceOut]
    verified: bool
    ready: bool
    fingerprint: str | None
    dtype: str | None


class ModelsResponse(Schema):
    models: list[ModelOut]


class Problem(BaseModel):
    """RFC 9457 problem document; further members depend on ``code``."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None = None
