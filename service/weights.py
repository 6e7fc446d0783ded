"""The files that a model of these settings needs, and whether they are here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.base import LoadOptions, WeightsError, WeightSource
from models.registry import get_info
from models.sources import locate, shown
from service.settings import ModelSettings, Settings


@dataclass(frozen=True)
class Needed:
    """One file or folder of a model: its source as the settings say it, published size in bytes (0: not known)."""

    role: str
    source: str
    bytes: int
    files: tuple[str, ...]
    weights_dir: Path | None

    @property
    def present(self) -> bool:
        """Whether it is on this machine, by its name and place alone."""
        try:
            return locate(self.source, self.weights_dir, self.files) is not None
        except WeightsError:  # the settings name no source, or an index is damaged: nothing that could be loaded
            return False

    @property
    def shown(self) -> str:
        """The source as /models may show it."""
        return shown(self.source)


def load_options(name: str, settings: Settings) -> LoadOptions:
    """What the settings say of where ``name``'s weights are; device and dtype are left at their defaults."""
    model = settings.models.get(name) or ModelSettings()
    return LoadOptions(weights=model.weights, options=model.options, weights_dir=settings.weights_dir)


def needed(name: str, settings: Settings) -> list[Needed]:
    """The files of the model ``name``, in its own order; none where its weights ship with a package.

    Raises ValueError where an option that names a source is not a text, and KeyError for an unknown name.
    """
    options = load_options(name, settings)
    return [_needed(source, options) for source in get_info(name).sources]


def _needed(source: WeightSource, options: LoadOptions) -> Needed:
    text = options.source(source)
    size = source.bytes if text == source.source else 0
    return Needed(source.role, text, size, source.files, options.weights_dir)
