"""What tests ask of a judge's turn: the parts, and the hash of the text as it was published."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

from PIL import Image

from models.base import Candidate, LoadOptions, Sample, SampleError
from models.judge import Comparison, Part, Preference
from models.judging.chat_judge import ChatJudge
from tests.models.judging.scripted_chat import Reply, ScriptedChat

A, B, SOURCE = (Candidate(image=Image.new("RGB", (8, 8), color)) for color in ("red", "blue", "green"))

J = TypeVar("J", bound=ChatJudge)


def load(judge: type[J], reply: Reply = "", **options: Any) -> J:
    return judge.load(LoadOptions(chat=ScriptedChat(lambda turn: reply), options=options))


def parts(judge: ChatJudge, asked: Comparison | Sample) -> tuple[Part, ...]:
    """Of the only question."""
    (question,) = judge.ask(asked) if isinstance(asked, Comparison) else judge.ask_about(asked)
    return question.turn.parts


def sha256(text: object) -> str:
    assert isinstance(text, str)
    return hashlib.sha256(text.encode()).hexdigest()


def preference(judge: ChatJudge, comparison: Comparison) -> Preference | SampleError:
    (result,) = judge.compare([judge.prepare_comparison(comparison)])
    return result
