from __future__ import annotations

import pytest

from tests.service.engine import tiny


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of tests/service/engine/tiny.py are registered for the length of one test."""
    tiny.register_all(monkeypatch)
