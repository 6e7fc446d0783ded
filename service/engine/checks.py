"""What a worker makes sure of: that outcomes are answers, and that the device can be trusted."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import torch

from models.base import ModelError, Output, SampleError
from models.judge import Preference
from service.engine.batcher import GradientResult, Outcome
from service.runtime import reduction_order


def checked(outcome: Any) -> Outcome:
    """What a model gave for one sample, or a ModelError if that cannot be answered: not finite, not an output."""
    if isinstance(outcome, SampleError):
        return outcome
    output = outcome.output if isinstance(outcome, GradientResult) else outcome
    if not isinstance(output, Output | Preference):
        return ModelError("the model gave something that is not an output")
    value = output.probability if isinstance(output, Preference) else output.score
    numbers = [value, *output.outputs.values()]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        return ModelError("the model gave something that is not an output")
    if not all(math.isfinite(number) for number in numbers):
        return ModelError("the model gave a score that is not a finite number", code="not_finite")
    if isinstance(output, Preference) and not 0 <= output.probability <= 1:
        return ModelError("the model gave a probability outside [0, 1]", code="out_of_range")
    if output.details:
        try:
            json.dumps(output.details, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            return ModelError("the model gave details that are not JSON")
    return cast(Outcome, outcome)


_POISON = ("CUDA error", "device-side assert", "CUDNN_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_INTERNAL_ERROR")


def poisons_device(error: BaseException) -> bool:
    """Whether the device's context is lost after ``error``: every later call would fail too."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in _POISON)
    )


def device_class(device: torch.device) -> str:
    """Devices of one class give the same bits: instruction set on CPU, name and capability on CUDA."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda:{torch.cuda.get_device_name(device)}:sm_{major}{minor}"
    amx = "+amx" if torch.cpu._is_amx_tile_supported() else ""
    bf16 = "+avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"cpu:{torch.backends.cpu.get_cpu_capability()}{bf16}{amx}:mkl={reduction_order()}"
