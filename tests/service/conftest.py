"""One shared service with healthy and faulty models; faults that end a process get a service of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.service.live import Live, running

SHARED = {
    "models": {
        "jpeg-compressibility": {},
        "jpeg-incompressibility": {},
        "tiny-tower": {},
        "raises-on-red": {"options": {"batch_s": 0.02}},
        "slow": {"options": {"batch_s": 0.25}, "micro_batch": 4},
        "wrong-length": {},
        "wrong-type": {},
        "not-finite": {},
        "prepare-raises": {},
    },
    "limits": {"body_bytes": 4 << 20, "inflight_bytes": 64 << 20},
}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The service of most tests. In the end SIGTERM must end it cleanly, whatever the tests have done to it."""
    with running(tmp_path_factory.mktemp("shared"), SHARED) as live:
        yield live
        live.terminate()
        assert live.wait() == 0, live.log[-2000:]


@pytest.fixture
def service(shared: Live) -> Iterator[Live]:
    """The shared service, healthy before and after each test."""
    yield shared
    shared.assert_healthy()
