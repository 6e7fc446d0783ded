"""A judge with a true (random) network on this machine, through the engine: nothing is computed twice."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models.catalog  # noqa: F401
from models.base import Candidate, LoadOptions
from models.judge import Comparison, Generation, Preference
from models.registry import get_model, load_model
from models.shapes.world import Scene, SceneObject, render
from service.engine.batcher import GradientResult
from service.engine.engine import Engine
from service.engine.judging import PROBE_TOKENS
from service.engine.request import Made, Maker
from service.engine.worker import TensorSample
from service.settings import Settings
from tests.service.engine.tiny import ask, serving, until

NAME = "shapes-judge"
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random network of the structure of the trained one."""
    loaded = get_model(NAME).random_checkpoint(tmp_path_factory.mktemp("judge")).weights
    assert loaded is not None
    return loaded


def settings(weights: str, **changes: Any) -> Settings:
    model = {"weights": weights, **changes.pop("model", {})}
    return Settings(models={NAME: model, "jpeg-incompressibility": {}}, device="cpu", dtype="float32", **changes)


@pytest.fixture
def candidates() -> list[Candidate]:
    colours = ("red", "blue", "green", "yellow")
    return [Candidate(image=render(Scene((SceneObject("circle", colour, (1, 1)),)))) for colour in colours]


def makers(candidates: list[Candidate]) -> list[Maker]:
    pairs = [(i, j) for i in range(len(candidates)) for j in range(len(candidates)) if i != j]
    return [lambda i=i, j=j: Made(Comparison(PROMPT, candidates[i], candidates[j])) for i, j in pairs]  # type: ignore[misc]


async def probabilities(chosen: Settings, candidates: list[Candidate]) -> tuple[list[float], dict[str, float]]:
    """Of all pairs in both orders, and how often each store was asked in vain and not."""
    async with serving(chosen) as engine:
        judge: Any = engine.workers[NAME].model
        encoded: list[str] = []
        encode = judge.chat.encode

        def counted(picture: Any) -> Any:
            encoded.append(picture.digest)
            return encode(picture)

        judge.chat.encode = counted
        found = [
            result.outcomes[NAME] for result in await ask(engine, [NAME], makers(candidates), job="compare", seconds=60)
        ]
        cache = engine._telemetry.cache
        counts = {
            f"{store}_{kind}": cache.labels(store, kind)._value.get()
            for store in ("image", "prefix")
            for kind in ("hit", "miss")
        }
        counts["encoded"] = len(encoded)
        counts["distinct"] = len(set(encoded))
        assert all(isinstance(outcome, Preference) for outcome in found), found
        return [outcome.probability for outcome in found if isinstance(outcome, Preference)], counts


def test_each_image_passes_the_vision_tower_once_and_each_beginning_is_computed_once(
    weights: str, candidates: list[Candidate]
) -> None:
    found, counts = asyncio.run(probabilities(settings(weights), candidates))
    assert counts["encoded"] == counts["distinct"] == len(candidates)
    assert counts["prefix_miss"] == len(candidates) + 1  # and the canary's
    # The answers are those of a judge that knows no caches, asked one by one.
    naive: Any = load_model(NAME, LoadOptions(weights=weights))
    naive.chat.share_features = naive.chat.share_prefixes = False
    naive.chat.rows = 1
    asked = [maker().sample for maker in makers(candidates)]
    wanted = [naive.compare([naive.prepare_comparison(each)])[0].probability for each in asked]
    assert found == pytest.approx(wanted, abs=1e-5)
    assert max(wanted) - min(wanted) > 1e-6  # a random network too sees that images differ


def test_answers_do_not_depend_on_the_stores_or_the_batches(weights: str, candidates: list[Candidate]) -> None:
    large, _ = asyncio.run(probabilities(settings(weights), candidates))
    small, _ = asyncio.run(probabilities(settings(weights, model={"token_budget": 1}), candidates))
    without, counts = asyncio.run(
        probabilities(settings(weights, caches={"prefix_bytes": 0, "image_features_bytes": 0}), candidates)
    )
    assert counts["prefix_hit"] == counts["image_hit"] == 0
    assert small == large
    assert without == large


def test_short_requests_are_answered_while_the_judge_writes(weights: str, candidates: list[Candidate]) -> None:
    """The true network calls back between tokens: the engine sees each of them."""

    async def main() -> None:
        model = {"options": {"mode": "think", "max_tokens": 40}}
        async with serving(settings(weights, model=model)) as engine:
            worker = engine.workers[NAME]
            assert worker.writes
            steps: list[float] = []
            between = worker._between_tokens
            judge: Any = worker.model
            judge.chat.on_step = lambda: (steps.append(worker.last_success), between())
            asked = asyncio.create_task(ask(engine, [NAME], makers(candidates)[:2], job="compare", seconds=60))
            await until(lambda: len(steps) > 3)
            assert time.monotonic() - worker.last_success < 5
            results = await asked
            codes = [getattr(result.outcomes[NAME], "code", "ok") for result in results]
            assert all(code == "ok" or code.startswith("answer_") for code in codes)

    asyncio.run(main())


def written_by(engine: Engine) -> list[Generation]:
    """How the judge's answers are made, from now on."""
    judge: Any = engine.workers[NAME].model
    made: list[Generation] = []
    generate = judge.chat.generate

    def noted(turns: Any, how: Generation) -> Any:
        made.append(how)
        return generate(turns, how)

    judge.chat.generate = noted
    return made


def test_readiness_asks_a_judge_that_writes_for_a_few_tokens(weights: str, candidates: list[Candidate]) -> None:
    """What they say has no verdict, which is no failure; a request still has its whole answer."""

    async def main() -> None:
        chosen = settings(weights, model={"options": {"mode": "think", "max_tokens": 30}})
        async with serving(chosen) as engine:
            made, worker = written_by(engine), engine.workers[NAME]
            rate, worker.last_success = worker.batcher.rate, 0.0
            assert (await engine.check_ready())[NAME]
            assert [how.max_tokens for how in made] == [PROBE_TOKENS]
            assert worker.last_success > 0
            assert worker.batcher.rate == rate
            await ask(engine, [NAME], makers(candidates[:2]), job="compare", seconds=60)
            assert {how.max_tokens for how in made[1:]} == {30}

    asyncio.run(main())


def test_a_judge_whose_network_is_broken_is_not_ready(weights: str) -> None:
    async def main() -> None:
        chosen = settings(weights, model={"options": {"mode": "think", "max_tokens": 30}}, ready_max_age_s=0.0)
        async with serving(chosen) as engine:
            head = engine.workers[NAME].model.chat.model.lm_head  # type: ignore[attr-defined]
            whole = head.weight.clone()
            assert (await engine.check_ready())[NAME]
            head.weight.fill_(float("nan"))
            assert not (await engine.check_ready())[NAME]
            head.weight.copy_(whole)
            assert (await engine.check_ready())[NAME]
            head.weight = torch.nn.Parameter(whole[:, :-1], requires_grad=False)  # every forward raises
            assert not (await engine.check_ready())[NAME]

    asyncio.run(main())


def test_the_gradient_of_a_true_judge_climbs(weights: str, candidates: list[Candidate]) -> None:
    async def main() -> None:
        async with serving(settings(weights)) as engine:

            async def gradient(pixels: Tensor) -> GradientResult:
                made = Made(TensorSample(PROMPT, pixels, candidates[1]))
                [result] = await ask(engine, [NAME], [lambda: made], job="gradient", seconds=60)
                outcome = result.outcomes[NAME]
                assert isinstance(outcome, GradientResult), outcome
                return outcome

            pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
            before = await gradient(pixels)
            after = await gradient(pixels + 0.02 * before.gradient / before.gradient.abs().max())
            assert after.output.score > before.output.score

    asyncio.run(main())


def test_a_candidate_that_is_no_image_is_the_caller_s_mistake(weights: str, candidates: list[Candidate]) -> None:
    async def main() -> None:
        async with serving(settings(weights)) as engine:
            text = Candidate(text="an answer")
            [result] = await ask(
                engine, [NAME], [lambda: Made(Comparison(PROMPT, text, candidates[0]))], job="compare", seconds=60
            )
            assert getattr(result.outcomes[NAME], "code", None) == "unsupported_input"

    asyncio.run(main())


def test_the_folder_of_weights_is_named_where_it_is_missing(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(settings(str(tmp_path / "nowhere"))):
            pass

    with pytest.raises(RuntimeError, match="nowhere"):
        asyncio.run(main())
