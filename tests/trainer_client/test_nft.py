"""DiffusionNFT as a run, against a loop that is written from the paper's formulas, one image at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.service.live import running
from tests.trainer_client.conftest import RewardServer
from tests.trainer_client.policies.tiny_pipelines import build
from tests.trainer_client.scripts import tiny_run
from trainer_client.config import ConfigError, parse_config
from trainer_client.distributed import sample_generators
from trainer_client.nft import NFTConfig, train
from trainer_client.prompt_order import PromptOrder

EMBEDDED = "models/shapes/weights/policy"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with tiny_run.rewards() as server:
        yield server


@pytest.fixture(scope="module")
def failing_server() -> Iterator[RewardServer]:
    with tiny_run.rewards(failures=True) as server:
        yield server


def configured(folder: Path, source: Path | str, url: str, /, **overrides: Any) -> NFTConfig:
    values = tiny_run.values(folder, Path(source), url, **overrides)
    del values["noise_level"]
    return parse_config(NFTConfig, values)


# -- the loop, written from the formulas ------------------------------------------------------------------------------


class Naive:
    """The same run without batches, queues, ranks, masks or weights under names."""

    def __init__(self, config: NFTConfig, *, failures: bool = False) -> None:
        self.config, self.failures = config, failures
        self.pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
            config.policy.source, text_encoder_3=None, tokenizer_3=None
        )
        self.pipeline.scheduler.set_timesteps(config.sampling.steps)
        self.sigmas: list[float] = self.pipeline.scheduler.sigmas.tolist()
        self.network: Any = self.pipeline.transformer.requires_grad_(True)
        self.old: Any = deepcopy(self.network).requires_grad_(False)
        self.reference: Any = deepcopy(self.network).requires_grad_(False)
        self.start = {name: parameter.detach().clone() for name, parameter in self.network.named_parameters()}
        chosen = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=chosen.lr, betas=chosen.betas, eps=chosen.eps, weight_decay=0.0
        )
        self.updates = self.failed = 0
        self.deviation = self.kl = 0.0

    @torch.no_grad()
    def told(self, prompt: str) -> tuple[Tensor, Tensor]:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(prompt, None, None, max_sequence_length=0)
        return embeddings, pooled

    def velocity(self, network: Any, x: Tensor, t: float, told: tuple[Tensor, Tensor]) -> Tensor:
        found: Tensor = network(x, *told, torch.tensor([1000 * t]), return_dict=False)[0]
        return found

    @torch.no_grad()
    def draw(self, prompt: str, generator: torch.Generator) -> tuple[Tensor, float]:
        """(x0, reward), by the old policy."""
        x, told, before, times = torch.randn(1, 4, 16, 16, generator=generator), self.told(prompt), None, self.sigmas
        for i in range(1, len(times)):
            t, t_next = times[i - 1], times[i]
            x0 = x - t * self.velocity(self.old, x, t, told)
            if self.config.solver == "dpm2" and before is not None and i < len(times) - 1:
                # The second step comes from t = 1, infinitely far in lambda: its correction is 0.
                q_inverse = 0.0 if times[i - 2] == 1 else self.h(i) / self.h(i - 1)
                mixed = (1 + q_inverse / 2) * x0 - q_inverse / 2 * before
                x = t_next / t * x - (1 - t_next) * (math.exp(-self.h(i)) - 1) * mixed
            else:
                x = (1 - t_next) * x0 + t_next * (x + (1 - t) * (x - x0) / t)
            before = x0
        vae = self.pipeline.vae
        image = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5
        return x, tiny_run.coarse(float((image.clamp(0, 1) * 255).round().mean()) / 255)

    def h(self, i: int) -> float:
        return math.log((1 - self.sigmas[i]) / self.sigmas[i]) - math.log((1 - self.sigmas[i - 1]) / self.sigmas[i - 1])

    def loss(self, prompt: str, x0: Tensor, advantage: float, t: float, generator: torch.Generator) -> Tensor:
        config, beta, limit = self.config, self.config.beta, self.config.advantage_clip
        x = (1 - t) * x0 + t * torch.randn(1, 4, 16, 16, generator=generator)
        told = self.told(prompt)
        v = self.velocity(self.network, x, t, told)
        with torch.no_grad():
            v_old, v_ref = self.velocity(self.old, x, t, told), self.velocity(self.reference, x, t, told)
        clipped = max(-limit, min(limit, advantage))
        if config.advantages == "binary":
            clipped = math.copysign(1.0, clipped) if clipped else 0.0
        r = min(1.0, max(0.0, clipped / limit / 2 + 0.5))
        errors = []
        for mixed in (beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v):
            error = (x.double() - t * mixed.double()) - x0.double()
            errors.append((error**2 / error.detach().abs().mean().clamp(min=1e-5)).mean())
        self.deviation += float((v - v_old).detach().abs().max())
        self.kl += float((v - v_ref).detach().square().mean())
        policy_loss = limit * (r * errors[0] / beta + (1 - r) * errors[1] / beta)
        return policy_loss + config.kl_beta * ((v - v_ref) ** 2).mean()

    def advantages(self, rewards: list[float], ok: list[bool]) -> list[float]:
        """0 where the image has no reward."""
        size, found = self.config.group_size, []
        for i, reward in enumerate(rewards):
            rows = range(i // size * size, i // size * size + size)
            group = torch.tensor([rewards[row] for row in rows if ok[row]], dtype=torch.float64)
            found.append(float((reward - group.mean()) / (group.std(correction=0) + 1e-4)) if ok[i] else 0.0)
        return found

    def step(self, step: int, prompts: list[str]) -> None:
        config = self.config
        generators = sample_generators(config.seed, step, range(config.images_per_step))
        drawn = [self.draw(prompt, generator) for prompt, generator in zip(prompts, generators, strict=True)]
        ok = [not (self.failures and tiny_run.fails(reward)) for _, reward in drawn]
        self.failed += ok.count(False)
        advantages = self.advantages([reward for _, reward in drawn], ok)
        for chunk in range(config.updates_per_step):
            members = [i for i in range(len(drawn)) if ok[i] and i % config.updates_per_step == chunk]
            for i in members:
                shuffled = torch.randperm(config.sampling.steps, generator=generators[i])
                times = [self.sigmas[k] for k in shuffled[: round(config.timestep_fraction * config.sampling.steps)]]
                for t in times:
                    loss = self.loss(prompts[i], drawn[i][0], advantages[i], t, generators[i])
                    (loss / (len(members) * len(times))).backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), config.optimizer.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.updates += 1
        d = [0.0, min(0.001 * self.updates, 0.5), 0.0][config.schedule]  # a test makes fewer than 75 updates
        with torch.no_grad():
            for old, new in zip(self.old.parameters(), self.network.parameters(), strict=True):
                old.copy_(d * old + (1 - d) * new)

    def run(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(trained, old) weights after all steps."""
        order = PromptOrder(list(tiny_run.PROMPTS), self.config.seed)
        for step in range(self.config.steps):
            taken = order.take(self.config.prompts_per_step)
            self.step(step, [tiny_run.PROMPTS[i] for i in taken for _ in range(self.config.group_size)])
        trained, old = dict(self.network.named_parameters()), dict(self.old.named_parameters())
        return {name: value.detach() for name, value in trained.items()}, old


CASES: dict[str, dict[str, Any]] = {
    "one update, all timesteps": {"steps": 1},
    "two updates, small beta, velocity penalty": {"updates_per_step": 2, "beta": 0.1, "kl_beta": 3.0},
    "old policy that lags": {"steps": 3, "updates_per_step": 2, "schedule": 1, "timestep_fraction": 0.5},
    "half of the timesteps, signs, first order": {
        "timestep_fraction": 0.5, "advantages": "binary", "solver": "ddim", "schedule": 0, "advantage_clip": 2.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_loop_of_the_formulas(case: str, policy: Path, server: RewardServer, tmp_path: Path) -> None:
    config = configured(tmp_path, policy, server.url, **CASES[case])
    out = train(config, tmp_path / "run")
    naive = Naive(config)
    trained, old = naive.run()
    assert tiny_run.distance(tiny_run.tensors(out, config.steps), trained, naive.start) < 1e-4
    assert tiny_run.distance(tiny_run.tensors(out, config.steps, "old"), old, naive.start) < 1e-4
    assert (naive.deviation > 1e-4) == (config.updates_per_step > 1), "the old policy must differ where it should"
    assert naive.kl > 0 or config.steps == 1


def test_failed_samples_leave_no_trace(policy: Path, failing_server: RewardServer, tmp_path: Path) -> None:
    config = configured(tmp_path, policy, failing_server.url, group_size=6, prompts_per_step=2)
    out = train(config, tmp_path / "run")
    naive = Naive(config, failures=True)
    trained, _ = naive.run()
    assert 0 < naive.failed < config.steps * config.images_per_step
    assert tiny_run.distance(tiny_run.tensors(out, config.steps), trained, naive.start) < 1e-4
    told = sum(row["failed_ratio"] for row in tiny_run.rows(out)) * config.images_per_step
    assert told == pytest.approx(naive.failed)


# -- what does not matter ---------------------------------------------------------------------------------------------


def start_of(source: Path) -> dict[str, Tensor]:
    return load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_accumulation_does_not_change_the_update(
    weights: str, policy: Path, server: RewardServer, tmp_path: Path
) -> None:
    """In pieces of 3, 3, 2 images, and of 8."""
    found = []
    for size in (8, 3):
        config = configured(
            tmp_path, policy, server.url, train_batch_size=size, policy={"weights": weights}, timestep_fraction=0.5
        )
        found.append(tiny_run.tensors(train(config, tmp_path / str(size)), config.steps))
    biggest = max(float(tensor.abs().max()) for tensor in found[0].values())
    assert max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0]) < 1e-6 * max(biggest, 1)
    if weights == "full":
        start = start_of(policy)
        assert max(float((found[0][name] - start[name]).abs().max()) for name in found[0]) > 1e-4
    else:
        assert any(float(tensor.abs().max()) > 1e-5 for name, tensor in found[0].items() if "lora_B" in name)


def test_two_runs_from_one_seed_are_one_and_a_resumed_one_too(
    policy: Path, server: RewardServer, tmp_path: Path
) -> None:
    short, whole = (configured(tmp_path, policy, server.url, steps=n, schedule=1) for n in (1, 2))
    once = train(whole, tmp_path / "once")
    again = train(whole, tmp_path / "again")
    train(short, tmp_path / "resumed")
    resumed = train(whole, tmp_path / "resumed", resume=True)
    other = train(configured(tmp_path, policy, server.url, seed=1), tmp_path / "other")
    for part in ("weights", "old", "ema"):
        expected = tiny_run.tensors(once, 2, part)
        for out in (again, resumed):
            found = tiny_run.tensors(out, 2, part)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not all(torch.equal(tiny_run.tensors(other, 2, part)[name], expected[name]) for name in expected)
    assert tiny_run.untimed(tiny_run.rows(again)) == tiny_run.untimed(tiny_run.rows(once))


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_it_learns_what_is_rewarded(weight: float, policy: Path, server: RewardServer, tmp_path: Path) -> None:
    """Brighter images, or darker ones: by several of the standard deviations that a group has."""
    config = configured(
        tmp_path, policy, server.url, steps=12, group_size=8, train_batch_size=16, sampling={"batch_size": 16},
        rewards={"models": {"mean": weight}},
        optimizer={"lr": 3e-3, "eps": 1e-8, "betas": [0.9, 0.99], "max_grad_norm": 1.0},
    )  # fmt: skip
    rows = tiny_run.rows(train(config, tmp_path / "run"))
    risen = weight * (rows[-1]["reward/mean"] - rows[0]["reward/mean"])
    assert risen > 4 * rows[0]["group_std"]


# -- the old policy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [0, 1])
def test_the_old_policy_follows_by_its_schedule(
    schedule: int, policy: Path, server: RewardServer, tmp_path: Path
) -> None:
    config = configured(
        tmp_path, policy, server.url, steps=3, updates_per_step=2, schedule=schedule, timestep_fraction=0.25,
        checkpoints={"every": 1, "keep": 5},
    )  # fmt: skip
    out = train(config, tmp_path / "run")
    rows = tiny_run.rows(out)
    assert [row["updates"] for row in rows] == [2, 4, 6]
    decays = [0.002 * step if schedule else 0.0 for step in (1, 2, 3)]
    assert [row["old_decay"] for row in rows] == pytest.approx(decays, abs=1e-12)
    expected = start_of(policy)
    for step, d in enumerate(decays, start=1):
        trained, old = tiny_run.tensors(out, step), tiny_run.tensors(out, step, "old")
        expected = {name: d * expected[name].double() + (1 - d) * trained[name].double() for name in trained}
        for name in trained:
            torch.testing.assert_close(old[name].double(), expected[name], rtol=1e-6, atol=1e-7)
        assert all(torch.equal(old[name], trained[name]) for name in trained) == (schedule == 0)


def test_what_is_logged(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    """At the first update the three policies are one: both predictions err alike, and no distance is above 0."""
    rows = tiny_run.rows(train(configured(tmp_path, policy, server.url), tmp_path / "run"))
    first, second = rows
    assert first["positive_error"] == pytest.approx(first["negative_error"], rel=1e-6)
    assert first["loss"] == pytest.approx(5 * first["positive_error"], rel=1e-5)
    assert first["kl"] == 0
    assert second["kl"] > 0
    assert second["kl_weight"] == 1e-4
    two = tiny_run.rows(train(configured(tmp_path, policy, server.url, updates_per_step=2), tmp_path / "two"))
    assert first["old_deviation"] == 0 < two[0]["old_deviation"]


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_classifier_free_guidance_is_refused(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    config = configured(tmp_path, policy, server.url, sampling={"guidance_scale": 4.5})
    with pytest.raises(ConfigError, match=r"sampling\.guidance_scale is 4\.5.*without guidance"):
        train(config, tmp_path / "run")
    assert tiny_run.rows(tmp_path / "run") == []


def test_distilled_guidance_is_an_input(server: RewardServer, tmp_path: Path) -> None:
    build("flux").save_pretrained(tmp_path / "flux")
    found = {}
    for scale in (1.0, 3.5):
        config = configured(
            tmp_path, tmp_path / "flux", server.url, steps=1, policy={"max_sequence_length": 8},
            sampling={"guidance_scale": scale, "steps": 2, "height": 32, "width": 32},
        )  # fmt: skip
        found[scale] = tiny_run.rows(train(config, tmp_path / str(scale)))[0]
    assert found[1.0]["reward/total"] != found[3.5]["reward/total"]
    assert all(row["grad_norm"] > 0 for row in found.values())


def test_a_policy_that_is_no_flow_is_refused(server: RewardServer, tmp_path: Path) -> None:
    build("sd").save_pretrained(tmp_path / "sd")
    config = configured(tmp_path, tmp_path / "sd", server.url, policy={"max_sequence_length": None})
    with pytest.raises(ConfigError, match="nft trains rectified flows"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "named"),
    [({"beta": 0}, "beta"), ({"schedule": 3}, "schedule"), ({"timestep_fraction": 0}, "timestep_fraction"),
     ({"solver": "heun"}, "solver"), ({"advantages": "some"}, "advantages"), ({"group_size": 1}, "group_size")],
)  # fmt: skip
def test_wrong_values_are_named(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        configured(tmp_path, "nowhere", "http://127.0.0.1:1", **values)


# -- a real service ---------------------------------------------------------------------------------------------------


def test_the_embedded_policy_trains_on_rewards_of_a_real_service(tmp_path: Path) -> None:
    with running(tmp_path / "service", {"models": {"shapes-clip": {}}}) as live:
        config = configured(
            tmp_path, EMBEDDED, live.url, prompts="shapes:train", kl_beta=1e-4, timestep_fraction=0.5,
            sampling={"steps": 4}, rewards={"models": {"shapes-clip": 1.0}}, optimizer={"lr": 1e-4, "eps": 1e-8},
        )  # fmt: skip
        out = train(config, tmp_path / "run")
        asked = live.metric("reward_requests_total", route="/score")
    rows = tiny_run.rows(out)
    assert [row["images"] for row in rows] == [8, 16]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(row["reward_std/shapes-clip"] > 0.1 and row["failed_ratio"] == 0 for row in rows)
    assert rows[1]["kl"] > 0
    assert asked >= 2
