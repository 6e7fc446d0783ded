"""d(score)/d(image): of a :class:`models.towers.TowerReward` in batches of few shapes, of a judge one by one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from models.base import Candidate, Context, InputError, Output, SampleError
from models.judge import Comparison, Judge
from models.towers import HeadOutput, TowerInput, TowerReward, alike, unpack
from service.engine.batcher import GradientResult
from service.engine.compile import powers_of_two
from service.engine.towers import power_of_two
from service.tournament import preference_from_orders

log = logging.getLogger(__name__)

WARM_UP_S = 20.0
"""Measuring of small batches at start stops after this long: on a CPU a large tower takes seconds for each."""


Result = TypeVar("Result")
Answer = tuple[Output | SampleError, Tensor]
"""An output and the gradient of its score [3, H, W]."""


@dataclass(frozen=True, eq=False)
class _Row:
    """A sample, its image as a leaf [3, H, W], and the tower's input [1, ...] made from the leaf."""

    entry: TowerInput
    leaf: Tensor
    pixels: Tensor


class TowerGradient:
    """Along the differentiable twin of the preprocessing, in the model's own dtype (float32).

    Batches are padded to ``micro_batch`` rows, or to a smaller size that :meth:`warm_up` found to give the same bits.
    """

    def __init__(self, model: TowerReward, micro_batch: int) -> None:
        self.model = model
        self.micro_batch = power_of_two(micro_batch)
        self._small: list[int] = []
        self._every_size = False

    def warm_up(self, prompt: str, pixels_3HW: Tensor) -> None:
        """Find the sizes below ``micro_batch`` whose scores and gradients are those of a full batch, bit for bit.

        ``micro_batch`` is halved until a full batch fits into memory.
        """
        tokens, _ = self.model.prepare_text(prompt)
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(self.micro_batch, *pixels_3HW.shape, generator=generator)
        entries = [TowerInput(image, tokens, "", prompt) for image in noise]
        self._small = self._halving(lambda: self._exact_sizes(entries[: self.micro_batch]))
        log.info(
            "usable gradient batch sizes",
            extra={"model": self.model.info.name, "sizes": [*self._small, self.micro_batch]},
        )

    def _exact_sizes(self, entries: Sequence[TowerInput]) -> list[int]:
        started = time.monotonic()
        exact = []
        full = self._gradients([self._input(entry) for entry in entries], self.micro_batch)
        for size in powers_of_two(self.micro_batch)[:-1]:
            if time.monotonic() - started > WARM_UP_S:
                break
            first = [self._input(entry) for entry in entries[:size]]
            last = [self._input(entry) for entry in entries[-size:]]
            if _equal(self._gradients(first, size), full[:size]) and _equal(self._gradients(last, size), full[-size:]):
                exact.append(size)
        return exact

    def _halving(self, compute: Callable[[], Result]) -> Result:
        """What ``compute`` gives, which is tried with smaller batches when memory runs out."""
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
            self.halve()  # the error is gone: its traceback held the tensors of the forward that failed

    def use_every_size(self) -> None:
        """Allow every power of two without asking whether it gives the same bits (``invariance: fast``)."""
        self._every_size = True
        self._small = powers_of_two(self.micro_batch)[:-1]

    def halve(self) -> None:
        """Remember that a full batch does not fit. What was measured against it counts no longer."""
        self.micro_batch //= 2
        self._small = powers_of_two(self.micro_batch)[:-1] if self._every_size else []
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory: halved", extra={"model": self.model.info.name, "micro_batch": self.micro_batch})

    def run(self, batch: Sequence[TowerInput]) -> list[GradientResult | SampleError]:
        """``pixels`` are float32 [3, H, W] in [0, 1] here; sizes and token lengths may differ.

        Batches are halved until they fit into memory; torch.OutOfMemoryError when a single image does not.
        """
        return self._halving(lambda: self._run_all(batch))

    def _run_all(self, batch: Sequence[TowerInput]) -> list[GradientResult | SampleError]:
        results: list[GradientResult | SampleError] = []
        for start in range(0, len(batch), self.micro_batch):
            results += self._chunk(batch[start : start + self.micro_batch])
        return results

    def _chunk(self, batch: Sequence[TowerInput]) -> list[GradientResult | SampleError]:
        rows = [self._input(entry) for entry in batch]
        results: dict[int, GradientResult | SampleError] = {}
        for same in alike({i: (row.pixels.shape, row.entry.tokens.shape) for i, row in enumerate(rows)}):
            size = next((size for size in self._small if size >= len(same)), self.micro_batch)
            for place, answer in zip(same, self._gradients([rows[place] for place in same], size), strict=True):
                results[place] = _result(*answer)
        return [results[place] for place in range(len(batch))]

    @torch.enable_grad()
    def _input(self, entry: TowerInput) -> _Row:
        leaf = entry.pixels.detach().to(self.model.device).requires_grad_()
        return _Row(entry, leaf, self.model.preprocess_tensor(leaf[None]))

    @torch.enable_grad()
    def _gradients(self, rows: Sequence[_Row], size: int) -> list[Answer]:
        """Output and gradient [3, H, W] of rows of equal shapes, computed as a batch of ``size``."""
        model, filler = self.model, size - len(rows)
        entries = [*(row.entry for row in rows), *[rows[-1].entry] * filler]
        with torch.no_grad():
            distinct = {row.entry.text_id: row.entry.tokens for row in rows}
            texts = {name: model.encode_text(tokens[None].to(model.device)) for name, tokens in distinct.items()}
        images = torch.cat([*(row.pixels for row in rows), *[rows[-1].pixels.detach()] * filler])
        head: HeadOutput = model.head(
            model.encode_image(images), torch.cat([texts[entry.text_id] for entry in entries])
        )
        gradients = torch.autograd.grad(head.score_B[: len(rows)].sum(), [row.leaf for row in rows])
        outputs = unpack(head, [entry.warnings for entry in entries])
        return [(output, gradient.detach()) for output, gradient in zip(outputs, gradients, strict=False)]


@dataclass(frozen=True, eq=False)
class JudgedPixels:
    """Pixels [3, H, W] to be compared with the reference, which is both candidates of ``comparison``."""

    comparison: Comparison
    pixels: Tensor
    both_orders: bool = True


class JudgeGradient:
    """d P(candidate preferred to its reference) / d(image) of a judge, one comparison after the other.

    In both orders the preference is the mean over both places of the image, as in /compare: what the judge prefers for
    its place cancels. In one order the image is seen first.
    """

    micro_batch = 1

    def __init__(self, judge: Judge, between: Callable[[], None] = lambda: None) -> None:
        """``between`` is called before each comparison: it may take as long as a batch of another model."""
        self.judge = judge
        self._between = between

    @staticmethod
    def prepare(
        prompt: str, pixels: Tensor, reference: Candidate | None, context: Context | None, both_orders: bool = True
    ) -> JudgedPixels:
        """Raises InputError ("reference_missing") for an item without reference."""
        if reference is None:
            raise InputError(
                "a judge's gradient is that of being preferred to the item's reference, which is missing",
                code="reference_missing",
            )
        return JudgedPixels(Comparison(prompt, reference, reference, context), pixels, both_orders)

    def run(self, batch: Sequence[JudgedPixels]) -> list[GradientResult | SampleError]:
        """Scores are preferences in [0, 1]; an image of which a comparison failed, in either order, has its error."""
        results: list[GradientResult | SampleError] = []
        for entry in batch:
            try:
                results.append(_result(*self._preferred(entry)))
            except SampleError as error:
                results.append(error)
        return results

    def _preferred(self, entry: JudgedPixels) -> tuple[Output, Tensor]:
        """P(image preferred) and its gradient."""
        self._between()
        forwards, gradient = self.judge.gradient(entry.comparison, entry.pixels)
        if not entry.both_orders:
            return forwards, gradient
        self._between()
        backwards, against = self.judge.gradient(entry.comparison, entry.pixels, "second")
        score = preference_from_orders(forwards.score, backwards.score)
        warnings = tuple(dict.fromkeys((*forwards.warnings, *backwards.warnings)))
        return Output(score, warnings=warnings), (gradient - against) / 2


def _result(output: Output | SampleError, gradient: Tensor) -> GradientResult | SampleError:
    if isinstance(output, SampleError):
        return output
    if not bool(torch.isfinite(gradient).all()):
        return SampleError("the gradient holds numbers that are not finite", code="not_finite")
    return GradientResult(output, gradient.float().cpu())


def _equal(answers: Sequence[Answer], others: Sequence[Answer]) -> bool:
    return all(
        isinstance(output, Output)
        and isinstance(other, Output)
        and (output.score, output.outputs) == (other.score, other.outputs)
        and torch.equal(gradient, other_gradient)
        for (output, gradient), (other, other_gradient) in zip(answers, others, strict=True)
    )
