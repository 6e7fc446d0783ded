"""Configurations: read from TOML and overrides, refused in one line, and what of them a checkpoint insists on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_client.config import ConfigError, GroupConfig, RunConfig, load_config, parse_config
from trainer_client.flow_grpo import FlowGRPOConfig

NEEDED: dict[str, Any] = {"prompts": "p.txt", "policy": {"source": "s"}, "rewards": {"models": {"m": 1.0}}}
SET = ["prompts=p.txt", "policy.source=s", "rewards.models.m=1.0"]


def test_a_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'prompts = "p.txt"\nsteps = 7\n[policy]\nsource = "s"\n[optimizer]\nlr = 1e-4\n[rewards.models]\nm = 1.0\n'
    )
    config = load_config(RunConfig, file)
    assert (config.steps, config.optimizer.lr, config.policy.source) == (7, 1e-4, "s")
    changed = load_config(
        RunConfig,
        file,
        ["optimizer.lr=2e-4", "policy.source=a/b c=d", "rewards.models.other=0.5", "evaluation.heldout=['x']"],
    )
    assert changed.optimizer.lr == 2e-4
    assert changed.policy.source == "a/b c=d"
    assert changed.rewards.models == {"m": 1.0, "other": 0.5}
    assert changed.evaluation.heldout == ("x",)
    assert changed.steps == 7
    assert load_config(RunConfig, None, SET) == parse_config(RunConfig, NEEDED)


@given(st.floats(1e-8, 10), st.integers(1, 10**6))
def test_overrides_are_numbers_where_they_are_numbers(lr: float, steps: int) -> None:
    config = load_config(RunConfig, None, [*SET, f"optimizer.lr={lr!r}", f"steps={steps}"])
    assert (config.optimizer.lr, config.steps) == (lr, steps)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stepps=3"], r"^stepps: Extra inputs"),
        (["optimizer.rate=3"], r"^optimizer\.rate: Extra inputs"),
        (["steps=0"], r"^steps: Input should be greater than or equal to 1$"),
        (["steps=many"], r"^steps: .*valid integer"),
        (["policy.weights=half"], r"^policy\.weights: Input should be 'lora' or 'full'$"),
        (["policy=3"], r"^policy: "),
        (["steps.more=1", "steps=2", "steps.more=1"], r"steps\.more=1: steps is a value and no section"),
        (["steps"], r"--set takes key=value, such as optimizer.lr=1e-4, not 'steps'"),
        (["=3"], r"--set takes key=value"),
        (["evaluation.heldout=['m']"], r"m is both trained on and held out"),
        (["ema.decay=1.5", "seed=-1"], r"seed: .*; ema\.decay: |ema\.decay: .*; seed: "),
        (["optimizer.lr=nan"], r"optimizer\.lr"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(RunConfig, None, [*SET, *overrides])
    assert "\n" not in str(caught.value)


def test_needed_values() -> None:
    with pytest.raises(ConfigError, match=r"^prompts: Field required; policy: Field required; rewards: Field required"):
        parse_config(RunConfig, {})
    with pytest.raises(ConfigError, match=r"rewards.models is empty: name a reward model, such as --set"):
        parse_config(RunConfig, NEEDED | {"rewards": {}})


@pytest.mark.parametrize("text", ["steps = [", "\xff"])
def test_files_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.toml: "):
        load_config(RunConfig, file)
    with pytest.raises(ConfigError, match=r"none\.toml: .*No such file"):
        load_config(RunConfig, tmp_path / "none.toml")


def test_a_group_has_two_images() -> None:
    assert parse_config(GroupConfig, NEEDED | {"group_size": 2, "prompts_per_step": 3}).images_per_step == 6
    assert parse_config(RunConfig, NEEDED | {"prompts_per_step": 3}).images_per_step == 3
    with pytest.raises(ConfigError, match=r"group_size is 1: an image alone in its group teaches nothing"):
        parse_config(GroupConfig, NEEDED | {"group_size": 1})


def test_the_identity_holds_what_changes_the_result_and_nothing_else() -> None:
    """A run may be continued for longer, elsewhere, with other services and more patience, and not otherwise."""
    identity = parse_config(FlowGRPOConfig, NEEDED).identity()
    free: list[dict[str, Any]] = [
        {"steps": 7},
        {"checkpoints": {"every": 1, "keep": 9}},
        {"logging": {"tensorboard": False}},
        {"policy": {"source": "s", "device": "cpu"}},
        {"rewards": {"models": {"m": 1.0}, "services": ["http://other"], "patience": 1, "start_patience": 2,
                     "deadline": 3, "allow_fingerprint_change": True}},
    ]  # fmt: skip
    for each in free:
        assert parse_config(FlowGRPOConfig, NEEDED | each).identity() == identity, each
    bound: list[dict[str, Any]] = [
        {"seed": 1}, {"prompts": "q"}, {"group_size": 8}, {"clip": 1e-3}, {"updates_per_step": 2},
        {"ema": {"every": 1}},
        {"optimizer": {"lr": 1e-3}}, {"sampling": {"steps": 11}}, {"rewards": {"models": {"m": 2.0}}},
        {"policy": {"source": "s", "lora_rank": 4}}, {"evaluation": {"seeds": 2}}, {"guard": {"mode": "off"}},
    ]  # fmt: skip
    for each in bound:
        assert parse_config(FlowGRPOConfig, NEEDED | each).identity() != identity, each
