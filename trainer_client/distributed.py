"""Thin helpers for runs on several ranks, over torch.distributed's process group.

accelerate and torchrun both make that group, so these work under either; without a group there is one rank, and nothing
is sent. Collectives must be called by every rank, in the same order. Objects travel as JSON in byte tensors, because
the object collectives of torch pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Json: TypeAlias = Any
"""What json.dumps takes."""
AskGroups: TypeAlias = Callable[[Tensor, Tensor, list[Json]], Tensor]
"""(group_N, samples [N, ...], notes of N) of whole groups -> rewards [N] or [N, T]."""

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip
_MAX_DIMS = 8
_NO_ROWS = -1
_NOT_SENDABLE = -2


class RankFailed(RuntimeError):
    """Another rank met an exception, so this one cannot go on; its message is repeated here."""


# Who am I


def rank() -> int:
    """This process's place among all, from 0; 0 without a process group."""
    return dist.get_rank() if _is_spread() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if _is_spread() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if _is_spread():
        dist.barrier()


def own_share(total: int) -> range:
    """The global sample indices of this rank: contiguous, sizes differing by one at most. Raises ValueError if < 0."""
    if total < 0:
        raise ValueError(f"a batch has at least 0 samples, not {total}")
    return range(total * rank() // world_size(), total * (rank() + 1) // world_size())


# Seeds that do not know the rank


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from the first 63 bits of the SHA-256 of ``parts``: equal parts, equal seed, everywhere."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_generators(
    seed: int, step: int, indices: Iterable[int], device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """One generator a sample, seeded by (seed, step, global index of the sample).

    Two ranks of B samples then draw the noise that one rank of 2 B draws. Raises what torch raises for the device.
    """
    return [torch.Generator(device).manual_seed(derived_seed(seed, step, index)) for index in indices]


# Gathering


@torch.no_grad()
def gather_rows(rows: Tensor | None) -> Tensor:
    """Rows [B_r, ...] of every rank, one after the other by rank: [sum B_r, ...] on every rank, on its own device.

    B_r may differ and be 0; None stands for no rows where a rank does not know their shape (the answer then lies on
    the CPU). No gradient passes. Raises ValueError on every rank alike where shapes or dtypes do not fit.
    """
    if not _is_spread():
        if rows is None:
            raise ValueError("there are no rows")
        return rows.clone()
    device = _wire_device()
    headers = [h.tolist() for h in _all_gather(torch.tensor(_header(rows), device=device))]
    known = {tuple(h[1:2] + h[3 : 2 + h[2]]) for h in headers if h[0] != _NO_ROWS}
    if len(known) != 1 or any(h[0] == _NOT_SENDABLE for h in headers):
        shapes = "; ".join(f"rank {r}: {_described(h)}" for r, h in enumerate(headers))
        raise ValueError(f"the ranks' rows do not fit together: {shapes}")
    dtype, *row_shape = known.pop()
    counts = [max(h[0], 0) for h in headers]
    # uint8 and back: gloo and nccl do not take every dtype, but bytes they do.
    own = torch.zeros((max(counts), *row_shape), dtype=_DTYPES[dtype], device=device)
    if rows is not None:
        own[: len(rows)] = rows
    gathered = _all_gather(own.reshape(-1).view(torch.uint8))
    parts = [part.view(_DTYPES[dtype]).view(own.shape)[:n] for part, n in zip(gathered, counts, strict=True)]
    return torch.cat(parts).to("cpu" if rows is None else rows.device)


def gather_bytes(content: bytes) -> list[bytes]:
    """The bytes of every rank, by rank."""
    lengths = gather_rows(torch.tensor([len(content)]))
    joined = gather_rows(torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else _no_bytes())
    return [part.numpy().tobytes() for part in torch.split(joined, lengths.tolist())]


def gather_json(value: Json) -> list[Json]:
    """The value of every rank, by rank, as JSON gives it back. Raises TypeError for what JSON cannot hold."""
    return [json.loads(content) for content in gather_bytes(json.dumps(value).encode())]


def rewards_of_whole_groups(group_B: Tensor, samples: Tensor, notes: Sequence[Json], ask: AskGroups) -> Tensor:
    """Rewards of this rank's B samples where a reward needs the whole group, and groups are spread over ranks.

    ``group_B`` int [B], one id a prompt on all ranks; ``samples`` [B, ...] such as uint8 images; ``notes`` one JSON
    value a sample, such as its prompt. All are gathered, each group goes to one rank (round robin by ascending id),
    which calls ``ask`` once with all rows of its groups, sorted by group and, within it, in the order of ranks.
    Returns float64 [B] or [B, T]. Raises ValueError for lengths that differ, RankFailed where another rank raised.
    """
    raise_together(None if len(group_B) == len(samples) == len(notes) else ValueError(
        f"{len(group_B)} groups, {len(samples)} samples and {len(notes)} notes"))  # fmt: skip
    groups_N, samples_N = gather_rows(group_B).cpu(), gather_rows(samples)
    notes_N = [note for part in gather_json(list(notes)) for note in part]
    turn_N = torch.unique(groups_N, return_inverse=True)[1] % world_size()
    order = groups_N.argsort(stable=True)
    own = order[turn_N[order] == rank()]
    rewards: Tensor | None = None
    error: Exception | None = None
    if len(own):
        try:
            rewards = ask(groups_N[own], samples_N[own.to(samples_N.device)], [notes_N[i] for i in own.tolist()])
            if len(rewards) != len(own):
                raise ValueError(f"{len(rewards)} rewards for {len(own)} samples")
            rewards = rewards.double().cpu()
        except Exception as caught:  # it is raised below, on every rank
            error = caught
    raise_together(error)
    answered = gather_rows(own)
    values = gather_rows(rewards)
    values = torch.empty_like(values).index_copy_(0, answered, values)
    start = sum(gather_rows(torch.tensor([len(group_B)]))[: rank()].tolist())
    return values[start : start + len(group_B)].to(group_B.device)


# Means, losses and steps


@torch.no_grad()
def masked_mean(values_B: Tensor, ok_B: Tensor) -> float:
    """Mean over all ranks of the values that are ok, in float64; NaN where none is.

    Rows that are not ok may hold NaN. Raises ValueError for shapes that differ.
    """
    _same_length(values_B, ok_B)
    kept = values_B.double()[ok_B]
    total, count = _sum_over_ranks(torch.stack([kept.sum(), kept.new_tensor(kept.numel())]))
    return float(total / count)


def count_ok(ok_B: Tensor) -> int:
    """The number of samples that are ok, over all ranks."""
    return int(_sum_over_ranks(ok_B.sum().long().reshape(1)).item())


def masked_loss(loss_B: Tensor, ok_B: Tensor, *, count: int | None = None) -> Tensor:
    """This rank's scalar loss, scaled so that the average over ranks is the mean over all samples that are ok.

    DDP (and :func:`average_gradients_`) averages gradients over ranks, which weighs a rank with failed samples as much
    as one without; this loss is the rank's sum times ranks / ``count``. ``count`` is :func:`count_ok` of the optimizer
    step when its batch is worked in several pieces; None: of this call. A rank (or batch) without an ok sample gives 0
    that is still connected to the graph, so that it takes its step like the others. A NaN that entered the network
    before ``loss_B`` still spoils the gradient: mask rewards first (advantages of failed samples are 0).
    """
    _same_length(loss_B, ok_B)
    count = count_ok(ok_B) if count is None else count
    return torch.where(ok_B, loss_B, 0.0).sum() * (world_size() / max(count, 1))


def minibatches(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """(rows [size] int64, ok [size] bool) of this rank's ``count`` samples, in order; as many on every rank.

    Where another rank has more samples, or the last minibatch is not full, row 0 is repeated and not ok. Raises
    ValueError for a size below 1, or where any rank has no sample.
    """
    counts = gather_rows(torch.tensor([count])).tolist()
    if size < 1 or min(counts) < 1:
        raise ValueError(f"minibatches of {size} from {counts} samples by rank")
    padded = -(-max(counts) // size) * size
    rows = torch.arange(padded)
    ok = rows < count
    return list(zip(torch.split(torch.where(ok, rows, 0), size), torch.split(ok, size), strict=True))


@torch.no_grad()
def average_gradients_(parameters: Iterable[Tensor]) -> None:
    """Gradients <- their mean over ranks, in place: what DDP does, for a network that is not wrapped by it.

    A parameter without a gradient counts as zero, so every rank must pass the same parameters in the same order.
    """
    if not _is_spread():
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter.grad)
    for gradients in kinds.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        mean = _sum_over_ranks(flat) / world_size()
        for gradient, part in zip(gradients, torch.split(mean, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


# One writes, all know


def on_main(action: Callable[[], object]) -> None:
    """Run ``action`` on the main process; all wait for it. Where it raises, the others raise RankFailed."""
    error: Exception | None = None
    if is_main():
        try:
            action()
        except Exception as caught:  # it is raised below, on every rank
            error = caught
    raise_together(error)


def raise_together(error: Exception | None) -> None:
    """Raise ``error`` if there is one, else RankFailed if another rank has one: ranks left alone would wait forever."""
    if not _is_spread():
        if error is not None:
            raise error
        return
    messages = gather_json(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [f"rank {r}: {message}" for r, message in enumerate(messages) if message is not None]
    if failed:
        raise RankFailed("; ".join(failed))


def _is_spread() -> bool:
    return dist.is_available() and dist.is_initialized()


def _wire_device() -> torch.device:
    """Where the backend wants tensors: nccl takes only those of its GPU."""
    if "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _all_gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return parts


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    if not _is_spread():
        return tensor
    total = tensor.to(_wire_device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def _header(rows: Tensor | None) -> list[int]:
    """[rows, dtype, dimensions, sizes of the other dimensions, ..., 0]; every rank must send one, even a wrong one."""
    if rows is None or rows.dtype not in _DTYPES or not 1 <= rows.dim() <= _MAX_DIMS:
        return [_NO_ROWS if rows is None else _NOT_SENDABLE] + [0] * (1 + _MAX_DIMS)
    return [len(rows), _DTYPES.index(rows.dtype), rows.dim(), *rows.shape[1:], *[0] * (_MAX_DIMS - rows.dim())]


def _described(header: list[int]) -> str:
    if header[0] < 0:
        return "none" if header[0] == _NO_ROWS else "of a dtype or number of dimensions that cannot be sent"
    return f"{_DTYPES[header[1]]} {[header[0], *header[3 : 2 + header[2]]]}"


def _no_bytes() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _same_length(values: Tensor, ok: Tensor) -> None:
    if values.shape != ok.shape:
        raise ValueError(f"values {list(values.shape)} and mask {list(ok.shape)} differ in shape")
