"""Every published model on a CUDA device, from a tiny random checkpoint of its true structure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import models.catalog  # noqa: F401
from models.base import Candidate, LoadOptions, Output, Sample
from models.preprocessing import to_float_tensor
from models.registry import get_info, get_model, list_models
from models.towers import TowerReward
from service.engine.batcher import Batcher, GradientResult
from service.engine.features import FeatureCache
from service.engine.request import Made
from service.engine.worker import TensorSample, Worker, WorkerOptions
from service.settings import ModelSettings, Settings
from service.telemetry import Telemetry
from tests.service.engine import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of the compiler, about itself
]

IMAGES = Path(__file__).parents[2] / "fixtures" / "pointwise" / "images"
PUBLISHED = [name for name in list_models() if get_info(name).sources and get_info(name).kind == "pointwise"]
TOWERS = [name for name in PUBLISHED if issubclass(get_model(name), TowerReward)]
DIFFERENTIABLE = [name for name in TOWERS if get_info(name).differentiable]
CPU = torch.device("cpu")
MICRO_BATCH = 4


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda:0")


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """float32 means float32 here: by default cuDNN's convolutions round to TF32, which has ten bits of mantissa."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadOptions]:
    return {name: get_model(name).random_checkpoint(tmp_path_factory.mktemp(name), "tiny") for name in PUBLISHED}


def worker_of(
    name: str,
    checkpoint: LoadOptions,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    compile: str = "off",
    gradients: bool = False,
) -> Worker:
    """A loaded worker without a lane and without caches: every batch runs, on the calling thread."""
    telemetry = Telemetry()
    options = WorkerOptions(
        name, replace(checkpoint, device=device, dtype=dtype), MICRO_BATCH, "exact", compile, 60.0, gradients
    )
    batcher = Batcher(name, max_cost=1024, max_delay_s=0.0, wakeup=threading.Condition(), telemetry=telemetry)
    worker = Worker(
        options, batcher, (FeatureCache("image", 0, telemetry), FeatureCache("text", 0, telemetry)), telemetry
    )
    worker.load()
    return worker


def samples_of(name: str) -> list[Sample]:
    """The canary and photographs of several shapes, with prompts of several lengths."""
    canary = get_model(name).canary(get_model(name))  # type: ignore[arg-type]  # it reads nothing of the model
    pictures = [canary.image(name)]
    for file in ("landscape", "portrait", "square", "tiny"):
        with Image.open(IMAGES / f"{file}.png") as picture:
            pictures.append(picture.convert("RGB"))
    prompts = (canary.prompt, "a red circle left of a blue square", "a cat " * 12)
    return [
        replace(canary, prompt=prompts[i % len(prompts)], candidate=Candidate(image=picture))
        for i, picture in enumerate([*pictures, *pictures[:2]])
    ]


def spread(values: list[float]) -> float:
    return max(values) - min(values)


@pytest.mark.parametrize("name", PUBLISHED)
def test_scores_are_those_of_the_cpu(name: str, checkpoints: dict[str, LoadOptions], device: torch.device) -> None:
    samples = samples_of(name)
    expected = tiny.scores(worker_of(name, checkpoints[name], CPU), samples)
    found = tiny.scores(worker_of(name, checkpoints[name], device), samples)
    assert spread(expected) > 0
    for score, reference in zip(found, expected, strict=True):
        assert abs(score - reference) <= 1e-3 * max(abs(reference), spread(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_score_is_bit_equal_alone_among_neighbours_and_at_any_place(
    name: str, dtype: torch.dtype, checkpoints: dict[str, LoadOptions], device: torch.device
) -> None:
    worker = worker_of(name, checkpoints[name], device, dtype)
    samples = samples_of(name)
    together = tiny.scores(worker, samples)
    assert tiny.scores(worker, samples[::-1])[::-1] == together
    assert [tiny.scores(worker, [entry])[0] for entry in samples] == together


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.25)])
@pytest.mark.parametrize("name", TOWERS)
def test_cuda_graphs_are_captured_give_the_eager_scores_and_are_exact(
    name: str, dtype: torch.dtype, tolerance: float, checkpoints: dict[str, LoadOptions], device: torch.device
) -> None:
    torch._dynamo.utils.counters.clear()
    worker = worker_of(name, checkpoints[name], device, dtype, compile="on")
    assert worker._towers is not None
    assert all(part.compiled for part in worker._towers._parts)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    samples = samples_of(name)
    together = tiny.scores(worker, samples)
    eager = tiny.scores(worker_of(name, checkpoints[name], device, dtype), samples)
    for score, reference in zip(together, eager, strict=True):
        assert abs(score - reference) <= tolerance * max(spread(eager), 1e-3 * abs(reference))
    assert tiny.scores(worker, samples[::-1])[::-1] == together
    assert [tiny.scores(worker, [entry])[0] for entry in samples] == together


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TOWERS if get_model(name).joint])  # type: ignore[attr-defined]
def test_a_replayed_graph_of_a_joint_head_does_not_overwrite_an_earlier_result(
    name: str, checkpoints: dict[str, LoadOptions], device: torch.device
) -> None:
    """Its inputs are features in memory of their own, which a graph copies to where it was captured."""
    worker = worker_of(name, checkpoints[name], device, compile="on")
    assert worker._towers is not None
    assert worker._towers.joint is not None
    canary = worker.prepare(worker.model.canary(), "score")
    towers, joint = worker._towers, worker._towers.joint
    with torch.inference_mode():
        images = towers.images([canary.pixels, 255 - canary.pixels, canary.pixels // 2])
        text = towers.texts([canary.tokens])[0]
        kept_images = images.clone()
        first = joint([(images[0], text)])
        kept = first.clone()
        second = joint([(images[1], text), (images[2], text)])
    assert torch.equal(images, kept_images)
    assert torch.equal(first, kept)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_the_cpu_even_for_a_bfloat16_model(
    name: str, checkpoints: dict[str, LoadOptions], device: torch.device
) -> None:
    tensors = [to_float_tensor(entry.image(name)) for entry in samples_of(name)[:3]]
    answers: list[list[GradientResult]] = []
    for where, dtype in ((CPU, torch.float32), (device, torch.bfloat16)):
        worker = worker_of(name, checkpoints[name], where, dtype, gradients=True)
        inputs = [worker.prepare(TensorSample("a red circle", pixels.clone()), "gradient") for pixels in tensors]
        answers.append([o for o in worker._bisect("gradient", inputs) if isinstance(o, GradientResult)])
    assert [len(results) for results in answers] == [3, 3]
    for expected, found in zip(*answers, strict=True):
        assert found.gradient.device == CPU
        assert _cosine(found.gradient, expected.gradient) >= 0.999
        assert float(found.gradient.norm()) == pytest.approx(float(expected.gradient.norm()), rel=1e-2)


def _cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0))


def test_all_models_in_one_process_score_as_each_alone(
    checkpoints: dict[str, LoadOptions], device: torch.device
) -> None:
    async def together(names: list[str], samples: dict[str, list[Sample]]) -> dict[str, list[Any]]:
        chosen = Settings(
            models={
                name: ModelSettings(weights=checkpoints[name].weights, options=dict(checkpoints[name].options))
                for name in names
            },
            device=str(device),
            dtype="bfloat16",
            compile="off",
            micro_batch=MICRO_BATCH,
        )
        async with tiny.serving(chosen) as engine:
            asked = [
                tiny.ask(engine, [name], [lambda entry=entry: Made(entry) for entry in samples[name]], seconds=120.0)  # type: ignore[misc]
                for name in names
            ]
            results = await asyncio.gather(*asked)
        return {
            name: [result.outcomes[name] for result in of_model] for name, of_model in zip(names, results, strict=True)
        }

    samples = {name: samples_of(name) for name in PUBLISHED}
    found = asyncio.run(together(PUBLISHED, samples))
    for name in PUBLISHED:
        expected = tiny.scores(worker_of(name, checkpoints[name], device, torch.bfloat16), samples[name])
        assert [outcome.score for outcome in found[name] if isinstance(outcome, Output)] == expected
