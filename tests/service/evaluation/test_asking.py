"""What a service is asked, and what is made of its answers; faults and biased judges that cannot be had for real."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.fitting.preference_data import FilePicture, Picture, PreferenceRow, RowContext
from service.evaluation import asking
from service.evaluation.asking import Asked, Asker, EvaluationProblem, Failure, PairVerdict, RowVerdict
from service.evaluation.results import Judged, TieThreshold, measures
from service.schemas import CalibrationOut, ErrorOut, ItemIn, ModelOut
from tests.models.fitting.preference_fixtures import encoded, picture

Handler = Callable[[httpx.Request], httpx.Response]
TIMING = {"decode": 0, "queue": 0, "forward": 0}
USED = {"fingerprint": "sha256:0", "dtype": "float32"}


def model(kind: str) -> ModelOut:
    return ModelOut(
        name="m", description="", kind=kind, inputs=["image"], outputs=[], differentiable=False, range=(0, 1),  # type: ignore[arg-type]
        calibration=CalibrationOut(temperature=2.0, source="a test"), citation="", license="", weights=None,
        weights_bytes=0, weights_present=True, sources=[], verified=True, ready=True, fingerprint="sha256:0",
        dtype="float32",
    )  # fmt: skip


@pytest.fixture
def red(tmp_path: Path) -> Picture:
    path = tmp_path / "red.png"
    path.write_bytes(encoded(picture("red")))
    return FilePicture(path, "red.png")


def ask(handler: Handler, rows: Sequence[PreferenceRow], kind: str = "pointwise", **options: Any) -> list[RowVerdict]:
    async def main() -> list[RowVerdict]:
        transport = httpx.MockTransport(handler)
        async with httpx.AsyncClient(transport=transport, base_url="http://judge") as client:
            asker = Asker(client, **options)
            return await asker.ask(Asked(model(kind), "compare" if kind == "pairwise" else "score"), rows)

    return asyncio.run(main())


def scored(request: httpx.Request, fail: str = "") -> httpx.Response:
    """The length of the prompt as the score of the first image, 0 for the others; images of ``fail`` have none."""
    results = []
    for item in json.loads(request.content)["items"]:
        scores: list[float | None] = [float(len(item["prompt"])), *[0.0] * (len(item["images"]) - 1)]
        errors: list[list[dict[str, Any]]] = [[] for _ in scores]
        if item["prompt"] == fail:
            scores[-1] = None
            errors[-1] = [ErrorOut(model="m", code="image_too_small", message="too small").model_dump()]
        empty: list[list[Any]] = [[] for _ in scores]
        results.append({"scores": {"m": scores}, "total": scores, "outputs": {}, "errors": errors, "warnings": empty})
    return httpx.Response(200, json={"results": results, "models": {"m": USED}, "timing_ms": TIMING})


def refused(status: int, code: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"code": code, "detail": "no", "status": status}, headers=headers)


def test_scores_become_probabilities_by_the_models_temperature(red: Picture) -> None:
    (verdict,) = ask(scored, [PreferenceRow("k", "four", (red, red), preference=0.0)])
    (pair,) = verdict.pairs
    assert verdict.scores == (4.0, 0.0)
    assert (pair.probability, pair.margin) == (pytest.approx(1 / (1 + 2.718281828**-2)), 4.0)


def test_the_context_of_a_row_is_that_of_the_item(red: Picture, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.extend(json.loads(request.content)["items"])
        return scored(request)

    (tmp_path / "blue.png").write_bytes(encoded(picture("blue")))
    blue = FilePicture(tmp_path / "blue.png", "blue.png")
    context = RowContext(image=blue, mask=red, frames=(red, blue), question="q", task="fill", criterion="structure")
    rows = [
        PreferenceRow("a", "p", (red, red), preference=1.0, context=context),
        PreferenceRow("b", "q", (red, red), preference=1.0, context=RowContext(task="remove")),
        PreferenceRow("c", "r", (red, red), preference=1.0),
        PreferenceRow("d", "s", (red, red), preference=1.0, context=RowContext(mask=FilePicture(tmp_path / "x", "x"))),
    ]
    verdicts = ask(handler, rows)
    sent = {name: base64.b64encode(each.read()).decode() for name, each in (("red", red), ("blue", blue))}
    assert [item.get("context") for item in asked] == [
        {"image": sent["blue"], "mask": sent["red"], "frames": [sent["red"], sent["blue"]], "question": "q",
         "task": "fill", "criterion": "structure"},
        {"task": "remove"},
        None,
    ]  # fmt: skip
    assert all(ItemIn.model_validate(item) for item in asked)
    assert [failure.code for failure in verdicts[3].failures] == ["image_unreadable"]


def test_pictures_of_contexts_count_in_the_size_of_a_request(red: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sizes.append(len(json.loads(request.content)["items"]))
        return scored(request)

    one = len(base64.b64encode(red.read()))
    monkeypatch.setattr(asking, "BYTES_PER_REQUEST", 4 * one)
    plain = [PreferenceRow(str(i), "p", (red, red), preference=1.0) for i in range(4)]
    ask(handler, plain)
    ask(handler, [replace(row, context=RowContext(image=red, mask=red)) for row in plain])
    ask(handler, [replace(row, context=RowContext(frames=(red, red))) for row in plain])
    assert sizes == [2, 2, *[1] * 8]


def test_a_failed_image_takes_its_own_pairs_only(red: Picture) -> None:
    rows = [
        PreferenceRow("k", "bad", (red, red, red), ranks=(1, 2, 3)),
        PreferenceRow("l", "ok", (red, red), ranks=(1, 2)),
    ]
    first, second = ask(lambda request: scored(request, fail="bad"), rows)
    assert first.scores == (3.0, 0.0, None)
    assert [(pair.first, pair.second) for pair in first.pairs] == [(0, 1)]
    assert first.failures == (Failure("image_too_small", "too small"),)
    assert (second.scores, second.failures) == ((2.0, 0.0), ())
    found = measures(Judged(rows, [first, second]), TieThreshold())
    assert (found["pairs"], found["ranking_agreement"]["count"]) == (2, 1)


def test_every_row_is_asked_once_and_in_few_requests(red: Picture) -> None:
    rows = [PreferenceRow(str(i), "x" * (i + 1), (red, red), preference=1.0) for i in range(70)]
    sizes: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sizes.append(len(json.loads(request.content)["items"]))
        return scored(request)

    verdicts = ask(handler, rows, concurrency=3)
    assert [verdict.scores[0] for verdict in verdicts] == [float(i + 1) for i in range(70)]
    assert sorted(sizes) == [6, 16, 16, 16, 16]


def test_no_more_requests_run_at_once_than_asked_for(red: Picture) -> None:
    running, most = 0, 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return scored(request)

    rows = [PreferenceRow(str(i), "x", (red,) * 9, ranks=tuple(range(9))) for i in range(24)]
    assert len(ask(handler, rows, concurrency=3)) == 24  # type: ignore[arg-type]
    assert most == 3


def test_one_row_that_is_refused_fails_alone(red: Picture) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        prompts = [item["prompt"] for item in json.loads(request.content)["items"]]
        return refused(422, "prompt_too_long") if "long" in prompts else scored(request)

    rows = [PreferenceRow(p, p, (red, red), preference=1.0) for p in ("a", "b", "long", "d", "e")]
    verdicts = ask(handler, rows)
    assert [verdict.scores[0] for verdict in verdicts] == [1.0, 1.0, None, 1.0, 1.0]
    assert [failure.code for failure in verdicts[2].failures] == ["prompt_too_long"]
    assert verdicts[2].pairs == ()


def test_a_full_service_is_asked_again(red: Picture) -> None:
    answers = iter([refused(429, "overloaded"), refused(503, "unavailable", **{"Retry-After": "1"})])
    rows = [PreferenceRow("k", "four", (red, red), preference=1.0)]
    (verdict,) = ask(lambda request: next(answers, None) or scored(request), rows)
    assert verdict.scores == (4.0, 0.0)
    with pytest.raises(StopIteration):
        next(answers)


def test_a_service_that_stays_full_is_a_failure_of_the_row_and_never_a_number(red: Picture) -> None:
    rows = [PreferenceRow("k", "four", (red, red), preference=1.0)]
    (verdict,) = ask(lambda request: refused(429, "overloaded"), rows, patience_s=0)
    assert (verdict.scores, verdict.pairs) == ((None, None), ())
    assert verdict.failures[0].code == "overloaded"


def test_a_service_that_turns_the_caller_away_ends_it(red: Picture) -> None:
    rows = [PreferenceRow("k", "four", (red, red), preference=1.0)]
    with pytest.raises(EvaluationProblem, match="401 unauthorized: no"):
        ask(lambda request: refused(401, "unauthorized"), rows)
    with pytest.raises(EvaluationProblem, match="out of memory"):
        ask(lambda request: refused(503, "unavailable"), rows, gone=lambda: "out of memory")


def test_a_service_that_leaves_ends_it(red: Picture) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("gone", request=request)

    with pytest.raises(EvaluationProblem, match="nothing answers at http://judge"):
        ask(handler, [PreferenceRow("k", "p", (red, red), preference=1.0)], patience_s=0)


def test_pictures_that_vanish_fail_their_row(red: Picture, tmp_path: Path) -> None:
    lost = FilePicture(tmp_path / "lost.png", "lost.png")
    rows = [PreferenceRow("a", "p", (red, lost), preference=1.0), PreferenceRow("b", "p", (red, red), preference=1.0)]
    first, second = ask(scored, rows)
    assert [failure.code for failure in first.failures] == ["image_unreadable"]
    assert second.scores == (1.0, 0.0)


def compared(request: httpx.Request) -> httpx.Response:
    """A judge that adds .2 to the image shown first. Of three images it cannot tell the last pair, and the middle one
    in one order only."""
    body = json.loads(request.content)
    assert body["both_orders"] is True
    results = []
    for item in body["items"]:
        count = len(item["images"])
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        comparisons: list[dict[str, Any]] = []
        for i, j in pairs:
            if count == 3 and (i, j) == (1, 2):
                error = {"model": "m", "code": "unparseable", "message": "no verdict"}
                comparisons.append(
                    {
                        "i": i,
                        "j": j,
                        "probability": None,
                        "orders": [None, None],
                        "parse": "unparseable",
                        "parse_orders": ["unparseable", "unparseable"],
                        "error": error,
                    }
                )
                continue
            if count == 3 and (i, j) == (0, 2):
                half = {"i": i, "j": j, "probability": 0.8, "orders": [0.8, None], "parse": "truncated"}
                comparisons.append(half | {"parse_orders": ["ok", "truncated"]})
                continue
            both = {"i": i, "j": j, "probability": 0.6, "orders": [0.8, 0.4], "parse": "ok"}
            comparisons.append(both | {"parse_orders": ["ok", "ok"]})
        nothing: list[list[Any]] = [[] for _ in range(count)]
        values = [float(-i) for i in range(count)]
        results.append(
            {"probabilities": [[None] * count] * count, "win_rate": values, "strength": values, "warnings": nothing,
             "strength_stderr": [0.1] * count, "ranking": list(range(count)), "comparisons": comparisons,
             "errors": nothing}
        )  # fmt: skip
    return httpx.Response(200, json={"results": results, "model": {"name": "m", **USED}, "timing_ms": TIMING})


def test_a_judge_of_pairs_is_asked_in_both_orders(red: Picture) -> None:
    rows = [
        PreferenceRow("a", "p", (red, red), preference=1.0),
        PreferenceRow("b", "q", (red, red, red), ranks=(1, 2, 3)),
    ]
    first, second = ask(compared, rows, kind="pairwise")
    assert first.pairs == (PairVerdict(0, 1, 0.6, pytest.approx(0.1), (0.8, 0.4)),)
    assert second.scores == (0.0, -1.0, -2.0)
    assert [(pair.first, pair.second) for pair in second.pairs] == [(0, 1), (0, 2)]
    assert [pair.orders for pair in second.pairs] == [(0.8, 0.4), None]
    assert [failure.code for failure in second.failures] == ["truncated", "unparseable"]
    found = measures(Judged(rows, [first, second]), TieThreshold())
    assert (found["position_bias"]["value"], found["position_bias"]["count"]) == (pytest.approx(0.2), 2)
    assert found["order_flips"]["value"] == 1.0
    assert (found["pair_accuracy"]["value"], found["kendall_tau_b"]["value"]) == (1.0, pytest.approx(1.0))


def test_models_are_found_by_their_kind() -> None:
    def find(kind: str, name: str, route: Any = None) -> Asked:
        async def main() -> Asked:
            answer = {"models": [model(kind).model_dump()]}
            transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answer))
            async with httpx.AsyncClient(transport=transport, base_url="http://judge") as client:
                return await Asker(client).find(name, route)

        return asyncio.run(main())

    assert find("pointwise", "m").route == "score"
    assert find("pairwise", "m").route == "compare"
    assert find("pointwise", "m", "compare").route == "compare"
    assert find("pairwise", "m", "score").route == "score"
    with pytest.raises(EvaluationProblem, match="unknown reward model n; the service has m"):
        find("pointwise", "n")
