"""What a user can set for a run: sections of plain values, read from TOML and from ``--set key=value``.

Every algorithm's configuration is a :class:`RunConfig` with its own values beside the sections. Unknown names and
values out of range are refused, with the name of what is wrong.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A run cannot be as it was asked for; the message is one line that names what to change."""


class Section(BaseModel):
    """Values that belong together; frozen, unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicySection(Section):
    """The text-to-image model and what of it is trained."""

    source: str = Field(description="diffusers folder or hub id")
    revision: str | None = Field(None, description="revision of the hub id")
    device: str = Field("auto", description="'auto' takes CUDA where there is a GPU")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="what network and text encoders compute in; trained weights are always float32"
    )
    max_sequence_length: int | None = Field(None, ge=0, description="tokens of the long text encoder; 0 leaves T5 out")
    weights: Literal["lora", "full"] = Field("lora", description="train adapters, or the whole network")
    lora_rank: int = Field(32, ge=1)
    lora_alpha: int = Field(64, ge=1)
    lora_targets: tuple[str, ...] = Field((), description="ends of layer names; empty: the family's attention layers")
    start: str | None = Field(None, description="folder of adapters in diffusers' format to go on from")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")


class SamplingSection(Section):
    """How the policy draws the images that it is trained on."""

    steps: int = Field(10, ge=1, description="denoising steps")
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance above 1; FLUX: its guidance input")
    negative: str = Field("", description="what guidance steers away from")
    height: int | None = Field(None, ge=1, description="pixels; the pipeline's own size by default")
    width: int | None = Field(None, ge=1, description="pixels")
    batch_size: int = Field(16, ge=1, description="images that a device draws at once")
    smallest_batch: int | None = Field(
        None,
        ge=1,
        description="draw the last batch of a rollout in halves down to this number of images, so that the step waits "
        "for the rewards of few; null: as one (refl draws train_batch_size at once)",
    )


class RewardsSection(Section):
    """Where rewards come from, and how several become one."""

    services: tuple[str, ...] = Field(("http://127.0.0.1:8000",), min_length=1, description="one or several services")
    models: dict[str, float] = Field({}, description="weight by the name of a reward model")
    aggregate: Literal["sum", "per_reward", "gdpo"] = Field(
        "sum",
        description="weighted sum of rewards, of advantages normalised by themselves, or of those once more over the "
        "batch (GDPO)",
    )
    std: Literal["group", "batch"] = Field("group", description="whose standard deviation divides advantages")
    patience: float = Field(3600.0, ge=0, description="seconds for which a service that is away is waited for")
    start_patience: float = Field(60.0, ge=0, description="the same before the first step")
    deadline: float | None = Field(None, gt=0, description="seconds that one request may take; none by default")
    allow_fingerprint_change: bool = Field(False, description="go on when a service changes what it scores with")


class OptimizerSection(Section):
    """AdamW."""

    lr: float = Field(3e-4, gt=0, description="learning rate, the same in all steps after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps over which lr rises from 0")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(1e-4, ge=0)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0, description="gradients longer than this are scaled down")


class EmaSection(Section):
    """Averaged weights, which evaluation and users take."""

    decay: float = Field(0.9, ge=0, le=1, description="0 keeps no average")
    every: int = Field(8, ge=1, description="optimizer steps between updates")


class EvaluationSection(Section):
    """The policy on fixed prompts and seeds, by the training rewards and by held-out ones."""

    every: int = Field(
        0, ge=0, description="steps between evaluations; 0: none but before and after, if prompts are set"
    )
    prompts: str | None = Field(None, description="prompt file; None: no evaluation")
    count: int = Field(32, ge=1, description="prompts that are taken of it, from its start")
    seeds: int = Field(4, ge=1, description="images of each prompt")
    seed: int = Field(1_000_003, ge=0, description="what the noise of evaluation images follows from")
    heldout: tuple[str, ...] = Field((), description="rewards that are only watched")
    steps: int | None = Field(None, ge=1, description="denoising steps; as in sampling by default")
    weights: Literal["ema", "trained"] = Field("ema", description="'ema' is 'trained' where no average is kept")


class GuardSection(Section):
    """What is done about reward hacking; the limits are those of trainer_client.guard_signals.GuardConfig."""

    mode: Literal["off", "warn", "act"] = Field("warn", description="'act' raises the KL weight and stops the run")
    kl_factor: float = Field(2.0, gt=1, description="raise_kl multiplies the KL weight by it")
    kl_start: float = Field(
        0.01, gt=0, description="raise_kl turns a KL weight of 0 into this; nft needs 1 or more (docs/metrics.md)"
    )
    limits: dict[str, float] = Field({}, description="values of GuardConfig that differ from its defaults")


class CheckpointSection(Section):
    """When the run's state is saved; it always is at the end."""

    every: int = Field(50, ge=1, description="steps")
    keep: int = Field(2, ge=1, description="last checkpoints that are kept, beside the best one")


class LoggingSection(Section):
    """Besides metrics.jsonl and events.jsonl, which are always written."""

    tensorboard: bool = Field(True, description="where the package tensorboard is installed")
    wandb_project: str | None = Field(None, description="Weights & Biases, where the package wandb is installed")
    progress: bool = Field(True, description="a progress bar on a terminal, lines elsewhere")


class RunConfig(Section):
    """A run; algorithms add their own values."""

    prompts: str = Field(description="prompt file, or a shipped set such as 'shapes:train'")
    steps: int = Field(100, ge=1, description="rollouts, each with its updates")
    seed: int = Field(0, ge=0, description="what prompts, noise and adapters follow from")
    prompts_per_step: int = Field(12, ge=1, description="prompts of one rollout, over all devices")
    updates_per_step: int = Field(1, ge=1, description="optimizer steps on each rollout")
    train_batch_size: int = Field(16, ge=1, description="images in one backward pass of a device; gradients add up")

    policy: PolicySection
    sampling: SamplingSection = SamplingSection()
    rewards: RewardsSection
    optimizer: OptimizerSection = OptimizerSection()
    ema: EmaSection = EmaSection()
    evaluation: EvaluationSection = EvaluationSection()
    guard: GuardSection = GuardSection()
    checkpoints: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()

    @property
    def images_per_prompt(self) -> int:
        """Size of a group; 1 for algorithms without groups."""
        return 1

    @property
    def images_per_step(self) -> int:
        """Images of one rollout, over all devices."""
        return self.prompts_per_step * self.images_per_prompt

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight of each reward in the total, by name."""
        return dict(self.rewards.models)

    @property
    def judges(self) -> tuple[str, ...]:
        """Models that the run asks for comparisons."""
        return ()

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been trained with to be continued: all but lengths, places and log settings."""
        values = self.model_dump(mode="json", exclude={"steps", "logging", "checkpoints"})
        for section, name in _FREE:
            del values[section][name]
        return values

    @model_validator(mode="after")
    def _has_a_reward(self) -> RunConfig:
        if not self.reward_weights:
            raise ValueError("rewards.models is empty: name a reward model, such as --set rewards.models.pickscore=1.0")
        return self

    @model_validator(mode="after")
    def _heldout_is_not_trained(self) -> RunConfig:
        both = sorted({*self.evaluation.heldout} & {*self.rewards.models})
        if both:
            raise ValueError(f"{both[0]} is both trained on and held out")
        return self


class GroupConfig(RunConfig):
    """A run of an algorithm that compares the images of a prompt with each other."""

    group_size: int = Field(24, description="images of each prompt in a rollout, at least 2")

    @property
    def images_per_prompt(self) -> int:
        return self.group_size

    @model_validator(mode="after")
    def _groups_can_be_compared(self) -> GroupConfig:
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}: an image alone in its group teaches nothing; take 2 or more"
            )
        return self


_FREE = (
    ("policy", "device"),
    ("rewards", "services"),
    ("rewards", "patience"),
    ("rewards", "start_patience"),
    ("rewards", "deadline"),
    ("rewards", "allow_fingerprint_change"),
)
"""(section, name) of values that do not change what is computed."""

Config = TypeVar("Config", bound=RunConfig)


def load_config(kind: type[Config], file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a TOML file (None: nothing is set), with ``overrides`` such as "optimizer.lr=1e-4" on top.

    A value of an override is TOML where it is TOML and text else. Raises :class:`ConfigError` in one line for a file
    that cannot be read, for an unknown name and for a value that is wrong.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{file}: {error}") from error
    for override in overrides:
        _override(values, override)
    return parse_config(kind, values)


def parse_config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration of nested ``values``; raises :class:`ConfigError` in one line."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, each['loc'])) or 'configuration'}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors(include_url=False)
        ]
        raise ConfigError("; ".join(problems)) from error


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set takes key=value, such as optimizer.lr=1e-4, not {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for name in names[:-1]:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {name} is a value and no section")
    values[names[-1]] = value
