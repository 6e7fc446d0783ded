"""Names to reward models. A model file says ``@register`` above its class; ``models.catalog`` imports the files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from models.base import LoadOptions, RewardInfo, RewardModel

_REGISTRY: dict[str, type[RewardModel]] = {}
ModelClass = TypeVar("ModelClass", bound=type[RewardModel])


def register(name: str) -> Callable[[ModelClass], ModelClass]:
    """Register a reward model class under ``name``, which must be its ``info.name``; a duplicate raises ValueError."""

    def add(model_class: ModelClass) -> ModelClass:
        if name in _REGISTRY:
            raise ValueError(f"reward model {name!r} is registered twice: {_REGISTRY[name]} and {model_class}")
        if model_class.info.name != name:
            raise ValueError(f"{model_class} calls itself {model_class.info.name!r} but is registered as {name!r}")
        _REGISTRY[name] = model_class
        return model_class

    return add


def list_models(*, hidden: bool = False) -> list[str]:
    """Names of the registered reward models, sorted; hidden ones (benchmarks) only on demand."""
    return sorted(name for name, model in _REGISTRY.items() if hidden or not model.info.hidden)


def get_model(name: str) -> type[RewardModel]:
    """The class registered under ``name``; raises KeyError naming the known ones."""
    if name not in _REGISTRY:
        raise KeyError(f"unknown reward model {name!r}; known: {', '.join(list_models())}")
    return _REGISTRY[name]


def get_info(name: str) -> RewardInfo:
    return get_model(name).info


def load_model(name: str, options: LoadOptions | None = None) -> RewardModel:
    """Build the model ``name``.

    Raises KeyError for an unknown name, ValueError for an option that the model does not have or cannot take, and
    :class:`models.base.WeightsError` for missing or unfit weights.
    """
    model_class, options = get_model(name), options or LoadOptions()
    info = model_class.info
    known = {*info.options, *(source.role for source in info.sources if source.role != "weights")}
    unknown = sorted(options.options.keys() - known)
    if unknown:
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise ValueError(f"{name} has no option {', '.join(map(repr, unknown))}; {has}")
    return model_class.load(options)
