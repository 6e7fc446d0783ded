"""POST /compute and GET /health on real processes, with bodies as Flow-Factory's remote reward client sends them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from pydantic import ValidationError
from schemathesis import GenerationMode

from models.base import InputError, ModelError, Output, SampleError
from service.engine.request import SampleResult
from service.errors import DeadlineExceeded, InvalidRequest, ServiceError
from service.routes.compute import SHOWN_FAILURES, refuse_failures
from service.settings import ComputeSettings, ModelSettings, Settings
from tests.service.bodies import INNER_TEXT, JPEG_MODEL, SAFETENSORS, b64, grey, noise, tensor_body
from tests.service.live import Live, running, wait_until
from tests.service.test_bad_input import assert_problem
from tests.service.test_openapi_fuzz import CHECKS, document, operation, settings

WEIGHTS = {JPEG_MODEL: 0.5, "raises-on-red": 2.0}
WEIGHTED = {"models": {name: {} for name in WEIGHTS}, "compute": {"models": WEIGHTS}}
MAX_COST = 16
KEY = {"authorization": "Bearer the-key"}
NULLS = {
    "models": {"slow": {"options": {"batch_s": 0.25}, "micro_batch": 4}, "raises-on-red": {}},
    "compute": {"models": {"slow": 1.0}, "null_rewards": True},
    "queue": {"max_cost": MAX_COST},
    "limits": {"images_per_request": MAX_COST},
    "api_keys": ["the-key"],
}


@pytest.fixture(scope="module")
def weighted_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("weighted"), WEIGHTED) as live:
        yield live


@pytest.fixture
def weighted(weighted_process: Live) -> Iterator[Live]:
    """Two models with weights; a failed sample is a problem."""
    yield weighted_process
    weighted_process.assert_healthy()


@pytest.fixture(scope="module")
def nulls_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("nulls"), NULLS) as live:
        yield live


@pytest.fixture
def nulls(nulls_process: Live) -> Iterator[Live]:
    """One slow model of two, a key, and null for a failed sample."""
    yield nulls_process
    nulls_process.assert_healthy()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One model, which asks for metadata, and no setting ``compute``."""
    with running(tmp_path_factory.mktemp("reader"), {"models": {"ocr": {}}}) as live:
        yield live


def payload(prompts: Sequence[str], images: Sequence[str], **extra: Any) -> dict[str, Any]:
    """What the client sends: what it does not have is null."""
    empty = dict.fromkeys(("video", "condition_images", "condition_videos", "kwargs"))
    return {"prompt": list(prompts), "image": list(images), **empty, **extra}


def rewards(live: Live, body: dict[str, Any]) -> list[float | None]:
    response = live.post("/compute", body, headers=KEY)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == ["rewards"]  # and no "error", which the client looks for
    found: list[float | None] = answer["rewards"]
    return found


def expected(live: Live, prompt: str, image: str) -> float:
    """The total that /score gives this sample alone."""
    body = {"models": WEIGHTS, "items": [{"prompt": prompt, "images": [image]}]}
    total: float = live.post("/score", body).json()["results"][0]["total"][0]
    return total


def sign(text: str) -> str:
    """A picture of a word."""
    image = Image.new("RGB", (320, 120), "white")
    ImageDraw.Draw(image).text((30, 25), text, "black", font=ImageFont.load_default(64))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_rewards_are_the_totals_of_score(weighted: Live) -> None:
    """Each sample has the reward that /score gives it alone, to the last bit, in the order asked."""
    prompts = [f"prompt {i % 3}" for i in range(12)]
    images = [b64(noise(i)) if i % 2 else b64(grey(20 * i)) for i in range(12)]
    found = rewards(weighted, payload(prompts, images))
    assert found == [expected(weighted, prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    assert len(set(found)) == 12


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_rewards_follow_their_samples(weighted_process: Live, data: st.DataObject) -> None:
    """However prompts and metadata repeat and are mixed, a permuted request has the permuted rewards."""
    samples = st.tuples(
        st.sampled_from(["a", "b", "c"]), st.integers(0, 255), st.sampled_from([None, {}, {"x": 1}, '{"x": 2}'])
    )
    drawn = data.draw(st.lists(samples, min_size=1, max_size=12))
    shuffled = data.draw(st.permutations(drawn))

    def ask(samples: Sequence[tuple[str, int, Any]]) -> list[float | None]:
        prompts, levels, metadata = zip(*samples, strict=True)
        images = [b64(grey(level, 16)) for level in levels]
        return rewards(weighted_process, payload(prompts, images, kwargs={"metadata": list(metadata)}))

    def by_level(samples: Sequence[tuple[str, int, Any]]) -> list[tuple[int, float | None]]:
        return [(level, reward) for (_, level, _), reward in zip(samples, ask(samples), strict=True)]

    in_order = dict(by_level(drawn))
    assert by_level(drawn) == [(level, in_order[level]) for _, level, _ in drawn]
    assert by_level(shuffled) == [(level, in_order[level]) for _, level, _ in shuffled]
    brightness = {level: in_order[level] for _, level, _ in drawn}
    assert sorted(brightness) == sorted(brightness, key=lambda level: brightness[level] or 0.0)


def test_the_groups_are_measured(weighted: Live) -> None:
    """A group of GRPO is what has the same prompt, wherever it stands in the request."""
    labels = {"model": "raises-on-red", "statistic": "std"}
    before = weighted.metric("reward_score_count", **labels)
    answered = weighted.metric("reward_requests_total", route="/compute", status="200")
    rewards(weighted, payload(["a", "b", "a", "b", "c"], [b64(grey(level)) for level in (0, 50, 255, 50, 1)]))
    assert weighted.metric("reward_score_count", **labels) == before + 2  # "c" is alone and has no spread
    assert weighted.metric("reward_requests_total", route="/compute", status="200") == answered + 1


def test_a_sample_that_cannot_be_read_refuses_the_request_and_is_named(weighted: Live) -> None:
    bad = base64.b64encode(b"not an image at all").decode()
    response = weighted.post("/compute", payload(["a", "b", "c"], [b64(grey(1)), bad, b64(grey(2))]))
    problem = assert_problem(response, 422, "sample_failed")
    assert problem["failed_samples"] == 1
    (failure,) = problem["failures"]
    assert (failure["sample"], failure["model"], failure["code"]) == (1, None, "not_an_image")
    assert "sample 1" in problem["detail"]
    assert "1 of 3" in problem["detail"]
    assert "rewards" not in problem
    lines = [line for line in weighted.log_lines() if line["request_id"] == problem["request_id"]]
    assert any(line.get("first_failure") == failure for line in lines)  # the client shows nothing but the status


def test_a_model_that_fails_is_not_the_clients_fault(weighted: Live) -> None:
    body = payload(["blue", "blue", "red"], [b64(grey(level)) for level in (1, 2, 3)])
    response = weighted.post("/compute", body)
    problem = assert_problem(response, 500, "sample_failed")
    assert [(f["sample"], f["model"], f["code"]) for f in problem["failures"]] == [(2, "raises-on-red", "model_error")]
    assert INNER_TEXT not in response.text
    assert weighted.post("/compute", payload(["blue"], [b64(grey(1))])).status_code == 200


def test_failures_of_both_sides_are_the_clients(weighted: Live) -> None:
    """Repeating such a request cannot help."""
    problem = assert_problem(weighted.post("/compute", payload(["red", "a"], [b64(grey(1)), "AAAA"])), 422)
    assert [failure["sample"] for failure in problem["failures"]] == [0, 1]


def test_null_where_the_settings_say_so(nulls: Live) -> None:
    found = rewards(nulls, payload(["a", "b", "a"], [b64(grey(51)), "AAAA", b64(grey(102))]))
    assert found == [pytest.approx(0.2), None, pytest.approx(0.4)]


def test_black_is_a_score_and_failure_is_not(nulls: Live) -> None:
    """The one place where a zero may come from is a score of zero."""
    assert rewards(nulls, payload(["a", "a"], [b64(grey(0)), "AAAA"])) == [0.0, None]


TWO = (["a", "b"], [b64(grey(1)), b64(grey(2))])
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "fewer images": (payload(["a", "b"], [b64(grey(1))]), "length_mismatch", "2 prompts and 1 images"),
    "fewer prompts": (payload(["a"], TWO[1]), "length_mismatch", "1 prompts and 2 images"),
    "no images": (payload(*TWO, image=None), "length_mismatch", "2 prompts and 0 images"),
    "nothing": (payload([], []), "invalid_request", "prompt"),
    "video": (payload(*TWO, video=[["AAAA"], ["AAAA"]]), "unknown_field", "video"),
    "video alone": (payload(["a"], [], image=None, video=[["AAAA"]]), "unknown_field", "video"),
    "conditions": (payload(*TWO, condition_images=[["AAAA"], ["AAAA"]]), "unknown_field", "condition_images"),
    "a model": (payload(*TWO, model="slow"), "invalid_request", "model"),
    "kwargs": (payload(*TWO, kwargs={"model": "slow"}), "unknown_field", "metadata"),
    "metadata of one": (payload(*TWO, kwargs={"metadata": ["{}"]}), "length_mismatch", "2 entries"),
    "metadata of all": (payload(*TWO, kwargs={"metadata": {"a": 1}}), "length_mismatch", "2 entries"),
    "metadata text": (payload(*TWO, kwargs={"metadata": ["{}", "a: 1"]}), "invalid_metadata", "metadata[1]"),
    "metadata list": (payload(*TWO, kwargs={"metadata": ["[1]", "{}"]}), "invalid_metadata", "metadata[0]"),
    "metadata number": (payload(*TWO, kwargs={"metadata": [7, None]}), "invalid_metadata", "metadata[0]"),
    "deep metadata": (payload(*TWO, kwargs={"metadata": ["{}", '{"a":' + "[" * 900]}), "invalid_metadata", "[1]"),
    "long metadata": (payload(*TWO, kwargs={"metadata": ["{}", " " * 70_000]}), "metadata_too_large", "65536"),
    "many prompts": (payload([str(i) for i in range(65)], [TWO[1][0]] * 65), "too_many_items", "64"),
    "a long prompt": (payload(["a" * 20_000], TWO[1][:1]), "prompt_too_long", "16384"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_is_refused_by_name(weighted: Live, name: str) -> None:
    body, code, words = REFUSED[name]
    assert words in assert_problem(weighted.post("/compute", body), 422, code)["detail"]


def test_only_json(weighted: Live) -> None:
    tensors = tensor_body(payload(["a"], ["image0"]), {"image0": grey(1)})
    assert_problem(weighted.post("/compute", content=tensors, headers={"content-type": SAFETENSORS}), 415)
    assert_problem(weighted.post("/compute", data={"prompt": "a"}, files={"images": b"x"}), 415)
    assert_problem(weighted.post("/compute", content=b"{", headers={"content-type": "application/json"}), 400)


def test_the_only_loaded_model_needs_no_setting_and_metadata_arrives(reader: Live) -> None:
    """As the client's dataset packs it: a JSON text a sample, with lists and objects as text inside."""
    images = [sign("HELLO"), sign("HELLO")]
    found = rewards(
        reader, payload(["a sign"] * 2, images, kwargs={"metadata": ['{"target": "HELLO"}', '{"target": "WORLD"}']})
    )
    assert found[0] == 1.0
    assert found[1] is not None
    assert found[1] < 0.5
    problem = assert_problem(reader.post("/compute", payload(["a sign"] * 2, images)), 422, "sample_failed")
    assert [failure["code"] for failure in problem["failures"]] == ["target_missing"] * 2


def test_words_that_begin_with_a_bracket_stay_words(reader: Live) -> None:
    """Text inside metadata is unpacked only where it is JSON; then OCR says that a list is no target."""
    images = [sign("HELLO")]
    kept = rewards(reader, payload(["a sign"], images, kwargs={"metadata": [{"target": "[HELLO"}]}))
    assert kept[0] is not None
    assert kept[0] > 0.5
    refused = reader.post("/compute", payload(["a sign"], images, kwargs={"metadata": [{"target": '["HELLO"]'}]}))
    assert assert_problem(refused, 422, "sample_failed")["failures"][0]["code"] == "target_invalid"


def test_several_models_and_no_setting_is_a_clear_refusal(service: Live) -> None:
    problem = assert_problem(service.post("/compute", payload(*TWO)), 422, "compute_not_configured")
    assert "compute.models" in problem["detail"]


def test_keys_guard_compute_and_not_health(nulls: Live) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}):
        response = nulls.post("/compute", payload(*TWO), headers=headers)
        assert_problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    answer = nulls.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "models": {"slow": True, "raises-on-red": True}}


def test_overload_is_429_and_what_was_admitted_is_right(nulls: Live) -> None:
    def ask(i: int) -> tuple[int, Any]:
        response = nulls.post("/compute", payload(["a"] * 4, [b64(grey(i, 16))] * 4), headers=KEY)
        return i, response

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    assert {response.status_code for _, response in answers} == {200, 429}
    for i, response in answers:
        if response.status_code == 200:
            assert response.json() == {"rewards": [pytest.approx(i / 255)] * 4}
        else:
            assert_problem(response, 429, "overloaded")
            assert int(response.headers["retry-after"]) >= 1


def test_a_request_larger_than_the_limits(nulls: Live) -> None:
    images = [b64(grey(1, 16))] * (MAX_COST + 1)
    assert_problem(nulls.post("/compute", payload(["a"] * len(images), images), headers=KEY), 422, "too_many_images")


def test_health_is_503_while_draining(tmp_path: Path) -> None:
    drain = {"min_s": 5.0}
    with running(tmp_path, {"models": {JPEG_MODEL: {}}, "drain": drain}) as live:
        assert live.get("/health").status_code == 200
        live.terminate()
        wait_until(lambda: live.get("/health").status_code == 503, "the service drains", 4)
        assert_problem(live.get("/health"), 503, "draining")
        assert_problem(live.post("/compute", payload(*TWO)), 503, "draining")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_makes_it_fail(weighted: Live, mode: GenerationMode) -> None:
    described = operation(weighted, document(weighted), "/compute", "POST")

    @settings(60)
    @hypothesis.given(case=described.as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=30)

    fuzz()


def test_answers_fit_the_document(weighted: Live) -> None:
    described = operation(weighted, document(weighted), "/compute", "POST")
    for body in (payload(*TWO), payload(["red"], TWO[1][:1]), payload(["a"], ["AAAA"])):
        described.validate_response(weighted.post("/compute", body))
    assert set(document(weighted)["paths"]["/compute"]["post"]["requestBody"]["content"]) == {"application/json"}


def failed_sample(error: SampleError) -> SampleResult:
    return SampleResult({"a": Output(1.0), "b": error})


LATE, BROKEN, UNFIT = ModelError("late", code="deadline"), ModelError("broken"), InputError("unfit")


@pytest.mark.parametrize(
    ("given", "kind", "status"),
    [
        ([LATE, LATE], DeadlineExceeded, 504),
        ([LATE, BROKEN], ServiceError, 500),
        ([BROKEN, UNFIT], InvalidRequest, 422),
    ],
)
def test_the_status_says_whether_repeating_can_help(
    given: list[SampleError], kind: type[ServiceError], status: int
) -> None:
    good = SampleResult({"a": Output(1.0), "b": Output(2.0)})
    with pytest.raises(ServiceError) as caught:
        refuse_failures([good, *map(failed_sample, given)], ["a", "b"])
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.code) == (status, "sample_failed")
    assert [failure["sample"] for failure in caught.value.extra["failures"]] == [1, 2]
    refuse_failures([good], ["a", "b"])


def test_many_failures_are_counted_and_not_all_shown() -> None:
    with pytest.raises(InvalidRequest) as caught:
        refuse_failures([failed_sample(UNFIT)] * 100, ["a", "b"])
    assert caught.value.extra["failed_samples"] == 100
    assert len(caught.value.extra["failures"]) == SHOWN_FAILURES


def test_a_model_that_is_not_loaded_is_refused_at_start() -> None:
    loaded = {"ocr": ModelSettings()}
    with pytest.raises(ValidationError, match=r"compute\.models names 'pickscore', which is not in models"):
        Settings(models=loaded, compute=ComputeSettings(models={"ocr": 1.0, "pickscore": 1.0}))
    assert Settings(models=loaded, compute=ComputeSettings(models={"ocr": 0.5})).compute.models == {"ocr": 0.5}


@pytest.mark.parametrize(
    "text", ["{models: {ocr: .inf}}", "{models: {ocr: 2.0e+6}}", "{null_rewards: 0.5}", "{model: ocr}"]
)
def test_senseless_settings_are_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "service.yaml").write_text(f"compute: {text}\n")
    monkeypatch.setenv("REWARD_CONFIG", str(tmp_path / "service.yaml"))
    with pytest.raises(ValidationError, match="compute"):
        Settings()


def test_models_of_the_environment_replace_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward may not have a part that whoever set it in the environment does not see; other settings are merged."""
    text = "models: {ocr: {}, shapes-clip: {}}\ncompute: {models: {ocr: 1.0}, null_rewards: true}\n"
    (tmp_path / "service.yaml").write_text(text)
    monkeypatch.setenv("REWARD_CONFIG", str(tmp_path / "service.yaml"))
    assert Settings().compute == ComputeSettings(models={"ocr": 1.0}, null_rewards=True)
    monkeypatch.setenv("REWARD_COMPUTE__MODELS", '{"shapes-clip": 2.0}')
    assert Settings().compute == ComputeSettings(models={"shapes-clip": 2.0}, null_rewards=True)
