"""What a user of the client may rely on when the service is well, against a real server."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import trainer_client
from trainer_client import AsyncRewardClient, Candidate, Context, Item, RewardClient

ROOT = Path(__file__).parents[2]


def test_exported_names():
    names = {
        name
        for name, value in vars(trainer_client).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert names == set(trainer_client.__all__)
    assert sorted(trainer_client.__all__) == [
        "AsyncRewardClient", "Candidate", "CompareResponse", "ComparisonResult", "ConnectionFailed", "Context",
        "DeadlineExceeded", "FingerprintChanged", "GradientResponse", "Item", "ItemComparisons", "ItemGradients",
        "ItemScores", "MaskedArray", "ModelIdentity", "ModelInfo", "ModelNotOffered", "Overloaded", "ProtocolError",
        "RequestRejected", "RewardClient", "RewardError", "SampleFailure", "SampleWarning", "SamplesFailed",
        "ScoreResponse", "ServiceFailed", "ServiceUnavailable", "TimedOut", "TransportError",
    ]  # fmt: skip


def test_import_needs_neither_torch_nor_the_service():
    code = "import json, sys, trainer_client; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(run.stdout))
    assert {"trainer_client", "httpx", "numpy"} <= loaded
    assert not loaded & {"torch", "service", "models", "fastapi", "pydantic"}


@pytest.mark.parametrize("wire", ["safetensors", "json"])
def test_pixels_arrive_unchanged_and_scores_come_back_in_order(server, images, wire):
    items = [Item("a cat", images[:2]), {"prompt": "ein Hund 🐕", "images": images[2:]}]
    with RewardClient(server.url, wire=wire) as client:
        response = client.score(items, {"mean": 2.0, "other": -0.5})
    received = server.received[-1]
    for name, image in zip(["item0.image0", "item0.image1", "item1.image0"], images, strict=True):
        np.testing.assert_array_equal(received.images[name], image)
    assert received.request["models"] == {"mean": 2.0, "other": -0.5}
    assert [item["prompt"] for item in received.request["items"]] == ["a cat", "ein Hund 🐕"]
    assert received.request["deadline_ms"] is None
    assert received.request["explain"] is False
    assert [item.scores["mean"] for item in response] == [
        pytest.approx([images[0].mean() / 255, images[1].mean() / 255]),
        pytest.approx([images[2].mean() / 255]),
    ]
    assert response[1].total == pytest.approx([1.5 * images[2].mean() / 255])
    assert response.fingerprints == {"mean": "sha256:feed", "other": "sha256:feed"}
    assert response.timing_ms["queue"] == 2.0
    values, ok = response.raise_for_errors().as_array("mean")
    assert values == pytest.approx([image.mean() / 255 for image in images])
    assert ok.all()


@pytest.mark.parametrize("wire", ["safetensors", "json"])
def test_every_part_of_an_item_travels(server, images, wire):
    mask = np.zeros((7, 5), dtype=bool)
    mask[2:4] = True
    item = Item(
        prompt="fill it",
        candidates=[Candidate(image=images[0]), {"frames": images, "fps": 8}, {"text": "two"}],
        metadata={"target": "OK", "n": [1, None]},
        context=Context(image=images[1], mask=mask, question="why?", task="fill"),
        reference=images[2],
    )
    with RewardClient(server.url, wire=wire) as client:
        response = client.score(item, "mean")
    received = server.received[-1]
    (sent,) = received.request["items"]
    assert sent["metadata"] == {"target": "OK", "n": [1, None]}
    assert sent["candidates"][1]["fps"] == 8
    assert sent["candidates"][2] == {"text": "two"}
    assert sent["context"]["question"] == "why?"
    assert sent["context"]["task"] == "fill"
    assert "criterion" not in sent["context"]
    np.testing.assert_array_equal(received.images["item0.context.mask"], np.repeat(mask[:, :, None] * 255, 3, axis=2))
    np.testing.assert_array_equal(received.images["item0.context.image"], images[1])
    np.testing.assert_array_equal(received.images["item0.reference.image"], images[2])
    np.testing.assert_array_equal(received.images["item0.candidate1.frame2"], images[2])
    assert response[0].scores["mean"] == pytest.approx([images[0].mean() / 255, images[0].mean() / 255, 3.0])


def test_a_batch_tensor_is_a_group_of_images(server):
    batch = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with RewardClient(server.url) as client:
        response = client.score(Item("x", batch), "mean")
    sent = server.received[-1].images
    for k in range(3):
        expected = (batch[k].detach() * 255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(sent[f"item0.image{k}"], expected)
    assert len(response[0].total) == 3


def test_compare_all_pairs(server, images):
    with RewardClient(server.url) as client:
        (result,) = client.compare(Item("x", images), "judge", explain=True).raise_for_errors()
    request = server.received[-1].request
    assert (request["model"], request["both_orders"], request["items"][0]["pairs"]) == ("judge", True, "all")
    assert result.ranking == [2, 1, 0]
    assert [(c.i, c.j) for c in result.comparisons] == [(0, 1), (0, 2), (1, 2)]
    assert result.comparisons[0].text == ("because", "because")
    probabilities, ok = result.as_array("probabilities")
    np.testing.assert_array_equal(ok, ~np.eye(3, dtype=bool))
    assert probabilities[0, 2] == pytest.approx(1 - probabilities[2, 0])
    assert result.strength == pytest.approx([image.mean() / 255 for image in images])


def test_compare_given_pairs_in_one_order(server, images):
    with RewardClient(server.url, wire="json") as client:
        response = client.compare(Item("x", images), "judge", pairs=[(0, 2)], both_orders=False)
    assert server.received[-1].request["items"][0]["pairs"] == [[0, 2]]
    assert response[0].comparisons[0].orders[1] is None
    assert response[0].probabilities[0][1] is None
    assert response.fingerprints == {"judge": "sha256:feed"}


def test_gradient_sends_floats_unrounded_and_gives_writable_arrays(server, images):
    floats = np.random.default_rng(1).random((3, 6, 4), dtype=np.float32)
    with RewardClient(server.url, wire="json") as client:
        response = client.gradient([Item("x", [floats]), Item("y", images[:1])], {"mean": 3.0})
    received = server.received[-1]
    np.testing.assert_array_equal(received.images["item0.image0"], floats)
    expected = images[0].transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(received.images["item1.image0"], expected)
    gradient = response[0].gradients[0]
    assert gradient.dtype == np.float32
    np.testing.assert_allclose(gradient, np.full((3, 6, 4), 3.0 / floats.size), rtol=1e-6)
    gradient += 1  # a trainer puts it into a tensor of its own: it must not be read-only memory
    assert response[1].gradients[0].shape == (3, 7, 5)
    assert response[0].total == pytest.approx([3 * floats.mean()])
    assert "both_orders" not in received.request
    with RewardClient(server.url) as client:
        client.gradient(Item("x", images[:1]), "mean", both_orders=False)
    assert server.received[-1].request["both_orders"] is False


def test_models_and_ready(server):
    with RewardClient(server.url) as client:
        (info,) = client.models()
        assert (info.name, info.kind, info.range, info.ready) == ("mean", "pointwise", (0.0, 1.0), True)
        assert info.raw["verified"] is True
        assert client.ready() is True
        server.play(server.problem(503, "starting", Retry_After="5"))
        assert client.ready() is False
    server.shutdown()
    server.server_close()
    with RewardClient(server.url) as client:
        assert client.ready() is False


def test_connections_are_reused(server, images):
    with RewardClient(server.url) as client:
        for _ in range(5):
            client.score(Item("x", images), "mean")
    assert len({received.peer for received in server.received}) == 1


def test_one_client_serves_many_threads(server):
    shades = [np.full((4, 4, 3), shade, np.uint8) for shade in range(40)]
    with RewardClient(server.url) as client, ThreadPoolExecutor(8) as pool:
        totals = list(pool.map(lambda shade: client.score(Item("x", [shade]), "mean")[0].total[0], shades))
    assert totals == pytest.approx([shade / 255 for shade in range(40)])


def test_the_key_is_sent_and_not_shown(server, images):
    with RewardClient(server.url, api_key="s3cret") as client:
        client.score(Item("x", images), "mean")
        assert "s3cret" not in repr(client)
    assert server.received[-1].headers["Authorization"] == "Bearer s3cret"


def test_async_client_does_the_same(server, images):
    async def run():
        async with AsyncRewardClient(server.url) as client:
            assert await client.ready() is True
            assert [info.name for info in await client.models()] == ["mean"]
            responses = await asyncio.gather(*(client.score(Item("x", [image]), "mean") for image in images))
            compared = await client.compare(Item("x", images), "judge")
            gradients = await client.gradient(Item("x", images), "mean")
        return responses, compared, gradients

    responses, compared, gradients = asyncio.run(run())
    assert [r[0].total[0] for r in responses] == pytest.approx([image.mean() / 255 for image in images])
    assert compared[0].ranking == [2, 1, 0]
    assert [g.shape for g in gradients[0].gradients] == [(3, *image.shape[:2]) for image in images]


def test_async_sends_the_pixels_of_the_call_even_if_the_array_changes_afterwards(server):
    image = np.full((64, 64, 3), 10, np.uint8)

    async def run():
        async with AsyncRewardClient(server.url) as client:
            call = asyncio.create_task(client.score(Item("x", [image]), "mean"))
            await asyncio.sleep(0)
            image[:] = 200
            return await call

    assert asyncio.run(run())[0].total == pytest.approx([10 / 255])


@pytest.mark.parametrize(
    ("item", "models", "options", "error", "match"),
    [
        ({"prompt": "x", "images": []}, "m", {}, ValueError, "at least one candidate"),
        ({"prompt": "x"}, "m", {}, ValueError, "either images or candidates"),
        ({"prompt": "x", "images": [np.zeros((2, 2, 3), np.uint8)], "imags": 1}, "m", {}, ValueError, "'imags'"),
        ({"prompt": 3, "images": [np.zeros((2, 2, 3), np.uint8)]}, "m", {}, TypeError, "prompt"),
        ({"prompt": "x", "images": Image.new("RGB", (4, 4))}, "m", {}, TypeError, "one image"),
        ({"prompt": "x", "images": np.zeros((4, 4, 3), np.uint8)}, "m", {}, TypeError, "one image"),
        ({"prompt": "x", "images": ["cat.png"]}, "m", {}, TypeError, "not str"),
        ({"prompt": "x", "candidates": [{"text": "a", "image": np.zeros((2, 2, 3))}]}, "m", {}, ValueError, "one of"),
        ({"prompt": "x", "candidates": [{}]}, "m", {}, ValueError, "none"),
        ({"prompt": "x", "candidates": [{"frames": [np.zeros((2, 2, 3))]}]}, "m", {}, ValueError, "fps"),
        ({"prompt": "x", "candidates": [{"text": "a", "fps": 8}]}, "m", {}, ValueError, "fps"),
        ({"prompt": "x", "candidates": [{"text": "a"}], "metadata": {"x": float("nan")}}, "m", {}, ValueError, "JSON"),
        ({"prompt": "x", "candidates": [{"text": "a"}], "metadata": {"x": object()}}, "m", {}, TypeError, "JSON"),
        ([], "m", {}, ValueError, "at least one item"),
        ({"prompt": "x", "candidates": [{"text": "a"}]}, {}, {}, ValueError, "at least one reward model"),
        ({"prompt": "x", "candidates": [{"text": "a"}]}, {"m": float("nan")}, {}, ValueError, "finite"),
        ({"prompt": "x", "candidates": [{"text": "a"}]}, "m", {"deadline": 0}, ValueError, "deadline"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_sent(server, item, models, options, error, match):
    with RewardClient(server.url) as client, pytest.raises(error, match=match):
        client.score(item, models, **options)
    assert server.received == []


@pytest.mark.parametrize("pairs", ["some", [], [[0, 0]], [[0, 3]], [[-1, 0]], [[0, 1, 2]], [[0, 1], [1, 0]]])
def test_impossible_pairs_raise(server, images, pairs):
    with RewardClient(server.url) as client, pytest.raises(ValueError, match="pair"):
        client.compare(Item("x", images), "judge", pairs=pairs)
    assert server.received == []


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("localhost:8000", {}),
        ("ftp://host", {}),
        ([], {}),
        ("http://user:pw@host", {}),
        ("http://host", {"wire": "pickle"}),
        ("http://host", {"patience": -1}),
        ("http://host", {"timeout": 0}),
        ("http://host", {"api_key": "a\nb"}),
    ],
)
def test_wrong_settings_raise(url, options):
    with pytest.raises(ValueError, match=r"."):
        RewardClient(url, **options)


def test_reprs_are_short(images):
    item = Item("a cat", images, context=Context(image=images[0], task="fill"))
    assert repr(item) == "Item('a cat', 3 images)"
    assert repr(item.context) == "Context(image, task)"
    assert repr(Candidate(frames=images, fps=8)) == "Candidate(3 frames, fps=8)"


def test_the_readme_runs(server, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "trainer_client" / "README.md").read_text(), re.DOTALL)
    exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert "'jpeg-incompressibility': [" in capsys.readouterr().out
