"""A chat model behind a server that speaks OpenAI's chat completions API: vLLM, SGLang and their like."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from PIL import Image as PILImage
from torch import Tensor

from models.base import Candidate, InputError, ModelError, SampleError, UnsupportedInput
from models.judge import Answer, FeatureStore, Generation, Turn, WordScores
from service.engine.remote_answers import TOP_LOGPROBS, word_scores, written_answer
from service.engine.remote_http import BACKOFF_S, Connection, Reply
from service.remote_settings import RemoteSettings

VERSION = "1"
"""Of how a turn becomes a request: part of the fingerprint."""
PATCH = 28
"""Side of the square of pixels that is one token of Qwen's vision-language models: the budget counts in it."""
CHARACTERS = 4
"""Bytes of text that count as one token."""

_CONTROL = re.compile(r"<\|\w+\|>")
_NO_LIST = "remote_refused"

Read = TypeVar("Read")


@dataclass(frozen=True, eq=False)
class RemoteTurn:
    """A turn as ``messages`` of the API; ``begun``: the beginning of the answer, which the last of them holds.

    ``tokens`` is an estimate: only the server knows its tokenizer.
    """

    messages: tuple[Mapping[str, Any], ...]
    begun: str
    tokens: int
    prefix: Hashable
    digest: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Encoded:
    """The ``urls`` of an image or a video's frames, and the tokens that they are counted as."""

    urls: tuple[str, ...]
    tokens: int


class RemoteChat:
    """A chat model behind a server; see :class:`models.judge.ChatModel` and ``docs/remote_judges.md``.

    Nothing is sent before the first call. Failures are in the place of the turn that failed, :class:`ModelError` with
    the codes remote_unauthorized, remote_refused, remote_overloaded, remote_unavailable, remote_timeout,
    remote_bad_answer and remote_no_logprobs; withheld answers are ``AnswerError`` "refused".
    """

    weights_hash = ""
    dtype = torch.float32
    """Of the numbers that come back. What the server computes in is its own choice."""
    uses_device = False

    def __init__(self, settings: RemoteSettings, *, backoff_s: float = BACKOFF_S) -> None:
        self.settings = settings
        self._connection = Connection(settings, backoff_s=backoff_s)
        self._on_step: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._encoded: WeakKeyDictionary[Candidate, _Encoded] = WeakKeyDictionary()
        self._listed: str | None = None
        self._reported = ""

    def __repr__(self) -> str:
        return f"RemoteChat({self.settings.model!r})"

    def attach(self, *, features: FeatureStore, prefixes: FeatureStore, rows: int, on_step: Callable[[], None]) -> None:
        """``on_step`` is called while answers are waited for. The server keeps its own caches and batches."""
        self._on_step = on_step

    def close(self) -> None:
        """End the connections; idempotent. Later calls fail with "remote_unavailable"."""
        self._connection.close()

    @property
    def identity(self) -> str:
        """The model's name, and a hash of what the server says it is and of all that the settings add to a request.

        The server's address is no part of it. What the server says is known from the first answer on, and changes
        where the server begins to name another model.
        """
        known = _hash(VERSION, self._listed or "", self._reported, self._request_options())
        return f"remote:{self.settings.model}:{known}"

    def _request_options(self) -> str:
        settings = self.settings
        quality = settings.jpeg_quality if settings.image_format == "jpeg" else None
        return json.dumps([settings.image_format, quality, settings.videos, settings.extra_body], sort_keys=True)

    def _ask_for_models(self) -> str:
        """What the server's list says of the model; "" for servers that have no list, or leave this model out.

        Raises :class:`ModelError` where it cannot be asked: answers have one identity from the first on.
        """
        reply = self._connection.get("/models", self._on_step)
        if isinstance(reply, ModelError):
            if reply.code == _NO_LIST:
                return ""
            raise reply
        data = reply.get("data")
        entries = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
        own = next((entry for entry in entries if entry.get("id") == self.settings.model), None)
        # Not "created": vLLM puts the time of the request there.
        return "" if own is None else json.dumps([own.get("id"), own.get("root"), own.get("parent")])

    # -- CPU threads --------------------------------------------------------------------------------------------------

    def prepare(self, turn: Turn) -> RemoteTurn:
        """Thread-safe. Raises InputError: "invalid_unicode", "reserved_token", "video_unsupported".

        "unsupported_input" for pixels whose gradient is asked for, for a candidate in text, and for independent images.
        """
        if turn.independent:
            raise UnsupportedInput("a server shows a turn's images to each other; independent ones are read here only")
        content: list[dict[str, Any]] = []
        names: list[str] = []
        tokens, cut = 0, 0
        for part in turn.parts:
            if isinstance(part, str):
                tokens += _text_tokens(part)
                content.append({"type": "text", "text": part})
                names.append(f"text:{part}")
                continue
            encoded = self._encode(part)
            cut = len(names)
            tokens += encoded.tokens
            content += [{"type": "image_url", "image_url": {"url": url}} for url in encoded.urls]
            names.append(f"picture:{part.digest}" if isinstance(part, Candidate) else "")
        tokens += _text_tokens(turn.system) + _text_tokens(turn.reply)
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if turn.system:
            messages.insert(0, {"role": "system", "content": turn.system})
        if turn.reply:
            messages.append({"role": "assistant", "content": turn.reply})
        return RemoteTurn(
            messages=tuple(messages),
            begun=turn.reply,
            tokens=tokens,
            prefix=_hash(turn.system, *names[:cut]),
            digest=_hash(turn.system, turn.reply, *names),
        )

    def _encode(self, part: Candidate | Tensor) -> _Encoded:
        if isinstance(part, Tensor):
            raise UnsupportedInput("a judge behind a server gives no gradients")
        with self._lock:
            found = self._encoded.get(part)
        if found is None:
            found = self._encode_candidate(part)
            with self._lock:
                self._encoded[part] = found
        return found

    def _encode_candidate(self, candidate: Candidate) -> _Encoded:
        if candidate.text is not None:
            raise UnsupportedInput("a text cannot stand where an image is asked for")
        if candidate.frames and self.settings.videos == "refuse":
            raise InputError(
                "this judge's server is not sent videos (remote.videos: frames sends them as images)",
                code="video_unsupported",
            )
        images = [candidate.image] if candidate.image is not None else list(candidate.frames)
        urls = tuple(data_url(image, self.settings.image_format, self.settings.jpeg_quality) for image in images)
        return _Encoded(urls, sum(-(-image.width // PATCH) * -(-image.height // PATCH) for image in images))

    # -- the lane -----------------------------------------------------------------------------------------------------

    def score(self, turns: Sequence[RemoteTurn], words: Sequence[str]) -> list[WordScores | SampleError]:
        """From the :data:`TOP_LOGPROBS` likeliest first tokens; a word beyond them is -inf."""
        ask = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        replies = self._ask([self._body(turn, ask) for turn in turns])
        return [_read(reply, lambda answer: word_scores(answer, words)) for reply in replies]

    def generate(self, turns: Sequence[RemoteTurn], how: Generation) -> list[list[Answer] | SampleError]:
        """Each sample is a request with a seed of its own; a turn of which one failed is failed."""
        asked = [turn for turn in turns for _ in range(how.samples)]
        bodies = [self._body(turn, _sampling(turn, how, k % how.samples)) for k, turn in enumerate(asked)]
        answers = [
            _read(reply, partial(written_answer, stop=how.stop, begun=turn.begun))
            for turn, reply in zip(asked, self._ask(bodies), strict=True)
        ]
        return [_together(answers[start : start + how.samples]) for start in range(0, len(answers), how.samples)]

    def _body(self, turn: RemoteTurn, ask: Mapping[str, Any]) -> dict[str, Any]:
        go_on = {"continue_final_message": True, "add_generation_prompt": False} if turn.begun else {}
        return {"model": self.settings.model, "messages": turn.messages, **ask, **go_on, **self.settings.extra_body}

    def _ask(self, bodies: Sequence[Mapping[str, Any]]) -> list[Reply]:
        if not bodies:
            return []
        if self._listed is None:
            try:
                self._listed = self._ask_for_models()
            except ModelError as error:
                return [error] * len(bodies)
        replies = self._connection.post_all("/chat/completions", bodies, self._on_step)
        for reply in replies:
            if not isinstance(reply, ModelError) and isinstance(reply.get("model"), str):
                self._reported = reply["model"]
        return replies


def _read(reply: Reply, read: Callable[[Mapping[str, Any]], Read]) -> Read | SampleError:
    if isinstance(reply, ModelError):
        return reply
    try:
        return read(reply)
    except SampleError as error:
        return error


def _together(answers: Sequence[Answer | SampleError]) -> list[Answer] | SampleError:
    whole: list[Answer] = []
    for answer in answers:
        if isinstance(answer, SampleError):
            return answer
        whole.append(answer)
    return whole


def _sampling(turn: RemoteTurn, how: Generation, sample: int) -> dict[str, Any]:
    asked: dict[str, Any] = {"max_tokens": how.max_tokens, "temperature": how.temperature}
    if how.temperature > 0:
        # 31 bits: what every server takes.
        asked["seed"] = int(_hash(str(how.seed), str(sample), turn.digest)[:8], 16) >> 1
    if how.stop:
        asked["stop"] = list(how.stop)
    return asked


def _hash(*parts: str) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode()
        hasher.update(len(raw).to_bytes(8, "big") + raw)
    return hasher.hexdigest()


def _text_tokens(text: str) -> int:
    """An estimate; raises InputError for text that would not reach the server as it is."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InputError("the text holds characters that no encoding has", code="invalid_unicode") from None
    if control := _CONTROL.search(text):
        raise InputError(
            f"the text holds {control[0]}, which the server would take for a control token", code="reserved_token"
        )
    return -(-size // CHARACTERS)


def data_url(image: PILImage.Image, image_format: str, quality: int) -> str:
    """The RGB pixels as a data URL: "png" is lossless; "jpeg" has PIL's ``quality`` (1 to 100)."""
    buffer = io.BytesIO()
    if image_format == "png":
        # The server decodes it once: time counts, not bytes.
        image.convert("RGB").save(buffer, "PNG", compress_level=1)
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
