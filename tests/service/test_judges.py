"""Judges over HTTP: what /compare, /score, /gradient, /compute and /models answer with them, and every bad input."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image

from tests.service.bodies import SAFETENSORS, b64, grey, item, score_body, tensor_body
from tests.service.live import BASE, Live, running
from tests.service.plugins.judges import SHARPNESS, TOKENS
from trainer_client import Item, RewardClient, RewardError

BIAS = 0.5
SETTINGS = {
    "plugins": ["faulty", "judges"],
    "models": {
        "jpeg-incompressibility": {},
        "slow": {"options": {"batch_s": 0.0}},
        "bright-judge": {"options": {"bias": BIAS}},
        "bright-writer": {"options": {"steps": 3}},
        "bright-pointwise": {},
        "tiny-tower": {},
    },
    "limits": {"images_per_item": 12, "images_per_request": 32, "comparisons_per_request": 150, "frames_per_video": 4},
    "queue": {"max_cost": 64},
}


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("judges"), SETTINGS) as live:
        yield live


@pytest.fixture
def service(judges: Live) -> Iterator[Live]:
    yield judges
    judges.assert_healthy()


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def expected(i: int, j: int, bias: float = BIAS) -> float:
    """P(i preferred) as the judge answers when i is shown first; levels are of 255."""
    return sigmoid(SHARPNESS * (i - j) / 255 + bias)


def both(i: int, j: int) -> float:
    return (expected(i, j) + 1 - expected(j, i)) / 2


def compare_body(model: str, *items: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"model": model, "items": list(items), **extra}


def compare(service: Live, model: str, *items: dict[str, Any], **extra: Any) -> list[dict[str, Any]]:
    response = service.post("/compare", compare_body(model, *items, **extra))
    assert response.status_code == 200, response.text
    results: list[dict[str, Any]] = response.json()["results"]
    return results


def score(service: Live, model: str, *items: dict[str, Any], **extra: Any) -> list[dict[str, Any]]:
    response = service.post("/score", score_body(model, *items, **extra))
    assert response.status_code == 200, response.text
    results: list[dict[str, Any]] = response.json()["results"]
    return results


LEVELS = (40, 90, 200)
IMAGES = [grey(level) for level in LEVELS]


# -- /compare ----------------------------------------------------------------------------------------------------------


def test_all_pairs_in_both_orders(service: Live) -> None:
    asked = service.metric("reward_samples_total", model="bright-judge", kind="compare")
    tokens = service.metric("reward_judge_tokens_total", model="bright-judge")
    [result] = compare(service, "bright-judge", item("a lamp", *IMAGES))
    assert service.metric("reward_samples_total", model="bright-judge", kind="compare") == asked + 6
    assert service.metric("reward_judge_tokens_total", model="bright-judge") == tokens + 6 * TOKENS
    for i, first in enumerate(LEVELS):
        for j, second in enumerate(LEVELS):
            if i == j:
                assert result["probabilities"][i][j] is None
            else:
                assert result["probabilities"][i][j] == pytest.approx(both(first, second), abs=1e-9)
    assert result["ranking"] == [2, 1, 0]
    assert result["strength"][2] > result["strength"][1] > result["strength"][0]
    assert all(error > 0 for error in result["strength_stderr"])
    assert [(c["i"], c["j"]) for c in result["comparisons"]] == [(0, 1), (0, 2), (1, 2)]
    for comparison in result["comparisons"]:
        i, j = LEVELS[comparison["i"]], LEVELS[comparison["j"]]
        assert comparison["orders"] == pytest.approx([expected(i, j), 1 - expected(j, i)], abs=1e-9)
        assert comparison["parse"] == "ok"
        assert comparison["parse_orders"] == ["ok", "ok"]
        assert comparison["error"] is None
    # The bias of 0.5 logits for the first place shows, and cancels in the preferences.
    sums = [expected(i, j) + expected(j, i) for i, j in ((40, 90), (40, 200), (90, 200))]
    assert result["position_bias"] == pytest.approx(sum(sums) / 6 - 0.5, abs=1e-9)
    assert result["position_bias"] > 0.03
    assert result["reference"] is None


def test_one_order_keeps_the_bias_and_reports_none(service: Live) -> None:
    [result] = compare(service, "bright-judge", item("a lamp", *IMAGES), both_orders=False)
    assert result["probabilities"][0][1] == pytest.approx(expected(40, 90), abs=1e-9)
    assert result["comparisons"][0]["orders"][1] is None
    assert result["comparisons"][0]["parse_orders"] == ["ok", None]
    assert result["position_bias"] is None


def test_only_the_pairs_of_a_list_are_asked(service: Live) -> None:
    asked = service.metric("reward_samples_total", model="bright-judge", kind="compare")
    [result] = compare(service, "bright-judge", item("a lamp", *IMAGES, pairs=[[2, 0]]))
    assert service.metric("reward_samples_total", model="bright-judge", kind="compare") == asked + 2
    assert result["probabilities"][2][0] == pytest.approx(both(200, 40), abs=1e-9)
    assert result["probabilities"][1] == [None, None, None]
    assert result["strength"][1] is None
    assert result["ranking"][-1] == 1


def test_the_reference_is_compared_with_every_candidate(service: Live) -> None:
    reference = {"image": b64(grey(120))}
    [result] = compare(service, "bright-judge", item("a lamp", *IMAGES, reference=reference))
    assert result["reference"] == pytest.approx([both(level, 120) for level in LEVELS], abs=1e-9)
    [alone] = compare(service, "bright-judge", item("a lamp", *IMAGES))
    assert result["strength"] == alone["strength"]


def test_a_pointwise_model_compares_with_the_reference_by_its_scores(service: Live) -> None:
    reference = {"image": b64(grey(120))}
    [result] = compare(service, "slow", item("a lamp", *IMAGES, reference=reference))
    wanted = [sigmoid((level - 120) / 255) for level in LEVELS]
    assert result["reference"] == pytest.approx(wanted, abs=1e-9)
    assert [(c["i"], c["j"]) for c in result["comparisons"]][3:] == [(0, 3), (1, 3), (2, 3)]
    assert result["warnings"] == [[], [], []]
    [plain] = compare(service, "slow", item("a lamp", *IMAGES))
    assert (plain["strength"], plain["reference"]) == (result["strength"], None)


def test_what_the_judge_wrote_is_told_when_asked_for(service: Live) -> None:
    body = item("a lamp", *IMAGES[:2])
    [silent] = compare(service, "bright-writer", body)
    assert silent["comparisons"][0]["text"] is None
    [told] = compare(service, "bright-writer", body, explain=True)
    assert told["comparisons"][0]["text"] == ["The second image is brighter.", "The first image is brighter."]
    assert told["comparisons"][0]["orders"] == [0.0, 0.0]


@pytest.mark.parametrize("status", ["empty", "truncated", "contradictory", "refused"])
def test_an_answer_without_a_verdict_is_a_failed_comparison_and_never_a_tie(service: Live, status: str) -> None:
    before = service.metric("reward_sample_errors_total", model="bright-writer", code=f"answer_{status}")
    [result] = compare(service, "bright-writer", item(f"a {status} lamp", *IMAGES[:2]), explain=True)
    [comparison] = result["comparisons"]
    assert comparison["probability"] is None
    assert comparison["orders"] == [None, None]
    assert comparison["error"]["code"] == f"answer_{status}"
    assert status in comparison["parse"]
    assert comparison["parse_orders"] == [f"answer_{status}"] * 2
    assert len(comparison["text"]) == 2
    assert result["win_rate"] == [None, None]
    assert result["strength"] == [None, None]
    after = service.metric("reward_sample_errors_total", model="bright-writer", code=f"answer_{status}")
    assert after == before + 2


def test_an_order_that_failed_is_told_from_the_one_that_did_not(service: Live) -> None:
    """The writer's answer is cut off where the darker image comes first."""
    [result] = compare(service, "bright-writer", item("a lopsided lamp", *IMAGES[:2]), explain=True)
    [comparison] = result["comparisons"]
    assert comparison["parse_orders"] == ["answer_truncated", "ok"]
    assert comparison["parse"] == "answer_truncated"
    assert comparison["orders"] == [None, 0.0]
    assert comparison["probability"] == 0.0
    assert comparison["error"] is None


def test_items_fail_alone(service: Live) -> None:
    bad, good = compare(service, "bright-judge", item("a red lamp", *IMAGES), item("a lamp", *IMAGES))
    assert {c["error"]["code"] for c in bad["comparisons"]} == {"model_error"}
    assert good["ranking"] == [2, 1, 0]
    assert all(c["error"] is None for c in good["comparisons"])


def test_a_probability_that_is_none_is_no_answer(service: Live) -> None:
    [result] = compare(service, "bright-judge", item("an impossible lamp", *IMAGES[:2]))
    assert result["comparisons"][0]["error"]["code"] == "out_of_range"


def test_more_comparisons_than_the_queue_holds_come_in_waves(service: Live) -> None:
    levels = list(range(20, 240, 20))[:11]
    [result] = compare(service, "bright-judge", item("a lamp", *[grey(level) for level in levels]))
    assert len(result["comparisons"]) == 55  # 110 comparisons; the queue admits 64
    assert result["ranking"] == list(range(10, -1, -1))
    for comparison in result["comparisons"]:
        i, j = levels[comparison["i"]], levels[comparison["j"]]
        assert comparison["probability"] == pytest.approx(both(i, j), abs=1e-9)


def test_adaptive_pairs_find_the_ranking(service: Live) -> None:
    levels = list(range(20, 240, 20))[:11]
    images = [grey(level) for level in levels]
    [result] = compare(service, "bright-judge", item("a lamp", *images, pairs="adaptive"))
    assert result["ranking"] == list(range(10, -1, -1))
    answered = sum(order is not None for c in result["comparisons"] for order in c["orders"])
    assert answered < 60
    # The bias of 0.5 logits is found and taken out.
    assert result["position_bias"] == pytest.approx(sigmoid(BIAS) - 0.5, abs=0.03)
    reference = {"image": b64(grey(130))}
    [against] = compare(service, "bright-judge", item("a lamp", *images, pairs="adaptive", reference=reference))
    assert against["reference"] == pytest.approx([both(level, 130) for level in levels], abs=1e-9)
    assert against["strength"] == result["strength"]


# -- /score ------------------------------------------------------------------------------------------------------------


def test_a_judge_scores_by_the_win_rate_of_the_group(service: Live) -> None:
    [result] = score(service, "bright-judge", item("a lamp", *IMAGES), explain=True)
    rates = [sum(both(i, j) for j in LEVELS if j != i) / 2 for i in LEVELS]
    assert result["scores"]["bright-judge"] == pytest.approx(rates, abs=1e-9)
    assert result["total"] == result["scores"]["bright-judge"]
    assert len(result["details"]["bright-judge"][0]["comparisons"]) == 4


def test_a_judge_scores_against_the_reference(service: Live) -> None:
    one = item("a lamp", IMAGES[0], reference={"image": b64(grey(120))})
    [result] = score(service, "bright-judge", one)
    assert result["scores"]["bright-judge"] == pytest.approx([both(40, 120)], abs=1e-9)
    assert result["warnings"] == [[]]


def test_a_judge_and_a_pointwise_model_make_a_total(service: Live) -> None:
    response = service.post(
        "/score", {"models": {"bright-judge": 2.0, "slow": -1.0}, "items": [item("a lamp", *IMAGES)]}
    )
    [result] = response.json()["results"]
    judged, plain = result["scores"]["bright-judge"], result["scores"]["slow"]
    assert plain == pytest.approx([level / 255 for level in LEVELS])
    assert result["total"] == pytest.approx([2 * a - b for a, b in zip(judged, plain, strict=True)])
    assert set(response.json()["models"]) == {"bright-judge", "slow"}


def test_a_pointwise_judge_scores_a_single_image(service: Live) -> None:
    [result] = score(service, "bright-pointwise", item("a lamp", IMAGES[1]))
    assert result["scores"]["bright-pointwise"] == pytest.approx([90 / 255])


def test_flow_factory_s_route_takes_a_judge_for_groups(tmp_path: Path) -> None:
    with running(tmp_path, SETTINGS | {"compute": {"models": {"bright-judge": 1.0}}}) as service:
        body = {"prompt": ["a lamp"] * 3, "image": [b64(image) for image in IMAGES]}
        response = service.post("/compute", body)
        rates = [sum(both(i, j) for j in LEVELS if j != i) / 2 for i in LEVELS]
        assert response.json() == {"rewards": pytest.approx(rates, abs=1e-9)}
        alone = service.post("/compute", {"prompt": ["a lamp"], "image": [b64(IMAGES[0])]})
        assert alone.status_code == 422
        assert "too_few_candidates" in alone.text


# -- /gradient ---------------------------------------------------------------------------------------------------------


def pixels(level: int) -> NDArray[np.float32]:
    return np.full((3, 24, 20), level / 255, np.float32)


def gradient(service: Live, request: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Any:
    return service.post("/gradient", content=tensor_body(request, tensors), headers={"content-type": SAFETENSORS})


def against_reference(prompt: str, **extra: Any) -> dict[str, Any]:
    return score_body("bright-judge", {"prompt": prompt, "images": ["x"], "reference": {"image": "r"}}, **extra)


def answered(response: Any) -> dict[str, Any]:
    """The one item of an answer."""
    assert response.status_code == 200, response.text
    header = json.loads(response.content[8 : 8 + int.from_bytes(response.content[:8], "little")])
    [result] = json.loads(header["__metadata__"]["response"])["results"]
    return dict(result)


def slope(probability: float) -> float:
    """Of P(preferred) in one of the pixels of an image."""
    return SHARPNESS * probability * (1 - probability) / (3 * 24 * 20)


@pytest.mark.parametrize("reference", [grey(120), pixels(120)], ids=["uint8", "float32"])
def test_the_gradient_of_being_preferred_to_the_reference_in_both_orders(
    service: Live, reference: NDArray[Any]
) -> None:
    response = gradient(service, against_reference("a lamp"), {"x": pixels(90), "r": reference})
    assert answered(response)["scores"]["bright-judge"] == pytest.approx([both(90, 120)], abs=1e-6)
    mean = (slope(expected(90, 120)) + slope(expected(120, 90))) / 2
    np.testing.assert_allclose(safetensors.numpy.load(response.content)["x"], mean, rtol=1e-5)


def test_the_gradient_in_one_order_keeps_the_bias(service: Live) -> None:
    request = against_reference("a lamp", both_orders=False)
    response = gradient(service, request, {"x": pixels(90), "r": pixels(120)})
    probability = expected(90, 120)
    assert abs(probability - both(90, 120)) > 0.05
    assert answered(response)["scores"]["bright-judge"] == pytest.approx([probability], abs=1e-6)
    np.testing.assert_allclose(safetensors.numpy.load(response.content)["x"], slope(probability), rtol=1e-5)


def test_an_order_that_failed_leaves_no_gradient_of_the_other(service: Live) -> None:
    response = gradient(service, against_reference("a lopsided lamp"), {"x": pixels(90), "r": pixels(120)})
    result = answered(response)
    assert result["scores"]["bright-judge"] == [None]
    assert result["errors"][0][0]["code"] == "answer_unparseable"
    assert "x" not in safetensors.numpy.load(response.content)
    one = gradient(
        service, against_reference("a lopsided lamp", both_orders=False), {"x": pixels(90), "r": pixels(120)}
    )
    assert answered(one)["scores"]["bright-judge"] == pytest.approx([expected(90, 120)], abs=1e-6)


def test_a_model_that_scores_one_image_has_no_orders(service: Live) -> None:
    """Beside a judge too: its score and its gradient are the same, and weigh in the total."""
    alone = score_body("tiny-tower", {"prompt": "a lamp", "images": ["x"]})
    plain = gradient(service, alone, {"x": pixels(90)})
    [tower] = answered(plain)["scores"]["tiny-tower"]
    for both_orders, preferred in ((True, both(90, 120)), (False, expected(90, 120))):
        told = gradient(service, {**alone, "both_orders": both_orders}, {"x": pixels(90)})
        assert answered(told)["scores"]["tiny-tower"] == [tower]
        np.testing.assert_array_equal(*(safetensors.numpy.load(each.content)["x"] for each in (plain, told)))
        mixed = {
            **against_reference("a lamp", both_orders=both_orders),
            "models": {"tiny-tower": 1.0, "bright-judge": 2.0},
        }
        total = answered(gradient(service, mixed, {"x": pixels(90), "r": pixels(120)}))["total"]
        assert total == pytest.approx([tower + 2 * preferred], abs=1e-5)


def test_a_gradient_needs_a_reference(service: Live) -> None:
    response = gradient(service, score_body("bright-judge", {"prompt": "a", "images": ["x"]}), {"x": pixels(90)})
    assert answered(response)["errors"][0][0]["code"] == "reference_missing"


def test_a_judge_that_writes_has_no_gradient(service: Live) -> None:
    response = gradient(service, score_body("bright-writer", {"prompt": "a", "images": ["x"]}), {"x": pixels(90)})
    assert response.status_code == 422
    assert response.json()["code"] == "not_differentiable"


# -- what it says of itself, and the client ----------------------------------------------------------------------------


def test_models_lists_judges(service: Live) -> None:
    rows = {row["name"]: row for row in service.get("/models").json()["models"]}
    row = rows["bright-judge"]
    assert (row["kind"], row["ready"], row["differentiable"]) == ("pairwise", True, True)
    assert row["fingerprint"].startswith("sha256:")
    answer = service.post("/compare", compare_body("bright-judge", item("a lamp", *IMAGES[:2]))).json()
    assert answer["model"]["fingerprint"] == row["fingerprint"]


def test_the_client_compares_by_a_judge(service: Live) -> None:
    with RewardClient(service.url) as client:
        preferences = client.compare(Item("a lamp", IMAGES), "bright-judge", explain=True).raise_for_errors()
        assert preferences[0].ranking == [2, 1, 0]
        against = client.compare(Item("a lamp", IMAGES, reference=grey(120)), "bright-judge").raise_for_errors()
        assert against[0].ranking == [2, 1, 0]
        assert against[0].reference == pytest.approx([both(level, 120) for level in LEVELS], abs=1e-9)
        with pytest.raises(RewardError, match="at most 12 images"):
            client.compare(Item("a lamp", [grey(10 * k) for k in range(13)]), "bright-judge")
        failed = client.compare(Item("a truncated lamp", IMAGES[:2]), "bright-writer")
        assert [failure.code for _, failure in failed.failures()] == ["answer_truncated"]
        scores = client.score(Item("a lamp", IMAGES), "bright-judge").raise_for_errors()
        assert scores[0].total[2] > scores[0].total[0]


# -- bad input ---------------------------------------------------------------------------------------------------------


def refused(service: Live, body: dict[str, Any], path: str = "/compare") -> str:
    response = service.post(path, body)
    assert response.status_code == 422, response.text
    code: str = response.json()["code"]
    return code


def test_one_image_cannot_be_compared(service: Live) -> None:
    assert refused(service, compare_body("bright-judge", item("a lamp", IMAGES[0]))) == "too_few_candidates"
    lonely, group = score(service, "bright-judge", item("a lamp", IMAGES[0]), item("a lamp", *IMAGES))
    assert lonely["scores"]["bright-judge"] == [None]
    assert lonely["errors"][0][0]["code"] == "too_few_candidates"
    assert None not in group["scores"]["bright-judge"]


def test_identical_images_are_not_asked_about(service: Live) -> None:
    asked = service.metric("reward_samples_total", model="bright-judge", kind="compare")
    [result] = compare(service, "bright-judge", item("a lamp", grey(50), grey(50), grey(80)))
    codes = {(c["i"], c["j"]): c["error"] and c["error"]["code"] for c in result["comparisons"]}
    assert codes == {(0, 1): "identical_candidates", (0, 2): None, (1, 2): None}
    assert service.metric("reward_samples_total", model="bright-judge", kind="compare") == asked + 4
    [scored] = score(service, "bright-judge", item("a lamp", grey(50), grey(50)))
    assert [errors[0]["code"] for errors in scored["errors"]] == ["identical_candidates"] * 2


def test_more_images_than_the_cap(service: Live) -> None:
    many = [grey(10 * k) for k in range(13)]
    assert refused(service, compare_body("bright-judge", item("a lamp", *many))) == "too_many_images"


@pytest.mark.parametrize("path", ["/compare", "/score"])
def test_more_comparisons_than_the_cap(service: Live, path: str) -> None:
    items = [item("a lamp", *[grey(20 * k + n) for k in range(10)]) for n in range(2)]
    body = compare_body("bright-judge", *items) if path == "/compare" else score_body("bright-judge", *items)
    assert refused(service, body, path) == "too_many_comparisons"


@pytest.mark.parametrize(
    ("pairs", "code"),
    [([[0, 3]], "pair_out_of_range"), ([[-1, 0]], "pair_out_of_range"), ([[1, 1]], "pair_with_itself"),
     ([[0, 1], [1, 0]], "duplicate_pair")],
)  # fmt: skip
def test_pairs_that_cannot_be_asked(service: Live, pairs: list[list[int]], code: str) -> None:
    assert refused(service, compare_body("bright-judge", item("a lamp", *IMAGES, pairs=pairs))) == code


def test_a_template_whose_field_the_item_lacks(service: Live) -> None:
    [result] = compare(service, "bright-judge", item("inpaint a lamp", *IMAGES[:2]))
    assert result["comparisons"][0]["error"]["code"] == "template_field_missing"
    with_mask = item("inpaint a lamp", *IMAGES[:2], context={"mask": b64(grey(255))})
    [result] = compare(service, "bright-judge", with_mask)
    assert result["comparisons"][0]["error"] is None


def test_a_video_of_more_frames_than_the_cap(service: Live) -> None:
    frames = [b64(grey(level)) for level in range(10, 60, 10)]
    long = {"frames": frames, "fps": 8}
    body = {"prompt": "a lamp", "candidates": [long, long]}
    assert refused(service, compare_body("bright-judge", body)) == "too_many_frames"
    fits = [{"frames": frames[:4], "fps": 8}, {"frames": frames[1:], "fps": 8}]
    [result] = compare(service, "bright-judge", {"prompt": "a lamp", "candidates": fits})
    assert result["comparisons"][0]["error"]["code"] == "unsupported_input"


def test_an_unreadable_image_fails_its_comparisons_alone(service: Live) -> None:
    images = [b64(IMAGES[0]), "bm8gaW1hZ2U=", b64(IMAGES[2])]
    [result] = compare(service, "bright-judge", {"prompt": "a lamp", "images": images})
    assert result["errors"][1][0]["model"] is None
    code = result["errors"][1][0]["code"]
    errors = {(c["i"], c["j"]): c["error"] and c["error"]["code"] for c in result["comparisons"]}
    assert errors == {(0, 1): code, (0, 2): None, (1, 2): code}
    [scored] = score(service, "bright-judge", {"prompt": "a lamp", "images": images})
    assert scored["scores"]["bright-judge"][1] is None
    assert scored["scores"]["bright-judge"][0] == pytest.approx(both(40, 200), abs=1e-9)


def test_warnings_are_those_of_their_own_candidate(service: Live) -> None:
    buffer = io.BytesIO()
    frames = [Image.fromarray(grey(level)) for level in (60, 160)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    images = [b64(IMAGES[0]), base64.b64encode(buffer.getvalue()).decode(), b64(IMAGES[2])]
    body = {"prompt": "a lamp", "images": images}
    [compared], [scored] = compare(service, "bright-judge", body), score(service, "bright-judge", body)
    for answer in (compared, scored):
        codes = [[warning["code"] for warning in warnings] for warnings in answer["warnings"]]
        assert codes == [[], ["animated_first_frame"], []]


def test_the_deadline_keeps_what_was_finished(tmp_path: Path) -> None:
    """Batches of two comparisons, 0.4 s each: of 20 some are finished after 1.5 s, and not all."""
    model = {"bright-judge": {"options": {"batch_s": 0.4}, "token_budget": 100}}
    with running(tmp_path, BASE | SETTINGS | {"models": model}) as service:
        body = compare_body("bright-judge", item("a lamp", *[grey(40 * k) for k in range(5)]), deadline_ms=1500)
        response = service.post("/compare", body)
        assert response.status_code == 200, response.text
        [result] = response.json()["results"]
        orders = [order for c in result["comparisons"] for order in c["orders"]]
        late = [c for c in result["comparisons"] if c["error"] is not None]
        assert {c["error"]["code"] for c in late} == {"deadline"}
        assert 0 < sum(order is not None for order in orders) < 20
        service.assert_healthy()
        response = service.post("/compare", body | {"deadline_ms": 50})
        assert response.status_code == 504
        assert response.json()["code"] == "deadline"
