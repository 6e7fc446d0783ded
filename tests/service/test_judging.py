"""The asking of a request's comparisons: waves, room in the queue, deadlines, decoding once."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from scipy.special import expit

from models.base import Candidate, InputError, Output, SampleError
from models.judge import AnswerError, Preference
from service.engine.engine import Engine
from service.engine.request import SampleResult
from service.errors import DeadlineExceeded, InvalidRequest, Overloaded
from service.items import Decoded, Group, Once
from service.judging import Judged, against_reference, judge
from service.scoring import score_all
from service.settings import LimitSettings, Settings
from service.telemetry import Telemetry
from service.tournament import Pair, all_pairs
from tests.service.plugins.judges import SHARPNESS, BrightJudge, Question

JUDGE = "bright-judge"


@contextlib.asynccontextmanager
async def serving(max_cost: int = 1024, token_budget: int = 4096, **judge: Any) -> AsyncIterator[Engine]:
    settings = Settings(
        models={
            JUDGE: {"token_budget": token_budget, **judge},
            "jpeg-incompressibility": {},
            "slow": {"options": {"batch_s": 0.0}},
        },
        plugins=["tests.service.plugins.judges", "tests.service.plugins.faulty"],
        device="cpu",
        queue={"max_cost": max_cost},
        limits={"images_per_request": min(max_cost, 256)},
    )
    fatal: list[str] = []
    engine = Engine(settings, Telemetry(), fatal.append)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
    assert not fatal


def group(*levels: int, reference: int | None = None, decoded: list[int] | None = None) -> Group:
    """Even images; ``decoded`` is told each time that one is decoded."""

    def decoder(level: int) -> Callable[[], Decoded]:
        def decode() -> Decoded:
            if decoded is not None:
                decoded.append(level)
            if level < 0:
                raise InputError("it cannot be read", code="invalid_image")
            return Candidate(image=PILImage.new("RGB", (16, 16), (level, level, level))), ()

        return decode

    shown = [*levels, *([] if reference is None else [reference])]
    return Group("a lamp", [Once(decoder(level)) for level in shown], None, {}, len(levels))


async def ask(
    engine: Engine, *groups: Group, pairs: Sequence[Pair] | None = None, seconds: float = 20.0, limit: int = 1000
) -> list[Judged]:
    plans = [all_pairs(each.count) if pairs is None else list(pairs) for each in groups]
    limits = LimitSettings(comparisons_per_request=limit)
    deadline = time.monotonic() + seconds
    judged, _ = await judge(engine, JUDGE, groups, plans, both_orders=True, deadline=deadline, limits=limits)
    return judged


class Hold:
    """Holds the judge's batches, after the first ``free``, until it is opened; ``sizes`` are those that came."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, *, free: int = 0) -> None:
        model = engine.workers[JUDGE].model
        assert isinstance(model, BrightJudge)
        self.entered, self.opened, self.sizes = threading.Event(), threading.Event(), list[int]()
        answer = model.compare

        def compare(batch: Sequence[Question]) -> list[Preference | SampleError]:
            self.sizes.append(len(batch))
            self.entered.set()
            assert len(self.sizes) <= free or self.opened.wait(20)
            return answer(batch)

        monkeypatch.setattr(model, "compare", compare)


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        await asyncio.sleep(0.002)


def cost(engine: Engine) -> int:
    return engine.workers[JUDGE].batcher.cost


def test_each_candidate_is_decoded_once() -> None:
    async def main() -> None:
        decoded: list[int] = []
        async with serving() as engine:
            [judged] = await ask(engine, group(10, 60, 110, 160, decoded=decoded))
            assert len(judged.outcomes) == 12
            assert sorted(decoded) == [10, 60, 110, 160]
            assert list(judged.outcomes) == sorted(judged.outcomes)  # by what is shown first

    asyncio.run(main())


def test_a_request_larger_than_the_queue_comes_in_waves_that_leave_room(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(max_cost=8) as engine:
            hold = Hold(engine, monkeypatch)
            asking = asyncio.create_task(ask(engine, group(10, 60, 110, 160, 210)))
            await until(hold.entered.is_set)
            assert cost(engine) <= 4  # another request of half the queue is let in
            other = asyncio.create_task(ask(engine, group(20, 70), group(30, 80)))
            await until(lambda: cost(engine) > 4)
            hold.opened.set()
            [judged], others = await asking, await other
            assert all(isinstance(judged.outcome(pair, JUDGE), Preference) for pair in judged.outcomes)
            assert len(judged.outcomes) == 20
            assert [len(each.outcomes) for each in others] == [2, 2]

    asyncio.run(main())


def test_a_full_queue_turns_the_first_wave_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(max_cost=4) as engine:
            hold = Hold(engine, monkeypatch)
            busy = [asyncio.create_task(ask(engine, group(10, 60))) for _ in range(2)]
            await until(lambda: cost(engine) == 4)
            with pytest.raises(Overloaded):
                await ask(engine, group(20, 70))
            hold.opened.set()
            await asyncio.gather(*busy)
            assert cost(engine) == 0

    asyncio.run(main())


def test_what_is_late_leaves_the_answers_that_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with serving(max_cost=4, token_budget=1) as engine:
            hold = Hold(engine, monkeypatch, free=3)
            [judged] = await ask(engine, group(10, 60, 110), seconds=1.0)
            codes = [getattr(judged.outcome(pair, JUDGE), "code", "ok") for pair in judged.outcomes]
            # Waves of two: of the second one is answered, whichever was prepared first, and the third never begins.
            assert codes[:2] == ["ok"] * 2
            assert sorted(codes[2:4]) == ["deadline", "ok"]
            assert codes[4:] == ["deadline"] * 2
            hold.opened.set()
            await until(lambda: cost(engine) == 0)

    asyncio.run(main())


def test_nothing_finished_at_the_deadline_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving() as engine:
            hold = Hold(engine, monkeypatch)
            with pytest.raises(DeadlineExceeded):
                await ask(engine, group(10, 60), seconds=0.3)
            hold.opened.set()
            await until(lambda: cost(engine) == 0)

    asyncio.run(main())


def test_a_caller_that_leaves_frees_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(max_cost=16, token_budget=1) as engine:
            hold = Hold(engine, monkeypatch)
            asking = asyncio.create_task(ask(engine, group(10, 60, 110, 160, 210)))
            await until(hold.entered.is_set)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            hold.opened.set()
            await until(lambda: cost(engine) == 0)
            assert hold.sizes == [1]  # what had not begun was dropped

    asyncio.run(main())


def test_too_many_comparisons_are_refused_before_any_is_asked() -> None:
    async def main() -> None:
        async with serving() as engine:
            with pytest.raises(InvalidRequest) as refused:
                await ask(engine, group(10, 60, 110), group(10, 60, 110), limit=11)
            assert refused.value.code == "too_many_comparisons"
            assert cost(engine) == 0

    asyncio.run(main())


def test_when_one_model_is_full_the_others_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(max_cost=8) as engine:
            hold = Hold(engine, monkeypatch)
            busy = asyncio.create_task(ask(engine, group(10, 60, 110), pairs=[(0, 1), (1, 2)]))
            more = asyncio.create_task(ask(engine, group(20, 70, 120), pairs=[(0, 1), (1, 2)]))
            await until(lambda: cost(engine) == 8)
            limits = LimitSettings()
            models = ["jpeg-incompressibility", JUDGE]
            with pytest.raises(Overloaded):
                await score_all(engine, models, [JUDGE], [group(1, 2)], deadline=time.monotonic() + 20, limits=limits)
            assert engine.workers["jpeg-incompressibility"].batcher.cost == 0
            hold.opened.set()
            await asyncio.gather(busy, more)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("rule", "reference", "comparisons"),
    [("first", 0, 4), ("best:slow", 2, 4), ("best-of-2", 1, 4), ("best-of-9", 2, 6)],
)
def test_the_reference_is_chosen_within_the_group_and_nothing_is_asked_twice(
    monkeypatch: pytest.MonkeyPatch, rule: str, reference: int, comparisons: int
) -> None:
    levels = (40, 90, 200)

    async def main() -> None:
        async with serving(reference=rule, options={"bias": 0.5}) as engine:
            hold = Hold(engine, monkeypatch)
            hold.opened.set()
            results, _ = await score_all(
                engine, [JUDGE], [JUDGE], [group(*levels)], deadline=time.monotonic() + 20, limits=LimitSettings()
            )
            for k, scored in enumerate(results):
                outcome = scored.outcomes[JUDGE]
                assert isinstance(outcome, Output)
                difference = SHARPNESS * (levels[k] - levels[reference]) / 255
                forwards, backwards = expit(difference + 0.5), expit(-difference + 0.5)
                assert outcome.score == pytest.approx((forwards + 1 - backwards) / 2, abs=1e-9)
                assert outcome.warnings == (("is_reference",) if k == reference else ())
            assert sum(hold.sizes) == comparisons

    asyncio.run(main())


def test_one_order_is_asked_where_the_settings_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving(both_orders=False) as engine:
            hold = Hold(engine, monkeypatch)
            hold.opened.set()
            await score_all(
                engine, [JUDGE], [JUDGE], [group(1, 2, 3)], deadline=time.monotonic() + 20, limits=LimitSettings()
            )
            assert sum(hold.sizes) == 3

    asyncio.run(main())


def test_an_unreadable_opponent_is_not_the_candidate_s_own_error() -> None:
    async def main() -> None:
        async with serving() as engine:
            results, _ = await score_all(
                engine, [JUDGE], [JUDGE], [group(10, -1)], deadline=time.monotonic() + 20, limits=LimitSettings()
            )
            codes = [getattr(result.outcomes[JUDGE], "code", "ok") for result in results]
            assert codes == ["opponent_unreadable", "invalid_image"]
            assert [result.unreadable is None for result in results] == [True, False]

    asyncio.run(main())


# -- what the outcomes say ---------------------------------------------------------------------------------------------

probabilities = st.floats(0, 1) | st.none()


def result(probability: float | None) -> SampleResult:
    return SampleResult({JUDGE: AnswerError("empty", "no answer") if probability is None else Preference(probability)})


@given(probabilities, probabilities)
def test_preferences_of_a_pair_sum_to_one(forwards: float | None, backwards: float | None) -> None:
    judged = Judged(group(1, 2), {(0, 1): result(forwards), (1, 0): result(backwards)})
    one, other = judged.preference(0, 1, JUDGE), judged.preference(1, 0, JUDGE)
    if forwards is None and backwards is None:
        assert (one, other) == (None, None)
    else:
        assert one is not None
        assert other is not None
        assert one + other == pytest.approx(1)
        assert 0 <= one <= 1


@given(st.floats(0, 1), st.floats(-0.2, 0.2))
def test_a_position_bias_cancels(preference: float, bias: float) -> None:
    forwards, backwards = preference + bias, 1 - preference + bias
    if not (0 <= forwards <= 1 and 0 <= backwards <= 1):
        return
    judged = Judged(group(1, 2), {(0, 1): result(forwards), (1, 0): result(backwards)})
    assert judged.preference(0, 1, JUDGE) == pytest.approx(preference)


def test_the_reference_stands_after_the_candidates() -> None:
    assert against_reference(group(1, 2, reference=3)) == [(0, 2), (1, 2)]
    assert against_reference(group(1, 2)) == []
    judged = Judged(group(1, 2, reference=3), {(0, 1): result(0.2), (1, 2): result(0.3)})
    assert [(each.first, each.second) for each in judged.inner(JUDGE)] == [(0, 1)]
