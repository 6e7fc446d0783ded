"""Rows from host memory to the device: pinned buffers and a copy stream on CUDA, a plain stack on the CPU."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUFFERS = 2  # one is filled while the other is still being copied
KEPT_SHAPES = 32
"""Batch shapes whose buffers are kept: pinned memory cannot be swapped out, and images may have hundreds of shapes."""


@dataclass(eq=False)
class _Pinned:
    host: Tensor
    copied: torch.cuda.Event


class Stager:
    """Builds padded batches on a device. On CUDA the copy of a batch overlaps with the forward of the one before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffers: OrderedDict[tuple[object, ...], deque[_Pinned]] = OrderedDict()

    def stage(self, rows: Sequence[Tensor], size: int) -> Tensor:
        """Rows [n, ...] (one shape and dtype) padded with copies of the last to [size, ...] on the device."""
        if not 0 < len(rows) <= size:
            raise ValueError(f"{len(rows)} rows do not fit a batch of {size}")
        padded = [*rows, *[rows[-1]] * (size - len(rows))]
        if self._stream is None or rows[0].device.type != "cpu":
            return torch.stack(padded).to(self.device)
        return self._stage_pinned(padded, self._stream)

    def _stage_pinned(self, rows: Sequence[Tensor], stream: torch.cuda.Stream) -> Tensor:
        buffer = self._next_buffer((len(rows), *rows[0].shape), rows[0].dtype)
        buffer.copied.synchronize()  # its last copy must have left before it is filled again
        torch.stack(list(rows), out=buffer.host)
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(stream):
            batch = buffer.host.to(self.device, non_blocking=True)
            buffer.copied.record(stream)
        compute.wait_stream(stream)
        batch.record_stream(compute)  # the allocator may not hand it out again before the forward has read it
        return batch

    def _next_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Pinned:
        """The buffer of this shape that was used longest ago."""
        key = (shape, dtype)
        if key not in self._buffers:
            self._buffers[key] = deque(
                _Pinned(torch.empty(shape, dtype=dtype, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]
                for _ in range(BUFFERS)
            )
            # A copy that is still running keeps its memory: the allocator waits for it.
            while len(self._buffers) > KEPT_SHAPES:
                self._buffers.popitem(last=False)
        self._buffers.move_to_end(key)
        self._buffers[key].rotate()
        return self._buffers[key][0]

    def clear(self) -> None:
        """Free the buffers (after running out of memory, or when batch sizes change)."""
        self._buffers.clear()
