"""Deliberately bad input: every mistake has a typed answer, and never a number."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
from PIL import Image as PILImage

from benchmarks.demo import pictures
from benchmarks.demo.document import Call, Column, Row, Section, Table, decimals
from benchmarks.demo.session import CALL_DEADLINE_S, Session
from trainer_client import Item, RequestRejected

MODEL = "jpeg-compressibility"


@dataclass(frozen=True)
class Mistake:
    """What was sent, what came back for it, and the code that it should have been."""

    what: str
    expected: str
    code: str
    message: str
    score: float | None = None

    @property
    def as_expected(self) -> bool:
        return self.code == self.expected and self.score is None


def png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def mistakes(session: Session) -> Section:
    """A broken file between two good ones, a tiny image, prompts that a model cannot use, and an unknown model."""
    good, other = (photo.image for photo in pictures.photographs()[:2])
    broken, scores = _truncated_file(session, [good, other])
    found = [
        broken,
        _sample(session, "an image of 8 x 8 pixels", "image_too_small", MODEL, "a photograph", good.resize((8, 8))),
        _sample(session, "ocr without a quoted text", "target_missing", "ocr", "a shop sign", good),
        _sample(session, "a foreign prompt", "prompt_not_understood", "shapes-oracle",
                "a cat on a sofa", good),
        _unknown_model(session, good),
    ]  # fmt: skip
    rows = tuple(
        Row((mistake.what, decimals(mistake.score, 4), mistake.code, mistake.message),
            tone="good" if mistake.as_expected else "bad")
        for mistake in found
    )  # fmt: skip
    columns = (Column("what was sent"), Column("score", numeric=True), Column("code"), Column("the service says"))
    failures = [f"{m.what}: {m.code} where {m.expected} was expected" for m in found if not m.as_expected]
    if None in (scores[0], scores[2]):
        failures.append("a broken file took the score of its neighbours")
    neighbours = " and ".join(decimals(scores[i], 4) for i in (0, 2))
    return Section(
        "Mistakes",
        "An error is never a number: what cannot be scored has a null and a typed code, and the candidates beside it "
        "keep their scores.",
        (Table("Bad input", columns, rows, f"The good pictures on both sides of the broken file: {neighbours}."),),
        failures=tuple(failures),
    )


def _truncated_file(session: Session, good: Sequence[PILImage.Image]) -> tuple[Mistake, list[float | None]]:
    """Half a PNG between two whole ones, as raw JSON: the Python client would not send it."""
    whole = [png(image) for image in good]
    files = [whole[0], whole[0][: len(whole[0]) // 2], whole[1]]
    encoded = [base64.b64encode(data).decode() for data in files]
    body = {"models": {MODEL: 1.0}, "items": [{"prompt": "a photograph", "images": encoded}]}
    started = time.perf_counter()
    response = httpx.post(f"{session.url}/score", json=body, timeout=CALL_DEADLINE_S)
    response.raise_for_status()
    answer = response.json()
    wall_ms = 1000 * (time.perf_counter() - started)
    session.calls.append(Call("a broken file", "/score", (MODEL,), 3, wall_ms, answer["timing_ms"]))
    result = answer["results"][0]
    scores, errors = result["scores"][MODEL], result["errors"][1]
    code, message = (errors[0]["code"], errors[0]["message"]) if errors else ("none", "no error")
    return Mistake("half a PNG file", "truncated_image", code, message, scores[1]), scores


def _sample(session: Session, what: str, expected: str, model: str, prompt: str, image: PILImage.Image) -> Mistake:
    result = session.score(what, [Item(prompt, [image])], [model])[0]
    failure = result.errors[0][0] if result.errors[0] else None
    code, message = (failure.code, failure.message) if failure else ("none", "no error")
    return Mistake(what, expected, code, message, result.scores[model][0])


def _unknown_model(session: Session, image: PILImage.Image) -> Mistake:
    what, expected = "a model that does not exist", "unknown_model"
    error = session.rejection(Item("a photograph", [image]), "no-such-model")
    if isinstance(error, RequestRejected):
        return Mistake(what, expected, error.code, f"HTTP {error.status}: {error.detail}")
    return Mistake(what, expected, "none", f"no rejection but {error!r}")
