"""The run of `docker compose up` and of the Job: the trainer understands it; service and image have what it names."""

from __future__ import annotations

import tomllib
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from benchmarks.training.plans import PLANS
from tests.deploy.dockerfiles import DOCKER, FILES, ROOT, copied
from trainer_client.config import load_config
from trainer_client.nft import NFTConfig
from trainer_client.policies import from_pretrained
from trainer_client.policies.flow_pipeline import FlowPolicy
from trainer_client.prompts import load_prompts

DEMO = DOCKER / "demo_run.toml"
JOB = ROOT / "k8s/trainer/base/run.toml"


@pytest.fixture(scope="module")
def config() -> NFTConfig:
    return load_config(NFTConfig, DEMO)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """A run without what differs by place: where rewards come from, and how long a start may take."""
    rewards = {key: value for key, value in values["rewards"].items() if key not in ("services", "start_patience")}
    return values | {"rewards": rewards}


def test_the_job_runs_what_compose_runs() -> None:
    load_config(NFTConfig, JOB)
    assert plain(tomllib.loads(JOB.read_text())) == plain(tomllib.loads(DEMO.read_text()))


def test_containers_train_with_the_values_of_make_demo() -> None:
    values = tomllib.loads(DEMO.read_text())
    demo = next(plan for plan in PLANS if plan.name == "DiffusionNFT").configuration("", values["steps"], seed=0)
    for section in ("sampling", "optimizer", "ema"):
        assert values[section] == demo[section]
    for key in ("prompts", "prompts_per_step", "group_size", "train_batch_size", "timestep_fraction", "kl_beta"):
        assert values[key] == demo[key]
    assert values["rewards"]["models"] == demo["rewards"]["models"]
    assert values["evaluation"]["heldout"] == demo["evaluation"]["heldout"]
    assert values["policy"] == demo["policy"] | {"source": values["policy"]["source"]}


def test_the_service_is_found_by_its_name(config: NFTConfig) -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    (url,) = config.rewards.services
    assert urlsplit(url).port == 8000
    assert urlsplit(url).hostname in compose["services"]
    assert compose["services"]["service-gpu"]["networks"]["default"]["aliases"] == [urlsplit(url).hostname]


@pytest.mark.parametrize("settings", ["docker/settings.yaml", "k8s/base/settings.yaml"])
def test_the_service_has_the_rewards(config: NFTConfig, settings: str) -> None:
    served = set(yaml.safe_load((ROOT / settings).read_text())["models"])
    assert config.rewards.models.keys() | set(config.evaluation.heldout) <= served
    assert config.evaluation.heldout, "what is optimised must not be all that is watched"


def test_the_image_has_the_policy_at_its_place(config: NFTConfig) -> None:
    (policy,) = copied((DOCKER / FILES["trainer"]).read_text(), "trainer")
    source, target = policy.split()
    assert target == config.policy.source
    loaded = from_pretrained(ROOT / source, max_sequence_length=config.policy.max_sequence_length)
    assert isinstance(loaded, FlowPolicy), "DiffusionNFT trains flows"


def test_prompts_are_shipped_and_evaluation_has_its_own(config: NFTConfig) -> None:
    trained, evaluated = load_prompts(config.prompts), load_prompts(config.evaluation.prompts or "")
    assert len(trained) >= config.prompts_per_step
    assert len(evaluated) >= config.evaluation.count
    assert {prompt.text for prompt in trained}.isdisjoint(prompt.text for prompt in evaluated)


def test_a_killed_run_loses_little(config: NFTConfig) -> None:
    assert config.checkpoints.every <= config.steps // 4
