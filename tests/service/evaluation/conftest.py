"""The command line, and pairs of the shapes world."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from models.shapes.preferences import draw, held_out_pairs
from service import cli
from tests.service.evaluation.cases import (
    Pairs,
    Run,
)


@pytest.fixture(autouse=True)
def _environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets variables of libraries, of its own process; here that is the process of all tests."""
    for name in ("OMP_WAIT_POLICY", "MKL_CBWR"):
        if name not in os.environ:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("REWARD_DEVICE", "cpu")
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str | Path) -> Result:
        return CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])

    return invoke


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """(prompt, better, worse) of the shapes world."""
    rng = np.random.default_rng(11)
    drawn = held_out_pairs(rng, 24)
    images = draw([pair.better for pair in drawn] + [pair.worse for pair in drawn], rng)
    return [(pair.prompt.text, images[i], images[24 + i]) for i, pair in enumerate(drawn)]
