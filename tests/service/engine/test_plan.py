"""What the engine makes of ``auto`` and of a model's own wishes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import models.catalog  # noqa: F401
from models import registry
from models.base import WeightsError
from models.registry import get_model, load_model
from service.engine import plan
from service.engine.plan import GRADIENT_COPY_BYTES, worker_options
from service.settings import ModelSettings, Settings
from tests.service.engine import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.register_all(monkeypatch)


def options(device: torch.device = CPU, model: ModelSettings | None = None, **settings: Any) -> plan.WorkerOptions:
    return worker_options("tiny-tower", model or ModelSettings(), Settings(models=["tiny-tower"], **settings), device)


def heavy(monkeypatch: pytest.MonkeyPatch, weights_bytes: int) -> None:
    info = replace(tiny.TinyTower.info, weights_bytes=weights_bytes)
    monkeypatch.setitem(registry._REGISTRY, "tiny-tower", type("Heavy", (tiny.TinyTower,), {"info": info}))


@pytest.mark.parametrize(
    ("weights_bytes", "dtype", "asked", "given"),
    [
        (GRADIENT_COPY_BYTES, "bfloat16", None, True),
        (GRADIENT_COPY_BYTES + 1, "bfloat16", None, False),
        (GRADIENT_COPY_BYTES + 1, "float32", None, True),  # no copy is needed
        (GRADIENT_COPY_BYTES + 1, "bfloat16", True, True),
        (1, "bfloat16", False, False),
    ],
)
def test_a_float32_copy_for_gradients_is_made_unless_it_is_large(
    weights_bytes: int, dtype: Any, asked: bool | None, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heavy(monkeypatch, weights_bytes)
    assert options(model=ModelSettings(dtype=dtype, gradients=asked)).gradients is given


def test_batches_of_large_towers_are_small_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "reduction_order", lambda: "AUTO,STRICT")
    assert options().micro_batch == 32
    monkeypatch.setattr(tiny.TinyTower, "cpu_batch", 4)
    assert options().micro_batch == 4
    assert options(CUDA).micro_batch == 32
    assert options(micro_batch=16).micro_batch == 16
    monkeypatch.setattr(tiny.TinyTower, "max_batch", 2)
    assert options(CUDA).micro_batch == 2


def test_the_folder_of_the_weights_reaches_the_model(tmp_path: Any) -> None:
    assert options(weights_dir=tmp_path).load.weights_dir == tmp_path
    assert options().load.weights_dir is None


def test_a_file_that_is_not_the_expected_one_is_refused_at_load(tmp_path: Path) -> None:
    checkpoint = get_model("imagereward").random_checkpoint(tmp_path)
    assert checkpoint.weights is not None
    settings = Settings(models={"imagereward": ModelSettings(weights=checkpoint.weights, sha256="0" * 64)})
    refused = worker_options("imagereward", settings.models["imagereward"], settings, CPU).load
    with pytest.raises(WeightsError, match="expected 0000"):
        load_model("imagereward", refused)
    right = hashlib.sha256(Path(checkpoint.weights).read_bytes()).hexdigest()
    load_model("imagereward", replace(refused, sha256=right))
