"""What all judges share: options, the chat model that they ask, batches of questions, votes, errors, gradients.

A judge says what it asks (:meth:`ChatJudge.ask`) and how an answer is read. It is *scored* where the first token of the
answer is the verdict (``words``), else *written*: its answers are read by a parser.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self, cast

import torch
from PIL import Image as PILImage
from torch import Tensor

from models.base import (
    Candidate,
    CheckpointSize,
    LoadOptions,
    Output,
    Sample,
    SampleError,
    UnsupportedInput,
    WeightsError,
    WeightSource,
)
from models.judge import (
    ChatModel,
    Comparison,
    DifferentiableChat,
    Generation,
    Judge,
    Place,
    Preference,
    PreparedTurn,
    Turn,
)
from models.judging.options import Options
from models.judging.readings import Reader, Verdict, combine, vote, weigh
from models.judging.templates import Template
from models.judging.turns import with_pixels
from models.weights import obtain

CHAT_FILES = ("*.j[si]*", "*.safetensors")
"""Of a vision-language model's repository: JSON and jinja files, and the tensors."""
COMMON_OPTIONS = ("template", "system")
"""Options of every judge."""
WRITING_OPTIONS = ("max_tokens", "temperature", "samples", "seed")
"""Options of judges that may write answers."""
LOCAL_OPTIONS = ("min_pixels", "max_pixels", "independent_images")
"""Options of the network on this machine."""
MAX_TOKENS, MAX_SAMPLES = 32768, 64
YES_NO = ("yes", "no")


@dataclass(frozen=True, eq=False)
class Question:
    """One turn of a comparison or sample; ``name`` is the criterion that it asks about, "" where there is only one."""

    turn: Turn
    read: Reader | None = None
    """How a written answer is read; a scored one needs none."""
    name: str = ""


@dataclass(frozen=True, eq=False)
class PreparedQuestions:
    """All questions of one comparison or sample, ready for the chat model."""

    questions: tuple[Question, ...]
    turns: tuple[PreparedTurn, ...]
    tokens: int
    """What they cost together, images included."""
    prefix: Hashable
    """Of the first turn: equal where turns begin alike up to their last image."""
    warnings: tuple[str, ...]


class ChatJudge(Judge):
    """A judge that asks a chat model: a network on this machine, or ``LoadOptions.chat``.

    Options of every judge: ``template`` (another template's name, or a file with the same fields) and ``system`` (a
    system text). Of written answers: ``max_tokens``, ``temperature`` (0: greedy), ``samples`` (that many answers are
    drawn and voted), ``seed``. Of a network on this machine: ``independent_images`` (the pictures of a turn do not see
    each other, for a checkpoint that was trained so; its text stands first then) and the limits of resizing.
    """

    version: ClassVar[str] = "1"
    """Of what is asked and how it is read, apart from templates and options: part of the fingerprint."""
    max_tokens: ClassVar[int] = 1024
    writes: ClassVar[bool] = True
    """Whether answers are written unless an option says otherwise."""
    words: tuple[str, str] | None = None
    """Of a scored judge: the words of which the first prefers the first candidate."""
    independent_images: bool = False
    """Whether the pictures of a turn do not see each other (:class:`models.judge.Turn`)."""
    explains: bool = False
    """Whether a scored judge also writes its reasons, which are shown and change no number."""

    def __init__(self, options: LoadOptions) -> None:
        """Raises ValueError for an option that cannot be, before any weights are looked at; WeightsError as ``load``.

        A judge reads its own options first and comes here last.
        """
        own = self.read_options(options)
        self.system = own.text("system", self.default_system())
        self.generation = Generation(
            max_tokens=own.whole("max_tokens", self.max_tokens, 1, MAX_TOKENS),
            temperature=own.number("temperature", 0.0, 0.0, 10.0),
            samples=own.whole("samples", 1, 1, MAX_SAMPLES),
            seed=own.whole("seed", 0, 0, 2**63 - 1),
        )
        self.independent_images = own.flag("independent_images", self.independent_images)
        self._refuse_options_without_effect(options)
        if self.generation.samples > 1 and self.generation.temperature == 0:
            raise ValueError(f"{self.info.name}: several samples of a greedy answer are all the same; set temperature")
        self.chat = options.chat if options.chat is not None else self.local_chat(options)
        if self.independent_images and not hasattr(self.chat, "score_gradient"):
            raise ValueError(f"{self.info.name} is to read its images independently; a server's model can't be told to")
        self.weights_hash = self.chat.weights_hash
        self.dtype = self.chat.dtype

    def _refuse_options_without_effect(self, options: LoadOptions) -> None:
        scored = self.words is not None and not self.explains
        idle = [name for name in WRITING_OPTIONS if scored and name in options.options]
        if idle:
            raise ValueError(f"the option {idle[0]} of {self.info.name} is of written answers; this one is scored")
        idle = [name for name in LOCAL_OPTIONS if options.chat is not None and name in options.options]
        if idle:
            raise ValueError(
                f"the option {idle[0]} of {self.info.name} is of a network on this machine, not a server's"
            )

    @classmethod
    def read_options(cls, options: LoadOptions) -> Options:
        return Options(cls.info.name, options.options)

    @classmethod
    def load(cls, options: LoadOptions) -> Self:
        """The judge with the network of ``options``; ValueError for options that cannot be, WeightsError without it."""
        return cls(options)

    @classmethod
    def random_checkpoint(cls, folder: Path, size: CheckpointSize = "tiny") -> LoadOptions:
        """A random Qwen2-VL: a tiny one, or (``full``) one of some 100 million parameters. Its written answers are cut
        short: it has nothing to say."""
        from models.backbones.vlm_loading import write_random_chat

        written = write_random_chat(folder / "chat", size="tiny" if size == "tiny" else "bench")
        return LoadOptions(weights=str(written), options={"max_tokens": 8} if cls.writes else {})

    def local_chat(self, options: LoadOptions) -> ChatModel:
        """The network on this machine; :class:`WeightsError` where its weights cannot be had."""
        name, sources = self.info.name, self.info.sources
        if options.weights is None and not sources:
            raise WeightsError(
                f"no weights of {name} are published: give those of a vision-language model that was trained for it in "
                f"models.{name}.weights (a folder or hf:OWNER/NAME), or a server that has it in models.{name}.remote"
            )
        from models.backbones.vlm import LocalChat

        source = sources[0] if sources else WeightSource("", files=CHAT_FILES)
        return LocalChat.load(obtain(source, options, name), options)

    def default_system(self) -> str:
        """The system text without the option ``system``; "" leaves the checkpoint's own default."""
        return ""

    @property
    @abstractmethod
    def templates(self) -> tuple[Template, ...]:
        """All that may be asked: their texts are part of the fingerprint."""

    @abstractmethod
    def ask(self, comparison: Comparison) -> tuple[Question, ...]:
        """What is asked about a comparison; values are preferences for its first candidate.

        Raises :class:`UnsupportedInput` for candidates of a wrong kind and ``MissingField`` for what the item lacks.
        """

    def ask_about(self, sample: Sample) -> tuple[Question, ...]:
        """What is asked about a candidate alone, by judges that score them (``pointwise``)."""
        raise UnsupportedInput(f"{self.info.name} compares two candidates; it does not score one alone")

    @cached_property
    def preprocessing(self) -> str:  # type: ignore[override]
        """Of the code and of the texts that are asked: a template in a file may change under an unchanged option."""
        hasher = hashlib.sha256("\0".join(template.text for template in self.templates).encode())
        return f"{self.version}:{hasher.hexdigest()[:32]}{':independent' if self.independent_images else ''}"

    @property
    def uses_device(self) -> bool:  # type: ignore[override]
        return self.chat.uses_device

    @property
    def gives_gradients(self) -> bool:
        return self.info.differentiable and self.words is not None and hasattr(self.chat, "score_gradient")

    def prepare_comparison(self, comparison: Comparison) -> PreparedQuestions:
        return self._prepared(self.ask(comparison))

    def prepare(self, sample: Sample) -> PreparedQuestions:
        return self._prepared(self.ask_about(sample))

    def _prepared(self, questions: tuple[Question, ...]) -> PreparedQuestions:
        turns = tuple(self.chat.prepare(self._independent(question.turn)) for question in questions)
        warnings = tuple(dict.fromkeys(warning for turn in turns for warning in turn.warnings))
        return PreparedQuestions(questions, turns, sum(turn.tokens for turn in turns), turns[0].prefix, warnings)

    def _independent(self, turn: Turn) -> Turn:
        return replace(turn, independent=True) if self.independent_images else turn

    def compare(self, batch: Sequence[PreparedQuestions]) -> list[Preference | SampleError]:
        """Preferences; :class:`AnswerError` for answers without a verdict.

        ``details`` of written answers: ``texts``, ``statuses`` and, where the form sets them apart, ``reasons``; a
        list with an entry for each sample.
        """
        return [
            verdict
            if isinstance(verdict, SampleError)
            else Preference(verdict.value, verdict.outputs, verdict.details, verdict.warnings)
            for verdict in self._verdicts(batch)
        ]

    def run(self, batch: Sequence[PreparedQuestions]) -> list[Output | SampleError]:
        """Scores of single candidates; errors and ``details`` as :meth:`compare`."""
        if not self.pointwise:
            raise UnsupportedInput(f"{self.info.name} compares two candidates; it does not score one alone")
        return [
            verdict
            if isinstance(verdict, SampleError)
            else Output(verdict.value, verdict.outputs, verdict.details, verdict.warnings)
            for verdict in self._verdicts(batch)
        ]

    def _verdicts(self, batch: Sequence[PreparedQuestions]) -> list[Verdict | SampleError]:
        found = iter(self._answers(batch))
        verdicts: list[Verdict | SampleError] = []
        for entry in batch:
            own = [next(found) for _ in entry.turns]
            verdict = combine(own, tuple(question.name for question in entry.questions))
            if isinstance(verdict, Verdict):
                verdict = replace(verdict, warnings=(*entry.warnings, *verdict.warnings))
            verdicts.append(verdict)
        return verdicts

    def _answers(self, batch: Sequence[PreparedQuestions]) -> list[Verdict | SampleError]:
        """A verdict for each question of each entry, in order."""
        turns = [turn for entry in batch for turn in entry.turns]
        questions = [question for entry in batch for question in entry.questions]
        if self.words is None:
            return self._written(questions, turns)
        scored = [
            scores if isinstance(scores, SampleError) else weigh(scores)
            for scores, _ in zip(self.chat.score(turns, self.words), turns, strict=True)
        ]
        return self._explained(scored, turns) if self.explains else scored

    def _written(self, questions: Sequence[Question], turns: Sequence[PreparedTurn]) -> list[Verdict | SampleError]:
        verdicts: list[Verdict | SampleError] = []
        for question, answers in zip(questions, self.chat.generate(turns, self.generation), strict=True):
            if question.read is None:
                raise TypeError(f"{self.info.name} asked a question whose answer nobody reads")
            verdicts.append(answers if isinstance(answers, SampleError) else vote(answers, question.read))
        return verdicts

    def _explained(
        self, scored: Sequence[Verdict | SampleError], turns: Sequence[PreparedTurn]
    ) -> list[Verdict | SampleError]:
        """The verdicts with the texts that follow them; a text that failed is the failure of its comparison."""
        asked = [turn for verdict, turn in zip(scored, turns, strict=True) if isinstance(verdict, Verdict)]
        written = iter(self.chat.generate(asked, self.generation) if asked else [])
        explained: list[Verdict | SampleError] = []
        for verdict in scored:
            answers = next(written) if isinstance(verdict, Verdict) else None
            if isinstance(verdict, SampleError) or isinstance(answers, SampleError):
                explained.append(verdict if isinstance(verdict, SampleError) else cast(SampleError, answers))
                continue
            texts = [answer.text for answer in answers or ()]
            explained.append(replace(verdict, details={**verdict.details, "texts": texts, "reasons": texts}))
        return explained

    def gradient(self, comparison: Comparison, pixels: Tensor, place: Place = "first") -> tuple[Output, Tensor]:
        """As :meth:`Judge.gradient`; several criteria are averaged.

        Raises :class:`UnsupportedInput` for a judge that writes its answers, and one behind a server.
        """
        if self.words is None:
            raise UnsupportedInput(f"{self.info.name} writes its answers as it is set: they have no gradient")
        if not hasattr(self.chat, "score_gradient"):
            raise UnsupportedInput(f"{self.info.name} is behind a server, which gives no gradients")
        chat = cast(DifferentiableChat, self.chat)
        # A stand-in that is no other candidate of the turn marks where the pixels belong.
        stand_in = Candidate(image=PILImage.new("RGB", (pixels.shape[-1], pixels.shape[-2])))
        given = replace(comparison, first=stand_in) if place == "first" else replace(comparison, second=stand_in)
        questions = self.ask(given)
        found = [
            chat.score_gradient(with_pixels(self._independent(question.turn), stand_in, pixels), self.words)
            for question in questions
        ]
        verdict = combine([weigh(scores) for scores, _ in found], tuple(question.name for question in questions))
        if isinstance(verdict, SampleError):
            raise verdict
        gradient = torch.stack([gradient for _, gradient in found]).mean(0)
        return Output(verdict.value, verdict.outputs, verdict.details, verdict.warnings), gradient


def images_of(comparison: Comparison, model: str) -> tuple[Candidate, Candidate]:
    """Both candidates, which are images; :class:`UnsupportedInput` naming ``model`` otherwise."""
    both = (comparison.first, comparison.second)
    for candidate in both:
        expect(candidate, "image", model)
    return both


def expect(candidate: Candidate, kind: str, model: str) -> Candidate:
    """The candidate, which is of ``kind``; :class:`UnsupportedInput` naming ``model`` otherwise."""
    if candidate.kind != kind:
        takes = {"image": "images", "video": "videos", "text": "answers in text"}[kind]
        raise UnsupportedInput(f"{model} judges {takes} as it is set; this candidate is a {candidate.kind}")
    return candidate
