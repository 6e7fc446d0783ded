"""What a run is built of, from its configuration; whatever cannot work is said here, before the first step."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState  # type: ignore[import-untyped]

from trainer_client import distributed
from trainer_client.checkpoint import RunIdentity
from trainer_client.client import RewardClient
from trainer_client.config import ConfigError, PolicySection, RewardsSection, RunConfig
from trainer_client.errors import ModelNotOffered, ServiceUnavailable
from trainer_client.guard import Guard, GuardConfig
from trainer_client.policies import FlowPolicy, Policy, from_pretrained
from trainer_client.prompts import Prompt
from trainer_client.results import ModelInfo
from trainer_client.rewards import API_KEY

TOTAL = "total"
"""The name of the weighted sum among evaluated rewards."""
EMA = "ema"
"""The name of the averaged weights."""


def join_ranks(device: str) -> torch.device:
    """Meet the other ranks, if accelerate or torchrun started several, and this rank's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return torch.device(PartialState(cpu=device == "cpu").device)
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def leave_ranks(*, together: bool) -> None:
    """Part from the other ranks, if there are some: threads of the group must not outlive the interpreter.

    ``together`` waits for all of them first; without it they see a broken connection, as when this process dies.
    """
    if dist.is_available() and dist.is_initialized():
        if together:
            distributed.barrier()
        dist.destroy_process_group()


def offered_models(settings: RewardsSection, names: Sequence[str]) -> dict[str, ModelInfo]:
    """What the services say of the models ``names``, by name; waits ``start_patience`` for them to be loaded.

    Raises ModelNotOffered for a name that no service has, ConnectionFailed where none answers, ServiceUnavailable for
    a model that is not ready in time.
    """
    give_up = time.monotonic() + settings.start_patience
    with RewardClient(settings.services, patience=settings.start_patience, api_key=os.environ.get(API_KEY)) as client:
        while True:
            known = {info.name: info for info in client.models()}
            if missing := [name for name in names if name not in known]:
                raise ModelNotOffered(missing, settings.services)
            waited_for = [name for name in names if not known[name].ready]
            if not waited_for:
                return {name: known[name] for name in names}
            if time.monotonic() > give_up:
                message = f"{', '.join(waited_for)} is not ready after {settings.start_patience:.0f} s"
                raise ServiceUnavailable(message, status=503, code="not_ready")
            time.sleep(1.0)


def build_policy(settings: PolicySection, device: torch.device) -> Policy:
    """The policy on its device, nothing trained yet. Raises ConfigError for a source that cannot be loaded."""
    source = settings.source
    if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ConfigError(f"policy.source {source}: no such folder, and a hub id is written namespace/name")
    options: dict[str, Any] = {}
    if settings.max_sequence_length is not None:
        options["max_sequence_length"] = settings.max_sequence_length
    try:
        return from_pretrained(
            settings.source,
            device=device,
            dtype=getattr(torch, settings.dtype),
            revision=settings.revision,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy.source {settings.source}: {' '.join(str(error).split())}") from error


def flow_policy(algorithm: str, policy: Policy) -> FlowPolicy:
    """The policy itself; raises ConfigError for one that is no rectified flow."""
    if not isinstance(policy, FlowPolicy):
        raise ConfigError(f"{algorithm} trains rectified flows (SD3, FLUX, Qwen-Image), not {policy.family}")
    return policy


def choose_weights(policy: Policy, settings: PolicySection) -> None:
    """Make the policy's adapters, or its whole network, trainable. Raises ConfigError for what does not fit."""
    if settings.dtype == "float16":
        raise ConfigError("policy.dtype float16 needs a scaled loss, which training does not have: take bfloat16")
    try:
        if settings.weights == "full":
            if settings.start is not None:
                raise ValueError("policy.start holds adapters, and policy.weights is 'full'")
            policy.train_full()
        elif settings.start is not None:
            policy.load_lora(settings.start)
        else:
            policy.train_lora(settings.lora_rank, settings.lora_alpha, targets=settings.lora_targets or None)
    except (OSError, ValueError) as error:
        what = "policy" if settings.start is None else f"policy.start {settings.start}"
        raise ConfigError(f"{what}: {error}") from error
    if settings.gradient_checkpointing:
        policy.gradient_checkpointing()


def check_sampling(policy: Policy, config: RunConfig) -> None:
    """Raises ConfigError for more denoising steps than the scheduler was made for, and for impossible sizes."""
    most = int(policy.pipeline.scheduler.config.num_train_timesteps)
    for name, steps in (("sampling.steps", config.sampling.steps), ("evaluation.steps", config.evaluation.steps)):
        if steps is not None and steps > most:
            raise ConfigError(f"{name} is {steps}, and the scheduler of the policy has {most} timesteps")
    try:
        policy.latent_shape(config.sampling.height, config.sampling.width)
    except ValueError as error:
        raise ConfigError(f"sampling: {error}") from error


def build_guard(config: RunConfig, evaluated: Sequence[Prompt], kl_weight: float) -> Guard | None:
    """The guard, if there are held-out rewards to see hacking by and something trained to compare them with."""
    settings, heldout = config.guard, config.evaluation.heldout
    if settings.mode == "off" or not evaluated or not heldout or not config.rewards.models:
        if settings.mode == "act":
            raise ConfigError("guard.mode 'act' needs evaluation.prompts, evaluation.heldout and rewards.models")
        return None
    if "drift_limit" in settings.limits and kl_weight == 0:
        raise ConfigError("guard.limits.drift_limit needs a KL weight above 0: drift is not measured without")
    known = {field.name for field in fields(GuardConfig)} - {"reward", "heldout"}
    if unknown := sorted({*settings.limits} - known):
        raise ConfigError(f"guard.limits: there is no limit {unknown[0]!r}; there are {', '.join(sorted(known))}")
    values: Mapping[str, Any] = {
        name: int(value) if float(value).is_integer() and name not in _REAL else value
        for name, value in settings.limits.items()
    }
    try:
        return Guard(GuardConfig(reward=TOTAL, heldout=heldout, **values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"guard.limits: {error}") from error


_REAL = ("alpha", "release", "heldout_fall", "agreement_fall", "group_std_fall", "diversity_fall", "drift_limit")
"""Limits that stay real numbers where they happen to be whole."""


def write_config(out: Path, config: RunConfig, identity: RunIdentity, policy: Policy) -> None:
    """Write what the run is into its folder, for readers and reports."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {
            "algorithm": identity.algorithm,
            "configuration": config.model_dump(mode="json"),
            "versions": dict(identity.versions),
            "policy": {
                "class": identity.policy,
                "configuration": identity.policy_config,
                "base_weights": identity.base_weights,
                "family": policy.family,
                "trained_parameters": sum(parameter.numel() for parameter in policy.weights.tensors()),
            },
            "rewards": dict(identity.fingerprints),
        },
        indent=1,
    )
    (out / "config.json").write_text(text, encoding="utf-8")
