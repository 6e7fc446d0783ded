"""Pref-GRPO: win rates from a judge, in the loop of Flow-GRPO."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.service.live import running, wait_until
from tests.trainer_client.conftest import RewardServer, answer_well, serving
from tests.trainer_client.scripts import judged_ranks, tiny_run
from trainer_client import flow_grpo
from trainer_client.advantages import win_rates
from trainer_client.config import ConfigError, RewardsSection, parse_config
from trainer_client.errors import FingerprintChanged, RequestRejected
from trainer_client.pref_grpo import WIN_RATE, JudgedRewards, PrefGRPOConfig, judged_by, train
from trainer_client.prompts import Prompt
from trainer_client.reward_queue import QueueStats, remote_comparisons
from trainer_client.rewards import RewardBatch

EMBEDDED = "models/shapes/weights/policy"
JUDGE = {"mean": "sha256:feed", "beside": "sha256:beef", "heldout": "sha256:cafe"}


def verdicts(strength: Sequence[float], broken: set[int]) -> list[list[float | None]]:
    """P(i is preferred to j): the larger wins, equal ones tie; whoever is broken cannot be compared."""
    return [
        [
            None if i == j or {i, j} & broken else 0.5 if a == b else float(a > b)
            for j, b in enumerate(strength)
        ]
        for i, a in enumerate(strength)
    ]  # fmt: skip


def judge(answer: dict[str, Any], *, failures: bool) -> dict[str, Any]:
    """Turn preferences of the test server into hard verdicts by coarse brightness; broken images have no verdict."""
    for result in answer.get("results", []):
        if "comparisons" not in result:
            for name, scores in result["scores"].items():
                result["scores"][name] = [tiny_run.coarse(score) for score in scores]
            result["total"] = next(iter(result["scores"].values()))
            continue
        strength = [tiny_run.coarse(mean) for mean in result["strength"]]
        broken = {k for k, value in enumerate(strength) if failures and tiny_run.fails(value)}
        table = result["probabilities"] = verdicts(strength, broken)
        for comparison in result["comparisons"]:
            i, j = comparison["i"], comparison["j"]
            comparison["probability"] = table[i][j]
            comparison["orders"] = [table[i][j], table[i][j]]
            if table[i][j] is None:
                comparison["parse"] = "unparsable"
                comparison["error"] = {"model": "mean", "code": "unparsable", "message": "the judge rambled"}
        result["win_rate"] = [
            sum(known) / len(known) if (known := [p for p in row if p is not None]) else None for row in table
        ]
    return answer


@contextlib.contextmanager
def judging(*, failures: bool = False) -> Iterator[RewardServer]:
    with serving(dict(JUDGE)) as server:
        server.default = lambda handler, received: answer_well(
            handler, received, lambda answer: judge(answer, failures=failures)
        )
        yield server


@pytest.fixture
def server() -> Iterator[RewardServer]:
    with judging() as server:
        yield server


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.save_policy(tmp_path_factory.mktemp("policy"))


def configured(folder: Path, source: Path | str, url: str, /, **overrides: Any) -> PrefGRPOConfig:
    rewards = {"models": {}, **overrides.pop("rewards", {})}
    values = tiny_run.values(folder, Path(source), url, rewards=rewards, judge="mean", **overrides)
    return parse_config(PrefGRPOConfig, values)


def pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def rates_by_hand(images_N3HW: Tensor, *, failures: bool = False) -> Tensor:
    strength = [tiny_run.coarse(float(image.double().mean()) / 255) for image in images_N3HW]
    broken = {k for k, value in enumerate(strength) if failures and tiny_run.fails(value)}
    table = [[math.nan if p is None else p for p in row] for row in verdicts(strength, broken)]
    return win_rates(torch.tensor(table, dtype=torch.float64))[0]


# -- win rates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failures", [False, True])
def test_win_rates_find_their_images(failures: bool) -> None:
    """Images of three groups arrive in any order, in batches that cut the groups."""
    images, group_B = pixels(18), [0, 1, 2] * 6
    with judging(failures=failures) as server:
        rewards = JudgedRewards(remote_comparisons(server.url, "mean", patience=30), 6)
        for start in range(0, 18, 4):
            rows = range(start, min(start + 4, 18))
            prompts = [Prompt(f"prompt {group_B[row]}", {"n": group_B[row]}) for row in rows]
            rewards.submit(images[rows.start : rows.stop], prompts, [group_B[row] for row in rows])
        found = rewards.collect()
        rewards.close()
        items = [item for received in server.asked("/compare") for item in (received.request or {})["items"]]
    expected = torch.empty(18, dtype=torch.float64)
    for group in range(3):
        expected[group::3] = rates_by_hand(images[group::3], failures=failures)
    torch.testing.assert_close(found.scores[WIN_RATE], expected, equal_nan=True)
    assert torch.equal(found.ok[WIN_RATE], ~expected.isnan())
    assert found.fingerprints == {"mean": JUDGE["mean"]}
    asked = sorted((item["prompt"], item["metadata"]["n"]) for item in items)
    assert asked == [("prompt 0", 0), ("prompt 1", 1), ("prompt 2", 2)]
    if failures:
        broken = int(expected.isnan().sum())
        assert 0 < broken < 18
        assert found.failures[0] == "mean: unparsable: the judge rambled"
    else:
        assert found.failures == ()
        # One wins against all five, one against none, whatever they are.
        assert all(sorted(expected[g::3].tolist())[0] < 0.5 < sorted(expected[g::3].tolist())[-1] for g in range(3))


def test_a_group_is_judged_as_soon_as_it_is_whole(server: RewardServer) -> None:
    rewards = JudgedRewards(remote_comparisons(server.url, "mean", patience=30), 2)
    rewards.submit(pixels(3), [Prompt("a"), Prompt("a"), Prompt("b")], [0, 0, 1])
    wait_until(lambda: len(server.asked("/compare")) == 1, "the first group is asked, although nobody waits")
    rewards.submit(pixels(1), [Prompt("b")], [1])
    found = rewards.collect()
    assert len(server.asked("/compare")) == 2
    assert len(found.scores[WIN_RATE]) == 4
    rewards.submit(pixels(2), [Prompt("c")] * 2, [0, 0])
    assert len(rewards.collect().scores[WIN_RATE]) == 2, "the next rollout begins anew"
    assert rewards.stats().submitted == 3
    rewards.close()


def test_a_group_that_is_not_whole_raises(server: RewardServer) -> None:
    rewards = JudgedRewards(remote_comparisons(server.url, "mean", patience=30), 3)
    rewards.submit(pixels(4), [Prompt("a")] * 4, [0, 0, 0, 1])
    with pytest.raises(ValueError, match="group 1 has 1 images where 3 are due"):
        rewards.collect()
    rewards.close()


def test_groups_on_two_ranks_are_judged_whole(tmp_path: Path, server: RewardServer) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tiny_run.ROOT), "OMP_NUM_THREADS": "1"}
    script = judged_ranks.__file__
    processes = [
        subprocess.Popen([sys.executable, script, str(tmp_path), str(rank), "2", server.url], env=environment,
                         stderr=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=240)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    alone = judged_ranks.rates(server.url)
    for key in ("indices", "win_rate", "mean", "ok"):
        assert ranks[0]["whole"][key] + ranks[1]["whole"][key] == alone[key]
    # Each of the twelve images is scored alone, and one rank asks for the group between them.
    assert alone["asked"] == 12 + 3
    assert [rank["whole"]["asked"] for rank in ranks] == [6 + 2, 6 + 1]
    message = "group 2 has 3 images where 4 are due"
    assert all(message in rank["cut"]["error"] for rank in ranks)
    assert "RequestRejected" in ranks[1]["refused"]["error"]
    assert ranks[0]["refused"]["error"].startswith("RankFailed: rank 1: RequestRejected")


# -- the run ----------------------------------------------------------------------------------------------------------


class ByHand:
    """Win rates in this process, from the formula, as a reward called "mean"."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self.images: list[Tensor] = []

    def submit(self, images_B3HW: Tensor, prompts: Sequence[Prompt], group_B: Sequence[int]) -> None:
        self.images.append(images_B3HW)

    def collect(self) -> RewardBatch:
        groups = torch.cat(self.images).split(self.group_size)
        self.images = []
        rate_B = torch.cat([rates_by_hand(group, failures=True) for group in groups])
        return RewardBatch({"mean": rate_B}, {"mean": ~rate_B.isnan()})

    def stats(self) -> QueueStats:
        return QueueStats()

    def close(self) -> None:
        pass


def test_the_run_is_flow_grpo_on_win_rates(policy: Path, tmp_path: Path) -> None:
    """With images that the judge fails on, which count neither in their group nor in the update."""
    with judging(failures=True) as server:
        config = configured(tmp_path, policy, server.url, group_size=6)
        out = train(config, tmp_path / "run")
        rewards = {"models": {"mean": 1.0}, "aggregate": "per_reward"}
        plain = tiny_run.config(tmp_path, policy, server.url, group_size=6, rewards=rewards)
        expected = flow_grpo.train(plain, tmp_path / "plain", make_rewards=lambda *_: ByHand(6))
    start = load_file(policy / "transformer" / "diffusion_pytorch_model.safetensors")
    weights, by_hand = tiny_run.tensors(out, 2), tiny_run.tensors(expected, 2)
    assert tiny_run.distance(weights, by_hand, {name: start[name] for name in weights}) < 1e-6
    rows = tiny_run.rows(out)
    assert 0 < sum(row["failed_ratio"] for row in rows) < len(rows)
    for row in rows:
        assert row["reward/win_rate"] == pytest.approx(0.5)  # what one wins, another one loses
        assert row["reward/total"] == row["reward/win_rate"]
    assert "scores failed" in tiny_run.events(out, "warning")[0]
    about = json.loads((out / "config.json").read_text())
    assert (about["algorithm"], about["rewards"]) == ("pref_grpo", {"mean": JUDGE["mean"]})


class Kept:
    """What a run's rewards said."""

    def __init__(self, config: PrefGRPOConfig) -> None:
        self.config = config
        self.found: list[RewardBatch] = []

    def __call__(self, settings: RewardsSection, names: Sequence[str], fingerprints: Mapping[str, str]) -> Any:
        rewards = judged_by(self.config)(settings, names, fingerprints)
        collect = rewards.collect

        def kept() -> RewardBatch:
            self.found.append(collect())
            return self.found[-1]

        rewards.collect = kept  # type: ignore[method-assign]
        return rewards


def test_pointwise_rewards_beside_are_normalised_by_themselves(
    policy: Path, server: RewardServer, tmp_path: Path
) -> None:
    """A reward in hundreds and win rates in [0, 1] count by their weights, not by their sizes."""
    config = configured(tmp_path, policy, server.url, judge_weight=0.4, rewards={"models": {"beside": 0.6}})
    kept = Kept(config)
    rows = tiny_run.rows(train(config, tmp_path / "run", make_rewards=kept))
    assert len(kept.found) == len(rows) == 2
    for found, row in zip(kept.found, rows, strict=True):
        expected = []
        for start in (0, 4):
            terms = []
            for name, weight in (("beside", 0.6), (WIN_RATE, 0.4)):
                group = found.scores[name][start : start + 4]
                terms.append(weight * (group - group.mean()) / group.std(correction=0))
            expected.append(sum(terms))
        assert row["advantage_abs"] == pytest.approx(float(torch.cat(expected).abs().mean()), rel=1e-6)
        assert row["reward/beside"] == pytest.approx(float(found.scores["beside"].mean()))
        assert row["reward/beside"] > 100
    assert {received.path for received in server.received} == {"/models", "/score", "/compare"}


def test_two_runs_from_one_seed_are_one(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    config = configured(tmp_path, policy, server.url, updates_per_step=2)
    one, two = (train(config, tmp_path / name) for name in ("one", "two"))
    weights = [tiny_run.tensors(out, 2) for out in (one, two)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert tiny_run.untimed(tiny_run.rows(one)) == tiny_run.untimed(tiny_run.rows(two))


def test_it_learns_what_the_judge_prefers(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    """Brighter images; every group has the same rewards, and only the images tell."""
    config = configured(
        tmp_path, policy, server.url, steps=12, group_size=8, train_batch_size=16, sampling={"batch_size": 16},
        optimizer={"lr": 3e-3, "eps": 1e-8, "betas": [0.9, 0.99], "max_grad_norm": 1.0},
    )  # fmt: skip
    train(config, tmp_path / "run")
    brightness = [
        torch.tensor([float(image.mean()) for image in received.images.values()])
        for received in server.asked("/compare")
    ]
    assert len(brightness) == 24
    first, last = torch.cat(brightness[:2]), torch.cat(brightness[-2:])
    assert last.mean() - first.mean() > 4 * brightness[0].std()


@pytest.mark.parametrize(("pairs", "both_orders"), [("all", True), ("adaptive", False)])
def test_the_judge_is_asked_as_configured(pairs: str, both_orders: bool) -> None:
    with serving(dict(JUDGE)) as server:
        config = configured(Path("."), "nowhere", server.url, pairs=pairs, both_orders=both_orders, group_size=3)
        rewards = judged_by(config)(config.rewards, [], dict(JUDGE))
        rewards.submit(pixels(3), [Prompt("a")] * 3, [0] * 3)
        with contextlib.suppress(Exception):  # this server answers no adaptive tournaments
            rewards.collect()
        rewards.close()
        [received] = server.asked("/compare")
    assert received.request is not None
    assert received.request["both_orders"] is both_orders
    assert [item["pairs"] for item in received.request["items"]] == [pairs]


def test_a_judge_that_changes_stops_the_run(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    changed = server.changed(lambda answer: answer["model"].update(fingerprint="sha256:other"))

    def play(handler: Any, received: Any) -> None:
        (changed if received.path == "/compare" else well)(handler, received)

    well, server.default = server.default, play
    with pytest.raises(FingerprintChanged, match="'mean' has fingerprint sha256:other"):
        train(configured(tmp_path, policy, server.url), tmp_path / "run")
    assert tiny_run.rows(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rewards": {"models": {"win_rate": 1.0}}}, "no reward model can be called 'win_rate'"),
        ({"evaluation": {"prompts": "shapes:heldout"}}, "needs rewards.models or evaluation.heldout"),
        ({"evaluation": {"prompts": "shapes:heldout", "heldout": ["mean"]}}, "both the judge and held out"),
        ({"judge_weight": 0}, "judge_weight"),
        ({"pairs": "some"}, "pairs"),
        ({"group_size": 1}, "group_size is 1"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(tmp_path, "nowhere", "http://127.0.0.1:1", **values)


def test_a_judge_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="judge: Field required"):
        parse_config(PrefGRPOConfig, {"prompts": "p", "policy": {"source": "nowhere"}})


# -- a real service ---------------------------------------------------------------------------------------------------


def test_the_embedded_policy_trains_on_win_rates_of_a_real_service(tmp_path: Path) -> None:
    settings = {"models": {"shapes-clip": {}, "shapes-oracle": {}}, "limits": {"images_per_item": 4}}
    values: dict[str, Any] = {
        "prompts": "shapes:train", "sampling": {"steps": 3}, "optimizer": {"lr": 1e-4, "eps": 1e-8},
        "rewards": {"models": {"shapes-oracle": 0.5}},
    }  # fmt: skip
    with running(tmp_path / "service", settings) as live:
        config = configured(tmp_path, EMBEDDED, live.url, **values).model_copy(update={"judge": "shapes-clip"})
        rows = tiny_run.rows(train(config, tmp_path / "run"))
        with pytest.raises(RequestRejected, match="4"):
            train(config.model_copy(update={"group_size": 5}), tmp_path / "large")
    for row in rows:
        assert row["reward/win_rate"] == pytest.approx(0.5)
        assert row["reward_std/win_rate"] > 0.2
        assert row["failed_ratio"] == 0
        assert row["grad_norm"] > 0
