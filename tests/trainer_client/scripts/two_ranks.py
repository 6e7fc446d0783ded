"""What several ranks do together, as one process of them: FOLDER RANK WORLD_SIZE writes FOLDER/rank-R.json.

The functions are also called by the test itself, without a process group, for the answers of one process.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer_client import distributed
from trainer_client.advantages import group_advantages
from trainer_client.checkpoint import CheckpointMismatch, Checkpoints, RunIdentity
from trainer_client.prompt_order import PromptOrder
from trainer_client.run_state import RunState

BATCH, GROUP, STEPS = 12, 4, 3
FAILED = {(0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 11)}
"""(step, global index) of samples without a reward; at step 1 they are all those of the first of two ranks."""
IDENTITY = RunIdentity("flow_grpo", "Linear", "c", "b", {})


def judge(group_N: Tensor, samples: Tensor, notes: list[Any]) -> Tensor:
    """Share of its group that a sample beats: wrong unless the group is whole, and each note belongs to its sample."""
    strength_N = samples.double().sum(1) + torch.tensor([note["bonus"] for note in notes])
    rewards = []
    for group, strength in zip(group_N, strength_N, strict=True):
        rivals = strength_N[group_N == group]
        assert len(rivals) == GROUP
        rewards.append((strength > rivals).double().mean())
    return torch.stack(rewards)


def train(wrap: Callable[[nn.Module], nn.Module]) -> tuple[dict[str, Tensor], list[float]]:
    """Three steps of a policy gradient with groupwise rewards, two minibatches each; weights and mean rewards."""
    torch.manual_seed(0)
    network = nn.Linear(3, 3)
    wrapped = wrap(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    order = PromptOrder(["a", "b", "c", "d", "e"], 0)
    means = []
    for step in range(STEPS):
        prompts = order.take(BATCH // GROUP) * GROUP  # a group's samples lie on both ranks
        own = distributed.own_share(BATCH)
        generators = distributed.sample_generators(5, step, own)
        noise_B3 = torch.stack([torch.randn(3, generator=each) for each in generators])
        group_B = torch.tensor([prompts[i] for i in own])
        ok_B = torch.tensor([(step, i) not in FAILED for i in own])
        notes = [{"bonus": i / 7} for i in own]
        reward_B = distributed.rewards_of_whole_groups(group_B, network(noise_B3).detach(), notes, judge)
        reward_B = torch.where(ok_B, reward_B, torch.nan)
        means.append(distributed.masked_mean(reward_B, ok_B))
        advantage_N = group_advantages(
            distributed.gather_rows(reward_B), distributed.gather_rows(group_B), ok_B=distributed.gather_rows(ok_B)
        )
        advantage_B = advantage_N[own.start : own.stop]
        count = distributed.count_ok(ok_B)
        for rows, kept in distributed.minibatches(len(own), 4):
            loss_N = -advantage_B[rows].float() * (wrapped(noise_B3[rows]) - noise_B3[rows]).square().mean(1).neg()
            distributed.masked_loss(loss_N, ok_B[rows] & kept, count=count).backward()
        if wrapped is network:
            distributed.average_gradients_(network.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in network.named_parameters()}, means


def collectives(rank: int) -> dict[str, Any]:
    """Uneven rows of several dtypes, bytes, objects, minibatches; what is not JSON is turned into lists."""
    rows = torch.arange(rank * 3, dtype=torch.float32).reshape(-1, 3)  # none on rank 0
    dtypes = [torch.bool, torch.bfloat16, torch.int64, torch.uint8]
    return {
        "rows": distributed.gather_rows(rows).tolist(),
        "dtypes": [distributed.gather_rows(torch.full((rank + 1,), rank, dtype=d)).tolist() for d in dtypes],
        "none": distributed.gather_rows(torch.ones(2, 2) if rank else None).tolist(),
        "empty": list(distributed.gather_rows(torch.zeros(0, 5)).shape),
        "bytes": [content.hex() for content in distributed.gather_bytes(bytes(range(rank * 2)))],
        "json": distributed.gather_json({"rank": rank, "text": "é" * rank}),
        "mean of nothing": str(distributed.masked_mean(torch.tensor([torch.nan]), torch.tensor([False]))),
        "minibatches": [(r.tolist(), o.tolist()) for r, o in distributed.minibatches(2 + 3 * rank, 2)],
        "errors": errors(rank),
    }


def errors(rank: int) -> list[str]:
    """How each rank learns of a fault on one of them."""

    def fail() -> None:
        raise OSError("disk full")

    def judge_fails(group_N: Tensor, samples: Tensor, notes: list[Any]) -> Tensor:
        if 1 in group_N:
            raise ValueError("no such judge")
        return torch.zeros(len(group_N))

    notes = [0, 0]
    faults: list[Callable[[], object]] = [
        lambda: distributed.gather_rows(torch.zeros(1, 2 + rank)),
        lambda: distributed.gather_rows(torch.zeros(1, dtype=torch.float32 if rank else torch.int32)),
        lambda: distributed.gather_rows(torch.zeros(1, dtype=torch.complex64 if rank else torch.float32)),
        lambda: distributed.gather_rows(None),
        lambda: distributed.on_main(fail),
        lambda: distributed.rewards_of_whole_groups(torch.tensor([0, 1]), torch.zeros(2, 1), notes, judge_fails),
        lambda: distributed.rewards_of_whole_groups(torch.tensor([0, 1]), torch.zeros(2, 1), notes[rank:], judge),
        lambda: distributed.minibatches(rank, 2),
    ]
    found = []
    for fault in faults:
        try:
            fault()
            found.append("nothing")
        except (ValueError, OSError, distributed.RankFailed) as exc:
            found.append(f"{type(exc).__name__}: {exc}")
    return found


def resume(folder: Path, rank: int) -> dict[str, Any]:
    """Both ranks save, draw numbers, and draw them again after loading; a rank without the right run stops both."""
    random.seed(rank)
    torch.manual_seed(rank)
    generator = torch.Generator().manual_seed(100 + rank)
    run = RunState(noise=generator, counters={"step": 4})
    checkpoints = Checkpoints(folder / "checkpoints")
    run.save(checkpoints, 4, IDENTITY, exports={"lora": lambda into: (into / f"by-{rank}").touch()})

    def draws() -> list[float]:
        return [random.random(), torch.rand(()).item(), torch.rand((), generator=generator).item()]

    first = draws()
    run.load(checkpoints, IDENTITY)
    again = draws()
    try:
        run.load(checkpoints, IDENTITY if rank else RunIdentity("nft", "Linear", "c", "b", {}))
        fault = "nothing"
    except (CheckpointMismatch, distributed.RankFailed) as exc:
        fault = f"{type(exc).__name__}: {exc}"
    try:
        run.save(checkpoints, 4, IDENTITY)
        second = "nothing"
    except (ValueError, distributed.RankFailed) as exc:
        second = f"{type(exc).__name__}: {exc}"
    return {"first": first, "again": again, "fault": fault, "second": second}


def main(folder: Path, rank: int, world_size: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    found = {"collectives": collectives(rank), "resume": resume(folder, rank), "is_main": distributed.is_main()}
    runs = {"averaged": train(lambda network: network), "ddp": train(nn.parallel.DistributedDataParallel)}
    for name, (weights, means) in runs.items():
        found[name] = {"weights": {key: weight.tolist() for key, weight in weights.items()}, "means": means}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    gc.collect()  # DDP's reducers hold the group
    distributed.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    faulthandler.enable()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stderr.flush()
    os._exit(0)  # Python 3.11 aborts where a thread of gloo asks for the GIL of an interpreter that is going down
