"""Malformed requests to a real process: a problem document each, nothing leaked, and a healthy service afterwards."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest

from tests.service.bodies import (
    JPEG_MODEL,
    SAFETENSORS,
    b64,
    encoded,
    grey,
    item,
    noise,
    raw_safetensors,
    score_body,
    tensor_body,
)
from tests.service.live import Live, read_answer

JSON = {"content-type": "application/json"}
MARK = "XYZZYX"
"""Stands in inputs; may not come back."""
LARGEST_PROBLEM = 8192


def assert_problem(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """An RFC 9457 document with our members, short, with the request's id, without exception text."""
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) < LARGEST_PROBLEM
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["title"] == httpx.codes.get_reason_phrase(status) or status in (413, 422)
    assert problem["title"]
    assert problem["type"] == f"urn:reward-service:error:{problem['code']}"
    assert isinstance(problem["detail"], str)
    assert problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]
    for leak in ("Traceback", "pydantic", "Error(", "0x", "site-packages", ".py"):
        assert leak not in response.text
    if code is not None:
        assert problem["code"] == code
    return problem


GOOD = score_body(JPEG_MODEL, item("a cat", noise(0)))


def good_score(live: Live) -> float:
    response = live.post("/score", GOOD)
    assert response.status_code == 200, response.text
    score: float = response.json()["results"][0]["scores"][JPEG_MODEL][0]
    return score


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def with_metadata(text: str) -> bytes:
    return json.dumps(GOOD).replace('"prompt": "a cat"', f'"prompt": "a cat", "metadata": {text}').encode()


BAD_JSON: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 400, "invalid_json"),
    "not json": (MARK.encode(), 400, "invalid_json"),
    "cut": (json.dumps(GOOD).encode()[:-20], 400, "invalid_json"),
    "trailing garbage": (json.dumps(GOOD).encode() + b"}", 400, "invalid_json"),
    "not utf-8": (b'{"models": {"\xff\xfe": 1}}', 400, "invalid_json"),
    "lone surrogate": (json.dumps(GOOD).replace("a cat", "\\ud800").encode(), 400, "invalid_json"),
    "byte order mark": (json.dumps(GOOD).encode("utf-16"), 400, "invalid_json"),
    "deep list": (nested(100_000).encode(), 400, "invalid_json"),
    "deep metadata": (with_metadata('{"a": ' + nested(100_000) + "}"), 400, "invalid_json"),
    "deep objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400, "invalid_json"),
    "null": (b"null", 422, "invalid_request"),
    "list": (b"[]", 422, "invalid_request"),
    "number": (b"1" * 4000, 422, "invalid_request"),
    "huge integer": (b'{"models": {"slow": 1' + b"0" * 4000 + b'}, "items": []}', 422, "invalid_request"),
    "infinite weight": (json.dumps(GOOD).replace("1.0", "1e999").encode(), 422, "invalid_request"),
    "NaN weight": (json.dumps(GOOD).replace("1.0", "NaN").encode(), 422, "invalid_request"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json(service: Live, name: str) -> None:
    body, status, code = BAD_JSON[name]
    response = service.post("/score", content=body, headers=JSON)
    assert_problem(response, status, code)
    assert MARK not in response.text


def test_of_a_json_key_given_twice_the_last_counts(service: Live) -> None:
    """As in every JSON parser; what came before is not even looked at. A form refuses it (TestMultipart)."""
    text = json.dumps(GOOD).replace('{"models"', '{"models": {"no-such-model": 1.0}, "models"').encode()
    response = service.post("/score", content=text, headers=JSON)
    assert list(response.json()["results"][0]["scores"]) == [JPEG_MODEL]
    text = json.dumps(GOOD)[:-1].encode() + b', "items": []}'
    assert_problem(service.post("/score", content=text, headers=JSON), 422, "invalid_request")


IMAGE = b64(noise(0))
BAD_SCHEMA: dict[str, Any] = {
    "empty object": {},
    "no models": {"items": GOOD["items"]},
    "no items": {"models": {JPEG_MODEL: 1.0}},
    "empty models": {"models": {}, "items": GOOD["items"]},
    "empty items": {"models": {JPEG_MODEL: 1.0}, "items": []},
    "models is a list": {"models": [JPEG_MODEL], "items": GOOD["items"]},
    "weight is a string": {"models": {JPEG_MODEL: MARK}, "items": GOOD["items"]},
    "weight is null": {"models": {JPEG_MODEL: None}, "items": GOOD["items"]},
    "weight too large": {"models": {JPEG_MODEL: 1e7}, "items": GOOD["items"]},
    "33 models": {"models": {str(i): 1.0 for i in range(33)}, "items": GOOD["items"]},
    "no prompt": score_body(JPEG_MODEL, {"images": [IMAGE]}),
    "prompt is null": score_body(JPEG_MODEL, {"prompt": None, "images": [IMAGE]}),
    "prompt is a list": score_body(JPEG_MODEL, {"prompt": [MARK], "images": [IMAGE]}),
    "no images": score_body(JPEG_MODEL, {"prompt": "a"}),
    "empty images": score_body(JPEG_MODEL, {"prompt": "a", "images": []}),
    "null image": score_body(JPEG_MODEL, {"prompt": "a", "images": [None]}),
    "image is a number": score_body(JPEG_MODEL, {"prompt": "a", "images": [1]}),
    "both forms": score_body(JPEG_MODEL, {"prompt": "a", "images": [IMAGE], "candidates": [{"image": IMAGE}]}),
    "empty candidate": score_body(JPEG_MODEL, {"prompt": "a", "candidates": [{}]}),
    "ambiguous candidate": score_body(JPEG_MODEL, {"prompt": "a", "candidates": [{"image": IMAGE, "text": "b"}]}),
    "frames without fps": score_body(JPEG_MODEL, {"prompt": "a", "candidates": [{"frames": [IMAGE]}]}),
    "fps of zero": score_body(JPEG_MODEL, {"prompt": "a", "candidates": [{"frames": [IMAGE], "fps": 0}]}),
    "no frames": score_body(JPEG_MODEL, {"prompt": "a", "candidates": [{"frames": [], "fps": 8}]}),
    "metadata is a list": score_body(JPEG_MODEL, item("a", noise(0), metadata=[MARK])),
    "unknown field": GOOD | {"priority": MARK},
    "unknown field of an item": score_body(JPEG_MODEL, item("a", noise(0), image=MARK)),
    "deadline of zero": GOOD | {"deadline_ms": 0},
    "deadline is a fraction": GOOD | {"deadline_ms": 1.5},
    "deadline is text": GOOD | {"deadline_ms": MARK},
    "explain is text": GOOD | {"explain": MARK},
}


@pytest.mark.parametrize("name", BAD_SCHEMA)
def test_bodies_that_do_not_fit_the_schema(service: Live, name: str) -> None:
    response = service.post("/score", BAD_SCHEMA[name])
    problem = assert_problem(response, 422, "invalid_request")
    assert problem["errors"]
    assert MARK not in response.text


def test_long_names_and_many_errors_are_not_echoed(service: Live) -> None:
    """The location of an error holds names of the caller's: they are cut, and so is the list."""
    assert_problem(service.post("/score", GOOD | {MARK * 100_000: 1}), 422)
    assert_problem(service.post("/score", {"models": {MARK * 100_000: "x"}, "items": GOOD["items"]}), 422)
    assert_problem(service.post("/score", GOOD | {f"{MARK}{i}": 1 for i in range(5000)}), 422)
    assert_problem(service.post("/score", score_body(MARK * 100_000, *GOOD["items"])), 404, "unknown_model")


def many(count: int) -> dict[str, Any]:
    return {"models": {JPEG_MODEL: 1.0}, "items": [{"prompt": "a", "images": ["aaaa"] * count}]}


TOO_MUCH: dict[str, tuple[dict[str, Any], str]] = {
    "10,000 images": (many(10_000), "too_many_images"),
    "images of one item": (many(65), "too_many_images"),
    "images of all items": ({"models": {JPEG_MODEL: 1}, "items": many(64)["items"] * 5}, "too_many_images"),
    "items": ({"models": {JPEG_MODEL: 1}, "items": many(1)["items"] * 65}, "too_many_items"),
    "10,000 frames": (
        score_body(JPEG_MODEL, {"prompt": "a", "candidates": [{"frames": ["aaaa"] * 10_000, "fps": 8}]}),
        "too_many_images",
    ),
    "10,000 context frames": (
        score_body(JPEG_MODEL, item("a", noise(0), context={"frames": ["aaaa"] * 10_000})),
        "too_many_images",
    ),
    "10,000 reference frames": (
        score_body(JPEG_MODEL, item("a", noise(0), reference={"frames": ["aaaa"] * 10_000, "fps": 8})),
        "too_many_images",
    ),
    "2 MB prompt": (score_body(JPEG_MODEL, item(MARK * 350_000, noise(0))), "prompt_too_long"),
    "2 MB text": (
        score_body(JPEG_MODEL, {"prompt": "a", "candidates": [{"text": MARK * 350_000}]}),
        "prompt_too_long",
    ),
    "2 MB reference text": (
        score_body(JPEG_MODEL, item("a", noise(0), reference={"text": MARK * 350_000})),
        "prompt_too_long",
    ),
    "2 MB question": (
        score_body(JPEG_MODEL, item("a", noise(0), context={"question": MARK * 350_000})),
        "prompt_too_long",
    ),
    "2 MB metadata": (
        score_body(JPEG_MODEL, item("a", noise(0), metadata={"a": MARK * 350_000})),
        "metadata_too_large",
    ),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_more_than_the_limits_allow(service: Live, name: str) -> None:
    body, code = TOO_MUCH[name]
    response = service.post("/score", body)
    assert_problem(response, 422, code)
    assert MARK not in response.text


@pytest.mark.parametrize("value", [None, "", "text/plain", "application/jsonx", "application/x-www-form-urlencoded",
                                   "application/octet-stream", "application/x-pickle", "/", ";;;"])  # fmt: skip
def test_wrong_content_type(service: Live, value: str | None) -> None:
    headers = {} if value is None else {"content-type": value}
    for path in ("/score", "/compare", "/gradient"):
        response = service.post(path, content=json.dumps(GOOD).encode(), headers=headers)
        assert_problem(response, 415, "unsupported_media_type")


def test_gradient_speaks_safetensors_only(service: Live) -> None:
    assert_problem(service.post("/gradient", GOOD), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/score", 405), ("PUT", "/score", 405), ("DELETE", "/models", 405), ("POST", "/health/ready", 405),
        ("GET", "/", 404), ("POST", "/scores", 404), ("GET", "/models/nope", 404), ("GET", "/../etc/passwd", 404),
        ("GET", "/%00", 404),
        ("POST", "/score/", 404), ("GET", "/%ff%fe", 404), ("TRACE", "/score", 405), ("GET", "/" + "a" * 8000, 404),
    ],
)  # fmt: skip
def test_wrong_method_or_route(service: Live, method: str, path: str, status: int) -> None:
    response = service.client.request(method, service.url + path)
    assert_problem(response, status)
    if status == 405:
        assert response.headers["allow"]


def test_unknown_models(service: Live) -> None:
    assert_problem(service.post("/score", score_body(MARK, item("a", noise(0)))), 404, "unknown_model")
    assert_problem(service.post("/score", score_body("bench-clip", item("a", noise(0)))), 404, "model_not_loaded")
    body = {"model": "../../etc/passwd", "items": [item("a", noise(0), noise(1))]}
    assert_problem(service.post("/compare", body), 404, "unknown_model")


@pytest.mark.parametrize(
    ("pairs", "status", "code"),
    [
        ([[0, 0]], 422, "pair_with_itself"), ([[0, 2]], 422, "pair_out_of_range"),
        ([[-1, 0]], 422, "pair_out_of_range"),
        ([[0, 1], [1, 0]], 422, "duplicate_pair"), ([[0, 10**30]], 422, "pair_out_of_range"),
        ([[0]], 422, "invalid_request"), ([[0, 1, 2]], 422, "invalid_request"), ([[0.5, 1]], 422, "invalid_request"),
        ([], 422, "invalid_request"), ("some", 422, "invalid_request"), (None, 422, "invalid_request"),
    ],
)  # fmt: skip
def test_bad_pairs(service: Live, pairs: Any, status: int, code: str) -> None:
    body = {"model": JPEG_MODEL, "items": [item("a", noise(0), noise(1), pairs=pairs)]}
    assert_problem(service.post("/compare", body), status, code)


def test_a_comparison_of_one_candidate(service: Live) -> None:
    body = {"model": JPEG_MODEL, "items": [item("a", noise(0))]}
    assert_problem(service.post("/compare", body), 422, "too_few_candidates")


BAD_IMAGES: dict[str, tuple[str, str]] = {
    "not base64": ("!!!!", "invalid_base64"),
    "cut base64": (IMAGE[:-3], "invalid_base64"),
    "base64 with line breaks": (IMAGE[:76] + "\n" + IMAGE[76:], "invalid_base64"),
    "empty": ("", "empty_image"),
    "not an image": ("aGVsbG8gd29ybGQh", "not_an_image"),
    "truncated": (IMAGE[: len(IMAGE) // 8 * 4], "truncated_image"),
    "1x1": (b64(grey(0, 1)), "image_too_small"),
    "url": ("http://169.254.169.254/latest/meta-data", "invalid_base64"),
    "path": ("/etc/passwd", "invalid_base64"),
    "data url": (f"data:image/png;base64,{IMAGE}", "data_url_refused"),
    "emoji": ("🙂🙂🙂🙂", "invalid_base64"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_fails_alone(service: Live, name: str) -> None:
    text, code = BAD_IMAGES[name]
    body = score_body(JPEG_MODEL, {"prompt": "a cat", "images": [text, IMAGE]})
    response = service.post("/score", body)
    assert response.status_code == 200, response.text
    result = response.json()["results"][0]
    assert result["scores"][JPEG_MODEL] == [None, good_score(service)]
    assert result["total"][0] is None
    [error] = result["errors"][0]
    assert error["model"] is None
    assert error["code"] == code
    assert len(error["message"]) < 200
    assert "Error" not in error["message"]
    assert result["errors"][1] == []


@pytest.mark.parametrize("bad", [0, 11, 23])
def test_one_bad_image_of_24_leaves_23_scores(service: Live, bad: int) -> None:
    images = [b64(noise(i)) for i in range(24)]
    models = {JPEG_MODEL: 1.0, "tiny-tower": 2.0}

    def scored() -> dict[str, Any]:
        response = service.post("/score", {"models": models, "items": [{"prompt": "a", "images": images}]})
        [result] = response.json()["results"]
        return result  # type: ignore[no-any-return]

    whole = scored()
    images[bad] = images[bad][: len(images[bad]) // 8 * 4]
    part = scored()
    for model in models:
        expected = [None if i == bad else score for i, score in enumerate(whole["scores"][model])]
        assert part["scores"][model] == expected
    assert [i for i, errors in enumerate(part["errors"]) if errors] == [bad]
    assert len(part["errors"][bad]) == 1  # once for all models


@pytest.mark.parametrize(
    "prompt",
    ["", " ", "ein Mädchen mit Möwe", "一只红色的猫", "🦊🔥👩‍👩‍👧‍👦", "\u202eright to left", "a\u0000b",
     "e\u0301", "\ufdfd" * 2000, "<|endoftext|>", "{{ config }} ${x} %s", "a" * 16_384],
)  # fmt: skip
def test_any_text_is_a_prompt(service: Live, prompt: str) -> None:
    body = {"models": {"tiny-tower": 1.0, JPEG_MODEL: 0.0}, "items": [item(prompt, noise(0))]}
    response = service.post("/score", body)
    assert response.status_code == 200, response.text
    result = response.json()["results"][0]
    assert isinstance(result["total"][0], float)
    assert result["errors"] == [[]]


class TestSafetensors:
    """Lying headers; the reader's own properties are in test_tensors.py."""

    entry: ClassVar[dict[str, Any]] = {"dtype": "U8", "shape": [32, 32, 3], "data_offsets": [0, 3072]}
    data = noise(0).tobytes()
    request = json.dumps(score_body(JPEG_MODEL, {"prompt": "a", "images": ["x"]}))

    def bad_bodies(self) -> Iterator[tuple[bytes, int, str]]:
        entry, data = self.entry, self.data
        meta = {"__metadata__": {"request": self.request}}
        malformed = 400, "malformed_safetensors"
        yield b"", *malformed
        yield b"\x00" * 7, *malformed
        yield b"\x00" * 8, *malformed
        yield b"PK\x03\x04" + b"\x00" * 60, 413, "header_too_large"
        yield raw_safetensors({}, length=1 << 63), 413, "header_too_large"
        yield raw_safetensors(meta | {"x": entry}, data, length=1 << 20), *malformed
        yield raw_safetensors(b"\xff" * 40), *malformed
        yield raw_safetensors(nested(100_000).encode()), *malformed
        yield raw_safetensors([1]), *malformed
        yield raw_safetensors({"x": entry}, data), *malformed
        yield raw_safetensors({"__metadata__": {"request": 1}, "x": entry}, data), *malformed
        for change in (
            {"shape": [32, 32, 4]}, {"shape": [2**31, 2**31, 4]}, {"shape": [-32, -32, 3]}, {"shape": [32.0, 32, 3]},
            {"shape": [True] * 3}, {"shape": [1] * 99}, {"data_offsets": [0, 10**6]}, {"data_offsets": [3072, 0]},
            {"data_offsets": [-3072, 0]}, {"data_offsets": [1, 3073]}, {"data_offsets": [0]}, {"data_offsets": None},
        ):  # fmt: skip
            yield raw_safetensors(meta | {"x": entry | change}, data), *malformed
        yield raw_safetensors(meta | {"x": entry, "y": entry}, data), *malformed
        yield raw_safetensors(meta | {"x": entry}, data + b"!"), *malformed
        yield raw_safetensors(meta | {"x": entry | {"dtype": "F64"}}, data), 400, "unsupported_tensor_dtype"
        yield raw_safetensors(meta | {"x": entry | {"dtype": ["U8"]}}, data), 400, "unsupported_tensor_dtype"
        yield raw_safetensors(meta | {"y": entry}, data), 422, "unknown_tensor"
        yield tensor_body("{", {}), 400, "invalid_json"
        yield tensor_body(nested(100_000), {}), 400, "invalid_json"
        yield tensor_body("{}", {}), 422, "invalid_request"

    def test_lying_headers(self, service: Live) -> None:
        for number, (body, status, code) in enumerate(self.bad_bodies()):
            response = service.post("/score", content=body, headers={"content-type": SAFETENSORS})
            try:
                assert_problem(response, status, code)
            except AssertionError as error:
                raise AssertionError(f"body {number}: {body[:120]!r}") from error

    @pytest.mark.parametrize(
        "array",
        [np.zeros((32, 32), np.uint8), np.zeros((3, 32, 32), np.uint8), np.zeros((32, 32, 4), np.uint8),
         np.zeros((32, 32, 3), np.float32), np.zeros((0, 32, 3), np.uint8), np.zeros((2, 32, 3), np.uint8),
         np.zeros((1, 9000, 3), np.uint8)],
        ids=lambda array: f"{array.dtype}{array.shape}",
    )  # fmt: skip
    def test_tensors_that_are_no_images_fail_alone(self, service: Live, array: np.ndarray) -> None:
        request = score_body(JPEG_MODEL, {"prompt": "a", "images": ["bad", "good"]})
        body = tensor_body(request, {"bad": array, "good": noise(0)})
        response = service.post("/score", content=body, headers={"content-type": SAFETENSORS})
        assert response.status_code == 200, response.text
        result = response.json()["results"][0]
        assert result["scores"][JPEG_MODEL] == [None, good_score(service)]
        assert result["errors"][0][0]["code"] in ("invalid_image_array", "image_too_small", "side_too_long")

    @pytest.mark.parametrize(
        ("array", "code"),
        [(np.full((3, 32, 32), np.nan, np.float32), "pixels_not_finite"),
         (np.full((3, 32, 32), 1.5, np.float32), "pixels_out_of_range"),
         (np.zeros((32, 32, 3), np.float32), "invalid_image_array"),
         (np.zeros((3, 32, 32), np.uint8), "invalid_image_array"),
         (np.zeros((3, 4, 32), np.float32), "image_too_small")],
    )  # fmt: skip
    def test_bad_pixels_of_a_gradient_fail_alone(self, service: Live, array: np.ndarray, code: str) -> None:
        request = score_body("tiny-tower", {"prompt": "a", "images": ["bad", "good"]})
        body = tensor_body(request, {"bad": array, "good": np.full((3, 32, 32), 0.5, np.float32)})
        response = service.post("/gradient", content=body, headers={"content-type": SAFETENSORS})
        assert response.status_code == 200, response.text
        header = json.loads(response.content[8 : 8 + int.from_bytes(response.content[:8], "little")])
        result = json.loads(header["__metadata__"]["response"])["results"][0]
        assert [errors[0]["code"] if errors else None for errors in result["errors"]] == [code, None]
        assert isinstance(result["total"][1], float)
        assert sorted(name for name in header if name != "__metadata__") == ["good"]

    def test_gradient_requests_that_cannot_be(self, service: Live) -> None:
        pixels = {"x": np.full((3, 32, 32), 0.5, np.float32)}
        twice = score_body("tiny-tower", {"prompt": "a", "images": ["x", "x"]})
        text = score_body("tiny-tower", {"prompt": "a", "candidates": [{"text": "b"}]})
        flat = score_body(JPEG_MODEL, {"prompt": "a", "images": ["x"]})
        for request, code in ((twice, "duplicate_tensor"), (text, "not_an_image"), (flat, "not_differentiable")):
            body = tensor_body(request, pixels)
            response = service.post("/gradient", content=body, headers={"content-type": SAFETENSORS})
            assert_problem(response, 422, code)


class TestMultipart:
    png = ("a.png", encoded(noise(0)), "image/png")

    def post(self, live: Live, fields: dict[str, Any], files: Any = None) -> httpx.Response:
        return live.post("/score", data=fields, files=[("images", self.png)] if files is None else files)

    @pytest.mark.parametrize(
        ("fields", "status", "code"),
        [
            ({}, 422, "invalid_request"),
            ({"model": JPEG_MODEL}, 422, "invalid_request"),
            ({"prompt": "a"}, 422, "invalid_request"),
            ({"model": MARK, "prompt": "a"}, 404, "unknown_model"),
            ({"model": f"{JPEG_MODEL}=nan", "prompt": "a"}, 422, "invalid_request"),
            ({"model": f"{JPEG_MODEL}=1=2", "prompt": "a"}, 422, "invalid_request"),
            ({"model": [JPEG_MODEL, JPEG_MODEL], "prompt": "a"}, 422, "repeated_field"),
            ({"model": JPEG_MODEL, "prompt": ["a", "b"]}, 422, "repeated_field"),
            ({"model": JPEG_MODEL, "prompt": "a", "modell": "b"}, 422, "unknown_field"),
            ({"model": JPEG_MODEL, "prompt": "a", "metadata": "{"}, 400, "invalid_json"),
            ({"model": JPEG_MODEL, "prompt": "a", "metadata": "[]"}, 422, "invalid_request"),
            ({"model": JPEG_MODEL, "prompt": "a", "deadline_ms": "soon"}, 422, "invalid_request"),
            ({"model": JPEG_MODEL, "prompt": "a", "metadata": f'{{"a": {nested(100_000)}}}'}, 400, "invalid_json"),
            ({"model": JPEG_MODEL, "prompt": "a" * 20_000}, 422, "prompt_too_long"),
        ],
    )
    def test_bad_fields(self, service: Live, fields: dict[str, Any], status: int, code: str) -> None:
        response = self.post(service, fields)
        assert_problem(response, status, code)
        assert MARK not in response.text

    @pytest.mark.parametrize("depth", [150, 300, 450, 600, 800, 940])
    def test_metadata_as_deep_as_the_parser_allows(self, service: Live, depth: int) -> None:
        """What json.loads accepts, json.dumps may refuse a few frames deeper: a client's mistake, never a 500."""
        fields = {"model": JPEG_MODEL, "prompt": "a", "metadata": f'{{"a": {nested(depth)}}}'}
        response = self.post(service, fields)
        if response.status_code != 200:
            assert_problem(response, 400, "invalid_json")

    def test_a_file_where_text_belongs_and_text_where_files_belong(self, service: Live) -> None:
        fields = {"model": JPEG_MODEL, "prompt": "a"}
        assert_problem(self.post(service, fields, [("image", self.png)]), 422, "unknown_field")
        assert_problem(self.post(service, fields | {"images": IMAGE}, [("metadata", self.png)]), 422, "unknown_field")

    def test_too_many_parts(self, service: Live) -> None:
        fields = {"model": JPEG_MODEL, "prompt": "a"}
        assert_problem(self.post(service, fields, [("images", self.png)] * 65), 400, "malformed_multipart")
        fields["model"] = [f"m{i}" for i in range(200)]  # type: ignore[assignment]
        assert_problem(self.post(service, fields), 400, "malformed_multipart")

    @pytest.mark.parametrize(
        ("content_type", "body"),
        [
            ("multipart/form-data", b"x"),
            ("multipart/form-data; boundary=", b"x"),
            ("multipart/form-data; boundary=abc", b"x"),
            ("multipart/form-data; boundary=abc", b""),
            ("multipart/form-data; boundary=abc", b"--abc\r\nContent-Disposition: form-data\r\n\r\nx\r\n--abc--\r\n"),
            ("multipart/form-data; boundary=abc", b"--abc\r\n" + b"a" * 50_000),
            ("multipart/form-data; boundary=abc; charset=idna",
             b'--abc\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff..\r\n--abc--\r\n'),
        ],
    )  # fmt: skip
    def test_broken_framing(self, service: Live, content_type: str, body: bytes) -> None:
        response = service.post("/score", content=body, headers={"content-type": content_type})
        assert 400 <= response.status_code < 500
        assert_problem(response, response.status_code)


class TestFraming:
    """Bodies whose length is unknown, wrong, or too large, on bare sockets."""

    def exchange(self, live: Live, head: str, body: bytes = b"", *, close: bool = False) -> bytes:
        """Send a request and read until the service closes or an answer is complete."""
        with socket.create_connection(live.address, timeout=30) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
            if close:
                connection.shutdown(socket.SHUT_WR)
            return read_answer(connection)

    head = "POST /score HTTP/1.1\nHost: localhost\nContent-Type: application/json"

    def test_a_declared_body_over_the_cap_is_refused_before_it_is_read(self, service: Live) -> None:
        answer = self.exchange(service, f"{self.head}\nContent-Length: {5 << 20}")
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b'"code": "payload_too_large"' in answer

    def test_a_body_over_the_cap_without_a_length(self, service: Live) -> None:
        def endless() -> Iterator[bytes]:
            for _ in range(80):
                yield b" " * (64 << 10)

        response = service.post("/score", content=endless(), headers=JSON)
        assert_problem(response, 413, "payload_too_large")

    def test_a_whole_body_over_the_cap_gets_its_answer(self, service: Live) -> None:
        """The client hears 413, not a broken pipe, though it is still sending."""
        assert_problem(service.post("/score", content=b" " * (12 << 20), headers=JSON), 413, "payload_too_large")

    def test_a_chunked_body_is_as_good_as_any(self, service: Live) -> None:
        text = json.dumps(GOOD).encode()
        chunks = (text[i : i + 100] for i in range(0, len(text), 100))
        response = service.post("/score", content=chunks, headers=JSON)
        assert response.json()["results"][0]["scores"][JPEG_MODEL] == [good_score(service)]

    def test_a_length_that_is_too_small(self, service: Live) -> None:
        """The rest is no request either; the connection ends, the service lives."""
        text = json.dumps(GOOD).encode()
        answer = self.exchange(service, f"{self.head}\nContent-Length: {len(text) // 2}", text)
        assert answer.startswith(b"HTTP/1.1 400 ")

    def test_a_length_that_is_too_large_and_a_client_that_leaves(self, service: Live) -> None:
        """Half a body and an end: nobody is there for an answer, and it is no fault of the service."""
        before = service.metric("reward_errors_total", code="internal_error")
        log_before = len(service.log)
        text = json.dumps(GOOD).encode()
        self.exchange(service, f"{self.head}\nContent-Length: {len(text) + 10}", text, close=True)
        service.assert_empty_queue()
        assert service.metric("reward_errors_total", code="internal_error") == before
        assert "ERROR" not in service.log[log_before:]

    @pytest.mark.parametrize(
        "lines",
        ["Content-Length: -1", "Content-Length: abc", "Content-Length: 1e3", "Content-Length: 5\nContent-Length: 6",
         "Content-Length: 99999999999999999999999", "Content-Length: 5\nTransfer-Encoding: chunked",
         "Transfer-Encoding: gzip"],
    )  # fmt: skip
    def test_lengths_that_are_no_lengths(self, service: Live, lines: str) -> None:
        answer = self.exchange(service, f"{self.head}\n{lines}", b"[[[[[", close=True)
        assert answer[:10] == b"HTTP/1.1 4" or answer == b""

    def test_bytes_that_are_no_http(self, service: Live) -> None:
        assert self.exchange(service, "\x16\x03\x01\x02\x00\x01garbage").startswith(b"HTTP/1.1 400 ")


def test_request_ids(service: Live) -> None:
    """A safe id is kept on good and bad answers and in the log; an unsafe one is replaced."""
    for path, body, status in (("/score", GOOD, 200), ("/score", {}, 422), ("/nowhere", {}, 404)):
        response = service.post(path, body, headers={"x-request-id": f"trace-{status}.a_b"})
        assert response.status_code == status
        assert response.headers["x-request-id"] == f"trace-{status}.a_b"
    assert any(line["request_id"] == "trace-422.a_b" for line in service.log_lines())
    for unsafe in ("a b", "a" * 65, "a;b", '"'):
        response = service.post("/score", {}, headers={"x-request-id": unsafe})
        assert response.headers["x-request-id"] != unsafe
        assert_problem(response, 422)


def test_errors_are_counted(service: Live) -> None:
    before = service.metric("reward_errors_total", code="invalid_json")
    requests = service.metric("reward_requests_total", route="/score", status="400")
    service.post("/score", content=b"{", headers=JSON)
    assert service.metric("reward_errors_total", code="invalid_json") == before + 1
    assert service.metric("reward_requests_total", route="/score", status="400") == requests + 1


def test_unknown_paths_do_not_grow_the_metrics(service: Live) -> None:
    for i in range(20):
        service.get(f"/no/such/route/{i}")
    assert "/no/such/route" not in service.get("/metrics").text
