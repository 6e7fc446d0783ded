"""Fixed batch shapes, torch.compile, warm-up and the compile cache.

A score may not depend on its neighbours. A tensor forward gives the same row for the same input as long as the batch
*shape* is the same (its kernels reduce in an order that the shape decides), so rows run in micro-batches of one
canonical shape, padded. On many machines smaller shapes give the very same bits; warm-up measures which, on random
rows, and ``invariance: exact`` uses those too, because they answer a single image sooner. ``invariance: fast`` uses
every power of two without asking.

Compiling takes seconds to minutes, so it is done at start alone: rows of a shape that warm-up has not seen (images of
another aspect ratio) run uncompiled, always, and so with the same bits at any time.
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

Row = Tensor | tuple[Tensor, ...]
"""One row of every input of a function."""

RowFunction = Callable[..., Tensor]
"""Its inputs [B, ...] on the device -> features [B, ...]."""


def parts_of(row: Row) -> tuple[Tensor, ...]:
    return row if isinstance(row, tuple) else (row,)


def shapes_of(row: Row) -> tuple[torch.Size, ...]:
    """What rows must have in common to meet in one batch."""
    return tuple(part.shape for part in parts_of(row))


def use_compile_cache(cache_dir: Path | None) -> None:
    """Keep compiled kernels over restarts; must run before the first compilation."""
    if cache_dir is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir / "inductor"))
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir / "triton"))


def allow_many_shapes() -> None:
    """Every batch size and token length is a graph of its own: beyond dynamo's limit of 8 they would run uncompiled."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4 ... below ``limit``, then ``limit`` itself."""
    sizes = []
    size = 1
    while size < limit:
        sizes.append(size)
        size *= 2
    return [*sizes, limit]


def split(count: int, sizes: Sequence[int], waste: float) -> list[int]:
    """Batch sizes, out of ascending ``sizes``, that hold ``count`` rows; only the last one is padded.

    At most the share ``waste`` of a batch is padding, as long as there is a smaller size to use instead.
    """
    batches: list[int] = []
    while count > 0:
        enough = next((size for size in sizes if size >= count), None)
        below = max((size for size in sizes if size <= count), default=None)
        if enough is not None and (below is None or enough - count <= waste * enough):
            return [*batches, enough]
        assert below is not None  # one of the two exists
        batches.append(below)
        count -= below
    return batches


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
        self._tried = False
        self._compile = compile
        self._plain = function
        self._function = function
        self._sizes: dict[tuple[torch.Size, ...], list[int]] = {}
        self._warmed: set[tuple[torch.Size, ...]] = set()
        self._stager = Stager(device)

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """Features [n, ...] of n rows of equal shapes (from the CPU or from the device), on the device."""
        while True:
            try:
                return self._run_all(rows)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
            self._halve()  # and all rows again: those that had run belong to the old shape
            self._stop_compiling()  # callers are waiting: no time to compile another shape

    def _run_all(self, rows: Sequence[Row]) -> Tensor:
        usable = self._sizes.get(shapes_of(rows[0]), [self.micro_batch])
        # A small batch on an accelerator takes as long as a large one: there padding costs nothing.
        waste = 0.25 if self.device.type == "cpu" else 1.0
        parts: list[Tensor] = []
        start = 0
        for size in split(len(rows), usable, waste):
            parts.append(self._run(rows[start : start + size], size))
            start += size
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def warm_up(self, rows: Sequence[Row]) -> None:
        """Compile and find the usable sizes for the shape of ``rows`` (at least ``micro_batch`` different ones)."""
        while True:
            self._warmed.add(shapes_of(rows[0]))
            try:
                if not self._tried and self._compile != "off":
                    self._try_compiled(rows)
                self._sizes[shapes_of(rows[0])] = self._usable_sizes(rows[: self.micro_batch])
                return
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
            self._halve()

    def _usable_sizes(self, rows: Sequence[Row]) -> list[int]:
        sizes = powers_of_two(self.micro_batch)
        if self.invariance == "fast":
            for size in sizes:
                self._run(rows[:size], size)
            return sizes
        canonical = self._run(rows, self.micro_batch)
        rotated = self._run([*rows[1:], *rows[:1]], self.micro_batch)
        # Numbers that are not finite equal nothing; the canary's score will tell.
        if bool(torch.isfinite(canonical).all()) and not torch.equal(rotated, canonical.roll(-1, 0)):
            log.error(
                "a row's bits depend on its place in the batch: rows run one by one", extra={"function": self.name}
            )
            self.micro_batch = 1
            self._sizes = {}
            self._stop_compiling()
            return [1]
        # A compiled function is another kernel for every size: each would cost minutes, and hardly one would be equal.
        exact = [] if self.compiled else [size for size in sizes[:-1] if self._equal_bits(rows, size, canonical)]
        log.info(
            "usable batch sizes",
            extra={"function": self.name, "row": shapes_of(rows[0]), "sizes": [*exact, self.micro_batch]},
        )
        return [*exact, self.micro_batch]

    def _equal_bits(self, rows: Sequence[Row], size: int, canonical: Tensor) -> bool:
        """Whether ``size`` rows give the bits of the canonical batch, at both of its ends."""
        first, last = self._run(rows[:size], size), self._run(rows[-size:], size)
        return torch.equal(first, canonical[:size]) and torch.equal(last, canonical[-size:])

    def _run(self, rows: Sequence[Row], size: int) -> Tensor:
        columns = zip(*(parts_of(row) for row in rows), strict=True)
        function = self._function if shapes_of(rows[0]) in self._warmed else self._plain
        features = function(*(self._stager.stage(column, size) for column in columns))
        if features.shape[0] != size:
            raise ValueError(f"{self.name} gave {features.shape[0]} rows for a batch of {size}")
        # a replayed CUDA graph overwrites its output: what leaves here must own its memory
        return features[: len(rows)].clone()

    def _try_compiled(self, rows: Sequence[Row]) -> None:
        from torch._dynamo.exc import BackendCompilerFailed  # seconds to import, for those who compile

        allow_many_shapes()
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"  # reduce-overhead captures CUDA graphs
        compiled = cast(RowFunction, torch.compile(self._plain, mode=mode, dynamic=False))
        plain_s = self._seconds(rows) if self._compile == "measure" else float("inf")
        self._function = compiled
        try:
            started = time.perf_counter()
            self._run(rows[: self.micro_batch], self.micro_batch)
            compile_s = time.perf_counter() - started
            compiled_s = self._seconds(rows) if self._compile == "measure" else 0.0
        except torch.OutOfMemoryError:
            self._function = self._plain
            raise
        except BackendCompilerFailed:
            if self._compile != "measure":
                raise
            log.warning("cannot compile here, staying with plain", extra={"function": self.name}, exc_info=True)
            compile_s, compiled_s = 0.0, float("inf")
        self._tried = True
        self.compiled = compiled_s < plain_s
        if not self.compiled:
            self._function = self._plain
        log.info(
            "compiled" if self.compiled else "compiled is not faster",
            extra={
                "function": self.name,
                "compile_s": round(compile_s, 1),
                "plain_s": plain_s,
                "compiled_s": compiled_s,
            },
        )

    def _stop_compiling(self) -> None:
        self._function = self._plain
        self.compiled = False

    def _seconds(self, rows: Sequence[Row], repeats: int = 5) -> float:
        """Best time of one canonical batch."""
        best = float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            self._run(rows[: self.micro_batch], self.micro_batch)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            best = min(best, time.perf_counter() - started)
        return best

    def _halve(self) -> None:
        """Remember that a canonical batch does not fit. What was measured against it counts no longer.

        To be called when the error is gone: its traceback holds the tensors of the forward that failed.
        """
        self.micro_batch //= 2
        self._warmed.clear()
        kept = powers_of_two(self.micro_batch) if self.invariance == "fast" else [self.micro_batch]
        self._sizes = dict.fromkeys(self._sizes, kept)
        self._stager.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory: halved", extra={"function": self.name, "micro_batch": self.micro_batch})
