"""Which parameters of a reward model are trained, and which of its towers stay as they are meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.fitting.config import FitConfig, FitProblem
from models.fitting.fittable import Fittable
from models.towers import TowerInput, TowerReward


@dataclass(frozen=True, eq=False)
class Trainable:
    """The parameters that are trained; ``merge`` is called when they are: adapters become plain weights."""

    parameters: list[nn.Parameter]
    merge: Callable[[], object] = lambda: None


def trainable(fittable: Fittable, config: FitConfig) -> Trainable:
    """Free what ``config.train`` names and freeze the rest; raises FitProblem where the model has no such thing."""
    module = fittable.module
    module.requires_grad_(False)
    if config.train == "lora":
        return _with_adapters(module, fittable, config)
    chosen = [
        parameter
        for name, parameter in module.named_parameters()
        if not name.startswith(fittable.frozen or ("\0",)) and (config.train == "all" or name.startswith(fittable.head))
    ]
    if not chosen:
        raise FitProblem("the model has no such parameters")
    for parameter in chosen:
        parameter.requires_grad_(True)
    return Trainable(chosen)


def _with_adapters(module: nn.Module, fittable: Fittable, config: FitConfig) -> Trainable:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise FitProblem("LoRA needs peft: pip install 'reward-service[fit]'") from error
    targets = [
        name
        for name, layer in module.named_modules()
        # torch's own attention reads the weight of its output layer, not the layer.
        if isinstance(layer, nn.Linear)
        and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and not name.startswith(fittable.head)
    ]
    if not targets:
        raise FitProblem("the model has no linear layers beside its head to adapt")
    adapters = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
    wrapped: Any = get_peft_model(module, adapters)
    for name, parameter in module.named_parameters():
        if name.startswith(fittable.head):
            parameter.requires_grad_(True)
    return Trainable([p for p in module.parameters() if p.requires_grad], wrapped.merge_and_unload)


@dataclass(frozen=True)
class Steady:
    """Whether the image tower and the text tower give the same features whatever is trained."""

    image: bool
    text: bool


def steady_towers(model: TowerReward, example: TowerInput) -> Steady:
    """Which towers no trained parameter reaches: nothing in the features of ``example`` asks for a gradient.

    The models say which parameters are the head's; where those parts lie is found out here. CLIP's projections, for
    one, are part of its towers.
    """
    with torch.enable_grad():
        image = model.encode_image(model.normalize(example.pixels[None].to(model.device)))
        text = model.encode_text(example.tokens[None].to(model.device))
    return Steady(not image.requires_grad, not text.requires_grad)
