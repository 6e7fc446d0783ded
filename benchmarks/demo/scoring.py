"""Groups of candidates under one prompt: photographs, signs and drawings, scored and compared."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.demo import pictures
from benchmarks.demo.document import Column, Row, Section, Table, Tone, decimals
from benchmarks.demo.pictures import Picture
from benchmarks.demo.session import Session
from models.shapes.prompts import Prompt
from trainer_client import Item, ItemComparisons, ItemScores

RANK, NAME = Column("rank", numeric=True), Column("candidate")
FAVOURITE = "jpeg-incompressibility"
SPECIAL = frozenset({"ocr", "shapes-clip", "shapes-oracle"})
"""Models with parts of their own: on photographs with free prompts they have nothing to say."""


def failures_of(*results: ItemScores | ItemComparisons) -> tuple[str, ...]:
    """One sentence for every sample that should have had a score and has none."""
    return tuple(
        f"{where}: {failure.model or 'every model'}: {failure.code}: {failure.message}"
        for result in results
        for where, failure in result.failures()
    )


def unexpected_order(ranking: Sequence[int], better: set[int], names: Sequence[str], model: str) -> tuple[str, ...]:
    """A sentence where ``ranking`` (indices, best first) does not put the ``better`` candidates before all others."""
    first = set(ranking[: len(better)])
    if first == better:
        return ()
    listed = " and ".join(names[i] for i in ranking[: len(better)])
    return (f"{model} ranks {listed} first, which the prompt does not ask for",)


def photographs(session: Session) -> Section:
    """Six photographs by the models that need no special prompt; both JPEG rewards rank them, in opposite orders."""
    photos = pictures.photographs()
    item = Item("a photograph", [photo.image for photo in photos])
    offered = session.models()
    models = sorted(
        (name for name, model in offered.items() if name not in SPECIAL and set(model.inputs) <= {"prompt", "image"}),
        key=lambda name: (name != FAVOURITE, name),
    )
    scores = session.score("six photographs", [item], models)[0]
    compared = {model: session.compare("six photographs", item, model)[0] for model in models}
    favourite = compared[FAVOURITE]
    columns = [RANK, NAME]
    columns += [Column(title, numeric=True) for model in models for title in (model, "its strength")]
    rows = []
    for rank, i in enumerate(favourite.ranking, start=1):
        cells = [str(rank), photos[i].name]
        for model in models:
            digits = 2 if model == FAVOURITE else 4
            cells += [decimals(scores.scores[model][i], digits), decimals(compared[model].strength[i], 2)]
        rows.append(Row(tuple(cells), photos[i].image))
    failures = failures_of(scores, *compared.values())
    if compared["jpeg-compressibility"].ranking != favourite.ranking[::-1]:
        failures += ("the two JPEG rewards do not rank the photographs in opposite orders",)
    return Section(
        "Photographs",
        f"Six real photographs of {pictures.SIDE} x {pictures.SIDE} pixels. The classic toy rewards of RL for image "
        "generators ask how many kB a JPEG of quality 95 takes: one likes detail, the other dislikes it.",
        (Table(f"Ranked by {FAVOURITE}", tuple(columns), tuple(rows), _strength_note(session, models)),),
        failures=failures,
    )


def signs(session: Session) -> Section:
    """Painted signs, read by PP-OCR: is the text there that the prompt quotes?"""
    candidates = pictures.signs()
    item = Item(pictures.SIGN_PROMPT, [candidate.image for candidate in candidates])
    scores = session.score("six signs", [item], ["ocr"], explain=True)[0]
    compared = session.compare("six signs", item, "ocr")[0]
    columns = (
        RANK, NAME, Column("text read"), Column("wrong letters", numeric=True), Column("ocr", numeric=True),
        Column("strength", numeric=True), Column("win rate", numeric=True),
    )  # fmt: skip
    rows = []
    for rank, i in enumerate(compared.ranking, start=1):
        detail, output = scores.details["ocr"][i], scores.outputs["ocr"][i]
        cells = (
            str(rank), candidates[i].name,
            "–" if detail is None else f"“{detail['recognised']}”",
            decimals(None if output is None else output["distance"], 0), decimals(scores.scores["ocr"][i], 2),
            decimals(compared.strength[i], 2), decimals(compared.win_rate[i], 2),
        )  # fmt: skip
        rows.append(Row(cells, candidates[i].image, _tone(scores.scores["ocr"][i] == 1.0)))
    failures = failures_of(scores, compared)
    failures += unexpected_order(compared.ranking, {0, 1}, [c.name for c in candidates], "ocr")
    return Section(
        "Text rendering",
        "Is the text that the prompt quotes readable in the picture? PP-OCR reads the signs on this machine's CPU; the "
        "reward is the share of letters that are right (Flow-GRPO's OCR reward).",
        (Table(f"Prompt: {pictures.SIGN_PROMPT}", columns, tuple(rows), _strength_note(session, ["ocr"])),),
        failures=failures,
    )


def drawings(session: Session) -> Section:
    """Two groups of eight drawings: what the learned reward prefers beside what is true."""
    groups = [_drawing_group(session, prompt) for prompt in (pictures.ATTRIBUTES, pictures.POSITION)]
    return Section(
        "Groups of drawings",
        "Eight candidates for one caption, as a policy would offer them. shapes-clip is a small CLIP with an MLP head "
        "that learned from preferences and sees only pixels; the oracle measures the picture and knows the truth.",
        tuple(table for table, _ in groups),
        failures=sum((failures for _, failures in groups), ()),
    )


def _drawing_group(session: Session, prompt: Prompt) -> tuple[Table, tuple[str, ...]]:
    candidates = pictures.drawings(prompt)
    item = Item(prompt.text, [candidate.image for candidate in candidates])
    scores = session.score("eight drawings", [item], ["shapes-oracle", "shapes-clip"], explain=True)[0]
    compared = session.compare("eight drawings", item, "shapes-clip")[0]
    rows = [_drawing_row(rank, i, candidates, scores, compared) for rank, i in enumerate(compared.ranking, start=1)]
    columns = (
        RANK, NAME, Column("shapes-clip", numeric=True), Column("strength", numeric=True),
        Column("win rate", numeric=True), Column("oracle exact", numeric=True), Column("oracle soft", numeric=True),
        Column("oracle's reason"),
    )  # fmt: skip
    exact = {i for i, score in enumerate(scores.scores["shapes-oracle"]) if score == 1.0}
    failures = failures_of(scores, compared)
    if exact != {0, 1}:
        failures += (f"the oracle takes {sorted(exact)} for right, where candidates 0 and 1 were drawn right",)
    # A learned reward errs, and one group says little: the next part counts how often. It is no failure of the demo.
    verdict = "right" if compared.ranking[0] in exact else "wrong"
    note = f"The favourite of shapes-clip is {verdict}. {_strength_note(session, ['shapes-clip'])}"
    return Table(f"Prompt: {prompt.text}", columns, tuple(rows), note), failures


def _drawing_row(rank: int, i: int, candidates: list[Picture], scores: ItemScores, compared: ItemComparisons) -> Row:
    exact, output = scores.scores["shapes-oracle"][i], scores.outputs["shapes-oracle"][i]
    detail = scores.details["shapes-oracle"][i]
    cells = (
        str(rank),
        candidates[i].name,
        decimals(scores.scores["shapes-clip"][i], 2),
        decimals(compared.strength[i], 2),
        decimals(compared.win_rate[i], 2),
        decimals(exact, 0),
        decimals(None if output is None else output["soft"], 2),
        "–" if detail is None else str(detail["reason"]),
    )
    return Row(cells, candidates[i].image, _tone(exact == 1.0))


def _tone(right: bool) -> Tone:
    return "good" if right else "bad"


def _strength_note(session: Session, models: Sequence[str]) -> str:
    """What a strength means, with the temperatures that the service states."""
    offered = session.models()
    scales = ", ".join(f"{offered[model].raw['calibration']['temperature']:g} for {model}" for model in models)
    return (
        "Strength is Bradley-Terry's from POST /compare over all pairs, in logits, with mean zero: a difference of 1 "
        "is a preference of 73 %. A pointwise model prefers by sigmoid(score difference / temperature), with the "
        f"temperature {scales}."
    )
