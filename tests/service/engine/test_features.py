from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from hypothesis import given
from hypothesis import strategies as st

from service.engine.features import ENTRY_BYTES, FeatureCache
from service.telemetry import Telemetry


def feature(value: float, numbers: int = 4) -> torch.Tensor:
    return torch.full((numbers,), value, dtype=torch.float32)


def test_what_was_put_is_found_under_its_own_key() -> None:
    cache = FeatureCache("text", 10_000, Telemetry())
    cache.put(("tower a", "cat"), feature(1))
    cache.put(("tower b", "cat"), feature(2))
    assert torch.equal(cache.get(("tower a", "cat")), feature(1))
    assert torch.equal(cache.get(("tower b", "cat")), feature(2))
    assert cache.get(("tower a", "dog")) is None


def test_the_least_recently_used_goes_first() -> None:
    cache = FeatureCache("text", 3 * (16 + ENTRY_BYTES), Telemetry())
    for name in "abc":
        cache.put(name, feature(0))
    cache.get("a")
    cache.put("d", feature(0))
    assert [cache.get(name) is not None for name in "abcd"] == [True, False, True, True]


def test_bytes_count_and_not_entries() -> None:
    cache = FeatureCache("text", 64 + ENTRY_BYTES, Telemetry())
    cache.put("wide", feature(0, 8).to(torch.float64))
    assert (cache.bytes, len(cache)) == (64 + ENTRY_BYTES, 1)
    cache.put("narrow", feature(0, 4).to(torch.bfloat16))
    assert (cache.bytes, len(cache)) == (8 + ENTRY_BYTES, 1)


def test_a_feature_larger_than_the_cache_is_not_kept_and_evicts_nothing() -> None:
    cache = FeatureCache("text", 16 + ENTRY_BYTES, Telemetry())
    cache.put("small", feature(1))
    cache.put("large", feature(2, 5))
    assert cache.get("large") is None
    assert torch.equal(cache.get("small"), feature(1))


def test_zero_bytes_turn_the_cache_off() -> None:
    cache = FeatureCache("text", 0, Telemetry())
    cache.put("a", feature(1))
    assert (cache.get("a"), cache.bytes, len(cache)) == (None, 0, 0)


def test_metrics_say_hits_misses_and_bytes() -> None:
    telemetry = Telemetry()
    cache = FeatureCache("image", 100 + ENTRY_BYTES, telemetry)
    cache.put("a", feature(1))
    for name in ("a", "a", "b"):
        cache.get(name)
    value = telemetry.registry.get_sample_value
    assert value("reward_feature_cache_total", {"tower": "image", "result": "hit"}) == 2
    assert value("reward_feature_cache_total", {"tower": "image", "result": "miss"}) == 1
    assert value("reward_feature_cache_bytes", {"tower": "image"}) == 16 + ENTRY_BYTES


@given(
    limit=st.integers(0, 5 * ENTRY_BYTES),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(1, 20)), max_size=60),
)
def test_any_use_agrees_with_a_plain_lru_and_stays_within_its_bytes(
    limit: int, steps: list[tuple[bool, int, int]]
) -> None:
    cache = FeatureCache("text", limit, Telemetry())
    oracle: OrderedDict[int, int] = OrderedDict()
    for is_put, key, numbers in steps:
        if is_put:
            cache.put(key, feature(key, numbers))
            size = numbers * 4 + ENTRY_BYTES
            if size <= limit and key not in oracle:
                oracle[key] = size
                while sum(oracle.values()) > limit:
                    oracle.popitem(last=False)
        else:
            found = cache.get(key)
            assert (found is not None) == (key in oracle)
            if found is not None:
                assert found.numel() * 4 + ENTRY_BYTES == oracle[key]
                oracle.move_to_end(key)
        assert cache.bytes == sum(oracle.values()) <= limit


def test_threads_do_not_break_the_accounting() -> None:
    cache = FeatureCache("text", 25 * (16 + ENTRY_BYTES), Telemetry())
    wrong: list[int] = []

    def work(offset: int) -> None:
        for i in range(2000):
            key = (i * 7 + offset) % 50
            cache.put(key, feature(key))
            found = cache.get(key)
            if found is not None and found[0] != key:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache.bytes == (16 + ENTRY_BYTES) * len(cache) == 25 * (16 + ENTRY_BYTES)
