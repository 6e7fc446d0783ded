"""The embedded models through a real service: gradients of shapes-clip, and the code of the README."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models.base import LoadOptions
from models.registry import load_model
from models.shapes.world import Scene, SceneObject, render
from models.shapes_clip import ShapesClip
from tests.service.live import Live, running
from trainer_client import Item, RewardClient

PROMPT = "a red circle left of a blue square"
SCENE = Scene((SceneObject("circle", "red", (1, 0)), SceneObject("square", "blue", (1, 2))))
EMBEDDED = ("jpeg-compressibility", "jpeg-incompressibility", "ocr", "shapes-clip", "shapes-oracle")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("embedded"), {"models": {name: {} for name in EMBEDDED}}) as live:
        yield live


@pytest.fixture(scope="module")
def client(service: Live) -> Iterator[RewardClient]:
    with RewardClient(service.url, patience=60) as client:
        yield client


def drawing(size: int) -> np.ndarray:
    """Float pixels [3, H, W] away from 0 and 1, where clamping would stop a gradient."""
    pixels = np.asarray(render(SCENE, size), np.float32).transpose(2, 0, 1) / 255
    return (0.1 + 0.8 * pixels).astype(np.float32)


def gradient_in_process(pixels: np.ndarray) -> tuple[float, np.ndarray]:
    model = load_model("shapes-clip", LoadOptions(dtype=torch.float32))
    assert isinstance(model, ShapesClip)
    leaf = torch.from_numpy(pixels.copy()).requires_grad_()
    tokens, _ = model.prepare_text(PROMPT)
    head = model.head(model.encode_image(model.preprocess_tensor(leaf[None])), model.encode_text(tokens[None]))
    head.score_B.sum().backward()
    assert leaf.grad is not None
    return head.score_B[0].item(), leaf.grad.numpy()


@pytest.mark.parametrize("size", [64, 96])
def test_the_gradient_of_shapes_clip_is_that_of_autograd_in_process(client: RewardClient, size: int) -> None:
    pixels = drawing(size)
    answer = client.gradient(Item(PROMPT, [pixels, pixels[:, ::-1].copy()]), {"shapes-clip": 1.0})
    answer.raise_for_errors()
    expected_score, expected = gradient_in_process(pixels)
    served = answer[0].gradients[0]
    assert served is not None
    assert answer[0].total[0] == pytest.approx(expected_score, rel=1e-4)
    cosine = (served * expected).sum() / (np.linalg.norm(served) * np.linalg.norm(expected))
    assert cosine >= 0.9999
    assert np.linalg.norm(served) == pytest.approx(np.linalg.norm(expected), rel=1e-3)


def test_the_gradient_of_shapes_clip_is_that_of_finite_differences(client: RewardClient) -> None:
    """Along the gradient the served score changes as the served gradient says."""
    pixels = drawing(64)

    def ask(image: np.ndarray) -> tuple[float, np.ndarray]:
        answer = client.gradient(Item(PROMPT, [image]), {"shapes-clip": 1.0})
        answer.raise_for_errors()
        total, gradient = answer[0].total[0], answer[0].gradients[0]
        assert total is not None
        assert gradient is not None
        return total, gradient

    _, gradient = ask(pixels)
    step = (0.002 * gradient / np.abs(gradient).max()).astype(np.float32)
    difference = (ask(pixels + step)[0] - ask(pixels - step)[0]) / 2
    assert difference == pytest.approx(float((gradient * step).sum()), rel=0.03)


def test_every_embedded_model_is_ready_and_scores(client: RewardClient) -> None:
    assert {info.name for info in client.models() if info.ready} == set(EMBEDDED)
    item = Item(PROMPT, [render(SCENE)], metadata={"target": "red"})
    response = client.score(item, dict.fromkeys(EMBEDDED, 1.0), explain=True)
    response.raise_for_errors()
    assert response[0].scores["shapes-oracle"] == [1.0]


def test_the_code_of_the_readme_runs(service: Live, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0].replace("http://127.0.0.1:8000", service.url), "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert "None" not in printed[0]
