"""Three ways to send one request to a real process: equal pixels give equal scores."""

from __future__ import annotations

import base64
import json
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import Overloaded
from service.telemetry import Telemetry
from service.wire import ByteBudget
from tests.service.bodies import JPEG_MODEL, SAFETENSORS, encoded, noise, score_body, tensor_body
from tests.service.live import Live

Fields = dict[str, Any]
Images = list[np.ndarray]

MODELS = {JPEG_MODEL: 0.5, "tiny-tower": 2.0}


def by_json(live: Live, path: str, message: Fields, item: Fields, images: Images) -> httpx.Response:
    texts = [base64.b64encode(encoded(image)).decode() for image in images]
    return live.post(path, message | {"items": [item | {"images": texts}]})


def by_tensors(live: Live, path: str, message: Fields, item: Fields, images: Images) -> httpx.Response:
    tensors = {f"item0.image{i}": image for i, image in enumerate(images)}
    body = tensor_body(message | {"items": [item | {"images": list(tensors)}]}, tensors)
    return live.post(path, content=body, headers={"content-type": SAFETENSORS})


def by_form(live: Live, path: str, message: Fields, item: Fields, images: Images) -> httpx.Response:
    fields: Fields = {name: value if isinstance(value, str) else json.dumps(value) for name, value in item.items()}
    fields |= {name: json.dumps(value) for name, value in message.items() if name not in ("models", "model")}
    fields["model"] = message.get("model") or [f"{name}={weight}" for name, weight in message["models"].items()]
    files = [("images", (f"{i}.png", encoded(image))) for i, image in enumerate(images)]
    return live.post(path, data=fields, files=files)


WIRES = [by_json, by_tensors, by_form]


def answers(live: Live, path: str, message: Fields, item: Fields, images: Images) -> list[Any]:
    """The answer of each wire, without what may differ: the timing."""
    found = []
    for wire in WIRES:
        response = wire(live, path, message, item, images)
        assert response.status_code == 200, f"{wire.__name__}: {response.text[:500]}"
        found.append({name: value for name, value in response.json().items() if name != "timing_ms"})
    return found


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(min_size=1, max_size=30),
    sizes=st.lists(st.tuples(st.integers(16, 48), st.integers(16, 48)), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_three_wires_give_equal_scores(service: Live, prompt: str, sizes: list[tuple[int, int]], seed: int) -> None:
    images = [noise(seed + i, height, width) for i, (height, width) in enumerate(sizes)]
    first, *others = answers(service, "/score", {"models": MODELS}, {"prompt": prompt, "metadata": {"a": [1]}}, images)
    assert all(other == first for other in others)
    [result] = first["results"]
    assert all(isinstance(total, float) for total in result["total"])
    assert result["total"] == [
        pytest.approx(sum(weight * result["scores"][model][i] for model, weight in MODELS.items()))
        for i in range(len(images))
    ]


@pytest.mark.parametrize("pairs", ["all", [[2, 0], [1, 2]]])
def test_three_wires_give_equal_preferences(service: Live, pairs: Any) -> None:
    images = [noise(i) for i in range(3)]
    message = {"model": "tiny-tower", "both_orders": False}
    first, *others = answers(service, "/compare", message, {"prompt": "a cat", "pairs": pairs}, images)
    assert all(other == first for other in others)
    assert len(first["results"][0]["comparisons"]) == (3 if pairs == "all" else 2)


def test_the_order_of_items_and_candidates_is_kept(service: Live) -> None:
    """Scores come back where their images were, for any order and grouping."""
    images = [noise(i, 24 + 4 * i, 32) for i in range(6)]
    tensors = {f"t{i}": image for i, image in enumerate(images)}

    def scores(groups: list[list[int]]) -> dict[int, float]:
        items = [{"prompt": "a", "images": [f"t{i}" for i in group]} for group in groups]
        used = {f"t{i}": tensors[f"t{i}"] for group in groups for i in group}
        body = tensor_body(score_body("tiny-tower", *items), used)
        response = service.post("/score", content=body, headers={"content-type": SAFETENSORS})
        results = response.json()["results"]
        return {
            i: score
            for group, result in zip(groups, results, strict=True)
            for i, score in zip(group, result["scores"]["tiny-tower"], strict=True)
        }

    expected = scores([[0, 1, 2, 3, 4, 5]])
    assert len(set(expected.values())) == 6
    assert scores([[5, 3], [1], [0, 4, 2]]) == expected
    assert {**scores([[4]]), **scores([[0, 5]]), **scores([[1, 2, 3]])} == expected


def test_one_tensor_may_stand_for_several_candidates(service: Live) -> None:
    request = score_body("tiny-tower", {"prompt": "a", "images": ["x", "x"]}, {"prompt": "a", "images": ["x"]})
    body = tensor_body(request, {"x": noise(0)})
    results = service.post("/score", content=body, headers={"content-type": SAFETENSORS}).json()["results"]
    assert len({score for result in results for score in result["scores"]["tiny-tower"]}) == 1


def test_content_types_are_read_as_http_says(service: Live) -> None:
    """Case and parameters do not count."""
    body = json.dumps(score_body(JPEG_MODEL, {"prompt": "a", "images": [base64.b64encode(encoded(noise(0))).decode()]}))
    for value in ("application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"):
        response = service.post("/score", content=body, headers={"content-type": value})
        assert response.status_code == 200, response.text


def test_what_was_done_is_counted(service: Live) -> None:
    """Requests, samples, batches, the time of each stage, and the statistics of each group of scores."""
    names = {
        "reward_requests_total": {"route": "/score", "status": "200", "method": "POST"},
        "reward_request_seconds_count": {"route": "/score"},
        "reward_samples_total": {"model": "tiny-tower", "kind": "score"},
        "reward_batch_size_sum": {"model": "tiny-tower"},
        'reward_stage_seconds_count': {"model": "tiny-tower", "stage": "decode"},
        "reward_score_bucket": {"model": "tiny-tower", "statistic": "mean", "le": "+Inf"},
    }  # fmt: skip

    def read() -> dict[str, float]:
        found = {name: service.metric(name, **labels) for name, labels in names.items()}
        for stage in ("queue", "forward"):
            found[stage] = service.metric("reward_stage_seconds_count", model="tiny-tower", stage=stage)
        return found

    before = read()
    items = [{"prompt": "a", "images": ["x", "y", "z"]}, {"prompt": "b", "images": ["x", "y", "z"]}]
    body = tensor_body(score_body("tiny-tower", *items), {name: noise(i) for i, name in enumerate("xyz")})
    response = service.post("/score", content=body, headers={"content-type": SAFETENSORS})
    assert all(response.json()["timing_ms"][stage] > 0 for stage in ("decode", "queue", "forward"))
    after = read()
    grown = {name: after[name] - before[name] for name in before}
    assert grown == dict.fromkeys(before, 6) | {
        "reward_requests_total": 1, "reward_request_seconds_count": 1, "reward_score_bucket": 2,
    }  # fmt: skip
    assert service.metric("reward_ready") == 1


@given(st.integers(1, 1000), st.lists(st.lists(st.integers(0, 400), max_size=4), max_size=6))
def test_the_byte_budget_is_never_exceeded_and_always_returned(limit: int, requests: list[list[int]]) -> None:
    budget = ByteBudget(limit, Telemetry())
    with ExitStack() as stack:
        taken = 0
        for chunks in requests:
            take = stack.enter_context(budget.hold())
            for count in chunks:
                if taken + count > limit:
                    with pytest.raises(Overloaded):
                        take(count)
                else:
                    take(count)
                    taken += count
                assert budget.used == taken <= limit
    assert budget.used == 0
