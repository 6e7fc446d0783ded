"""Chat models of the five families with random weights, what is asked of them, and what transformers itself says."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.backbones.vlm import LocalChat
from models.backbones.vlm_loading import Family, load_chat, write_random_chat
from models.base import Candidate, LoadOptions
from models.judge import Turn, WordScores

NAMES = get_args(Family)
WORDS = ("yes", "no")
TOLERANCE = 1e-5
"""Of log-probabilities in float32, cached against whole turns one by one."""


class Store(dict[Any, Tensor]):
    """Keeps everything and counts what was asked for and not there."""

    misses = 0

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self.misses += 1
        return super().get(key, default)

    def put(self, key: Any, feature: Tensor) -> None:
        self[key] = feature


@cache
def folder(family: Family) -> Path:
    return write_random_chat(Path(mkdtemp(prefix=f"{family}-")), family)


@cache
def chat_of(family: Family, dtype: torch.dtype = torch.float32) -> LocalChat:
    return load_chat(folder(family), LoadOptions(dtype=dtype))


def fresh(family: Family, rows: int = 4, dtype: torch.dtype = torch.float32) -> tuple[LocalChat, Store, Store]:
    """The same network with stores of its own."""
    shared = chat_of(family, dtype)
    chat = LocalChat(shared.model, shared.processor)
    features, prefixes = Store(), Store()
    chat.attach(features=features, prefixes=prefixes, rows=rows, on_step=lambda: None)
    return chat, features, prefixes


def naive(family: Family, dtype: torch.dtype = torch.float32) -> LocalChat:
    shared = chat_of(family, dtype)
    return LocalChat(shared.model, shared.processor, share_features=False, share_prefixes=False, rows=1)


@cache
def candidates() -> tuple[Candidate, ...]:
    """Images of several sizes."""
    rng = np.random.default_rng(0)
    sizes = ((64, 64), (64, 64), (64, 128), (96, 64), (140, 40))
    return tuple(Candidate(image=Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))) for size in sizes)


def question(first: int, second: int, text: str = "Text Caption: [a red circle] Is image 2 better?") -> Turn:
    return Turn((candidates()[first], candidates()[second], text))


def table(scores: Any) -> Tensor:
    assert all(isinstance(score, WordScores) for score in scores)
    return torch.tensor([score.log_probs for score in scores], dtype=torch.float64)


def library_logits(chat: LocalChat, turn: Turn) -> Tensor:
    """What transformers says of the turn, by its own processor and forward."""
    pictures = [part.image for part in turn.parts if isinstance(part, Candidate)]
    inputs = library_inputs(chat, turn, pictures)
    with torch.no_grad():
        logits: Tensor = chat.model(**inputs).logits[0, -1]
    return logits


def library_inputs(chat: LocalChat, turn: Turn, pictures: list[Any]) -> Any:
    nested: Any = [pictures] if chat.model.config.model_type == "llava_onevision" else pictures
    return chat.processor(text=[rendered(chat, turn)], images=nested if pictures else None, return_tensors="pt")


def rendered(chat: LocalChat, turn: Turn) -> str:
    """The turn in the checkpoint's own chat template."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "video" if isinstance(part, Candidate) and part.frames else "image"}
        for part in turn.parts
    ]
    messages = [{"role": "user", "content": content}]
    if turn.system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": turn.system}]})
    text: str = chat.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text + turn.reply


def word_scores(chat: LocalChat, logits_V: Tensor) -> list[float]:
    """The words' log-probabilities from logits over the vocabulary."""
    log_probs = logits_V.float().log_softmax(-1)
    return [float(log_probs[list(chat.spellings(word))].logsumexp(0)) for word in WORDS]
