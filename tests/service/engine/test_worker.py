from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import registry
from models.base import InputError, LoadOptions, ModelError, Output, Sample, SampleError
from service.engine.batcher import Batcher, Outcome, Ticket
from service.engine.checks import poisons_device
from service.engine.features import FeatureCache
from service.engine.lane import Lane
from service.engine.worker import DevicePoisoned, TensorSample, Worker, WorkerOptions
from service.telemetry import Telemetry
from tests.service.engine import tiny

OOM = torch.OutOfMemoryError


def plain(worker: Worker) -> tiny.Plain:
    assert isinstance(worker.model, tiny.Plain)
    return worker.model


def codes(outcomes: Sequence[Outcome]) -> list[str | None]:
    return [outcome.code if isinstance(outcome, SampleError) else None for outcome in outcomes]


def guilty(*prompts: str) -> Callable[[Sequence[str]], None]:
    def before_run(batch: Sequence[str]) -> None:
        if set(prompts) & set(batch):
            raise ValueError("one of these samples is guilty")

    return before_run


# -- failures ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 24), data=st.data())
@pytest.mark.parametrize("name", ["plain", "plain-device"])
def test_bisection_finds_exactly_the_guilty(name: str, count: int, data: st.DataObject) -> None:
    worker = tiny.make_worker(name, micro_batch=24)
    prompts = [f"prompt {i}" for i in range(count)]
    wrong = data.draw(st.sets(st.sampled_from(prompts)))
    plain(worker).before_run = guilty(*wrong)
    outcomes = worker._bisect("score", prompts)
    expected = ["model_error" if prompt in wrong else None for prompt in prompts]
    assert codes(outcomes) == expected
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert isinstance(outcome, ModelError) or outcome == Output(float(sum(prompt.encode())))


def test_one_guilty_sample_of_a_tower_fails_alone() -> None:
    worker = tiny.make_worker(cache_bytes=0)
    samples = [tiny.sample(i, "a") for i in range(7)]
    expected = tiny.scores(worker, samples)
    wrong = worker.prepare(samples[3], "score").pixels
    assert isinstance(worker.model, tiny.TinyTower)
    rows = worker.model.normalize(wrong[None])

    def refuse(batch: torch.Tensor) -> None:
        if any(torch.equal(row, rows[0]) for row in batch):
            raise ValueError("this image breaks the tower")

    worker.model.before_image = refuse
    outcomes = worker._bisect("score", [worker.prepare(entry, "score") for entry in samples])
    assert codes(outcomes) == [None, None, None, "model_error", None, None, None]
    assert [o.score for o in outcomes if isinstance(o, Output)] == expected[:3] + expected[4:]


def test_the_text_of_an_exception_does_not_reach_the_caller() -> None:
    worker = tiny.make_worker("plain")
    plain(worker).before_run = guilty("secret")
    (outcome,) = worker._bisect("score", ["secret"])
    assert isinstance(outcome, ModelError)
    assert outcome.message == "the model failed on this sample"


@pytest.mark.parametrize("name", ["plain", "plain-device"])
def test_outputs_that_are_missing_are_errors_and_never_shift_the_others(name: str) -> None:
    worker = tiny.make_worker(name)
    model = plain(worker)
    run = model.run
    model.run = lambda batch: list(run(batch))[:-1] if "short" in batch else run(batch)  # type: ignore[method-assign]
    outcomes = worker._bisect("score", ["a", "short", "b"])
    assert codes(outcomes) == [None, "model_error", None]
    assert outcomes[2] == Output(98.0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_an_error_whatever_the_model(number: float) -> None:
    worker = tiny.make_worker("plain")
    plain(worker).answer = lambda prompt: Output(number if prompt == "bad" else 1.0)
    assert codes(worker._bisect("score", ["a", "bad", "b"])) == [None, "not_finite", None]


def test_an_answer_that_is_no_output_is_an_error() -> None:
    worker = tiny.make_worker("plain")
    plain(worker).answer = lambda prompt: None if prompt == "bad" else Output(1.0)
    assert codes(worker._bisect("score", ["a", "bad"])) == [None, "model_error"]


def test_an_error_of_one_sample_that_the_model_returns_is_passed_on() -> None:
    worker = tiny.make_worker("plain")
    error = InputError("no text in it", code="target_missing")
    plain(worker).answer = lambda prompt: error if prompt == "bad" else Output(1.0)
    outcomes = worker._bisect("score", ["a", "bad"])
    assert outcomes == [Output(1.0), error]
    assert len(plain(worker).batches[-1]) == 2  # and no bisection was needed


def test_preparation_errors_are_typed() -> None:
    worker = tiny.make_worker("plain")

    def typed(sample: Sample) -> None:
        raise InputError("no", code="mine")

    def untyped(sample: Sample) -> None:
        raise ZeroDivisionError("secret")

    plain(worker).before_prepare = typed
    with pytest.raises(InputError) as caught:
        worker.prepare(tiny.sample(0, "a"), "score")
    assert caught.value.code == "mine"
    plain(worker).before_prepare = untyped
    with pytest.raises(ModelError, match=r"^the model failed to prepare this sample$"):
        worker.prepare(tiny.sample(0, "a"), "score")
    with pytest.raises(InputError) as unsupported:
        worker.prepare(TensorSample("a", torch.zeros(3, 32, 32)), "gradient")
    assert unsupported.value.code == "unsupported_input"


def test_a_model_that_does_not_score_its_canary_does_not_load() -> None:
    worker = tiny.make_worker("plain", load=False)

    class Silent(tiny.Plain):
        @classmethod
        def load(cls, options: Any) -> tiny.Plain:
            model = tiny.Plain()
            model.answer = lambda prompt: ModelError("no")
            return model

    registry._REGISTRY["plain"] = Silent  # the fixture of this folder restores it
    with pytest.raises(RuntimeError, match="plain does not score its own canary"):
        worker.load()
    assert not worker.loaded


# -- out of memory ----------------------------------------------------------------------------------------------------


def fits(limit: int) -> Callable[[Sequence[Any]], None]:
    def before(batch: Sequence[Any]) -> None:
        if len(batch) > limit:
            raise OOM("no memory for this batch")

    return before


@pytest.mark.parametrize(("micro_batch", "fitting"), [(8, 2), (5, 2), (7, 1)])
@pytest.mark.parametrize("invariance", ["exact", "fast"])
def test_out_of_memory_halves_the_batch_and_remembers(micro_batch: int, fitting: int, invariance: Any) -> None:
    worker = tiny.make_worker("plain-device", micro_batch=micro_batch, invariance=invariance)
    before = worker.fingerprint()
    plain(worker).before_run = fits(2)
    prompts = [f"p{i}" for i in range(micro_batch)]
    outcomes = worker._bisect("score", prompts)
    assert outcomes == [Output(float(sum(prompt.encode()))) for prompt in prompts]
    assert worker.full == fitting
    plain(worker).batches.clear()
    worker._bisect("score", prompts[: worker.full])
    assert [len(batch) for batch in plain(worker).batches] == [worker.full]  # not tried again
    assert worker.fingerprint() != before


@pytest.mark.parametrize("micro_batch", [8, 5, 7])
def test_in_exact_mode_every_batch_has_the_canonical_shape_even_while_it_shrinks(micro_batch: int) -> None:
    worker = tiny.make_worker("plain-device", micro_batch=micro_batch)
    shapes: list[int] = []

    def before(batch: Sequence[str]) -> None:
        fits(3)(batch)
        shapes.append(len(batch))

    plain(worker).before_run = before
    worker._bisect("score", [f"p{i}" for i in range(micro_batch)])
    assert set(shapes) == {worker.full}


def test_one_sample_that_does_not_fit_fails_alone() -> None:
    worker = tiny.make_worker("plain-device", micro_batch=4)

    def before(batch: Sequence[str]) -> None:
        if "huge" in batch:
            raise OOM("no memory for this one")

    plain(worker).before_run = before
    assert codes(worker._bisect("score", ["a", "huge", "b", "c"])) == [None, "model_error", None, None]


def test_a_tower_halves_its_own_forwards() -> None:
    worker = tiny.make_worker(cache_bytes=0)
    samples = [tiny.sample(i, "a") for i in range(8)]
    expected = tiny.scores(worker, samples)
    fingerprint = worker.fingerprint()
    assert isinstance(worker.model, tiny.TinyTower)
    worker.model.before_image = fits(4)
    assert tiny.scores(worker, samples) == pytest.approx(expected, abs=1e-5)
    assert worker.full == 4
    assert worker.fingerprint() != fingerprint


def test_gradients_halve_too_and_leave_the_scores_alone() -> None:
    worker = tiny.make_worker()
    fingerprints = worker.fingerprint(), worker.fingerprint("gradient")
    assert isinstance(worker.model, tiny.TinyTower)
    inputs = [worker.prepare(TensorSample("a", torch.rand(3, 32, 32)), "gradient") for _ in range(7)]
    expected = [o.gradient for o in worker._bisect("gradient", inputs)]  # type: ignore[union-attr]
    worker.model.before_image = fits(2)
    outcomes = worker._bisect("gradient", inputs)
    for outcome, gradient in zip(outcomes, expected, strict=True):
        assert torch.allclose(outcome.gradient, gradient, atol=1e-6)  # type: ignore[union-attr]
    assert worker.fingerprint() == fingerprints[0]
    assert worker.fingerprint("gradient") != fingerprints[1]


@pytest.mark.parametrize(("gradients", "loads"), [(True, 2), (False, 1)])
def test_the_float32_copy_is_loaded_once_at_start_and_only_if_wanted(gradients: bool, loads: int) -> None:
    loaded = []

    class Counted(tiny.TinyTower):
        @classmethod
        def load(cls, options: LoadOptions) -> tiny.TinyTower:
            loaded.append(options.dtype)
            return super().load(options)

    registry._REGISTRY["tiny-tower"] = Counted  # the fixture of this folder restores it
    worker = tiny.make_worker(dtype=torch.bfloat16, load=False)
    worker.options = replace(worker.options, gradients=gradients)
    worker.load()
    assert worker.differentiable is gradients
    inputs = [worker.prepare(TensorSample("a", torch.rand(3, 32, 32)), "gradient") for _ in range(3)]
    for _ in range(2):
        assert codes(worker._bisect("gradient", inputs)) == [None if gradients else "model_error"] * 3
    assert loaded == [torch.bfloat16, torch.float32][:loads]


# -- poison -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "poisoned"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (OOM("CUDA out of memory. Tried to allocate"), False),
        (ValueError("CUDA error"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_only_errors_that_lose_the_device_poison_it(error: Exception, poisoned: bool) -> None:
    assert poisons_device(error) is poisoned


def test_a_poisoned_device_is_not_bisected() -> None:
    worker = tiny.make_worker("plain-device")

    def before(batch: Sequence[str]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    plain(worker).before_run = before
    runs = len(plain(worker).batches)
    with pytest.raises(DevicePoisoned, match="plain-device poisoned its device"):
        worker._bisect("score", ["a", "b"])
    assert len(plain(worker).batches) == runs + 1


# -- padding, rate, fingerprint ---------------------------------------------------------------------------------------


def test_exact_mode_pads_device_models_and_leaves_cpu_models_alone() -> None:
    for name, invariance, expected in (
        ("plain-device", "exact", 8), ("plain-device", "fast", 3), ("plain", "exact", 3),
    ):  # fmt: skip
        worker = tiny.make_worker(name, invariance=invariance)  # type: ignore[arg-type]
        worker._bisect("score", ["a", "b", "c"])
        assert len(plain(worker).batches[-1]) == expected, name
        assert plain(worker).batches[-1][:3] == ["a", "b", "c"]


def test_the_rate_after_warm_up_is_that_of_work_and_not_of_the_cache() -> None:
    """Retry-After starts from it: a rate measured on cached features promises a slot that will not be there."""
    worker = tiny.make_worker()
    assert isinstance(worker.model, tiny.TinyTower)
    worker.model.image_batches.clear()
    worker.model.before_image = lambda batch: time.sleep(0.05)
    worker.warm()
    assert worker.model.image_batches != []
    assert worker.batcher.rate is not None
    assert worker.batcher.rate <= worker.full / 0.05


def test_a_prompt_that_looks_like_a_canary_keeps_its_own_score() -> None:
    """Features are found by the prompt: an id that the engine invents must not be one that a caller can send."""
    worker = tiny.make_worker()
    payload = worker.canary_payload()
    worker._bisect("score", [payload])
    samples = [tiny.sample(0, str(payload.text_id)), *(tiny.sample(0, f"canary-{i}") for i in range(20))]
    assert tiny.scores(worker, samples) == tiny.scores(tiny.make_worker(cache_bytes=0), samples)


BASE: dict[str, Any] = {"micro_batch": 8}


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch": 4},
        {"invariance": "fast"},
        {"dtype": torch.bfloat16},
        {"seed": 1},  # other weights
        {"note": "another option"},
    ],
)
def test_the_fingerprint_changes_with_what_changes_a_score(change: dict[str, Any]) -> None:
    assert tiny.make_worker(**(BASE | change)).fingerprint() != tiny.make_worker(**BASE).fingerprint()


def test_the_fingerprint_tells_compiled_kernels_from_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused kernel rounds differently, and ``measure`` may choose it on one start and not on the next."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # only the bookkeeping is under test
    assert tiny.make_worker(compile="on").fingerprint() != tiny.make_worker(compile="off").fingerprint()


def test_the_fingerprint_changes_with_the_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny.make_worker().fingerprint()
    monkeypatch.setattr(tiny.TinyTower, "preprocessing", "2")
    assert tiny.make_worker().fingerprint() != before


def test_the_fingerprint_stays_with_what_does_not_change_a_score() -> None:
    before = tiny.make_worker()
    fingerprint = before.fingerprint()
    tiny.scores(before, [tiny.sample(i, "a") for i in range(9)])
    assert before.fingerprint() == fingerprint
    assert tiny.make_worker(cache_bytes=0).fingerprint() == fingerprint
    assert fingerprint.startswith("sha256:")
    assert len(fingerprint) == 7 + 64


def test_gradients_have_a_fingerprint_of_their_own_and_are_float32() -> None:
    worker = tiny.make_worker(dtype=torch.bfloat16)
    assert worker.fingerprint("gradient") != worker.fingerprint()
    assert (worker.dtype(), worker.dtype("gradient")) == ("bfloat16", "float32")


# -- lane -------------------------------------------------------------------------------------------------------------


class Bench:
    """A lane with workers, driven by hand: tickets go straight to the batchers."""

    def __init__(self, *names: str, micro_batch: int = 4, max_delay_s: float = 0.0) -> None:
        self.fatal: list[str] = []
        telemetry = Telemetry()
        self.lane = Lane("test", self.fatal.append)
        caches = (FeatureCache("image", 1 << 20, telemetry), FeatureCache("text", 1 << 20, telemetry))
        for name in names:
            batcher = Batcher(
                name, max_cost=1000, max_delay_s=max_delay_s, wakeup=self.lane.wakeup, telemetry=telemetry
            )
            options = WorkerOptions(name, tiny.LoadOptions(), micro_batch, "exact", "off", watchdog_s=0.1)
            self.lane.workers.append(Worker(options, batcher, caches, telemetry))
        self.answers: list[str] = []
        self.answered = threading.Semaphore(0)

    def queue(self, worker: Worker, payload: str, *, ready: bool = True) -> Ticket:
        def settle(ticket: Ticket, outcome: Outcome) -> None:
            self.answers.append(payload)
            self.answered.release()

        ticket = Ticket("score", settle, float("inf"))
        worker.batcher.admit(ticket)
        if ready:
            worker.batcher.ready(ticket, payload)
        return ticket

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.answered.acquire(timeout=10)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.lane.stop()
        if self.lane.is_alive():
            self.lane.join(10)
            assert not self.lane.is_alive()


def test_models_of_a_lane_take_turns_by_the_age_of_their_oldest_sample() -> None:
    with Bench("plain", "plain-other", micro_batch=2) as bench:
        for worker in bench.lane.workers:
            worker.load()
        a, b = bench.lane.workers
        for worker, payload in ((b, "1"), (a, "2"), (b, "3"), (a, "4"), (b, "5")):
            bench.queue(worker, payload)
        order = []
        for _ in range(3):
            work = bench.lane._next()
            assert work is not None
            order.append((work[0].name, [ticket.payload for ticket in work[1]]))
        assert order == [("plain-other", ["1", "3"]), ("plain", ["2", "4"]), ("plain-other", ["5"])]


def test_a_lane_waits_for_a_sample_in_preparation_and_runs_them_together() -> None:
    with Bench("plain", max_delay_s=5.0) as bench:
        bench.lane.start()
        assert bench.lane.started_ok.wait(10)
        worker = bench.lane.workers[0]
        coming = bench.queue(worker, "late", ready=False)
        bench.queue(worker, "early")
        time.sleep(0.05)
        assert bench.answers == []
        worker.batcher.ready(coming, "late")
        bench.wait(2)
        assert plain(worker).batches[-1] == ["early", "late"]


def test_a_lane_waits_no_longer_than_max_delay() -> None:
    with Bench("plain", max_delay_s=0.05) as bench:
        bench.lane.start()
        assert bench.lane.started_ok.wait(10)
        bench.queue(bench.lane.workers[0], "never ready", ready=False)
        bench.queue(bench.lane.workers[0], "early")
        bench.wait(1)
        assert bench.answers == ["early"]


def test_a_lane_that_dies_says_so() -> None:
    with Bench("plain-device") as bench:
        bench.lane.start()
        assert bench.lane.started_ok.wait(10)

        def before(batch: Sequence[str]) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

        worker = bench.lane.workers[0]
        plain(worker).before_run = before
        bench.queue(worker, "a")
        bench.lane.join(10)
        assert not bench.lane.is_alive()
        assert len(bench.fatal) == 1
        assert "poisoned" in bench.fatal[0]


def test_a_forward_that_hangs_is_overdue_and_an_idle_lane_is_not() -> None:
    with Bench("plain") as bench:
        bench.lane.start()
        assert bench.lane.started_ok.wait(10)
        worker = bench.lane.workers[0]
        entered, release = threading.Event(), threading.Event()

        def before(batch: Sequence[str]) -> None:
            entered.set()
            release.wait(10)

        plain(worker).before_run = before
        assert bench.lane.overdue(time.monotonic() + 60) is None
        bench.queue(worker, "a")
        assert entered.wait(10)
        now = time.monotonic()
        assert bench.lane.overdue(now + 0.2) is worker
        assert bench.lane.overdue(now - 60) is None
        release.set()
        bench.wait(1)


def test_a_lane_that_cannot_load_keeps_the_models_own_error() -> None:
    bench = Bench("tiny-tower")
    bench.lane.workers[0].options = WorkerOptions(
        "tiny-tower", tiny.LoadOptions(options={"broken": True}), 4, "exact", "off", 1.0
    )
    bench.lane.start()
    assert bench.lane.started_ok.wait(10)
    bench.lane.join(10)
    assert isinstance(bench.lane.startup_error, OSError)
    assert str(bench.lane.startup_error) == "the weights are on strike"
    assert bench.fatal == []


def test_an_idle_lane_keeps_no_payload_alive() -> None:
    import gc
    import weakref

    class Payload(str):
        __slots__ = ("__weakref__",)

    with Bench("plain") as bench:
        bench.lane.start()
        assert bench.lane.started_ok.wait(10)
        worker = bench.lane.workers[0]
        model = plain(worker)
        model.run = lambda batch: [Output(0.0) for _ in batch]  # type: ignore[method-assign]  # it keeps no batches
        gc.disable()
        try:
            payload = Payload("heavy")
            watched = weakref.ref(payload)
            ticket = Ticket("score", lambda t, o: bench.answered.release(), float("inf"))
            worker.batcher.admit(ticket)
            worker.batcher.ready(ticket, payload)
            del payload
            bench.wait(1)
            end = time.monotonic() + 5
            while watched() is not None and time.monotonic() < end:
                time.sleep(0.005)
            assert watched() is None
        finally:
            gc.enable()
