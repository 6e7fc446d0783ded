"""What only a CUDA device can show. The same laws hold on the CPU, in the files beside this one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from models.base import Output, Sample
from service.engine.batcher import GradientResult
from service.engine.compile import BucketedFunction
from service.engine.gradient import TowerGradient
from service.engine.plan import resolve_device
from service.engine.request import Made
from service.engine.staging import BUFFERS, KEPT_SHAPES, Stager
from service.engine.worker import TensorSample
from service.settings import Settings
from tests.service.engine import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of the compiler, about itself
]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda:0")


@pytest.fixture
def little_memory(device: torch.device) -> Iterator[float]:
    """A real limit: allocations beyond 1 GiB of the device raise torch.OutOfMemoryError, in this test alone."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = (torch.cuda.memory_reserved(device) + (1 << 30)) / total
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    yield 1 << 30
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    torch.cuda.empty_cache()


def mixed(count: int, seed: int = 0) -> list[Sample]:
    chooser = random.Random(seed)
    return [tiny.sample(seed * 1000 + i, chooser.choice(["a", "b", "a longer prompt than that"])) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_pinned_staging_equals_a_plain_copy_while_buffers_are_reused(dtype: torch.dtype, device: torch.device) -> None:
    stager = Stager(device)
    batches = []
    expected = []
    for i in range(8 * BUFFERS):  # more batches in flight than there are buffers
        rows = [torch.full((3, 256, 256), (i * 7 + j) % 100).to(dtype) for j in range(3)]
        batches.append(stager.stage(rows, 4))
        expected.append(torch.stack([*rows, rows[-1]]))
    for batch, plain in zip(batches, expected, strict=True):
        assert batch.device == device
        assert torch.equal(batch.cpu(), plain)


def test_a_staged_batch_is_complete_when_the_forward_reads_it(device: torch.device) -> None:
    stager = Stager(device)
    busy = torch.randn(4096, 4096, device=device)
    for i in range(20):
        for _ in range(5):
            busy = (busy @ busy).tanh_()  # keeps the compute stream behind the copies
        rows = [torch.full((3, 512, 512), float(i + j)) for j in range(4)]
        sums = stager.stage(rows, 4).sum(dim=(1, 2, 3))
        assert sums.tolist() == [float(i + j) * 3 * 512 * 512 for j in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_is_bit_equal_alone_among_neighbours_and_at_any_place(dtype: torch.dtype, device: torch.device) -> None:
    worker = tiny.make_worker(device=device, dtype=dtype, micro_batch=32, cache_bytes=0)
    samples = mixed(40)
    together = tiny.scores(worker, samples)
    assert tiny.scores(worker, samples[::-1])[::-1] == together
    assert [tiny.scores(worker, [entry])[0] for entry in samples] == together


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("invariance", ["exact", "fast"])
def test_cuda_graphs_of_every_bucket_give_the_eager_scores(
    invariance: Any, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    options: dict[str, Any] = {"device": device, "dtype": dtype, "micro_batch": 32, "invariance": invariance}
    eager = tiny.make_worker(cache_bytes=0, **options)
    graphs = tiny.make_worker(cache_bytes=0, compile="on", **options)
    assert graphs._towers is not None
    assert graphs._towers.images.compiled
    for count in (1, 2, 3, 4, 8, 16, 31, 32, 33, 70):
        samples = mixed(count, seed=count)
        assert tiny.scores(graphs, samples) == pytest.approx(tiny.scores(eager, samples), abs=tolerance)


@pytest.mark.slow
def test_a_replayed_graph_does_not_overwrite_an_earlier_result(device: torch.device) -> None:
    worker = tiny.make_worker(device=device, micro_batch=8, compile="on", cache_bytes=0)
    assert worker._towers is not None
    rows = [[worker.prepare(entry, "score").pixels for entry in mixed(8, seed)] for seed in (1, 2)]
    with torch.inference_mode():
        first = worker._towers.images(rows[0])
        kept = first.clone()
        second = worker._towers.images(rows[1])
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_compiled_scores_are_exact_too(device: torch.device) -> None:
    worker = tiny.make_worker(device=device, dtype=torch.bfloat16, micro_batch=16, compile="on", cache_bytes=0)
    samples = mixed(20)
    together = tiny.scores(worker, samples)
    assert [tiny.scores(worker, [entry])[0] for entry in samples] == together


def test_a_batch_that_does_not_fit_is_halved_until_it_does(device: torch.device, little_memory: float) -> None:
    worker = tiny.make_worker(device=device, micro_batch=8, cache_bytes=0)
    samples = mixed(8)
    expected = tiny.scores(worker, samples)
    model = worker.model
    assert isinstance(model, tiny.TinyTower)
    per_row = int(little_memory * 0.3)  # three rows fit, four do not: two is the power that does

    def need_memory(batch: torch.Tensor) -> None:
        torch.empty(len(batch) * per_row, dtype=torch.uint8, device=device)

    model.before_image = need_memory
    assert tiny.scores(worker, samples) == pytest.approx(expected, abs=1e-5)
    assert worker.full == 2
    model.image_batches.clear()
    tiny.scores(worker, samples)
    assert max(model.image_batches) == 2  # remembered: no batch of four was tried again


def test_gradients_that_do_not_fit_are_halved_too(device: torch.device, little_memory: float) -> None:
    worker = tiny.make_worker(device=device, micro_batch=8)
    inputs = [worker.prepare(TensorSample("a", torch.rand(3, 48, 48)), "gradient") for _ in range(8)]
    expected = [o.gradient for o in worker._bisect("gradient", inputs) if isinstance(o, GradientResult)]
    assert isinstance(worker.model, tiny.TinyTower)
    per_row = int(little_memory * 0.3)

    def need_memory(batch: torch.Tensor) -> None:
        torch.empty(len(batch) * per_row, dtype=torch.uint8, device=device)

    worker.model.before_image = need_memory
    outcomes = [o.gradient for o in worker._bisect("gradient", inputs) if isinstance(o, GradientResult)]
    assert len(outcomes) == 8
    for got, want in zip(outcomes, expected, strict=True):
        assert torch.allclose(got, want, atol=1e-5)


def hold_two_parts(little_memory: float, device: torch.device) -> Callable[[torch.Tensor], None]:
    """A forward that wants two parts of memory, and still holds the first when the second fails.

    Each is 9 % of the memory for a row: of eight rows the second part fails, and four fit only when what the eight had
    held is free again.
    """

    def need_memory(batch: torch.Tensor) -> None:
        size = int(len(batch) * little_memory * 0.09)
        first = torch.empty(size, dtype=torch.uint8, device=device)
        second = torch.empty(size, dtype=torch.uint8, device=device)
        assert first.data_ptr() != second.data_ptr()

    return need_memory


def test_the_memory_of_a_failed_forward_is_free_for_the_next_one(device: torch.device, little_memory: float) -> None:
    worker = tiny.make_worker(device=device, micro_batch=8, cache_bytes=0)
    samples = mixed(8)
    expected = tiny.scores(worker, samples)
    inputs = [worker.prepare(TensorSample("a", torch.rand(3, 48, 48)), "gradient") for _ in range(8)]
    assert isinstance(worker.model, tiny.TinyTower)
    before = torch.cuda.memory_allocated(device)
    worker.model.before_image = hold_two_parts(little_memory, device)
    assert tiny.scores(worker, samples) == pytest.approx(expected, abs=1e-5)
    assert worker.full == 4
    assert all(isinstance(outcome, GradientResult) for outcome in worker._bisect("gradient", inputs))
    assert worker._gradient is not None
    assert worker._gradient.micro_batch == 4
    assert torch.cuda.memory_allocated(device) - before < 1 << 20


def test_a_full_gradient_batch_that_does_not_fit_does_not_stop_the_start(
    device: torch.device, little_memory: float
) -> None:
    worker = tiny.make_worker(device=device, micro_batch=8)
    assert isinstance(worker.model, tiny.TinyTower)
    worker.model.before_image = hold_two_parts(little_memory, device)
    gradient = TowerGradient(worker.model, 8)
    gradient.warm_up("a", torch.rand(3, 48, 48))
    assert gradient.micro_batch == 4


def test_a_joint_head_that_does_not_fit_is_halved(device: torch.device, little_memory: float) -> None:
    """What it reads are features on the device, which stay where they are."""
    need_memory = hold_two_parts(little_memory, device)

    def head(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        need_memory(images)
        return images.sum((1, 2)) + texts.sum(1)

    joint = BucketedFunction("head", head, device=device, micro_batch=8, invariance="exact", compile="off")
    images, texts = torch.rand(8, 16, 32, device=device), torch.rand(8, 5, device=device)
    found = joint(list(zip(images, texts, strict=True)))
    assert joint.micro_batch == 4
    assert torch.allclose(found, images.sum((1, 2)) + texts.sum(1))


def test_features_on_a_device_without_an_index_are_staged_where_they_are() -> None:
    """``device: cuda`` is not equal to ``cuda:0``, which is what tensors say."""
    features = [torch.rand(7, 3, device="cuda") for _ in range(3)]
    batch = Stager(torch.device("cuda")).stage(features, 4)
    assert torch.equal(batch, torch.stack([*features, features[-1]]))


def test_pinned_buffers_are_kept_for_few_shapes(device: torch.device) -> None:
    stager = Stager(device)
    for width in range(1, 3 * KEPT_SHAPES):
        rows = [torch.full((3, width), float(width)) for _ in range(2)]
        assert torch.equal(stager.stage(rows, 2).cpu(), torch.stack(rows))
    assert len(stager._buffers) == KEPT_SHAPES


@pytest.mark.slow
def test_rows_of_a_shape_that_was_not_warmed_up_run_uncompiled(device: torch.device) -> None:
    def doubled(rows_BD: torch.Tensor) -> torch.Tensor:
        eager.append(not torch.compiler.is_compiling())
        return rows_BD.sin() * 2

    eager: list[bool] = []
    function = BucketedFunction("test", doubled, device=device, micro_batch=4, invariance="exact", compile="on")
    with torch.inference_mode():
        function.warm_up(list(torch.rand(4, 3)))
        eager.clear()
        for width in (3, 5, 3):
            rows = torch.rand(4, width)
            assert torch.allclose(function(list(rows)).cpu(), rows.sin() * 2, atol=1e-6)
    assert eager == [False, True, False]


def test_gradients_on_the_device_are_those_of_the_cpu(device: torch.device) -> None:
    images = [torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    results = []
    for where in (tiny.CPU, device):
        worker = tiny.make_worker(device=where, dtype=torch.float32)
        inputs = [worker.prepare(TensorSample("a cat", image.clone()), "gradient") for image in images]
        results.append([o.gradient for o in worker._bisect("gradient", inputs) if isinstance(o, GradientResult)])
    for on_cpu, on_device in zip(*results, strict=True):
        assert on_device.device == tiny.CPU
        cosine = torch.nn.functional.cosine_similarity(on_cpu.flatten(), on_device.flatten(), dim=0)
        assert float(cosine) >= 0.9999


def test_several_models_share_one_device_and_its_thread() -> None:
    async def main() -> None:
        chosen = Settings(models=["tiny-tower", "tiny-other", "plain-device"], device="auto", compile="off")  # type: ignore[arg-type]
        async with tiny.serving(chosen) as engine:
            assert [lane.name for lane in engine._lanes] == ["lane-device"]
            towers = ["tiny-tower", "tiny-other"]
            for name in towers:
                assert engine.workers[name].options.load.device == resolve_device("auto")
                assert engine.workers[name].dtype() == "bfloat16"
            requests = [
                tiny.ask(engine, [*towers, "plain-device"], [tiny.maker(i * 10 + j, f"p{i}") for j in range(6)])
                for i in range(20)
            ]
            for results in await asyncio.gather(*requests):
                for result in results:
                    first, second = (result.outcomes[name] for name in towers)
                    assert isinstance(first, Output)
                    assert first == second  # the same towers under two names

    asyncio.run(main())


def test_pixels_from_pool_threads_reach_the_right_sample() -> None:
    async def main() -> None:
        chosen = Settings(models=["tiny-tower"], device="cuda:0", dtype="float32", compile="off")  # type: ignore[arg-type]
        async with tiny.serving(chosen) as engine:
            samples = mixed(64)
            results = await tiny.ask(engine, ["tiny-tower"], [lambda s=s: Made(s) for s in samples])  # type: ignore[misc]
            expected = tiny.scores(tiny.make_worker(device=torch.device("cuda:0"), micro_batch=32), samples)
            assert [r.outcomes["tiny-tower"].score for r in results] == expected  # type: ignore[union-attr]

    asyncio.run(main())
