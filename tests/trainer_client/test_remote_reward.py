"""The remote reward as a torch function: its gradient is the one that was served, and a failure moves nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
import torch

from tests.trainer_client.conftest import gradients, score, serving
from trainer_client import RewardClient, SamplesFailed
from trainer_client.remote_reward import RemoteReward

PROMPTS = ["a", "b", "b"]


@pytest.fixture
def images():
    return torch.rand(3, 3, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def remote(server):
    with RewardClient(server.url, patience=5) as client:
        yield RemoteReward(client, {"mean": 2.0})


def fail_second(handler, received):
    """Image 1 has no score: the service sends no total and no gradient of it."""
    response, tensors = score(received, handler.server), gradients(received, handler.server)
    result = response["results"][1]
    result["scores"]["mean"][0] = result["total"][0] = None
    result["errors"][0] = [{"model": "mean", "code": "model_error", "message": "broken"}]
    del tensors["item1.image0"]
    body = safetensors.numpy.save(tensors, {"response": json.dumps(response)})
    handler.answer(body, content_type="application/vnd.safetensors")


def test_totals_and_gradients_are_those_served(server, remote, images):
    rewards = remote(images, PROMPTS, [{"n": k} for k in range(3)])
    assert rewards.total.detach().numpy() == pytest.approx(2 * images.detach().mean((1, 2, 3)).numpy())
    assert rewards.ok.all()
    assert rewards.scores["mean"].numpy() == pytest.approx(images.detach().mean((1, 2, 3)).numpy())
    weights = torch.tensor([1.0, -3.0, 0.5])
    (weights * rewards.total).sum().backward()
    expected = (2 * weights / 72)[:, None, None, None].expand_as(images)
    torch.testing.assert_close(images.grad, expected)
    items = server.received[-1].request["items"]
    assert [item["prompt"] for item in items] == PROMPTS
    assert [item.get("metadata") for item in items] == [{"n": 0}, {"n": 1}, {"n": 2}]
    sent = np.stack([server.received[-1].images[f"item{k}.image0"] for k in range(3)])
    np.testing.assert_array_equal(sent, images.detach().numpy())


def test_a_failed_sample_moves_nothing_and_is_counted(server, remote, images):
    server.play(fail_second)
    rewards = remote(images, PROMPTS)
    assert rewards.ok.tolist() == [True, False, True]
    assert torch.isfinite(rewards.total).all()
    assert torch.isnan(rewards.scores["mean"]).tolist() == [False, True, False]
    [(index, failure)] = rewards.failures
    assert (index, failure.code) == (1, "model_error")
    assert rewards.mean().item() == pytest.approx(2 * images.detach()[[0, 2]].mean().item())
    rewards.total.sum().backward()
    assert (images.grad[1] == 0).all()
    torch.testing.assert_close(images.grad[[0, 2]], torch.full((2, 3, 6, 4), 2 / 72))
    assert (remote.samples, remote.failed) == (3, 1)
    remote(images, PROMPTS)
    assert (remote.samples, remote.failed) == (6, 1)


def test_a_batch_without_any_reward_has_no_mean(server, remote, images):
    server.play(fail_second)
    rewards = remote(images[:2], PROMPTS[:2])._replace(ok=torch.tensor([False, False]))
    with pytest.raises(SamplesFailed, match="image 1, mean: model_error"):
        rewards.mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_have_the_images_dtype(remote, dtype):
    images = torch.full((2, 3, 4, 4), 0.5, dtype=dtype, requires_grad=True)
    rewards = remote(images, ["a", "b"])
    assert rewards.total.dtype == torch.float32
    rewards.mean().backward()
    assert images.grad.dtype == dtype
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 48))


def test_models_of_several_services_are_summed(images):
    with (
        serving({"a": "sha256:a"}) as left,
        serving({"b": "sha256:b"}, factor=10) as right,
        RewardClient([left.url, right.url], patience=5) as client,
    ):
        RemoteReward(client, {"a": 1.0, "b": -0.5})(images, PROMPTS).total.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, (1 - 5) / 72))


def test_without_gradient_there_is_a_total(remote, images):
    with torch.no_grad():
        rewards = remote(images, PROMPTS)
    assert not rewards.total.requires_grad
    assert not remote(images.detach(), PROMPTS).total.requires_grad


def test_a_second_derivative_is_refused(remote, images):
    (gradient,) = torch.autograd.grad(remote(images, PROMPTS).total.square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("images", "prompts", "metadata", "match"),
    [
        (torch.zeros(2, 3, 4, 4), ["a"], None, "2 images come with 1 prompts"),
        (torch.zeros(2, 3, 4, 4), ["a", "b"], [{}], "1 metadata"),
        (torch.zeros(3, 4, 4), ["a", "b", "c"], None, r"\[B, 3, H, W\]"),
        (torch.zeros(1, 1, 4, 4), ["a"], None, r"\[B, 3, H, W\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ["a"], None, "uint8"),
        (torch.full((1, 3, 4, 4), -1.0), ["a"], None, r"\[0, 1\]"),
        (torch.full((1, 3, 4, 4), float("nan")), ["a"], None, r"\[0, 1\]"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_sent(server, remote, images, prompts, metadata, match):
    with pytest.raises(ValueError, match=match):
        remote(images, prompts, metadata)
    assert server.received == []
