"""Every model with published weights through a real service: its true classes, on tiny random checkpoints of its form.

Nobody lists models by hand: they are found by their ``sources``.
"""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import models.catalog  # noqa: F401
from models.base import Candidate, LoadOptions, Output, RewardModel, Sample
from models.registry import get_info, get_model, list_models, load_model
from models.towers import TowerReward
from tests.service.live import Live, command, environment, running
from trainer_client import Item, RewardClient

NAMES = [name for name in list_models() if get_info(name).sources and get_info(name).kind == "pointwise"]
DIFFERENTIABLE = [name for name in NAMES if get_info(name).differentiable]
IMAGES = Path(__file__).parents[1] / "fixtures" / "pointwise" / "images"
PROMPT = 'a cat beside a sign that says "OPEN"'


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadOptions]:
    return {name: get_model(name).random_checkpoint(tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(scope="module")
def local(loads: dict[str, LoadOptions]) -> dict[str, RewardModel]:
    return {name: load_model(name, options) for name, options in loads.items()}


def model_settings(loads: dict[str, LoadOptions]) -> dict[str, Any]:
    return {name: {"weights": load.weights, "options": dict(load.options)} for name, load in loads.items()}


@pytest.fixture(scope="module")
def service(loads: dict[str, LoadOptions], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = {"models": model_settings(loads), "micro_batch": 4}
    with running(tmp_path_factory.mktemp("published"), settings) as live:
        yield live


@pytest.fixture(scope="module")
def client(service: Live) -> Iterator[RewardClient]:
    with RewardClient(service.url, patience=60) as client:
        yield client


def photographs() -> list[Image.Image]:
    return [Image.open(IMAGES / f"{name}.png").convert("RGB") for name in ("landscape", "portrait", "square")]


def metadata_of(local: dict[str, RewardModel]) -> dict[str, Any]:
    """What the canaries of all models bring along: one item may carry it for all of them."""
    merged: dict[str, Any] = {}
    for model in local.values():
        merged |= dict(model.canary().metadata)
    return merged


def test_there_are_such_models() -> None:
    assert {"pickscore", "hpsv2", "hpsv2.1", "clip-score", "aesthetic", "imagereward", "hpsv3", "geneval"} <= set(NAMES)


def test_the_catalogue_tells_that_weights_are_present_licence_size_and_range(service: Live) -> None:
    rows = {row["name"]: row for row in service.get("/models").json()["models"]}
    for name in NAMES:
        row = rows[name]
        assert row["ready"]
        assert row["license"]
        assert row["citation"]
        assert row["weights_bytes"] > 0
        assert row["range"][0] < row["range"][1]
        assert row["differentiable"] is get_info(name).differentiable
        assert row["weights_present"]
        assert {source["role"] for source in row["sources"]} == {source.role for source in get_info(name).sources}


def test_one_request_is_scored_by_all_of_them_as_in_process(
    client: RewardClient, local: dict[str, RewardModel]
) -> None:
    photos, metadata = photographs(), metadata_of(local)
    response = client.score(Item(PROMPT, photos, metadata=metadata), dict.fromkeys(NAMES, 1.0))
    response.raise_for_errors()
    for name, model in local.items():
        samples = [Sample(PROMPT, Candidate(image=photo), metadata=metadata) for photo in photos]
        plain = [model.run([model.prepare(sample)])[0] for sample in samples]
        for i, output in enumerate(plain):
            assert isinstance(output, Output), output
            scale = max(1.0, abs(output.score))
            assert response[0].scores[name][i] == pytest.approx(output.score, abs=2e-5 * scale), name
            if output.outputs:
                assert response[0].outputs[name][i] == pytest.approx(dict(output.outputs), rel=1e-4, abs=1e-5)


def test_hpsv3_answers_its_sigma_as_uncertainty(service: Live) -> None:
    image = base64.b64encode((IMAGES / "square.png").read_bytes()).decode()
    body = {"models": {"hpsv3": 1.0}, "items": [{"prompt": PROMPT, "images": [image]}]}
    answer = service.post("/score", body).json()["results"][0]
    assert answer["outputs"]["hpsv3"][0]["uncertainty"] > 0
    assert answer["total"] == answer["scores"]["hpsv3"]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_over_http_is_that_of_autograd_in_process(
    name: str, client: RewardClient, local: dict[str, RewardModel]
) -> None:
    model = local[name]
    assert isinstance(model, TowerReward)
    generator = np.random.default_rng(0)
    images = [generator.uniform(0.1, 0.9, (3, 64, 80)).astype(np.float32) for _ in range(3)]
    images.append(generator.uniform(0.1, 0.9, (3, 96, 64)).astype(np.float32))  # another shape in the same request
    answer = client.gradient(Item(PROMPT, images), {name: 1.0})
    answer.raise_for_errors()
    tokens, _ = model.prepare_text(PROMPT)
    for image, served, total in zip(images, answer[0].gradients, answer[0].total, strict=True):
        leaf = torch.from_numpy(image.copy()).requires_grad_()
        head = model.head(model.encode_image(model.preprocess_tensor(leaf[None])), model.encode_text(tokens[None]))
        (expected,) = torch.autograd.grad(head.score_B.sum(), leaf)
        assert total == pytest.approx(head.score_B[0].item(), rel=1e-4, abs=1e-5)
        assert served is not None
        assert float(expected.norm()) > 0
        cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(served).flatten(), expected.flatten(), dim=0)
        assert float(cosine) >= 0.9999
        assert np.linalg.norm(served) == pytest.approx(float(expected.norm()), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_pointwise_models_compare(name: str, client: RewardClient, local: dict[str, RewardModel]) -> None:
    answer = client.compare(Item(PROMPT, photographs(), metadata=metadata_of(local)), name)
    assert sorted(answer[0].ranking) == [0, 1, 2]


def test_a_group_is_scored_as_its_images_are_alone(client: RewardClient, local: dict[str, RewardModel]) -> None:
    """To the last bit, for images of several shapes and prompts of several lengths in one request."""
    photos, metadata = photographs(), metadata_of(local)
    prompts = [PROMPT, "a cat", "a cat " * 12]
    weights = dict.fromkeys(NAMES, 1.0)
    together = client.score([Item(prompt, photos, metadata=metadata) for prompt in prompts], weights)
    for i, prompt in enumerate(prompts):
        for j, photo in enumerate(photos):
            alone = client.score(Item(prompt, [photo], metadata=metadata), weights)
            for name in NAMES:
                assert alone[0].scores[name][0] == together[i].scores[name][j], name


def test_a_service_without_its_weights_says_which_and_how_in_one_line(tmp_path: Path) -> None:
    settings = {"models": {"pickscore": {}}, "weights_dir": str(tmp_path / "weights")}
    offline = environment(HF_HUB_OFFLINE="1")
    process = subprocess.run(
        command(tmp_path, settings), env=offline, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode not in (0, None)
    output = process.stdout + process.stderr
    assert "Traceback" not in output
    for part in ("yuvalkirstain/PickScore_v1", "model.safetensors", "models.pickscore.weights"):
        assert part in output
    assert str(tmp_path / "weights") in output


def test_options_reach_the_model_and_the_fingerprint(loads: dict[str, LoadOptions]) -> None:
    load = loads["clip-score"]
    other = replace(load, options={**load.options, "preprocessing": "hf"})
    sample = Sample(PROMPT, Candidate(image=photographs()[0]))
    scores = []
    for options in (load, other):
        model = load_model("clip-score", options)
        output = model.run([model.prepare(sample)])[0]
        assert isinstance(output, Output)
        scores.append(output.score)
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)
