"""Flow-GRPO as a run, against a loop that is written from the formulas, one image at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from torch import Tensor, nn

from tests.trainer_client.conftest import RewardServer, answer_well
from tests.trainer_client.scripts import tiny_run
from trainer_client.config import ConfigError, parse_config
from trainer_client.distributed import derived_seed, sample_generators
from trainer_client.flow_grpo import FlowGRPOConfig, choose_window, train
from trainer_client.prompt_order import PromptOrder

TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
           "attn.add_v_proj", "attn.to_add_out"]  # fmt: skip


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


# -- the loop, written from the formulas ------------------------------------------------------------------------------


def gaussian(x: Tensor, v: Tensor, t: float, t_next: float, config: FlowGRPOConfig) -> tuple[Tensor, float, float]:
    """(mean, standard deviation, what the KL divides by) of one drawn step."""
    eta, dt = config.noise_level, t_next - t
    if config.dynamics == "flow-sde":
        s = eta * math.sqrt(t / (1 - (t_next if t == 1 else t)))
        return x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt, s * math.sqrt(-dt), s
    if config.dynamics == "dance-sde":
        score = -(x - (1 - t) * (x - t * v)) / t**2
        return x + (v - 0.5 * eta**2 * score) * dt, eta * math.sqrt(-dt), eta
    s = t_next * math.sin(eta * math.pi / 2)
    x0, noise = x - t * v, x + (1 - t) * v
    return x0 * (1 - t_next) + noise * math.sqrt(t_next**2 - s**2), s, s


def log_probability(x_next: Tensor, mean: Tensor, s: float, config: FlowGRPOConfig) -> Tensor:
    if config.dynamics == "cps":
        return -(x_next - mean).square().mean()
    return torch.distributions.Normal(mean, s).log_prob(x_next).mean()


@dataclass
class Sample:
    """One image: its reward, and of each drawn step (t, t_next, x, x_next, log-probability, mean)."""

    prompt: str
    group: int
    reward: float
    steps: list[tuple[float, float, Tensor, Tensor, Tensor, Tensor]]
    advantage: float = 0.0


class Naive:
    """The same run without batches, queues, ranks or masks; ``clipped`` is the share of ratios out of range."""

    def __init__(self, config: FlowGRPOConfig, *, failures: bool = False) -> None:
        self.config, self.failures = config, failures
        self.pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
            config.policy.source, text_encoder_3=None, tokenizer_3=None
        )
        self.pipeline.scheduler.set_timesteps(config.sampling.steps)
        self.network: Any = self.pipeline.transformer.requires_grad_(config.policy.weights == "full")
        for part in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            part.requires_grad_(False)
        self.reference = deepcopy(self.network).requires_grad_(False)
        if config.policy.weights == "lora":
            torch.manual_seed(derived_seed(config.seed, "weights"))
            chosen = config.policy
            self.network.add_adapter(
                LoraConfig(
                    r=chosen.lora_rank, lora_alpha=chosen.lora_alpha, init_lora_weights="gaussian",
                    target_modules=TARGETS,
                )
            )  # fmt: skip
        self.trained = {
            name.removesuffix(".default.weight") if ".lora_" in name else name: parameter
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad
        }
        self.start = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        chosen = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=chosen.lr, betas=chosen.betas, eps=chosen.eps, weight_decay=chosen.weight_decay
        )
        self.told: dict[str, tuple[Tensor, ...]] = {}
        self.kl, self.clipped, self.failed = 0.0, 0.0, 0

    def velocity(self, network: nn.Module, x: Tensor, t: float, prompt: str) -> Tensor:
        scale = self.config.sampling.guidance_scale
        if prompt not in self.told:
            self.told[prompt] = self.pipeline.encode_prompt(
                prompt, None, None, negative_prompt=self.config.sampling.negative, max_sequence_length=0
            )
        told, away, pooled, pooled_away = self.told[prompt]

        def predict(embeddings: Tensor, projections: Tensor) -> Tensor:
            time = torch.tensor([1000 * t])
            found: Tensor = network(x, embeddings, projections, time, return_dict=False)[0]
            return found

        v = predict(told, pooled)
        if scale > 1:
            u = predict(away, pooled_away)
            v = u + scale * (v - u)
        return v

    @torch.no_grad()
    def draw(self, prompt: str, group: int, generator: torch.Generator, window: list[int]) -> Sample:
        x, steps = torch.randn(1, 4, 16, 16, generator=generator), []
        for index, (t, t_next) in enumerate(pairwise(self.pipeline.scheduler.sigmas.tolist())):
            v = self.velocity(self.network, x, t, prompt)
            if index not in window:
                x = x + v * (t_next - t)
                continue
            mean, s, _ = gaussian(x, v, t, t_next, self.config)
            x_next = mean + s * torch.randn(4, 16, 16, generator=generator)
            steps.append((t, t_next, x, x_next, log_probability(x_next, mean, s, self.config), mean))
            x = x_next
        vae = self.pipeline.vae
        image = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5
        reward = tiny_run.coarse(float((image.clamp(0, 1) * 255).round().mean()) / 255)
        return Sample(prompt, group, reward, steps)

    def loss(self, sample: Sample, step: tuple[float, float, Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        config = self.config
        t, t_next, x, x_next, old, old_mean = step
        mean, s, divisor = gaussian(x, self.velocity(self.network, x, t, sample.prompt), t, t_next, config)
        logarithm = log_probability(x_next, mean, s, config) - old
        if config.ratio == "guard":
            logarithm = logarithm * s + (mean - old_mean).square().mean() / (2 * s)
        ratio, high = logarithm.exp(), config.clip_high or config.clip
        advantage = max(-config.advantage_clip, min(config.advantage_clip, sample.advantage))
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - config.clip, 1 + high))
        self.clipped += float(ratio.item() - 1 > high or 1 - ratio.item() > config.clip)
        if config.beta:
            with torch.no_grad():
                v = self.velocity(self.reference, x, t, sample.prompt)
                reference = gaussian(x, v, t, t_next, config)[0]
            kl = (mean - reference).square().mean() / (2 * (divisor if config.kl == "diffusion" else s) ** 2)
            self.kl += kl.item()
            loss = loss + config.beta * kl
        return loss

    def run(self) -> dict[str, Tensor]:
        """The trained weights after all steps."""
        config = self.config
        order = PromptOrder(list(tiny_run.PROMPTS), config.seed)
        for step in range(config.steps):
            window = choose_window(
                config, step, torch.Generator().manual_seed(derived_seed(config.seed, step, "window"))
            )
            taken = order.take(config.prompts_per_step)
            generators = sample_generators(config.seed, step, range(config.images_per_step))
            samples = [
                self.draw(tiny_run.PROMPTS[taken[i // config.group_size]], i // config.group_size, generator, window)
                for i, generator in enumerate(generators)
            ]
            ok = [not (self.failures and tiny_run.fails(sample.reward)) for sample in samples]
            self.failed += ok.count(False)
            kept = [sample for sample, is_ok in zip(samples, ok, strict=True) if is_ok]
            for sample in kept:
                group = torch.tensor([each.reward for each in kept if each.group == sample.group], dtype=torch.float64)
                everyone = torch.tensor([each.reward for each in kept], dtype=torch.float64)
                spread = (everyone if config.rewards.std == "batch" else group).std(correction=0)
                sample.advantage = float((sample.reward - group.mean()) / (spread + 1e-4))
            for chunk in range(config.updates_per_step):
                members = [s for i, s in enumerate(samples) if ok[i] and i % config.updates_per_step == chunk]
                for sample in members:
                    for drawn in sample.steps:
                        (self.loss(sample, drawn) / (len(members) * len(window))).backward()
                nn.utils.clip_grad_norm_(self.trained.values(), config.optimizer.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return {name: parameter.detach() for name, parameter in self.trained.items()}


CASES: dict[str, dict[str, Any]] = {
    "all steps, std of the batch, weight decay": {"rewards": {"std": "batch"}, "optimizer": {"weight_decay": 0.01}},
    "random window, DanceGRPO, clipped gradient": {
        "window": "random", "window_size": 2, "dynamics": "dance-sde", "noise_level": 0.3,
        "optimizer": {"max_grad_norm": 1e-3, "lr": 20.0},
    },
    "fast window, guidance": {
        "window": "fast", "window_size": 1, "seed": 1, "sampling": {"guidance_scale": 4.5, "negative": "grey"},
    },
    "sliding window, CPS": {"window": "mix", "window_size": 2, "dynamics": "cps", "steps": 3},
    "two updates, KL": {"updates_per_step": 2, "beta": 5.0},
    "two updates, guard ratio, KL by std": {
        "updates_per_step": 2, "ratio": "guard", "clip": 1e-5, "clip_high": 2e-5, "beta": 5.0, "kl": "std",
    },
    "two updates, adapters, KL": {
        "updates_per_step": 2, "beta": 5.0, "policy": {"weights": "lora", "lora_rank": 2, "lora_alpha": 4},
        "optimizer": {"lr": 20.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_loop_of_the_formulas(case: str, policy: Path, server: RewardServer, tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, policy, server.url, **CASES[case])
    out = train(config, tmp_path / "run")
    naive = Naive(config)
    assert tiny_run.distance(tiny_run.tensors(out, config.steps), naive.run(), naive.start) < 2e-5
    assert (naive.kl > 0) == (config.beta > 0)
    assert (naive.clipped > 0) == (config.updates_per_step > 1), "only a second update can meet the clip range"


def test_failed_samples_are_as_if_they_had_not_been_there(
    policy: Path, failing_server: RewardServer, tmp_path: Path
) -> None:
    config = tiny_run.config(tmp_path, policy, failing_server.url, group_size=5, updates_per_step=2)
    out = train(config, tmp_path / "run")
    naive = Naive(config, failures=True)
    assert tiny_run.distance(tiny_run.tensors(out, config.steps), naive.run(), naive.start) < 2e-5
    assert 0 < naive.failed < config.steps * config.images_per_step / 2
    assert sum(row["failed_ratio"] for row in tiny_run.rows(out)) * 10 == pytest.approx(naive.failed)
    assert "the first: mean: model_error: it is dark" in tiny_run.events(out, "warning")[0]


# -- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_batch_sizes_change_nothing(kind: str, policy: Path, server: RewardServer, tmp_path: Path) -> None:
    sizes = {"whole": (8, 8), "small": (3, 2), "odd": (5, 1)}
    found = {}
    for name, (drawn, trained) in sizes.items():
        config = tiny_run.config(
            tmp_path, policy, server.url, train_batch_size=trained, beta=1.0, sampling={"batch_size": drawn},
            updates_per_step=2, policy={"weights": kind, "lora_rank": 2},
            optimizer={"lr": 1.0 if kind == "lora" else 0.5},
        )  # fmt: skip
        found[name] = tiny_run.tensors(train(config, tmp_path / name), 2)
    start = Naive(config).start
    for name in ("small", "odd"):
        assert tiny_run.distance(found[name], found["whole"], start) < 2e-5
        for key, tensor in found["whole"].items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-6, atol=1e-6)


def test_samples_that_teach_nothing_may_be_left_out(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    """Groups of which every image is equally good have advantage 0 and gradient 0, dropped or not."""
    server_default = server.default
    server.default = lambda handler, received: answer_well(handler, received, first_item_alike)
    try:
        found = [
            train(tiny_run.config(tmp_path, policy, server.url, drop_zero_advantages=drop), tmp_path / f"{drop}")
            for drop in (True, False)
        ]
    finally:
        server.default = server_default
    assert [row["zero_std_ratio"] for row in tiny_run.rows(found[0])] == [0.5, 0.5]
    dropped, kept = (tiny_run.tensors(out, 2) for out in found)
    assert tiny_run.distance(dropped, kept, Naive(tiny_run.config(tmp_path, policy, server.url)).start) < 1e-5


def test_a_rollout_that_teaches_nothing_leaves_the_weights(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    """Every group is drawn alone and all of its images are equally good: nothing is left to train on."""
    server_default = server.default
    server.default = lambda handler, received: answer_well(handler, received, first_item_alike)
    try:
        config = tiny_run.config(tmp_path, policy, server.url, sampling={"batch_size": 4})
        out = train(config, tmp_path / "run")
    finally:
        server.default = server_default
    assert [row["zero_std_ratio"] for row in tiny_run.rows(out)] == [1.0, 1.0]
    start = Naive(config).start
    for name, tensor in tiny_run.tensors(out, 2).items():
        assert torch.equal(tensor, start[name])


def first_item_alike(answer: dict[str, Any]) -> dict[str, Any]:
    for i, result in enumerate(answer.get("results", [])):
        scores = [0.5 if i == 0 else tiny_run.coarse(score) for score in result["scores"]["mean"]]
        result["scores"]["mean"], result["total"] = scores, list(scores)
    return answer


# -- on policy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["ppo", "guard"])
@pytest.mark.parametrize("dynamics", ["flow-sde", "dance-sde", "cps"])
def test_the_first_update_is_exactly_on_policy(
    dynamics: str, ratio: str, policy: Path, server: RewardServer, tmp_path: Path
) -> None:
    config = tiny_run.config(
        tmp_path, policy, server.url, dynamics=dynamics, ratio=ratio, sampling={"batch_size": 3, "steps": 3},
        noise_level=0.4, drop_zero_advantages=False,
    )  # fmt: skip
    for row in tiny_run.rows(train(config, tmp_path / "run")):
        assert (row["ratio_mean"], row["approx_kl"], row["clip_fraction"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_reference_is_the_policy_before_training(
    kind: str, policy: Path, server: RewardServer, tmp_path: Path
) -> None:
    """KL 0 where nothing is trained yet, more than 0 afterwards; the ratio of a second update leaves 1."""
    config = tiny_run.config(
        tmp_path, policy, server.url, beta=0.1, policy={"weights": kind, "lora_rank": 2},
        optimizer={"lr": 20.0 if kind == "lora" else 0.5},
    )  # fmt: skip
    first, second = tiny_run.rows(train(config, tmp_path / "once"))
    assert (first["kl"], first["ratio_mean"]) == (0.0, 1.0)
    assert second["kl"] > 0
    assert (first["kl_weight"], second["ratio_mean"]) == (0.1, 1.0)
    twice = config.model_copy(update={"updates_per_step": 2, "steps": 1})
    [row] = tiny_run.rows(train(twice, tmp_path / "twice"))
    assert row["approx_kl"] > 0
    assert row["updates"] == 2


# -- windows ----------------------------------------------------------------------------------------------------------


def windows(steps: int, **settings: Any) -> list[list[int]]:
    config = parse_config(
        FlowGRPOConfig,
        {"prompts": "p", "policy": {"source": "s"}, "rewards": {"models": {"m": 1}}, "sampling": {"steps": steps}}
        | settings,
    )
    generator = torch.Generator().manual_seed(0)
    return [choose_window(config, step, generator) for step in range(60)]


def test_windows() -> None:
    assert windows(10) == [list(range(9))] * 60
    drawn = windows(10, window="random", window_size=3)
    assert all(window == sorted(set(window)) and len(window) == 3 and max(window) <= 8 for window in drawn)
    assert {step for window in drawn for step in window} == set(range(9))
    fast = windows(10, window="fast", window_size=2)
    assert {tuple(window) for window in fast} == {(0, 1), (1, 2), (2, 3), (3, 4)}
    sliding = windows(6, window="mix", window_size=2, window_every=2)
    assert sliding[:9] == [[0, 1], [0, 1], [1, 2], [1, 2], [2, 3], [2, 3], [3, 4], [3, 4], [0, 1]]


@pytest.mark.parametrize(
    ("steps", "settings"),
    [(1, {}), (4, {"window": "random", "window_size": 4}), (4, {"window": "fast", "window_size": 3}),
     (3, {"window": "mix", "window_size": 3})],
)  # fmt: skip
def test_windows_that_do_not_fit_are_refused(steps: int, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"no window of \d drawn steps .* in {steps} denoising steps"):
        windows(steps, **settings)
