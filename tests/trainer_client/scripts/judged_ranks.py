"""Win rates where a group lies on two ranks: FOLDER RANK WORLD_SIZE URL writes FOLDER/rank-R.json.

:func:`rates` is also called by the test itself, without a process group, for the answer of one process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer_client import distributed
from trainer_client.pref_grpo import WIN_RATE, JudgedRewards
from trainer_client.prompts import Prompt
from trainer_client.reward_queue import remote_comparisons, remote_scores
from trainer_client.rewards import PointwiseRewards

IMAGES, GROUP = 12, 4
"""Two ranks have six images each: the first and the third group are whole, the second is halved."""


def rates(url: str, model: str = "mean", *, images: int = IMAGES) -> dict[str, Any]:
    """What this rank finds for its share of the images."""
    own = distributed.own_share(images)
    pixels = torch.randint(0, 256, (images, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    beside = PointwiseRewards(remote_scores(url, ["mean"], patience=30), ["mean"])
    rewards = JudgedRewards(remote_comparisons(url, model, patience=30), GROUP, beside=beside)
    try:
        for index in own:  # one by one: groups become whole in the middle of it
            prompt = Prompt(f"prompt {index // GROUP}", {"number": index // GROUP})
            rewards.submit(pixels[index : index + 1], [prompt], [index // GROUP])
        error: Exception | None = None
        try:
            found = rewards.collect()
        except Exception as caught:
            error = caught
        try:
            distributed.raise_together(error)
        except Exception as raised:
            return {"error": f"{type(raised).__name__}: {raised}"}
        return {
            "indices": list(own),
            "win_rate": found.scores[WIN_RATE].tolist(),
            "mean": found.scores["mean"].tolist(),
            "ok": found.ok[WIN_RATE].tolist(),
            "asked": rewards.stats().submitted,
        }
    finally:
        rewards.close()


def main(folder: Path, rank: int, world_size: int, url: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    found = {
        "whole": rates(url),
        "cut": rates(url, images=IMAGES - 1),
        "refused": rates(url, "mean" if rank == 0 else "nobody"),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    sys.stderr.flush()
    os._exit(0)  # Python 3.11 aborts where a thread of gloo asks for the GIL of an interpreter that is going down
