"""Two processes over gloo, against one process with the joined batch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer_client.scripts import two_ranks
from trainer_client import distributed
from trainer_client.checkpoint import CheckpointMismatch, Checkpoints
from trainer_client.run_state import RunState

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two ranks and what each of them found. They meet at a file, so no port can be taken."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, two_ranks.__file__, str(folder), str(rank), "2"], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", ["averaged", "ddp"])
def test_two_ranks_train_like_one_with_the_joined_batch(ranks: tuple[Path, list[dict[str, Any]]], way: str) -> None:
    weights, means = two_ranks.train(lambda network: network)
    start = torch.nn.Linear(3, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.nn.Linear(3, 3)
    for found in ranks[1]:
        assert found[way]["means"] == pytest.approx(means, abs=1e-12)
        for name, weight in weights.items():
            moved = (weight - start.get_parameter(name)).abs().max().item()
            assert moved > 1e-2
            torch.testing.assert_close(torch.tensor(found[way]["weights"][name]), weight, rtol=0, atol=1e-5 * moved)


def test_weights_are_equal_on_both_ranks(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for way in ("averaged", "ddp"):
        assert ranks[1][0][way]["weights"] == ranks[1][1][way]["weights"]


def test_rows_of_every_length_arrive_in_the_order_of_ranks(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in (each["collectives"] for each in ranks[1]):
        assert found["rows"] == [[0, 1, 2]]
        assert found["dtypes"] == [[False, True, True], [0, 1, 1], [0, 1, 1], [0, 1, 1]]
        assert found["none"] == [[1, 1], [1, 1]]
        assert found["empty"] == [0, 5]
        assert found["bytes"] == ["", "0001"]
        assert found["json"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "é"}]
        assert found["mean of nothing"] == "nan"


def test_uneven_ranks_take_as_many_steps(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (each["collectives"]["minibatches"] for each in ranks[1])
    assert first == [[[0, 1], [True, True]], [[0, 0], [False, False]], [[0, 0], [False, False]]]
    assert second == [[[0, 1], [True, True]], [[2, 3], [True, True]], [[4, 0], [True, False]]]


def test_a_fault_on_one_rank_is_known_to_both(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (each["collectives"]["errors"] for each in ranks[1])
    sizes = (
        "ValueError: the ranks' rows do not fit together: rank 0: torch.float32 [1, 2]; rank 1: torch.float32 [1, 3]"
    )
    assert first[0] == second[0] == sizes
    assert first[1] == second[1]
    assert "rank 0: torch.int32 [1]; rank 1: torch.float32 [1]" in first[1]
    assert first[2] == second[2]
    assert "rank 1: of a dtype or number of dimensions that cannot be sent" in first[2]
    assert "rank 0: none; rank 1: none" in first[3]
    assert (first[4], second[4]) == ("OSError: disk full", "RankFailed: rank 0: OSError: disk full")
    assert (first[5], second[5]) == ("RankFailed: rank 1: ValueError: no such judge", "ValueError: no such judge")
    assert second[6] == "ValueError: 2 groups, 2 samples and 1 notes"
    assert first[6] == "RankFailed: rank 1: " + second[6]
    assert first[7] == second[7] == "ValueError: minibatches of 2 from [0, 1] samples by rank"


def test_every_rank_gets_its_own_random_numbers_back(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (each["resume"] for each in ranks[1])
    assert first["first"] == first["again"]
    assert second["first"] == second["again"]
    assert not set(first["first"]) & set(second["first"])


def test_only_the_main_process_writes(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = ranks
    assert [each["is_main"] for each in found] == [True, False]
    assert [path.name for path in folder.glob("checkpoints/*/lora/*")] == ["by-0"]
    assert "is not after 4" in found[0]["resume"]["second"]
    assert found[1]["resume"]["second"].startswith("RankFailed: rank 0: ValueError: step 4 is not after 4")


def test_a_rank_that_cannot_load_stops_all(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (each["resume"]["fault"] for each in ranks[1])
    assert first.startswith("CheckpointMismatch: the checkpoint is of another run: algorithm was 'flow_grpo'")
    assert second == "RankFailed: rank 0: " + first


def test_another_number_of_ranks_is_said(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    checkpoints = Checkpoints(ranks[0] / "checkpoints")
    generator = torch.Generator()
    run = RunState(noise=generator, counters={"step": 0})
    with pytest.raises(CheckpointMismatch, match="of 2 ranks, and there are 1"):
        run.load(checkpoints, two_ranks.IDENTITY)
    assert run.load(checkpoints, two_ranks.IDENTITY, allow=["ranks"]).step == 4
    assert torch.rand((), generator=generator).item() == ranks[1][0]["resume"]["first"][2]
    assert run.parts["counters"] == {"step": 4}


# One process, no group


def test_one_process_needs_no_group() -> None:
    rows = torch.arange(3.0)
    gathered = distributed.gather_rows(rows)
    rows[0] = 9
    assert gathered.tolist() == [0, 1, 2]
    assert distributed.gather_json({"a": 1}) == [{"a": 1}]
    assert distributed.gather_bytes(b"") == [b""]
    assert (distributed.rank(), distributed.world_size(), distributed.own_share(5)) == (0, 1, range(5))
    with pytest.raises(OSError, match="full"):
        distributed.raise_together(OSError("full"))
    with pytest.raises(ValueError, match="no rows"):
        distributed.gather_rows(None)


def test_a_judge_that_answers_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="1 rewards for 2 samples"):
        distributed.rewards_of_whole_groups(torch.tensor([3, 3]), torch.zeros(2), [0, 0], lambda *_: torch.zeros(1))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-9, 9)), min_size=1, max_size=12))
def test_rewards_come_back_in_the_order_asked(rows: list[tuple[int, float]]) -> None:
    group_B = torch.tensor([group for group, _ in rows])
    value_B = torch.tensor([value for _, value in rows], dtype=torch.float64)
    rewards_B2 = distributed.rewards_of_whole_groups(
        group_B, value_B, list(range(len(rows))), lambda g, v, n: torch.stack([v + 10 * g, torch.tensor(n)], dim=1)
    )
    assert rewards_B2[:, 0].tolist() == (value_B + 10 * group_B).tolist()
    assert rewards_B2[:, 1].tolist() == list(range(len(rows)))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.booleans()), min_size=1, max_size=9))
def test_masked_loss_and_mean_are_those_of_the_rows_that_are_ok(rows: list[tuple[float, bool]]) -> None:
    ok_B = torch.tensor([ok for _, ok in rows])
    loss_B = torch.tensor([value for value, _ in rows], dtype=torch.float64, requires_grad=True)
    kept = [value for value, ok in rows if ok]
    loss = distributed.masked_loss(torch.where(ok_B, loss_B, torch.nan), ok_B)
    loss.backward()
    assert loss.item() == pytest.approx(math.fsum(kept) / len(kept) if kept else 0.0, abs=1e-12)
    assert loss_B.grad is not None
    assert loss_B.grad.tolist() == pytest.approx([1 / len(kept) if ok else 0.0 for _, ok in rows])
    mean = distributed.masked_mean(torch.where(ok_B, loss_B.detach(), torch.nan), ok_B)
    assert mean == pytest.approx(math.fsum(kept) / len(kept), abs=1e-12) if kept else math.isnan(mean)
    with pytest.raises(ValueError, match="differ in shape"):
        distributed.masked_loss(loss_B[:, None], ok_B)


def test_seeds_do_not_collide_and_do_not_change() -> None:
    seeds = {
        distributed.derived_seed(seed, step, index) for seed in range(10) for step in range(20) for index in range(20)
    }
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert distributed.derived_seed(1, 23) != distributed.derived_seed(12, 3) != distributed.derived_seed("12", 3)
    # Fixed for good: a run resumed under a later version must draw the same noise.
    assert distributed.derived_seed(5, 0, 3) == 6008702195177975578


@given(st.integers(0, 100), st.integers(1, 9))
def test_shares_are_the_whole_batch_in_order(total: int, count: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: count)
        shares = []
        for rank in range(count):
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            shares.append(distributed.own_share(total))
    assert [index for share in shares for index in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
