"""Settings -> what each worker gets: device, dtype, batch, compilation; ``auto`` is resolved here and nowhere else."""

from __future__ import annotations

import torch

from models.base import LoadOptions
from models.judge import Judge
from models.registry import get_model
from service.engine.remote import RemoteChat
from service.engine.worker import WorkerOptions
from service.runtime import reduction_order
from service.settings import ModelSettings, Settings

GRADIENT_COPY_BYTES = 8 << 30
"""Gradients take a float32 copy of a model that runs in another dtype; larger ones are made when they are asked for."""


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device or the CPU; a CUDA device that is asked for and missing raises ValueError."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"settings.device is {name!r} but torch sees no CUDA device")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on CUDA and on CPUs with AMX, else float32 (AVX512-BF16 alone was measured slower here)."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def worker_options(name: str, model: ModelSettings, settings: Settings, device: torch.device) -> WorkerOptions:
    """Settings of one model over settings of all, with ``auto`` resolved for the device.

    The connection of a judge with ``remote`` is made here (``load.chat``) and sends nothing yet; who stops the model
    closes it. Raises ValueError for ``remote`` of a model that asks no chat model.
    """
    dtype = model.dtype if model.dtype != "auto" else settings.dtype
    compile = model.compile if model.compile != "auto" else settings.compile
    if compile == "auto":
        compile = "on" if device.type == "cuda" else "off"
    model_class = get_model(name)
    load_dtype = resolve_dtype(dtype, device)
    gradients = model.gradients
    if model.remote is not None:
        if not issubclass(model_class, Judge):
            raise ValueError(f"models.{name}.remote: {name} is no judge, it asks no chat model")
        gradients = False
    elif gradients is None:
        gradients = load_dtype == torch.float32 or model_class.info.weights_bytes <= GRADIENT_COPY_BYTES
    # On a CPU a large batch is worth its padding only where small ones give the same bits and need none.
    default = 32 if device.type == "cuda" or reduction_order().endswith("STRICT") else 8
    default = min(default, model_class.max_batch or default)
    if device.type == "cpu":
        default = min(default, model_class.cpu_batch or default)
    if model.remote is not None:
        default = min(model.remote.concurrency, model_class.max_batch or model.remote.concurrency)
    chat = RemoteChat(model.remote) if model.remote is not None else None
    return WorkerOptions(
        name=name,
        load=LoadOptions(device, load_dtype, model.weights, model.options, settings.weights_dir, model.sha256, chat),
        micro_batch=model.micro_batch or settings.micro_batch or default,
        invariance=settings.invariance,
        compile=compile,
        watchdog_s=model.watchdog_s or settings.watchdog_s,
        gradients=gradients,
        token_budget=model.token_budget or _token_budget(model, device),
    )


def _token_budget(model: ModelSettings, device: torch.device) -> int:
    """Of a judge's batch. One behind a server gets enough turns for all its requests at the same time."""
    if model.remote is not None:
        return 4096 * model.remote.concurrency
    return 32_768 if device.type == "cuda" else 4096
