from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from models.base import InputError, ModelError, Output, Sample, SampleError
from service.engine.batcher import GradientResult
from service.engine.engine import Engine
from service.engine.plan import resolve_device, resolve_dtype, worker_options
from service.engine.request import Made, Maker
from service.engine.worker import TensorSample
from service.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, UnknownModel
from service.settings import ModelSettings, Settings
from service.telemetry import Telemetry
from tests.service.engine import tiny
from tests.service.engine.tiny import ask, maker, serving, settings, until


def plain(engine: Engine, name: str = "plain") -> tiny.Plain:
    model = engine.workers[name].model
    assert isinstance(model, tiny.Plain)
    return model


class Gate:
    """Holds the forwards of a plain model until it is opened."""

    def __init__(self, model: tiny.Plain) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        model.before_run = self

    def __call__(self, batch: Sequence[str]) -> None:
        self.entered.set()
        assert self.opened.wait(20)


def cost(engine: Engine) -> int:
    return sum(worker.batcher.cost for worker in engine.workers.values())


def sum_of(prompt: str) -> Output:
    return Output(float(sum(prompt.encode())))


# -- scores -----------------------------------------------------------------------------------------------------------


def test_every_sample_is_scored_by_every_model_in_order() -> None:
    async def main() -> None:
        async with serving(settings("plain", "plain-other", "tiny-tower")) as engine:
            prompts = [f"prompt {i}" for i in range(20)]
            results = await ask(
                engine, ["plain", "plain-other", "tiny-tower"], [maker(i, p) for i, p in enumerate(prompts)]
            )
            assert [result.outcomes["plain"] for result in results] == [sum_of(p) for p in prompts]
            assert [result.outcomes["plain-other"] for result in results] == [sum_of(p) for p in prompts]
            reference = tiny.make_worker()
            expected = tiny.scores(reference, [tiny.sample(i, p) for i, p in enumerate(prompts)])
            assert [result.outcomes["tiny-tower"].score for result in results] == expected  # type: ignore[union-attr]
            assert cost(engine) == 0

    asyncio.run(main())


def test_requests_share_batches() -> None:
    async def main() -> None:
        async with serving(settings("plain")) as engine:
            gate = Gate(plain(engine))
            requests = [asyncio.create_task(ask(engine, ["plain"], [maker(0, "first")]))]
            await asyncio.to_thread(gate.entered.wait, 10)
            requests += [asyncio.create_task(ask(engine, ["plain"], [maker(i, f"p{i}")])) for i in range(8)]
            await until(lambda: len(engine.workers["plain"].batcher._ready) == 8)
            gate.opened.set()
            await asyncio.gather(*requests)
            assert sorted(plain(engine).batches[-1]) == [f"p{i}" for i in range(8)]

    asyncio.run(main())


def test_an_unreadable_sample_fails_for_every_model_and_leaves_the_others() -> None:
    def broken() -> Made:
        raise InputError("not an image", code="undecodable")

    def crashing() -> Made:
        raise ZeroDivisionError("secret")

    async def main() -> None:
        async with serving(settings("plain", "plain-other")) as engine:
            makers: list[Maker] = [maker(0, "a"), broken, maker(0, "b"), crashing]
            results = await ask(engine, ["plain", "plain-other"], makers)
            assert [r.unreadable and r.unreadable.code for r in results] == [None, "undecodable", None, "decode_failed"]
            assert "secret" not in str(results[3].unreadable)
            for model in ("plain", "plain-other"):
                assert results[0].outcomes[model] == sum_of("a")
                assert isinstance(results[1].outcomes[model], InputError)
                assert results[2].outcomes[model] == sum_of("b")
            assert cost(engine) == 0

    asyncio.run(main())


def test_a_model_that_fails_leaves_the_scores_of_the_others() -> None:
    async def main() -> None:
        async with serving(settings("plain", "plain-other")) as engine:
            plain(engine).answer = lambda prompt: ModelError("no")
            (result,) = await ask(engine, ["plain", "plain-other"], [maker(0, "a")])
            assert isinstance(result.outcomes["plain"], ModelError)
            assert result.outcomes["plain-other"] == sum_of("a")

    asyncio.run(main())


def test_gradients_pass_the_same_door() -> None:
    async def main() -> None:
        async with serving(settings("tiny-tower", "plain")) as engine:
            makers: list[Maker] = [
                lambda side=side: Made(TensorSample("a", torch.rand(3, side, 40)))
                for side in (32, 48)  # type: ignore[misc]
            ]
            results = await ask(engine, ["tiny-tower"], makers, job="gradient")
            shapes = [r.outcomes["tiny-tower"].gradient.shape for r in results]  # type: ignore[union-attr]
            assert shapes == [(3, 32, 40), (3, 48, 40)]
            with pytest.raises(InvalidRequest) as refusal:
                await ask(engine, ["tiny-tower", "plain"], makers, job="gradient")
            assert refusal.value.code == "not_differentiable"
            assert cost(engine) == 0
            assert all(isinstance(r.outcomes["tiny-tower"], GradientResult) for r in results)

    asyncio.run(main())


# -- admission --------------------------------------------------------------------------------------------------------


def test_a_request_is_admitted_by_all_its_models_or_by_none() -> None:
    async def main() -> None:
        limits = {"images_per_request": 4}
        async with serving(settings("plain", "plain-other", queue={"max_cost": 4}, limits=limits)) as engine:
            gate = Gate(plain(engine, "plain-other"))
            busy = asyncio.create_task(ask(engine, ["plain-other"], [maker()] * 3))
            await asyncio.to_thread(gate.entered.wait, 10)
            for models in (["plain", "plain-other"], ["plain-other", "plain"]):
                with pytest.raises(Overloaded) as refusal:
                    await ask(engine, models, [maker()] * 2)
                assert refusal.value.extra["model"] == "plain-other"
                assert (refusal.value.retry_after_s or 0) >= 1
                assert engine.workers["plain"].batcher.cost == 0
            engine.check_open()  # plain is free
            assert await ask(engine, ["plain"], [maker(0, "a")] * 4)
            gate.opened.set()
            await busy
            assert len(await ask(engine, ["plain", "plain-other"], [maker()] * 4)) == 4
            assert cost(engine) == 0

    asyncio.run(main())


def test_a_request_that_could_never_be_admitted_is_not_told_to_come_back() -> None:
    """Gradients cost three: a legal number of images may be more than the whole queue."""

    async def main() -> None:
        limits = {"images_per_request": 4}
        async with serving(settings("tiny-tower", queue={"max_cost": 4}, limits=limits)) as engine:
            with pytest.raises(InvalidRequest):
                await ask(engine, ["tiny-tower"], [maker()] * 4, job="gradient")

    asyncio.run(main())


def test_models_that_are_not_there_are_told_apart() -> None:
    async def main() -> None:
        async with serving(settings("plain")) as engine:
            for name, code in (("tiny-tower", "model_not_loaded"), ("nothing", "unknown_model")):
                with pytest.raises(UnknownModel) as refusal:
                    await ask(engine, ["plain", name], [maker()])
                assert refusal.value.code == code
            assert cost(engine) == 0

    asyncio.run(main())


# -- deadlines and disconnects ----------------------------------------------------------------------------------------


def test_at_the_deadline_finished_samples_keep_their_scores_and_the_rest_is_dropped() -> None:
    async def main() -> None:
        async with serving(settings("plain", "plain-other")) as engine:
            gate = Gate(plain(engine, "plain-other"))
            blocker = asyncio.create_task(ask(engine, ["plain-other"], [maker()]))
            await asyncio.to_thread(gate.entered.wait, 10)
            results = await ask(engine, ["plain", "plain-other"], [maker(0, "a"), maker(1, "b")], seconds=0.2)
            assert [result.outcomes["plain"] for result in results] == [sum_of("a"), sum_of("b")]
            late = [result.outcomes["plain-other"] for result in results]
            assert [error.code for error in late if isinstance(error, SampleError)] == ["deadline", "deadline"]
            assert cost(engine) == 1  # the blocker alone
            gate.opened.set()
            await blocker
            await ask(engine, ["plain-other"], [maker(2, "c")])
            assert not any({"a", "b"} & set(batch) for batch in plain(engine, "plain-other").batches)

    asyncio.run(main())


def test_when_nothing_is_finished_at_the_deadline_the_request_fails_as_a_whole() -> None:
    async def main() -> None:
        async with serving(settings("plain")) as engine:
            gate = Gate(plain(engine))
            with pytest.raises(DeadlineExceeded):
                await ask(engine, ["plain"], [maker()], seconds=0.1)
            assert cost(engine) == 1  # its forward has begun and is still paid for
            gate.opened.set()
            await until(lambda: cost(engine) == 0)

    asyncio.run(main())


def test_a_deadline_that_has_passed_runs_nothing() -> None:
    async def main() -> None:
        async with serving(settings("plain")) as engine:
            runs = len(plain(engine).batches)
            with pytest.raises(DeadlineExceeded):
                await ask(engine, ["plain"], [maker()] * 3, seconds=-1)
            assert cost(engine) == 0
            await ask(engine, ["plain"], [maker(0, "next")])
            assert plain(engine).batches[runs:] == [["next"]]

    asyncio.run(main())


@pytest.mark.parametrize("stage", ["decoding", "preparing", "queued"])
def test_a_client_that_leaves_frees_its_cost_at_once_wherever_its_samples_are(stage: str) -> None:
    async def main() -> None:
        async with serving(settings("plain", decode_threads=1)) as engine:
            hold = threading.Event()
            entered = threading.Event()

            def wait_here(*_: object) -> None:
                entered.set()
                assert hold.wait(20)

            def slow() -> Made:
                wait_here()
                return maker()()

            makers: list[Maker] = [maker(0, "left")] * 5
            blocker: asyncio.Task[Any] | None = None
            if stage == "decoding":
                makers = [slow, *makers]
            elif stage == "preparing":
                plain(engine).before_prepare = wait_here
            else:
                plain(engine).before_run = wait_here
                blocker = asyncio.create_task(ask(engine, ["plain"], [maker(0, "blocker")]))
                assert await asyncio.to_thread(entered.wait, 10)
            request = asyncio.create_task(ask(engine, ["plain"], makers))
            if stage == "queued":
                await until(lambda: len(engine.workers["plain"].batcher._ready) == 5)
            assert await asyncio.to_thread(entered.wait, 10)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            assert cost(engine) == (1 if stage == "queued" else 0)
            hold.set()
            plain(engine).before_prepare = lambda sample: None
            if blocker is not None:
                await blocker
            await ask(engine, ["plain"], [maker(0, "after")])
            assert not any("left" in batch for batch in plain(engine).batches)
            assert cost(engine) == 0

    asyncio.run(main())


def test_many_clients_that_leave_at_any_moment_leave_nothing_behind() -> None:
    async def main() -> None:
        async with serving(settings("plain", "tiny-tower")) as engine:
            tasks = [
                asyncio.create_task(ask(engine, ["plain", "tiny-tower"], [maker(i, f"p{i}")] * 3)) for i in range(100)
            ]
            for i, task in enumerate(tasks):
                if i % 3:
                    await asyncio.sleep(0.001 * (i % 5))
                    task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(answer, list | asyncio.CancelledError) for answer in answers)
            assert all(isinstance(answer, list) for answer in answers[::3])
            await until(lambda: cost(engine) == 0)
            await asyncio.wait_for(engine.idle(), 5)
            assert engine._requests == set()
            assert (await ask(engine, ["plain"], [maker(0, "after")]))[0].outcomes["plain"] == sum_of("after")

    asyncio.run(main())


def test_a_request_that_left_does_not_keep_its_images_alive_behind_a_slow_decoder() -> None:
    """Its cost and its bytes are free again, so the next ones are admitted: what it held must go too."""

    class Image:
        pass

    async def main() -> None:
        async with serving(settings("plain", decode_threads=1)) as engine:
            hold, entered = threading.Event(), threading.Event()

            def slow() -> Made:
                entered.set()
                assert hold.wait(20)
                return maker()()

            def heavy_maker(image: Image) -> Maker:
                return lambda: Made(Sample(str(image), tiny.sample(0, "").candidate))

            blocker = asyncio.create_task(ask(engine, ["plain"], [slow]))
            assert await asyncio.to_thread(entered.wait, 10)
            image = Image()
            watched = weakref.ref(image)
            request = asyncio.create_task(ask(engine, ["plain"], [heavy_maker(image)]))
            del image
            await asyncio.sleep(0.02)
            request.cancel()
            await asyncio.wait([request])
            assert request.cancelled()
            del request
            gc.collect()
            alive = watched() is not None
            hold.set()
            await blocker
            assert not alive

    asyncio.run(main())


@pytest.mark.parametrize("where", ["nothing", "decode", "prepare"])
def test_a_sample_that_fails_keeps_nothing_alive_after_its_answer(where: str) -> None:
    """Tracebacks hold frames, frames hold images: without care each bad image lives until the garbage collector."""

    class Image:
        pass

    def make(image: Image) -> Maker:
        def run() -> Made:
            kept = image
            if where == "decode":
                raise InputError(f"bad {type(kept).__name__}")
            return maker()()

        return run

    def refuse(sample: Sample) -> None:
        raise InputError("bad")

    async def main() -> None:
        async with serving(settings("plain")) as engine:
            if where == "prepare":
                plain(engine).before_prepare = refuse
            image = Image()
            watched = weakref.ref(image)
            gc.collect()
            gc.disable()
            try:
                results = await ask(engine, ["plain"], [make(image)])
                assert isinstance(results[0].outcomes["plain"], InputError) == (where != "nothing")
                del image, results
                end = time.monotonic() + 0.5
                while watched() is not None and time.monotonic() < end:
                    await asyncio.sleep(0.01)
                assert watched() is None
            finally:
                gc.enable()

    asyncio.run(main())


# -- life -------------------------------------------------------------------------------------------------------------


def test_a_failed_start_raises_the_models_own_error() -> None:
    async def main() -> None:
        broken = Settings(
            models={"plain": ModelSettings(), "tiny-tower": ModelSettings(options={"broken": True})}, device="cpu"
        )
        with pytest.raises(OSError, match="the weights are on strike"):
            async with serving(broken):
                pass

    asyncio.run(main())


def test_a_model_nobody_knows_is_named_at_start() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="unknown reward model 'nothing'"):
            async with serving(settings("nothing")):
                pass

    asyncio.run(main())


def test_draining_answers_what_was_admitted_and_refuses_the_rest() -> None:
    async def main() -> None:
        async with serving(settings("plain")) as engine:
            gate = Gate(plain(engine))
            admitted = asyncio.create_task(ask(engine, ["plain"], [maker(0, "a")]))
            await asyncio.to_thread(gate.entered.wait, 10)
            engine.drain()
            for call in (lambda: ask(engine, ["plain"], [maker()]), engine.check_ready):
                with pytest.raises(Unavailable) as refusal:
                    await call()
                assert (refusal.value.code, refusal.value.retry_after_s) == ("draining", 1)
            idle = asyncio.create_task(engine.idle())
            await asyncio.sleep(0.02)
            assert not idle.done()
            gate.opened.set()
            assert (await admitted)[0].outcomes["plain"] == sum_of("a")
            await asyncio.wait_for(idle, 5)

    asyncio.run(main())


def test_draining_while_starting_does_not_end_in_serving() -> None:
    async def main() -> None:
        engine = Engine(settings("plain"), Telemetry(), lambda reason: None)
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        engine.drain()
        await starting
        try:
            assert engine.state == "draining"
        finally:
            await engine.stop()

    asyncio.run(main())


def test_a_hung_forward_fails_the_engine_and_everyone_who_waits_at_once() -> None:
    async def main() -> None:
        reasons: list[str] = []
        async with serving(settings("plain", "plain-other", watchdog_s=0.2), reasons.append) as engine:
            gate = Gate(plain(engine))
            asked = time.monotonic()
            with pytest.raises(Unavailable) as refusal:
                await ask(engine, ["plain"], [maker()], seconds=60)
            assert time.monotonic() - asked < 30  # by the watchdog, and not by the deadline
            assert refusal.value.code == "failed"
            assert engine.state == "failed"
            await until(lambda: reasons != [])  # the waiting are answered first
            assert len(reasons) == 1
            assert "plain hangs" in reasons[0]
            with pytest.raises(Unavailable):
                await ask(engine, ["plain-other"], [maker()])
            with pytest.raises(Unavailable):
                await engine.check_ready()
            gate.opened.set()

    asyncio.run(main())


def test_a_poisoned_device_fails_the_engine() -> None:
    async def main() -> None:
        reasons: list[str] = []
        async with serving(settings("plain-device"), reasons.append) as engine:

            def poison(batch: Sequence[str]) -> None:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

            plain(engine, "plain-device").before_run = poison
            with pytest.raises(Unavailable):
                await ask(engine, ["plain-device"], [maker()], seconds=60)
            await until(lambda: reasons != [])  # the waiting are answered first
            assert "poisoned" in reasons[0]

    asyncio.run(main())


def test_readiness_is_false_at_once_when_the_engine_fails_while_it_is_asked() -> None:
    async def main() -> None:
        chosen = settings("plain", watchdog_s=0.2, ready_max_age_s=0)
        async with serving(chosen, lambda reason: None) as engine:
            gate = Gate(plain(engine))
            with pytest.raises(Unavailable):
                await asyncio.wait_for(engine.check_ready(), 5)
            gate.opened.set()

    asyncio.run(main())


def test_a_request_admitted_while_the_engine_fails_does_not_wait_for_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with serving(settings("plain"), lambda reason: None) as engine:
            gate = Gate(plain(engine))
            require = engine.require

            def fails_right_after(*arguments: Any) -> Any:
                workers = require(*arguments)
                engine.fail("a lane died between the check and the admission")
                return workers

            monkeypatch.setattr(engine, "require", fails_right_after)
            with pytest.raises(Unavailable):
                await ask(engine, ["plain"], [maker()], seconds=2)
            gate.opened.set()

    asyncio.run(main())


# -- readiness --------------------------------------------------------------------------------------------------------


def stale(engine: Engine) -> None:
    for worker in engine.workers.values():
        worker.last_success = -1e9


def test_a_fresh_success_is_readiness_enough_and_a_stale_one_runs_the_canary() -> None:
    async def main() -> None:
        async with serving(settings("plain", ready_max_age_s=60)) as engine:
            runs = len(plain(engine).batches)
            assert await engine.check_ready() == {"plain": True}
            assert len(plain(engine).batches) == runs
            stale(engine)
            assert await engine.check_ready() == {"plain": True}
            assert plain(engine).batches[runs:] == [[tiny.Plain().canary().prompt]]
            assert cost(engine) == 0

    asyncio.run(main())


@pytest.mark.parametrize("failure", ["run", "prepare"])
def test_a_model_that_fails_its_canary_is_not_ready_and_recovers(failure: str) -> None:
    async def main() -> None:
        async with serving(settings("plain", "plain-other")) as engine:
            model = plain(engine)

            def broken(_: object) -> None:
                raise ValueError("broken")

            setattr(model, f"before_{failure}", broken)
            stale(engine)
            assert await engine.check_ready() == {"plain": False, "plain-other": True}
            setattr(model, f"before_{failure}", lambda _: None)
            assert await engine.check_ready() == {"plain": True, "plain-other": True}
            assert cost(engine) == 0

    asyncio.run(main())


def test_readiness_runs_the_towers_and_not_the_cache() -> None:
    async def main() -> None:
        async with serving(settings("tiny-tower")) as engine:
            model = engine.workers["tiny-tower"].model
            assert isinstance(model, tiny.TinyTower)

            def broken(batch: torch.Tensor) -> None:
                raise ValueError("the vision tower is broken")

            model.before_image = broken
            stale(engine)
            assert await engine.check_ready() == {"tiny-tower": False}

    asyncio.run(main())


def test_the_canary_passes_a_long_queue() -> None:
    async def main() -> None:
        async with serving(settings("plain")) as engine:
            gate = Gate(plain(engine))
            requests = [asyncio.create_task(ask(engine, ["plain"], [maker(0, "first")]))]
            await asyncio.to_thread(gate.entered.wait, 10)
            requests += [asyncio.create_task(ask(engine, ["plain"], [maker(i, "waits")] * 20)) for i in range(3)]
            await until(lambda: len(engine.workers["plain"].batcher._ready) == 60)
            stale(engine)
            ready = asyncio.create_task(engine.check_ready())
            await until(lambda: len(engine.workers["plain"].batcher._ready) == 61)
            runs = len(plain(engine).batches)
            gate.opened.set()
            assert await ready == {"plain": True}
            assert plain(engine).batches[runs][0] == tiny.Plain().canary().prompt
            await asyncio.gather(*requests)

    asyncio.run(main())


def test_readiness_asked_by_many_at_once_runs_one_canary() -> None:
    """/health/ready needs no key: whoever asks a thousand times must not fill the front of the queue."""

    async def main() -> None:
        async with serving(settings("plain")) as engine:
            gate = Gate(plain(engine))
            busy = asyncio.create_task(ask(engine, ["plain"], [maker()]))
            await asyncio.to_thread(gate.entered.wait, 10)
            stale(engine)
            checks = [asyncio.create_task(engine.check_ready()) for _ in range(50)]
            await asyncio.sleep(0.2)
            waiting = engine.workers["plain"].batcher.cost
            gate.opened.set()
            assert await asyncio.gather(*checks) == [{"plain": True}] * 50
            await busy
            assert waiting == 2  # the request and one canary

    asyncio.run(main())


# -- settings ---------------------------------------------------------------------------------------------------------


def test_the_event_loop_is_free_while_a_forward_runs() -> None:
    async def main() -> None:
        async with serving(settings("plain")) as engine:
            gate = Gate(plain(engine))
            request = asyncio.create_task(ask(engine, ["plain"], [maker()]))
            await until(gate.entered.is_set)
            turns = 0
            while turns < 100:  # would never end if the forward held the loop
                await asyncio.sleep(0)
                turns += 1
            assert not request.done()
            gate.opened.set()
            await request

    asyncio.run(main())


def test_dtype_and_device_by_name() -> None:
    cpu = torch.device("cpu")
    assert resolve_device("cpu") == cpu
    assert resolve_dtype("float16", cpu) == torch.float16
    assert resolve_dtype("auto", torch.device("cuda:0")) == torch.bfloat16
    if not torch.cuda.is_available():
        assert resolve_device("auto") == cpu
        with pytest.raises(ValueError, match="no CUDA device"):
            resolve_device("cuda:1")


def test_a_models_settings_win_over_those_of_all() -> None:
    chosen = Settings(
        models={"plain": ModelSettings()}, device="cpu", dtype="bfloat16", compile="measure", micro_batch=16,
        watchdog_s=50, invariance="fast",
    )  # fmt: skip
    cpu = torch.device("cpu")
    common = worker_options("tiny-tower", ModelSettings(), chosen, cpu)
    assert (common.load.dtype, common.compile, common.micro_batch) == (torch.bfloat16, "measure", 16)
    assert (common.watchdog_s, common.invariance) == (50, "fast")
    own = ModelSettings(dtype="float32", compile="off", micro_batch=4, watchdog_s=5, options={"seed": 3}, weights="w")
    special = worker_options("tiny-tower", own, chosen, cpu)
    assert (special.load.dtype, special.compile, special.micro_batch, special.watchdog_s) == (
        torch.float32, "off", 4, 5,
    )  # fmt: skip
    assert (special.load.options, special.load.weights) == ({"seed": 3}, "w")


def test_compilation_is_off_on_cpu_and_on_with_cuda_unless_told_otherwise() -> None:
    chosen = settings("plain")

    def compile_of(device: str) -> str:
        options = worker_options("tiny-tower", ModelSettings(), chosen, torch.device(device))
        return str(options.compile)

    assert (compile_of("cpu"), compile_of("cuda:0")) == ("off", "on")
