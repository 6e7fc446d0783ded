"""Fixed batch shapes, torch.compile, warm-up and the compile cache.

A score may not depend on its neighbours. A tensor forward gives the same row for the same input as long as the batch
*shape* is the same (its kernels reduce in an order that the shape decides), so rows run in micro-batches of one
canonical shape, padded. On many machines smaller shapes give the very same bits; warm-up measures which, on random
rows, and ``invariance: exact`` uses those too, because they answer a single image sooner. ``invariance: fast`` uses
every power of two without asking.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from service.engine.staging import Stager

log = logging.getLogger(__name__)

RowFunction = Callable[[Tensor], Tensor]
"""Rows [B, ...] on the device -> features [B, D]."""


def use_compile_cache(cache_dir: Path | None) -> None:
    """Keep compiled kernels over restarts; must run before the first compilation."""
    if cache_dir is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir / "inductor"))
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir / "triton"))


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4 ... below ``limit``, then ``limit`` itself."""
    sizes = []
    size = 1
    while size < limit:
        sizes.append(size)
        size *= 2
    return [*sizes, limit]


class BucketedFunction:
    """A function of rows, called with few batch shapes: split, pad, copy, run, cut, and halve when out of memory.

    Not thread-safe: CUDA graphs belong to the thread that captured them, so one lane's thread warms it up and calls it.
    """

    def __init__(
        self,
        name: str,
        function: RowFunction,
        *,
        device: torch.device,
        micro_batch: int,
        invariance: Literal["exact", "fast"],
        compile: Literal["on", "off", "measure"],
    ) -> None:
        self.name = name
        self.device = device
        self.micro_batch = micro_batch
        self.invariance = invariance
        self.compiled = False
        self._compile = compile
        self._plain = function
        self._function = function
        self._sizes: dict[tuple[int, ...], list[int]] = {}
        self._stager = Stager(device)

    def __call__(self, rows: Sequence[Tensor]) -> Tensor:
        """Features [n, D] of n rows of one shape (CPU tensors), on the device."""
        parts: list[Tensor] = []
        start = 0
        while start < len(rows):
            chunk = rows[start : start + self.micro_batch]
            size = self._size_for(chunk)
            try:
                parts.append(self._run(chunk, size))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self._halve(size)
                continue  # the same rows again, in smaller batches
            start += len(chunk)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def warm_up(self, rows: Sequence[Tensor]) -> None:
        """Compile and find the usable sizes for the shape of ``rows`` (at least ``micro_batch`` different ones)."""
        if self._compile == "on" or (self._compile == "measure" and not self.compiled and not self._sizes):
            self._try_compiled(rows)
        shape = tuple(rows[0].shape)
        while True:
            try:
                self._sizes[shape] = self._usable_sizes(rows[: self.micro_batch])
                return
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
                self._halve(self.micro_batch)

    def _usable_sizes(self, rows: Sequence[Tensor]) -> list[int]:
        sizes = powers_of_two(self.micro_batch)
        canonical = self._run(rows, self.micro_batch)
        if self.invariance == "fast":
            for size in sizes:
                self._run(rows[:size], size)
            return sizes
        exact = [size for size in sizes[:-1] if torch.equal(self._run(rows[-size:], size), canonical[-size:])]
        log.info(
            "usable batch sizes",
            extra={"function": self.name, "row": list(rows[0].shape), "sizes": [*exact, self.micro_batch]},
        )
        return [*exact, self.micro_batch]

    def _size_for(self, chunk: Sequence[Tensor]) -> int:
        usable = self._sizes.get(tuple(chunk[0].shape), [self.micro_batch])
        return next((size for size in usable if size >= len(chunk)), self.micro_batch)

    def _run(self, rows: Sequence[Tensor], size: int) -> Tensor:
        batch = self._stager.stage(rows, size)
        features = self._function(batch)
        if features.shape[0] != size:
            raise ValueError(f"{self.name} gave {features.shape[0]} rows for a batch of {size}")
        # a replayed CUDA graph overwrites its output: what leaves here must own its memory
        return features[: len(rows)].clone()

    def _try_compiled(self, rows: Sequence[Tensor]) -> None:
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"  # reduce-overhead captures CUDA graphs
        compiled = cast(RowFunction, torch.compile(self._plain, mode=mode, dynamic=False))
        plain_s = self._seconds(rows) if self._compile == "measure" else None
        self._function = compiled
        started = time.perf_counter()
        self._run(rows[: self.micro_batch], self.micro_batch)
        compile_s = time.perf_counter() - started
        if plain_s is not None:
            compiled_s = self._seconds(rows)
            self.compiled = compiled_s < plain_s
            log.info(
                "compiled against plain",
                extra={
                    "function": self.name,
                    "ratio": round(compiled_s / plain_s, 3),
                    "compile_s": round(compile_s, 1),
                },
            )
            if not self.compiled:
                self._function = self._plain
        else:
            self.compiled = True
            log.info("compiled", extra={"function": self.name, "compile_s": round(compile_s, 1)})

    def _seconds(self, rows: Sequence[Tensor], repeats: int = 5) -> float:
        """Best time of one canonical batch."""
        best = float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            self._run(rows[: self.micro_batch], self.micro_batch)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            best = min(best, time.perf_counter() - started)
        return best

    def _halve(self, size: int) -> None:
        """Remember that a batch of ``size`` rows does not fit."""
        self.micro_batch = max(1, min(self.micro_batch, size) // 2)
        self._sizes = {
            shape: [*[s for s in sizes if s < self.micro_batch], self.micro_batch]
            for shape, sizes in self._sizes.items()
        }
        self._stager.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory: halved", extra={"function": self.name, "micro_batch": self.micro_batch})
