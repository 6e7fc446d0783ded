"""A failed sample is never a number, and an answer that does not fit its question is never a score."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from trainer_client import Item, ProtocolError, RewardClient, SampleFailure, SamplesFailed, SampleWarning

FAILURE = {"model": "ocr", "code": "target_missing", "message": "no text to look for"}


@pytest.fixture
def client(server):
    with RewardClient(server.url) as client:
        yield client


@pytest.fixture
def item(images):
    return Item("x", images)


def fail_second(answer):
    """Candidate 1 fails for ocr alone, as the wire shows it."""
    result = answer["results"][0]
    result["scores"]["ocr"][1] = None
    result["total"][1] = None
    result["errors"][1] = [FAILURE]
    result["warnings"][0] = [{"model": "ocr", "code": "prompt_truncated", "message": "77 tokens"}]
    result["outputs"] = {"ocr": [{"distance": 0}, None, {"distance": 2.5}]}
    result["details"] = {"ocr": [{"text": "OK"}, None, {}]}


def test_a_failed_sample_is_none_beside_the_others_scores(server, client, item):
    server.play(server.changed(fail_second))
    response = client.score(item, ["mean", "ocr"], explain=True)
    result = response[0]
    assert server.received[-1].request["explain"] is True
    assert result.scores["ocr"][1] is None
    assert None not in result.scores["mean"]
    assert [total is None for total in result.total] == [False, True, False]
    assert result.errors == [[], [SampleFailure("ocr", "target_missing", "no text to look for")], []]
    assert result.warnings[0] == [SampleWarning("ocr", "prompt_truncated", "77 tokens")]
    assert result.outputs["ocr"] == [{"distance": 0.0}, None, {"distance": 2.5}]
    assert result.details["ocr"][0] == {"text": "OK"}
    values, ok = result.as_array("ocr")
    assert ok.tolist() == [True, False, True]
    assert np.isnan(values).tolist() == [False, True, False]
    assert response.as_array().ok.tolist() == [True, False, True]
    with pytest.raises(KeyError):
        result.as_array("other")
    with pytest.raises(SamplesFailed, match="at item 0 candidate 1, ocr: target_missing") as raised:
        response.raise_for_errors()
    assert raised.value.failures == (("item 0 candidate 1", result.errors[1][0]),)
    assert "failures=1" in repr(response)


def test_an_undecodable_image_fails_for_every_model(server, client, item):
    def undecodable(answer):
        result = answer["results"][0]
        for values in (*result["scores"].values(), result["total"]):
            values[2] = None
        result["errors"][2] = [{"model": None, "code": "image_truncated", "message": "the image is truncated"}]

    server.play(server.changed(undecodable))
    result = client.score(item, ["mean", "ocr"])[0]
    assert result.scores["mean"][2] is None
    with pytest.raises(SamplesFailed, match="every model: image_truncated"):
        result.raise_for_errors()


def test_a_failed_comparison_is_none(server, client, item):
    def unparsed(answer):
        result = answer["results"][0]
        result["probabilities"][0][1] = result["probabilities"][1][0] = None
        error = {"code": "unparseable", "message": "no verdict"}
        result["comparisons"][0] |= {"probability": None, "orders": [None, 0.5], "parse": "no_verdict", "error": error}

    server.play(server.changed(unparsed))
    result = client.compare(item, "judge")[0]
    assert result.comparisons[0].error == SampleFailure("judge", "unparseable", "no verdict")
    assert result.as_array("probabilities").ok[0].tolist() == [False, False, True]
    with pytest.raises(SamplesFailed, match=r"comparison \(0, 1\), judge: unparseable"):
        result.raise_for_errors()


def test_a_failed_sample_has_no_gradient(server, client, item):
    def drop(handler, received):
        answer = {
            "results": [
                {"scores": {"mean": [0.1, None, 0.3]}, "total": [0.1, None, 0.3], "warnings": [[], [], []],
                 "errors": [[], [{"model": "mean", "code": "not_finite", "message": "m"}], []]}
            ],
            "models": {"mean": {"fingerprint": "f", "dtype": "float32"}},
            "timing_ms": {},
        }  # fmt: skip
        tensors = {name: image for name, image in received.images.items() if name != "item0.image1"}
        body = safetensors.numpy.save(tensors, {"response": json.dumps(answer)})
        handler.answer(body, content_type="application/vnd.safetensors")

    server.play(drop)
    result = client.gradient(item, "mean")[0]
    assert [gradient is None for gradient in result.gradients] == [False, True, False]
    np.testing.assert_array_equal(result.gradients[2], server.received[-1].images["item0.image2"])


def edit(path, value):
    """Set (or with ... delete) one place of an answer."""

    def change(answer):
        place = answer
        for key in path[:-1]:
            place = place[key]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (["results"], [], "0 entries for 1 items"),
        (["results"], ..., "'results' is missing"),
        (["results", 0, "scores", "mean"], [0.1, 0.2], "2 entries for 3 candidates"),
        (["results", 0, "scores", "mean"], ..., "models"),
        (["results", 0, "scores", "extra"], [1, 2, 3], "models"),
        (["results", 0, "scores", "mean", 0], "0.5", "expected a number"),
        (["results", 0, "scores", "mean", 0], True, "expected a number"),
        (["results", 0, "scores", "mean", 0], float("nan"), "NaN is not JSON"),
        (["results", 0, "scores", "mean", 0], 10**400, "finite"),
        (["results", 0, "scores", "mean", 0], None, "no score and no error"),
        (["results", 0, "errors", 0], [{**FAILURE, "model": "mean"}], "a score and an error"),
        (["results", 0, "errors", 0], [{"model": "mean"}], "'code' is missing"),
        (["results", 0, "errors"], [[]], "1 entries for 3 candidates"),
        (["results", 0, "warnings"], ..., "'warnings' is missing"),
        (["results", 0, "total"], [1, 2, 3, 4], "4 entries for 3 candidates"),
        (["results", 0, "total", 1], None, "every score but no total"),
        (["results", 0, "outputs"], {"mean": [{}]}, "1 entries for 3 candidates"),
        (["results", 0, "outputs"], {"other": [None] * 3}, "models"),
        (["results", 0, "outputs"], {"mean": [{"a": "b"}, None, None]}, "expected a number"),
        (["models"], {}, "'mean' is missing"),
        (["models", "mean", "fingerprint"], None, "expected a string"),
        (["timing_ms"], [1], "expected an object"),
    ],
)
def test_scores_that_do_not_fit_the_question_raise(server, client, item, path, value, match):
    server.play(server.changed(edit(path, value)))
    with pytest.raises(ProtocolError, match=match):
        client.score(item, "mean")
    assert len(server.received) == 1  # asking again would give the same nonsense


def test_a_total_over_a_failed_score_is_refused_unless_it_has_no_weight(server, client, item):
    def change(answer):
        fail_second(answer)
        answer["results"][0]["total"][1] = 0.5

    server.play(server.changed(change), server.changed(change))
    with pytest.raises(ProtocolError, match="a total without the score of 'ocr'"):
        client.score(item, ["mean", "ocr"])
    assert client.score(item, {"mean": 1, "ocr": 0})[0].total[1] == 0.5


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (["results", 0, "probabilities"], [[None] * 3] * 2, "2 entries for 3 candidates"),
        (["results", 0, "probabilities", 1], [None] * 4, "4 entries for 3 candidates"),
        (["results", 0, "probabilities", 0, 1], 1.5, "expected a probability"),
        (["results", 0, "win_rate"], [0.5], "1 entries for 3 candidates"),
        (["results", 0, "ranking"], [0, 0, 1], "twice"),
        (["results", 0, "ranking"], [0, 1, 3], "index below 3"),
        (["results", 0, "comparisons", 1], ..., "candidates 0 and 2 was asked but not answered"),
        (["results", 0, "comparisons", 0, "j"], 0, "with itself"),
        (["results", 0, "comparisons", 0, "j"], 7, "index below 3"),
        (["results", 0, "comparisons", 0, "probability"], None, "no probability and no error"),
        (["results", 0, "comparisons", 0, "orders"], [0.5], "1 entries for 2 orders"),
        (["model", "name"], "other", "'other'.*'judge'"),
    ],
)
def test_comparisons_that_do_not_fit_the_question_raise(server, client, item, path, value, match):
    server.play(server.changed(edit(path, value)))
    with pytest.raises(ProtocolError, match=match):
        client.compare(item, "judge")


@pytest.mark.parametrize("body", [b"", b"{", b'{"results": [', b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"NaN"])
def test_what_is_no_answer_raises(server, client, item, body):
    server.play(server.raw(body))
    with pytest.raises(ProtocolError):
        client.score(item, "mean")


def gradient_body(received, *, shape=None, dtype=np.float32, extra=False, fill=0.0, metadata=True):
    tensors = {name: np.full(shape or image.shape, fill, dtype) for name, image in received.images.items()}
    if extra:
        tensors["item9.image0"] = np.zeros((3, 2, 2), np.float32)
    ones = [1.0] * len(received.images)
    response = {
        "results": [
            {"scores": {"mean": ones}, "total": ones, "errors": [[] for _ in ones], "warnings": [[] for _ in ones]}
        ],
        "models": {"mean": {"fingerprint": "f", "dtype": "float32"}},
    }
    return safetensors.numpy.save(tensors, {"response": json.dumps(response)} if metadata else None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shape": (3, 2, 2)}, r"\(3, 2, 2\), the image \(3, 7, 5\)"),
        ({"dtype": np.float64}, "float64"),
        ({"extra": True}, r"item9\.image0"),
        ({"fill": np.nan}, "not finite"),
        ({"metadata": False}, "'response'"),
    ],
)
def test_gradients_that_do_not_fit_the_question_raise(server, client, item, options, match):
    server.play(lambda handler, received: handler.answer(gradient_body(received, **options)))
    with pytest.raises(ProtocolError, match=match):
        client.gradient(item, "mean")


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body[:-1],
        lambda body: body + b"\0",
        lambda body: b"",
        lambda body: b"{}",
        lambda body: struct.pack("<Q", 2**60) + body[8:],
        lambda body: body.replace(b'"F32"', b'"F99"'),
        lambda body: body.replace(b'"F32"', b'"I8" '),
    ],
)
def test_damaged_safetensors_raise(server, client, item, damage):
    server.play(lambda handler, received: handler.answer(damage(gradient_body(received))))
    with pytest.raises(ProtocolError):
        client.gradient(item, "mean")


@pytest.mark.parametrize(
    ("path", "value"),
    [(["models"], ...), (["models", 0, "name"], 3), (["models", 0, "ready"], "yes"), (["models", 0, "range"], [1])],
)
def test_a_catalogue_that_is_none_raises(server, client, path, value):
    server.play(server.changed(edit(path, value)))
    with pytest.raises(ProtocolError):
        client.models()
