"""The weights that training changes, under names: the trained ones, copies such as an old policy, the reference.

Two kinds with one interface: LoRA adapters of peft inside a frozen network, or the whole network with copies of it.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

TRAINED = "default"
"""The name of the weights that the optimizer changes."""


@contextmanager
def several_adapters() -> Iterator[None]:
    """Within it peft doesn't warn that a network gets more than one adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute", category=UserWarning)
        yield


class TrainableWeights(ABC):
    """Named sets of weights of one network; exactly one is in use. Only those called ``"default"`` ask for gradients.

    All are float32 on the network's device, whatever the network computes in: a learning rate's step on a bfloat16
    weight is mostly rounded away.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._in_use: str | None = TRAINED

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The sets there are, ``"default"`` first."""

    @abstractmethod
    def named_tensors(self, name: str = TRAINED) -> dict[str, Tensor]:
        """The tensors of a set, in a stable order and under the same keys for every set; not copies.

        Raises KeyError for a name that isn't one of ``names``.
        """

    @abstractmethod
    def _add(self, name: str) -> None:
        """Make a set called ``name``; its values are overwritten."""

    @abstractmethod
    def _switch(self, name: str | None) -> None:
        """Compute with the set ``name``, or with the reference for None."""

    def tensors(self, name: str = TRAINED) -> list[Tensor]:
        """The values of :meth:`named_tensors`: for "default" what an optimizer takes."""
        return list(self.named_tensors(name).values())

    def add(self, name: str) -> None:
        """A new set, a copy of the trained weights as they are now. Raises ValueError if the name is taken."""
        if name in self.names:
            raise ValueError(f"there are weights called {name!r} already")
        self._add(name)
        self.copy(TRAINED, name)

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """target <- source, in place."""
        for into, value in zip(self.tensors(target), self.tensors(source), strict=True):
            into.copy_(value)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], name: str = TRAINED) -> None:
        """Overwrite a set in place by what :meth:`named_tensors` gave. Raises ValueError for other keys or shapes."""
        own = self.named_tensors(name)
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += sorted(key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape)
        if wrong:
            raise ValueError(f"the weights don't fit {name!r}: {', '.join(wrong[:3])} ({len(wrong)} in all)")
        for key, into in own.items():
            into.copy_(tensors[key])

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Within it the network computes with the set ``name``, or with the reference for None; may be nested.

        Backward passes belong outside: a checkpointed network is computed again there, with the weights in use then.
        Raises KeyError for a name that isn't one of ``names``.
        """
        if name is not None and name not in self.names:
            raise KeyError(f"no weights are called {name!r}, only {', '.join(self.names)}")
        before = self._in_use
        self._switch(name)
        self._in_use = name
        try:
            yield
        finally:
            self._switch(before)
            self._in_use = before


class LoraWeights(TrainableWeights):
    """LoRA adapters (Hu et al. 2021) on the linear layers of a frozen network, through peft.

    ``network`` is a diffusers model that already carries the adapter "default"; the reference is the network without
    adapters. Fresh adapters start at the reference: B is zero.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.refresh()

    @classmethod
    def create(cls, network: Any, rank: int, alpha: int, targets: Sequence[str]) -> LoraWeights:
        """Fresh adapters: A Gaussian with variance 1 / rank^2 from torch's global generator, B zero.

        Raises ValueError if no layer of the network is one of ``targets`` (ends of module names).
        """
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
        network.add_adapter(config, TRAINED)
        return cls(network)

    def refresh(self) -> None:
        """Look at the network again after peft or diffusers changed its adapters: float32, one of them in use."""
        self._layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        for name in self.names:
            for tensor in self.named_tensors(name).values():
                tensor.data = tensor.data.float()
        self._switch(self._in_use)

    @property
    def names(self) -> tuple[str, ...]:
        network: Any = self.network
        return (TRAINED, *sorted(name for name in network.peft_config if name != TRAINED))

    def named_tensors(self, name: str = TRAINED) -> dict[str, Tensor]:
        if name not in self.names:
            raise KeyError(f"no adapter is called {name!r}, only {', '.join(self.names)}")
        ends = (f".lora_A.{name}.weight", f".lora_B.{name}.weight")
        return {
            key.removesuffix(f".{name}.weight"): parameter
            for key, parameter in self.network.named_parameters()
            if key.endswith(ends)
        }

    def _add(self, name: str) -> None:
        network: Any = self.network
        with several_adapters():
            network.add_adapter(deepcopy(network.peft_config[TRAINED]), name)
        self.refresh()

    def _switch(self, name: str | None) -> None:
        for layer in self._layers:
            layer.enable_adapters(name is not None)
            layer.set_adapter(name or TRAINED, inference_mode=name != TRAINED)


class FullWeights(TrainableWeights):
    """All weights of the network; the reference is a copy of how they were at the start.

    The network is turned to float32, and every set costs its size again.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network.float().requires_grad_(True))
        self._live = dict(network.named_parameters())
        self._stored: dict[str | None, dict[str, Tensor]] = {None: {k: p.data.clone() for k, p in self._live.items()}}

    @property
    def names(self) -> tuple[str, ...]:
        return (TRAINED, *(name for name in self._stored if name is not None and name != TRAINED))

    def named_tensors(self, name: str = TRAINED) -> dict[str, Tensor]:
        # The optimizer needs the parameters themselves; while they show other values, the trained ones are stored.
        if name == TRAINED and self._in_use == TRAINED:
            return dict(self._live)
        return dict(self._stored[name])

    def _add(self, name: str) -> None:
        self._stored[name] = {key: torch.empty_like(parameter.data) for key, parameter in self._live.items()}

    def _switch(self, name: str | None) -> None:
        if self._in_use == TRAINED:
            self._stored[TRAINED] = {key: parameter.data for key, parameter in self._live.items()}
        for key, parameter in self._live.items():
            parameter.data = self._stored[name][key]
            parameter.requires_grad_(name == TRAINED)
