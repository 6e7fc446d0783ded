"""A loop that only logs: ``logged_run.py FOLDER STEPS SLEEP [RANK WORLD]``; it resumes after step 3 where told to."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from trainer_client.run_log import RunLog


def main(folder: Path, steps: int, sleep: float, rank: int = 0, world: int = 1) -> None:
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder.parent}/meet", rank=rank, world_size=world)
    with RunLog(folder, total_steps=steps, tensorboard=False, progress=False) as log:
        log.event(0, "start", f"rank {rank}")
        log.samples(0, ["a"], [rank], torch.zeros(1, 1, 3, 4, 4), {"r": [[0.0]]})
        for step in range(1, steps + 1):
            log.train(step, {"loss": step / 10, "rank": rank}, seconds=step, images=8 * step)
            time.sleep(sleep)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
