"""Settings: with ``remote_settings``, the only readers of environment and YAML.

Precedence: arguments, then environment (``REWARD_`` prefix, ``__`` between levels: ``REWARD_QUEUE__MAX_COST=256``),
then the YAML file named by ``REWARD_CONFIG``, then the defaults below.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from service.remote_settings import RemoteSettings, Section
from service.schemas import Weight

Device = Literal["auto", "cpu", "cuda"] | str
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Invariance = Literal["exact", "fast"]
Compile = Literal["auto", "on", "off", "measure"]


class ModelSettings(Section):
    """One reward model. ``null`` leaves the choice to the service or to the model."""

    weights: str | None = Field(
        None,
        min_length=1,
        description="hf:OWNER/NAME[@REVISION][/FILE], https://..., or a path; null: the published ones",
    )
    sha256: str | None = Field(
        None, pattern=r"^(sha256:)?[0-9a-fA-F]{64}$", description="of the file that weights names; others are refused"
    )
    dtype: Dtype = "auto"
    compile: Compile = "auto"
    micro_batch: int | None = Field(None, ge=1, le=4096)
    options: dict[str, Any] = Field(default_factory=dict)
    watchdog_s: float | None = Field(None, gt=0)
    gradients: bool | None = Field(
        None,
        description="answer /gradient; it takes a float32 copy of a model of another dtype. "
        "null: unless that copy is larger than 8 GB",
    )
    remote: RemoteSettings | None = Field(
        None, description="of a judge: the server that it asks in place of weights of its own"
    )
    token_budget: int | None = Field(
        None,
        ge=1,
        description="tokens of a judge's batch; null: 4096 on a CPU, 32768 on CUDA, by concurrency of a server",
    )
    both_orders: bool = Field(True, description="a judge that answers /score compares each pair in both orders")
    reference: str = Field(
        "group",
        pattern=r"^(group|first|best:.+|best-of-[1-9][0-9]?)$",
        description="what a judge's /score compares a candidate with where the item has no reference: all of its group "
        "(win rate), the first, the best by the score of a loaded model (best:NAME), or the winner of the first K "
        "(best-of-K)",
    )

    @model_validator(mode="after")
    def _one_place_for_weights(self) -> ModelSettings:
        if self.remote is not None and (self.weights is not None or self.sha256 is not None):
            raise ValueError("a model has remote, or weights and sha256, not both")
        if self.remote is not None and self.gradients:
            raise ValueError("a model behind a server gives no gradients")
        return self


class LimitSettings(Section):
    """What a request may ask for. Beyond them: 413 or 422, or a typed error of the one image."""

    body_bytes: int = Field(128 << 20, ge=1 << 10)
    inflight_bytes: int = Field(512 << 20, ge=1 << 10, description="bodies being read or answered, all together")
    body_timeout_s: float = Field(60.0, gt=0, description="for the whole body to arrive")
    items: int = Field(64, ge=1)
    images_per_item: int = Field(64, ge=1)
    images_per_request: int = Field(256, ge=1)
    frames_per_video: int = Field(32, ge=1)
    comparisons_per_request: int = Field(8192, ge=1, description="of a judge, both orders counted")
    prompt_chars: int = Field(16_384, ge=1)
    metadata_bytes: int = Field(65_536, ge=1)
    safetensors_header_bytes: int = Field(8 << 20, ge=1 << 10)
    image_bytes: int = Field(16 << 20, ge=64)
    image_pixels: int = Field(4096 * 4096, ge=1)
    image_min_side: int = Field(16, ge=1)
    image_max_side: int = Field(8192, ge=1)


class QueueSettings(Section):
    """Admission and batching. Cost is counted in forward passes of one sample; a gradient costs three."""

    max_cost: int = Field(1024, ge=1, description="admitted and unfinished, per model")
    max_delay_ms: float = Field(4.0, ge=0, description="longest wait for a batch to fill while samples are in decoding")
    default_deadline_ms: int = Field(120_000, ge=1)
    max_deadline_ms: int = Field(600_000, ge=1)


class ComputeSettings(Section):
    """The answer to POST /compute, a form of request that cannot name reward models or hold a null."""

    models: dict[str, Weight] = Field(
        default_factory=dict,
        max_length=32,
        description="weights of loaded models in the reward; empty: the only loaded model, where there is just one",
    )
    null_rewards: bool = Field(
        False, description="a sample without a score has the reward null, instead of refusing the whole request"
    )


class CacheSettings(Section):
    """Feature caches, bounded in bytes; 0 turns one off."""

    text_features_bytes: int = Field(64 << 20, ge=0)
    image_features_bytes: int = Field(
        256 << 20, ge=0, description="a judge wants all images of an item: of one of 7B some 7 MiB each"
    )
    prefix_bytes: int = Field(
        256 << 20, ge=0, description="keys and values of beginnings that a judge's comparisons share"
    )


class DrainSettings(Section):
    """What happens after SIGTERM: admitted work is answered, new work gets 503, then exit 0."""

    min_s: float = Field(0.0, ge=0, description="keep answering 503 at least this long, so that balancers notice")
    max_s: float = Field(60.0, gt=0, description="give up on admitted work after this long (exit 1)")


class _YamlSource(YamlConfigSettingsSource):
    """The YAML file; its ``models`` and ``compute.models`` give way as a whole to those of a stronger source."""

    def __init__(self, *args: Any, stronger: list[PydanticBaseSettingsSource], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stronger = stronger

    def __call__(self) -> dict[str, Any]:
        values = super().__call__()
        stronger = [source() for source in self._stronger]
        if any("models" in given for given in stronger):
            values = {name: value for name, value in values.items() if name != "models"}
        if isinstance(values.get("compute"), dict) and any("models" in _compute(given) for given in stronger):
            values["compute"] = {name: value for name, value in values["compute"].items() if name != "models"}
        return values


def _compute(given: dict[str, Any]) -> dict[str, Any]:
    section = given.get("compute")
    return section if isinstance(section, dict) else {}


class Settings(BaseSettings):
    """All settings of ``reward-service serve``."""

    model_config = SettingsConfigDict(
        env_prefix="REWARD_",
        env_nested_delimiter="__",
        extra="forbid",
        hide_input_in_errors=True,  # the input may be a key
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65_535)
    models: dict[str, ModelSettings] = Field(
        default_factory=lambda: {
            name: ModelSettings()
            for name in ("jpeg-compressibility", "jpeg-incompressibility", "ocr", "shapes-clip", "shapes-oracle")
        }
    )
    plugins: list[str] = Field(default_factory=list, description="modules that register further reward models")
    device: str = "auto"
    dtype: Dtype = "auto"
    invariance: Invariance = "exact"
    compile: Compile = "auto"
    micro_batch: int | None = Field(
        None, ge=1, le=4096, description="rows of one forward; null: 32, or 8 on a CPU without strict reductions"
    )
    threads: int | None = Field(None, ge=1, description="torch threads on CPU; null: all cores")
    decode_threads: int | None = Field(None, ge=1, description="null: cores, at most 8")
    cache_dir: Path | None = Field(None, description="compile cache; null: torch's own default")
    weights_dir: Path | None = Field(
        None, description="fetched weights, as OWNER/NAME[@REVISION]/FILE; null: the hub library's own cache (HF_HOME)"
    )
    watchdog_s: float = Field(120.0, gt=0, description="a forward that takes longer ends the process")
    exit_grace_s: float = Field(0.5, ge=0, description="between readiness false and the exit of a failed process")
    ready_max_age_s: float = Field(5.0, ge=0, description="a success this fresh counts as readiness without a canary")
    api_keys: list[str] = Field(default_factory=list)
    api_keys_file: Path | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "text"] = "json"
    show_hidden: bool = Field(False, description="list hidden models (benchmarks) in /models")
    limits: LimitSettings = Field(default_factory=LimitSettings)
    queue: QueueSettings = Field(default_factory=QueueSettings)
    compute: ComputeSettings = Field(default_factory=ComputeSettings)
    caches: CacheSettings = Field(default_factory=CacheSettings)
    drain: DrainSettings = Field(default_factory=DrainSettings)

    @field_validator("models", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        """A list of names is the short form of a mapping without settings; null settings are empty ones."""
        if isinstance(value, list):
            return {str(name): {} for name in value}
        if isinstance(value, dict):
            return {name: {} if settings is None else settings for name, settings in value.items()}
        return value

    @model_validator(mode="after")
    def _batches_are_powers_of_two(self) -> Settings:
        """Other lengths have a tail that vector kernels compute differently: a score would depend on its place."""
        named = {"micro_batch": self.micro_batch} | {
            f"models.{n}.micro_batch": m.micro_batch for n, m in self.models.items()
        }
        for name, size in named.items():
            if size is not None and size & (size - 1):
                raise ValueError(f"{name} is a power of two, not {size}")
        return self

    @field_validator("weights_dir")
    @classmethod
    def _weights_lie_in_a_folder(cls, value: Path | None) -> Path | None:
        if value is not None and value.exists() and not value.is_dir():
            raise ValueError(f"{value} is not a folder")
        return value

    @model_validator(mode="after")
    def _largest_request_fits(self) -> Settings:
        if self.limits.images_per_request > self.queue.max_cost:
            raise ValueError(
                f"limits.images_per_request ({self.limits.images_per_request}) is more than queue.max_cost "
                f"({self.queue.max_cost}): such a request could never be admitted"
            )
        return self

    @model_validator(mode="after")
    def _compute_models_are_loaded(self) -> Settings:
        if absent := sorted(set(self.compute.models) - set(self.models)):
            raise ValueError(f"compute.models names {absent[0]!r}, which is not in models")
        return self

    @model_validator(mode="after")
    def _references_are_chosen_by_other_loaded_models(self) -> Settings:
        for name, model in self.models.items():
            by = model.reference.removeprefix("best:")
            if model.reference.startswith("best:") and (by == name or by not in self.models):
                raise ValueError(f"models.{name}.reference names {by!r}, which is not another one of models")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        config = os.environ.get("REWARD_CONFIG")
        if config:
            if not Path(config).is_file():
                raise FileNotFoundError(f"REWARD_CONFIG names {config}, which is not a file")
            sources.append(_YamlSource(settings_cls, yaml_file=config, stronger=sources.copy()))
        return tuple(sources)

    def bearer_keys(self) -> list[str]:
        """The bearer keys of the settings and of the mounted secret (one a line); empty means no authentication.

        Raises ValueError when a secret file is named and holds no key: an open door must be asked for.
        """
        keys = list(self.api_keys)
        if self.api_keys_file is not None:
            lines = [line.strip() for line in self.api_keys_file.read_text().splitlines()]
            from_file = [line for line in lines if line and not line.startswith("#")]
            if not from_file:
                raise ValueError(f"api_keys_file {self.api_keys_file} holds no key")
            keys += from_file
        if not all(key.strip() for key in keys):
            raise ValueError("an api key is empty")
        return keys


class SettingsProblem(Exception):
    """The settings cannot be used; the message is one line for the person who wrote them."""


def load_settings(**given: Any) -> Settings:
    """Settings from arguments, environment and file, with their keys checked; raises SettingsProblem."""
    try:
        settings = Settings(**given)
        settings.bearer_keys()
    except ValidationError as error:
        parts = (f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors())
        raise SettingsProblem("; ".join(parts)) from error
    except (SettingsError, yaml.YAMLError, ValueError, OSError) as error:
        raise SettingsProblem(" ".join(str(error).split())) from error
    return settings
