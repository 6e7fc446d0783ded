"""Judges in the engine: token budgets, shared beginnings, and short requests between the tokens of a long answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image as PILImage

from models import registry
from models.base import Candidate, LoadOptions, ModelError, SampleError
from models.judge import (
    Answer,
    AnswerError,
    Comparison,
    FeatureStore,
    Generation,
    Judge,
    Preference,
    Turn,
    WordScores,
)
from service.engine.batcher import GradientResult
from service.engine.engine import Engine
from service.engine.request import Made, Maker
from service.engine.worker import DevicePoisoned, TensorSample, Worker
from service.errors import InvalidRequest
from service.settings import Settings
from tests.service.engine import tiny
from tests.service.engine.tiny import ask, maker, serving, settings, until


@dataclass(frozen=True, eq=False)
class Question:
    prompt: str
    tokens: int
    prefix: Hashable


class StepChat:
    """``before_step`` sees each token before it is written."""

    weights_hash = "sha256:steps"
    identity = "steps"
    dtype = torch.float32
    uses_device = True

    def __init__(self) -> None:
        self.rows = 0
        self.steps = 0
        self.before_step: Callable[[int], None] = lambda step: None
        self.on_step: Callable[[], None] = lambda: None

    def attach(self, *, features: FeatureStore, prefixes: FeatureStore, rows: int, on_step: Callable[[], None]) -> None:
        self.rows, self.on_step = rows, on_step

    def prepare(self, turn: Turn) -> Question:
        raise NotImplementedError

    def score(self, turns: Sequence[Any], words: Sequence[str]) -> list[WordScores | SampleError]:
        raise NotImplementedError

    @torch.inference_mode()
    def generate(self, turns: Sequence[Any], how: Generation) -> list[list[Answer] | SampleError]:
        for step in range(how.max_tokens):
            self.before_step(step)
            self.steps += 1
            self.on_step()
        return [[Answer("first", True)] for _ in turns]


class TinyJudge(Judge):
    """Answers by the prompt; ``batches`` are the prompts that were asked together."""

    info: ClassVar[Any] = tiny.info("tiny-judge")
    max_tokens = 0

    def __init__(self) -> None:
        self.chat: StepChat = StepChat()
        self.weights_hash = "sha256:tiny-judge"
        self.batches: list[list[str]] = []
        self.before_compare: Callable[[Sequence[Question]], None] = lambda batch: None
        self.answer: Callable[[str], Any] = lambda prompt: Preference(0.75)

    uses_device = True

    @classmethod
    def load(cls, options: LoadOptions) -> TinyJudge:
        return cls()

    def prepare_comparison(self, comparison: Comparison) -> Question:
        first, *rest = comparison.prompt.split()
        return Question(comparison.prompt, int(rest[0]) if len(rest) == 1 else 10, first)

    def compare(self, batch: Sequence[Question]) -> list[Preference | SampleError]:
        self.batches.append([question.prompt for question in batch])
        self.before_compare(batch)
        if self.max_tokens:
            self.chat.generate(batch, Generation(self.max_tokens))
        return [self.answer(question.prompt) for question in batch]


class TinyWriter(TinyJudge):
    """Writes 40 tokens for each batch."""

    info: ClassVar[Any] = tiny.info("tiny-writer")
    max_tokens = 40


class OtherWriter(TinyWriter):
    info: ClassVar[Any] = tiny.info("other-writer")


class Unhealthy(TinyJudge):
    """Never gives a verdict, as a network that nobody trained."""

    info: ClassVar[Any] = tiny.info("unhealthy")

    def compare(self, batch: Sequence[Question]) -> list[Preference | SampleError]:
        return [AnswerError("unparseable", "no verdict", ["gibberish"]) for _ in batch]


class Broken(TinyJudge):
    info: ClassVar[Any] = tiny.info("broken-judge")

    def compare(self, batch: Sequence[Question]) -> list[Preference | SampleError]:
        raise RuntimeError("a kernel is missing")


@pytest.fixture(autouse=True)
def judges(tiny_models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (TinyJudge, TinyWriter, OtherWriter, Unhealthy, Broken):
        monkeypatch.setitem(registry._REGISTRY, model.info.name, model)


def tiny_settings(models: dict[str, Any]) -> Settings:
    return Settings(models=models, device="cpu", dtype="float32")


def comparison(prompt: str) -> Maker:
    one, other = (Candidate(image=PILImage.new("RGB", (16, 16), (level,) * 3)) for level in (10, 200))
    return lambda: Made(Comparison(prompt, one, other))


def judge_of(engine: Engine, name: str) -> TinyJudge:
    model = engine.workers[name].model
    assert isinstance(model, TinyJudge)
    return model


def questions(worker: Worker, *prompts: str) -> list[Any]:
    return [worker.prepare(comparison(prompt)().sample, "compare") for prompt in prompts]


# -- batches -----------------------------------------------------------------------------------------------------------


def test_batches_are_formed_by_tokens() -> None:
    async def main() -> None:
        chosen = tiny_settings({"tiny-judge": {"token_budget": 100}})
        async with serving(chosen) as engine:
            judge = judge_of(engine, "tiny-judge")
            judge.batches.clear()
            hold = threading.Event()
            judge.before_compare = lambda batch: hold.wait(20) and None
            first = asyncio.create_task(ask(engine, ["tiny-judge"], [comparison("first 10")], job="compare"))
            await until(lambda: bool(judge.batches))
            prompts = ["a 60", "a 30", "a 300", "a 20", "a 20"]
            rest = asyncio.create_task(
                ask(engine, ["tiny-judge"], [comparison(prompt) for prompt in prompts], job="compare")
            )
            await until(lambda: len(engine.workers["tiny-judge"].batcher._ready) == len(prompts))
            hold.set()
            results = await rest
            await first
            assert [result.outcomes["tiny-judge"] for result in results] == [Preference(0.75)] * 5
            taken = [sum(int(prompt.split()[1]) for prompt in batch) for batch in judge.batches[1:]]
            assert sum(taken) == 430
            # What weighs more than the budget goes alone; no other batch exceeds it.
            assert sorted(taken)[-1] == 300
            assert all(tokens <= 100 for tokens in sorted(taken)[:-1])
            assert len(judge.batches) - 1 <= 3 + 1

    asyncio.run(main())


def test_equal_beginnings_are_neighbours_and_answers_keep_their_places() -> None:
    worker = tiny.make_worker("tiny-judge")
    assert isinstance(worker.model, TinyJudge)
    worker.model.answer = lambda prompt: Preference(int(prompt.split()[1]) / 100)
    worker.model.batches.clear()
    prompts = ["a 10", "b 20", "a 30", "c 40", "b 50"]
    outcomes = worker._bisect("compare", questions(worker, *prompts))
    assert worker.model.batches == [["a 10", "a 30", "b 20", "b 50", "c 40"]]
    assert [outcome.probability for outcome in outcomes if isinstance(outcome, Preference)] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_one_guilty_comparison_fails_alone() -> None:
    worker = tiny.make_worker("tiny-judge")
    assert isinstance(worker.model, TinyJudge)

    def refuse(batch: Sequence[Question]) -> None:
        if any(question.prompt == "c 3" for question in batch):
            raise ValueError("guilty")

    worker.model.before_compare = refuse
    outcomes = worker._bisect("compare", questions(worker, "a 1", "b 2", "c 3", "d 4"))
    assert [isinstance(outcome, Preference) for outcome in outcomes] == [True, True, False, True]
    assert isinstance(outcomes[2], ModelError)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (Preference(float("nan")), "not_finite"),
        (Preference(1.2), "out_of_range"),
        (Preference(0.5, {"mass": float("inf")}), "not_finite"),
        (Preference(0.5, details={"text": object()}), "model_error"),
        ("first", "model_error"),
    ],
)
def test_what_is_no_preference_is_an_error(answer: Any, code: str) -> None:
    worker = tiny.make_worker("tiny-judge")
    assert isinstance(worker.model, TinyJudge)
    worker.model.answer = lambda prompt: answer
    [outcome] = worker._bisect("compare", questions(worker, "a 1"))
    assert isinstance(outcome, ModelError)
    assert outcome.code == code


def test_out_of_memory_halves_the_rows_and_changes_the_fingerprint() -> None:
    worker = tiny.make_worker("tiny-judge", micro_batch=8)
    assert isinstance(worker.model, TinyJudge)
    chat, before = worker.model.chat, worker.fingerprint("compare")
    assert chat.rows == 8

    def full(batch: Sequence[Question]) -> None:
        if chat.rows > 2:
            raise torch.OutOfMemoryError("out of memory")

    worker.model.before_compare = full
    [outcome] = worker._bisect("compare", questions(worker, "a 1"))
    assert outcome == Preference(0.75)
    assert chat.rows == 2
    assert worker.fingerprint("compare") != before


def test_the_fingerprint_names_the_chat() -> None:
    worker = tiny.make_worker("tiny-judge")
    assert isinstance(worker.model, TinyJudge)
    before = worker.fingerprint("compare")
    worker.model.chat.identity = "another template"
    assert worker.fingerprint("compare") != before


# -- health ------------------------------------------------------------------------------------------------------------


def test_a_judge_without_a_verdict_on_its_canary_is_healthy() -> None:
    async def main() -> None:
        async with serving(settings("unhealthy", ready_max_age_s=0.0)) as engine:
            assert await engine.check_ready() == {"unhealthy": True}

    asyncio.run(main())


def test_a_judge_that_fails_on_its_canary_does_not_start() -> None:
    with pytest.raises(RuntimeError, match="does not score its own canary"):
        tiny.make_worker("broken-judge")


def test_a_judge_gives_no_score_of_one_candidate() -> None:
    async def main() -> None:
        async with serving(settings("tiny-judge")) as engine:
            [result] = await ask(engine, ["tiny-judge"], [maker()])
            outcome = result.outcomes["tiny-judge"]
            assert isinstance(outcome, SampleError)
            assert outcome.code == "unsupported_input"
            with pytest.raises(InvalidRequest, match="gives no gradients"):
                await ask(engine, ["tiny-judge"], [maker()], job="gradient")

    asyncio.run(main())


# -- a long answer and short requests ----------------------------------------------------------------------------------


class Writing:
    """Holds a judge's answer before a token until told, so that what runs meanwhile is seen."""

    def __init__(self, judge: TinyJudge, at: int = 3) -> None:
        self.chat, self.at = judge.chat, at
        self.reached, self.go = threading.Event(), threading.Event()
        self.chat.before_step = self

    def __call__(self, step: int) -> None:
        if step == self.at:
            self.reached.set()
            assert self.go.wait(20)


def test_short_requests_are_answered_between_the_tokens_of_a_long_answer() -> None:
    async def main() -> None:
        async with serving(settings("tiny-writer", "plain-device", "tiny-judge", "tiny-tower")) as engine:
            finished: list[str] = []

            async def note(name: str, job: str, made: Maker) -> Any:
                [result] = await ask(engine, [name], [made], job=job)
                finished.append(name)
                return result.outcomes[name]

            writing = Writing(judge_of(engine, "tiny-writer"))
            long = asyncio.create_task(note("tiny-writer", "compare", comparison("a 10")))
            await until(writing.reached.is_set)
            short = [
                asyncio.create_task(note("plain-device", "score", maker())),
                asyncio.create_task(note("tiny-judge", "compare", comparison("b 10"))),
                # In inference mode, in which tokens are written, nothing has a gradient.
                asyncio.create_task(
                    note("tiny-tower", "gradient", lambda: Made(TensorSample("a", torch.rand(3, 32, 32))))
                ),
            ]
            await until(lambda: all(w.batcher._ready for n, w in engine.workers.items() if n != "tiny-writer"))
            last = Writing(judge_of(engine, "tiny-writer"), at=39)
            writing.go.set()
            score, preference, gradient = await asyncio.gather(*short)
            assert sorted(finished) == ["plain-device", "tiny-judge", "tiny-tower"]
            assert not long.done()
            last.go.set()
            assert await long == Preference(0.75)
            assert not isinstance(score, SampleError)
            assert preference == Preference(0.75)
            assert isinstance(gradient, GradientResult)
            assert float(gradient.gradient.abs().sum()) > 0

    asyncio.run(main())


def test_a_long_answer_is_not_interrupted_by_another_long_one() -> None:
    async def main() -> None:
        async with serving(settings("tiny-writer", "other-writer")) as engine:
            writing = Writing(judge_of(engine, "tiny-writer"))
            other = judge_of(engine, "other-writer")
            first = asyncio.create_task(ask(engine, ["tiny-writer"], [comparison("a 10")], job="compare"))
            await until(writing.reached.is_set)
            second = asyncio.create_task(ask(engine, ["other-writer"], [comparison("b 10")], job="compare"))
            await until(lambda: bool(engine.workers["other-writer"].batcher._ready))
            steps = other.chat.steps
            last = Writing(judge_of(engine, "tiny-writer"), at=39)
            writing.go.set()
            await until(last.reached.is_set)
            assert other.chat.steps == steps
            last.go.set()
            await first
            await second
            assert other.chat.steps == steps + 40

    asyncio.run(main())


def test_a_steady_stream_of_short_requests_does_not_hold_a_long_answer() -> None:
    async def main() -> None:
        async with serving(settings("tiny-writer", "plain-device")) as engine:
            done = asyncio.Event()

            async def stream() -> int:
                answered = 0
                while not done.is_set():
                    await ask(engine, ["plain-device"], [maker() for _ in range(4)])
                    answered += 1
                return answered

            streams = [asyncio.create_task(stream()) for _ in range(4)]
            [result] = await ask(engine, ["tiny-writer"], [comparison("a 10")], job="compare")
            assert result.outcomes["tiny-writer"] == Preference(0.75)
            done.set()
            assert sum(await asyncio.gather(*streams)) > 0

    asyncio.run(main())


def test_the_watchdog_counts_each_token_and_each_short_batch_from_its_own_beginning() -> None:
    """Forty tokens of 20 ms take longer than the watchdog allows for one."""

    async def main() -> None:
        async with serving(settings("tiny-writer", "plain-device", watchdog_s=0.5)) as engine:
            judge = judge_of(engine, "tiny-writer")
            judge.chat.before_step = lambda step: time.sleep(0.02)
            long = asyncio.create_task(ask(engine, ["tiny-writer"], [comparison("a 10")], job="compare"))
            await until(lambda: judge.chat.steps > 42)
            await ask(engine, ["plain-device"], [maker()])
            [result] = await long
            assert result.outcomes["tiny-writer"] == Preference(0.75)
            assert engine.state == "serving"

    asyncio.run(main())


def test_a_short_batch_that_hangs_between_tokens_is_named() -> None:
    async def main() -> None:
        reasons: list[str] = []
        async with serving(settings("tiny-writer", "plain-device", watchdog_s=0.5), reasons.append) as engine:
            writing = Writing(judge_of(engine, "tiny-writer"))
            plain = engine.workers["plain-device"].model
            assert isinstance(plain, tiny.Plain)
            freed = threading.Event()
            plain.before_run = lambda batch: freed.wait(20) and None
            long = asyncio.create_task(ask(engine, ["tiny-writer"], [comparison("a 10")], job="compare"))
            await until(writing.reached.is_set)
            short = asyncio.create_task(ask(engine, ["plain-device"], [maker()]))
            await until(lambda: bool(engine.workers["plain-device"].batcher._ready))
            writing.go.set()
            await until(lambda: bool(reasons))
            freed.set()
            await asyncio.gather(long, short, return_exceptions=True)
            assert reasons[0] == "a forward of plain-device hangs: over 0.5 s"

    asyncio.run(main())


def test_a_device_that_a_short_batch_poisons_between_tokens_ends_the_process() -> None:
    async def main() -> None:
        reasons: list[str] = []
        async with serving(settings("tiny-writer", "plain-device"), reasons.append) as engine:
            writing = Writing(judge_of(engine, "tiny-writer"))
            plain = engine.workers["plain-device"].model
            assert isinstance(plain, tiny.Plain)

            def poison(batch: Sequence[str]) -> None:
                raise torch.AcceleratorError("an illegal memory access was encountered")

            plain.before_run = poison
            long = asyncio.create_task(ask(engine, ["tiny-writer"], [comparison("a 10")], job="compare"))
            await until(writing.reached.is_set)
            short = asyncio.create_task(ask(engine, ["plain-device"], [maker()]))
            await until(lambda: bool(engine.workers["plain-device"].batcher._ready))
            writing.go.set()
            await until(lambda: bool(reasons))
            await asyncio.gather(long, short, return_exceptions=True)
            assert "plain-device poisoned its device" in reasons[0]
            assert engine.state == "failed"

    asyncio.run(main())


def test_readiness_holds_during_a_long_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary cannot run while tokens are written; that they are is as good."""
    monkeypatch.setattr("service.engine.engine.CANARY_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with serving(settings("tiny-writer", ready_max_age_s=1.0)) as engine:
            judge = judge_of(engine, "tiny-writer")
            judge.chat.before_step = lambda step: time.sleep(0.05)
            engine.workers["tiny-writer"].last_success = 0.0
            assert await engine.check_ready() == {"tiny-writer": True}

    asyncio.run(main())


def test_a_tournament_lets_others_in_between_its_batches() -> None:
    async def main() -> None:
        chosen = tiny_settings({"tiny-judge": {"token_budget": 10}, "plain-device": {}})
        async with serving(chosen) as engine:
            judge, order = judge_of(engine, "tiny-judge"), []
            entered, go = threading.Event(), threading.Event()

            def before(batch: Sequence[Question]) -> None:
                order.append("tournament")
                entered.set()
                assert go.wait(20)

            judge.before_compare = before
            plain = engine.workers["plain-device"].model
            assert isinstance(plain, tiny.Plain)
            plain.before_run = lambda batch: order.append("score")
            tournament = asyncio.create_task(
                ask(engine, ["tiny-judge"], [comparison(f"{i} 10") for i in range(8)], job="compare")
            )
            await until(lambda: entered.is_set() and len(engine.workers["tiny-judge"].batcher._ready) == 7)
            single = asyncio.create_task(ask(engine, ["plain-device"], [maker()]))
            await until(lambda: bool(engine.workers["plain-device"].batcher._ready))
            go.set()
            await asyncio.gather(tournament, single)
            assert order == ["tournament", "score", *["tournament"] * 7]

    asyncio.run(main())


def test_device_poisoned_passes_through_the_batch_that_was_interrupted() -> None:
    worker = tiny.make_worker("tiny-writer")
    assert isinstance(worker.model, TinyJudge)

    def poison() -> None:
        raise DevicePoisoned("another model poisoned its device")

    worker.model.chat.on_step = poison
    with pytest.raises(DevicePoisoned, match="another model"):
        worker._bisect("compare", questions(worker, "a 1"))
