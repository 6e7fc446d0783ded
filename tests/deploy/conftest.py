"""Fixtures that tests of the manifests share."""

from __future__ import annotations

import os
import shutil

import pytest

from k8s import check
from k8s.manifests import Manifests


@pytest.fixture(scope="session")
def rendered() -> dict[str, Manifests]:
    """Every set of manifests that is checked, by its name; not to be changed."""
    if shutil.which("kubectl") is None and os.environ.get("CI") != "true":
        pytest.skip("kubectl is not installed; CI fails here instead")
    return dict(check.rendered())
