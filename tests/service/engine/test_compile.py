from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service.engine import compile as compile_module
from service.engine.compile import BucketedFunction, powers_of_two, split, use_compile_cache

CPU = torch.device("cpu")
OOM = torch.OutOfMemoryError


class Doubler:
    """Rows times two; remembers the batch sizes that it saw and fails as asked."""

    def __init__(self, fits: int = 1 << 30, rounding: Callable[[int], float] = lambda size: 0.0) -> None:
        self.sizes: list[int] = []
        self.fits = fits
        self.rounding = rounding  # what the batch size does to the last bits

    def __call__(self, rows_BD: Tensor) -> Tensor:
        self.sizes.append(len(rows_BD))
        if len(rows_BD) > self.fits:
            raise OOM("no memory for this batch")
        return rows_BD * 2 + self.rounding(len(rows_BD))


def bucketed(function: Callable[[Tensor], Tensor], micro_batch: int = 8, **changes: Any) -> BucketedFunction:
    given: dict[str, Any] = {"device": CPU, "micro_batch": micro_batch, "invariance": "exact", "compile": "off"}
    return BucketedFunction("test", function, **(given | changes))


def rows(count: int, width: int = 3) -> list[Tensor]:
    return list(torch.randn(count, width, generator=torch.Generator().manual_seed(0)))


@given(st.integers(1, 5000))
def test_bucket_sizes_end_with_the_limit_and_waste_less_than_half(limit: int) -> None:
    sizes = powers_of_two(limit)
    assert sizes[0] == 1
    assert sizes[-1] == limit
    assert all(small < large <= 2 * small for small, large in itertools.pairwise(sizes))


@pytest.mark.parametrize("invariance", ["exact", "fast"])
@pytest.mark.parametrize("count", [1, 3, 8, 9, 23])
def test_every_row_gets_its_own_result_in_order(count: int, invariance: str) -> None:
    function = bucketed(Doubler(), invariance=invariance)
    function.warm_up(rows(8))
    given = rows(count)
    assert torch.equal(function(given), torch.stack(given) * 2)


def test_without_warm_up_there_is_one_shape() -> None:
    doubler = Doubler()
    function = bucketed(doubler)
    function(rows(11))
    assert doubler.sizes == [8, 8]


def test_fast_mode_pads_to_powers_of_two_or_splits_where_that_wastes_more_than_a_quarter() -> None:
    doubler = Doubler(rounding=lambda size: size / 1024)  # sizes that differ in their bits are used all the same
    function = bucketed(doubler, invariance="fast")
    function.warm_up(rows(8))
    doubler.sizes.clear()
    for count in (1, 2, 3, 5, 8, 9):
        function(rows(count))
    assert doubler.sizes == [1, 2, 4, 4, 1, 8, 8, 1]  # five rows: three of eight would be padding


def test_exact_mode_uses_smaller_shapes_only_where_they_give_the_same_bits() -> None:
    doubler = Doubler(rounding=lambda size: 2**-20 if size in (1, 4) else 0.0)
    function = bucketed(doubler)
    function.warm_up(rows(8))
    doubler.sizes.clear()
    for count in (1, 2, 3, 8):
        function(rows(count))
    assert doubler.sizes == [2, 2, 2, 2, 8]  # three rows: two, and one that is padded to two


def test_usable_sizes_are_found_for_each_shape_of_row_by_itself() -> None:
    doubler = Doubler()
    doubler.rounding = lambda size: 0.0
    function = bucketed(doubler, micro_batch=4)
    function.warm_up(rows(4, width=3))
    doubler.rounding = lambda size: float(size)
    function.warm_up(rows(4, width=5))
    doubler.sizes.clear()
    doubler.rounding = lambda size: 0.0
    function(rows(1, width=3))
    function(rows(1, width=5))
    assert doubler.sizes == [1, 4]


def test_a_function_whose_result_depends_on_the_place_in_the_batch_keeps_no_small_size() -> None:
    """A kernel may treat the tail of a batch differently; then a row alone is not the row among others."""

    def function(rows_BD: Tensor) -> Tensor:
        features = rows_BD * 2
        if len(features) == 8:  # a vectorised body over the first rows, scalar code over the rest
            features[:4] += 2**-10
        return features

    chosen = bucketed(function)
    chosen.warm_up(rows(8))
    row = rows(1)[0]
    alone = chosen([row])[0]
    places = [chosen([*rows(i, 3), row, *rows(7 - i, 3)])[i] for i in range(8)]
    assert all(torch.equal(place, alone) for place in places)


def test_a_function_that_loses_rows_raises_and_names_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"test gave 7 rows for a batch of 8"):
        bucketed(lambda batch: batch[1:])(rows(8))


def test_a_result_owns_its_memory() -> None:
    output = torch.zeros(8, 3)

    def replayed(rows_BD: Tensor) -> Tensor:  # as a CUDA graph does: one output buffer for all calls
        return output.copy_(rows_BD)

    function = bucketed(replayed)
    first = function(rows(8))
    kept = first.clone()
    function([row + 1 for row in rows(8)])
    assert torch.equal(first, kept)


# -- out of memory ----------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_and_no_row_is_lost_or_repeated() -> None:
    doubler = Doubler(fits=2)
    function = bucketed(doubler)
    given = rows(11)
    assert torch.equal(function(given), torch.stack(given) * 2)
    assert function.micro_batch == 2


def test_the_size_that_fits_is_remembered() -> None:
    doubler = Doubler(fits=4)
    function = bucketed(doubler)
    function(rows(8))
    doubler.sizes.clear()
    function(rows(8))
    assert doubler.sizes == [4, 4]


def test_one_row_that_does_not_fit_raises() -> None:
    with pytest.raises(OOM):
        bucketed(Doubler(fits=0))(rows(3))


def test_warm_up_finds_the_size_that_fits_and_checks_its_small_sizes_against_it() -> None:
    doubler = Doubler(fits=4, rounding=lambda size: 2**-20 if size == 1 else 0.0)
    function = bucketed(doubler)
    function.warm_up(rows(8))
    assert function.micro_batch == 4
    doubler.sizes.clear()
    function(rows(1))
    assert doubler.sizes == [2]


def test_after_halving_in_service_small_sizes_still_give_the_bits_of_the_new_canonical_size() -> None:
    """Sizes 1 and 2 agreed with 8; that says nothing of 4, which becomes canonical when 8 no longer fits."""
    doubler = Doubler(rounding=lambda size: 2**-20 if size == 4 else 0.0)
    function = bucketed(doubler)
    function.warm_up(rows(8))
    doubler.fits = 4
    function(rows(8))
    given = rows(4)
    alone = torch.cat([function([row]) for row in given])
    assert torch.equal(alone, function(given))


@pytest.mark.parametrize("mode", ["on", "measure"])
def test_out_of_memory_while_compiling_halves_too(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler is left out: a real one would take minutes to say the same, and the fault cannot be made on a CPU.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    function = bucketed(Doubler(fits=4), compile=mode)
    function.warm_up(rows(8))
    assert function.micro_batch == 4


class Holder:
    """Holds the tensor of a forward while it runs, and notes whether earlier ones are gone when a forward begins."""

    def __init__(self, fits: int) -> None:
        self.fits = fits
        self.held: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def __call__(self, rows_BD: Tensor) -> Tensor:
        self.alive.append(sum(ref() is not None for ref in self.held))
        activations = rows_BD * 2
        self.held.append(weakref.ref(activations))
        if len(rows_BD) > self.fits:
            raise OOM("no memory for this batch")
        return activations + 0


def test_what_a_failed_forward_held_is_freed_before_the_smaller_one() -> None:
    """A traceback keeps the frames of a forward, and they its tensors: on a full device nothing would fit beside."""
    holder = Holder(fits=2)
    bucketed(holder)(rows(8))
    warmed = Holder(fits=2)
    bucketed(warmed).warm_up(rows(8))
    for found in (holder, warmed):
        assert len(found.alive) > 3
        assert not any(found.alive)


# -- compilation ------------------------------------------------------------------------------------------------------


class StepClock:
    """Time passes only where the test says: ``plain`` or ``compiled`` seconds for each call of a function."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(("plain_s", "compiled_s", "wins"), [(2.0, 1.0, True), (1.0, 2.0, False), (1.0, 1.0, False)])
def test_measure_keeps_the_faster(
    plain_s: float, compiled_s: float, wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = StepClock()
    monkeypatch.setattr(compile_module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    function = bucketed(torch.sin, compile="measure")
    calls: list[str] = []
    run = BucketedFunction._run

    def timed_run(self: BucketedFunction, given: Any, size: int) -> Tensor:
        is_plain = self._function is self._plain
        calls.append("plain" if is_plain else "compiled")
        clock.now += plain_s if is_plain else compiled_s
        return run(self, given, size)

    monkeypatch.setattr(BucketedFunction, "_run", timed_run)
    # "eager" runs dynamo and leaves the kernels alone: the choice is under test here, not the code generator
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: real(f, backend="eager", dynamic=dynamic))
    function.warm_up(rows(8))
    assert function.compiled is wins
    calls.clear()
    result = function(rows(8))
    assert calls == ["compiled" if wins else "plain"]
    assert torch.allclose(result, torch.sin(torch.stack(rows(8))))


class Compiler:
    """In place of torch.compile: notes the shapes that compiled functions are called with, and calls the function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        monkeypatch.setattr(torch, "compile", self.compile)

    def compile(self, function: Callable[[Tensor], Tensor], **_: Any) -> Callable[[Tensor], Tensor]:
        def compiled(rows_BD: Tensor) -> Tensor:
            self.shapes.append(tuple(rows_BD.shape))
            return function(rows_BD)

        return compiled


def test_a_shape_that_was_not_warmed_up_is_never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of another aspect ratio come at any time; a large network compiles longer than its watchdog waits."""
    compiler = Compiler(monkeypatch)
    function = bucketed(Doubler(), compile="on")
    function.warm_up(rows(8, width=3))
    assert function.compiled
    compiler.shapes.clear()
    for width in (3, 5, 3, 7):
        given = rows(9, width)
        assert torch.equal(function(given), torch.stack(given) * 2)
    assert set(compiler.shapes) == {(8, 3)}


@pytest.mark.parametrize("late", [True, False])
def test_after_running_out_of_memory_only_warm_up_compiles_again(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(monkeypatch)
    doubler = Doubler(fits=1 << 30 if late else 4)
    function = bucketed(doubler, compile="on")
    function.warm_up(rows(8))
    compiler.shapes.clear()
    doubler.fits = 4
    function(rows(8))
    function(rows(8))
    assert function.micro_batch == 4
    assert function.compiled is not late
    assert compiler.shapes == ([(8, 3)] if late else [(4, 3)] * 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_really_compiled_code_gives_the_plain_scores_and_is_exact() -> None:
    from tests.service.engine import tiny

    plain, compiled = tiny.make_worker(micro_batch=4), tiny.make_worker(micro_batch=4, compile="on")
    assert compiled._towers is not None
    assert compiled._towers.images.compiled
    samples = [tiny.sample(i, prompt) for i, prompt in enumerate(["a", "b", "a longer prompt", "d"])]
    together = tiny.scores(compiled, samples)
    assert together == pytest.approx(tiny.scores(plain, samples), abs=1e-5)
    fresh = tiny.make_worker(micro_batch=4, compile="on", cache_bytes=0)
    assert [tiny.scores(fresh, [entry])[0] for entry in samples] == together


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_shape_of_the_gpu_default_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """dynamo gives up on a code object after a few recompilations and runs it eagerly, with no more than a warning."""
    from tests.service.engine import tiny

    torch._dynamo.reset()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: real(f, backend="eager", dynamic=dynamic))
    worker = tiny.make_worker(micro_batch=32, compile="on")
    assert worker._towers is not None
    assert isinstance(worker.model, tiny.TinyTower)
    worker.model.text_batches.clear()  # the tower notes eager batches only
    with torch.inference_mode():
        for length in tiny.TEXT_LENGTHS:
            for size in powers_of_two(16):
                worker._towers.texts._run([torch.ones(length, dtype=torch.int64)] * size, size)
    assert worker.model.text_batches == []


def test_the_compile_cache_goes_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    monkeypatch.setenv("TRITON_CACHE_DIR", "restored at the end of the test")
    del os.environ["TRITON_CACHE_DIR"]
    use_compile_cache(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"  # what the user set wins
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


@given(
    st.integers(0, 200), st.sets(st.sampled_from([1, 2, 4, 8, 16, 32]), min_size=1), st.sampled_from([0.0, 0.25, 1.0])
)
def test_split_holds_all_rows_and_pads_the_last_batch_only(count: int, usable: set[int], waste: float) -> None:
    sizes = sorted(usable)
    batches = split(count, sizes, waste)
    assert set(batches) <= usable
    padding = sum(batches) - count
    assert 0 <= padding < (batches[-1] if batches else 1)
    if batches and padding > waste * batches[-1]:
        assert batches[-1] == sizes[0]  # there was no smaller size to use instead


def test_numbers_that_are_not_finite_are_not_taken_for_a_dependence_on_the_place() -> None:
    function = bucketed(lambda rows_BD: rows_BD * float("nan"))
    function.warm_up(rows(8))
    assert function.micro_batch == 8
