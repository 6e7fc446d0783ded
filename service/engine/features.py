"""Caches of text and image features, bounded in bytes and shared by all models whose tower keys are equal."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

from service.telemetry import Telemetry

ENTRY_BYTES = 1024
"""What an entry costs beside its numbers: key, objects, and the granularity of the device's allocator."""


class FeatureCache:
    """Least recently used features, bounded in bytes. Thread-safe. Keys hold everything that a feature depends on."""

    def __init__(self, tower: str, max_bytes: int, telemetry: Telemetry) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = telemetry.cache.labels(tower, "hit")
        self._misses = telemetry.cache.labels(tower, "miss")
        self._gauge = telemetry.cache_bytes.labels(tower)

    def get(self, key: Hashable) -> Tensor | None:
        with self._lock:
            feature = self._entries.get(key)
            if feature is None:
                self._misses.inc()
                return None
            self._entries.move_to_end(key)
            self._hits.inc()
            return feature

    def put(self, key: Hashable, feature: Tensor) -> None:
        """Keep ``feature`` (a tensor that owns its memory); one that is larger than the whole cache is not kept."""
        size = _size(feature)
        with self._lock:
            if size > self.max_bytes or key in self._entries:
                return
            self._entries[key] = feature
            self._bytes += size
            while self._bytes > self.max_bytes:
                _, evicted = self._entries.popitem(last=False)
                self._bytes -= _size(evicted)
            self._gauge.set(self._bytes)

    @property
    def bytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)


def _size(feature: Tensor) -> int:
    return feature.numel() * feature.element_size() + ENTRY_BYTES
