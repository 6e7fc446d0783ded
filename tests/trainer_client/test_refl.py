"""ReFL's gradients against plain autograd over the formulas of the papers, on tiny pipelines of each kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.service.live import ROOT
from tests.trainer_client.conftest import RewardServer, serving
from tests.trainer_client.policies.tiny_pipelines import build
from tests.trainer_client.scripts import refl_ranks
from tests.trainer_client.scripts.refl_ranks import FAILS, PROMPTS, Quality, local, quality
from trainer_client.config import ConfigError, parse_config
from trainer_client.denoising import Denoising, denoising_of
from trainer_client.distributed import derived_seed
from trainer_client.errors import ProtocolError
from trainer_client.policies import Conditioning, DDPMPolicy, FlowPolicy, Policy
from trainer_client.pretraining import load_captioned, read_image, shuffled
from trainer_client.refl import ReFLConfig, differentiated, learn_pretraining, learn_rewards, train
from trainer_client.remote_reward import RemoteTotals
from trainer_client.run import Run
from trainer_client.run_batch import Batch
from trainer_client.run_scoring import RunFailed

STEPS, TARGET, SCALE = 4, 2.0, 1e-3
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow": ("sd3", {}),
    "epsilon": ("sd", {}),
    "v": ("sd", {"prediction_type": "v_prediction"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, (family, options) in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        build(family, **options).save_pretrained(made[kind])
    return made


@pytest.fixture(scope="module")
def service() -> Iterator[RewardServer]:
    with serving({"mean": "sha256:feed"}) as server:
        yield server


@pytest.fixture
def config_of(folders: dict[str, Path], service: RewardServer, tmp_path: Path) -> Callable[..., ReFLConfig]:
    def make(kind: str = "flow", **values: Any) -> ReFLConfig:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        sections: dict[str, Any] = {
            "prompts": str(prompts),
            "prompts_per_step": 4,
            "train_batch_size": 4,
            "target": TARGET,
            "policy": {"source": str(folders[kind]), "weights": "full", "device": "cpu"},
            "sampling": {"steps": STEPS, "height": 32, "width": 32},
            "rewards": {"services": [service.url], "models": {"mean": 1.0}, "patience": 5.0},
            "ema": {"decay": 0},
            "logging": {"progress": False, "tensorboard": False},
        }
        for name, value in values.items():
            sections[name] = {**sections[name], **value} if isinstance(sections.get(name), dict) else value
        return parse_config(ReFLConfig, sections)

    return make


@contextmanager
def started(config: ReFLConfig, out: Path, reward: Any = None, kl_weight: float = 0.0) -> Iterator[Run[ReFLConfig]]:
    """A run that has not trained yet."""
    answers = Quality() if reward is None else reward
    with Run("refl", config, out, make_rewards=local(answers), needs_gradient=True, kl_weight=kl_weight) as run:
        yield run


def gradients(run: Run[ReFLConfig]) -> Tensor:
    """All in one vector."""
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in run.parameters])


def one_step(config: ReFLConfig, out: Path, reward: Any = None) -> tuple[Tensor, Batch]:
    """The gradient of one optimizer step, and its images."""
    with started(config, out, reward) as run:
        batch = run.next_batch()
        learn_rewards(run, denoising_of(run.policy, config.sampling), batch, 0)
        return gradients(run), batch


def apart(first: Tensor, second: Tensor) -> float:
    """Distance over length."""
    assert second.norm() > 0
    return float((first - second).norm() / second.norm())


# -- the formulas, one image at a time --------------------------------------------------------------------------------


def flow_step(policy: FlowPolicy, x: Tensor, index: int, told: Conditioning) -> tuple[Tensor, Tensor]:
    """(x', x_0) of Euler's step: v = eps - x_0."""
    sigmas = policy.sigmas(STEPS, 32, 32)
    velocity = policy.velocity(x, sigmas[index], told)
    return x + (sigmas[index + 1] - sigmas[index]) * velocity, x - sigmas[index] * velocity


def ddim_step(policy: DDPMPolicy, x: Tensor, index: int, told: Conditioning) -> tuple[Tensor, Tensor]:
    """(x', x_0) of DDIM with the scaled-linear schedule of Stable Diffusion, 250 timesteps apart, offset 1."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bars = (1 - betas).cumprod(0)
    timestep = (STEPS - 1 - index) * (1000 // STEPS) + 1
    now = alpha_bars[timestep]
    following = alpha_bars[max(timestep - 1000 // STEPS, 0)]
    said = policy.prediction(x, timestep, told)
    epsilon = said if policy.prediction_type == "epsilon" else (now.sqrt() * said + (1 - now).sqrt() * x).float()
    x0 = ((x - (1 - now).sqrt() * epsilon) / now.sqrt()).float()
    return (following.sqrt() * x0 + (1 - following).sqrt() * epsilon).float(), x0


def naive_gradient(
    config: ReFLConfig, out: Path, batch: Batch, rows: Sequence[int], cut: int, *, predict: bool
) -> Tensor:
    """Autograd of mean(SCALE * max(0, TARGET - r)) over ``rows``, without gradient before step ``cut``."""
    with started(config, out) as run:
        policy = run.policy
        losses = []
        for row in rows:
            generator = torch.Generator().manual_seed(derived_seed(config.seed, batch.step, row))
            x = torch.randn(1, 4, 16, 16, generator=generator)
            told = policy.encode_prompts([batch.prompts[row].text])
            for index in range(cut + 1 if predict else STEPS):
                with torch.set_grad_enabled(index >= cut):
                    step = flow_step if isinstance(policy, FlowPolicy) else ddim_step
                    x, x0 = step(policy, x, index, told)  # type: ignore[arg-type]
            latents = x0 if predict else x
            settings = policy.vae.config
            decoded = policy.vae.decode(latents / settings.scaling_factor + (settings.shift_factor or 0)).sample
            image = ((decoded + 1) / 2).clamp(0, 1)
            losses.append(SCALE * (config.target - quality(image, [batch.prompts[row].text])).clamp(min=0))
        torch.cat(losses).mean().backward()
        return gradients(run)


# -- the reward's gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("late", [1, 3])
def test_one_step_prediction_is_the_formula(
    kind: str, late: int, config_of: Callable[..., ReFLConfig], tmp_path: Path
) -> None:
    config = config_of(kind, step_range=(late, late))
    found, batch = one_step(config, tmp_path / "run")
    expected = naive_gradient(config, tmp_path / "naive", batch, range(4), late, predict=True)
    assert apart(found, expected) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_denoising_on_is_the_chain_cut_before_its_last_steps(
    kind: str, config_of: Callable[..., ReFLConfig], tmp_path: Path
) -> None:
    config = config_of(kind, x0="denoise", differentiable_steps=2)
    found, batch = one_step(config, tmp_path / "run")
    expected = naive_gradient(config, tmp_path / "naive", batch, range(4), STEPS - 2, predict=False)
    assert apart(found, expected) < 1e-4
    shorter = naive_gradient(config, tmp_path / "shorter", batch, range(4), STEPS - 1, predict=False)
    assert apart(found, shorter) > 0.05


@pytest.mark.parametrize("size", [1, 3])
def test_the_size_of_pieces_changes_nothing(size: int, config_of: Callable[..., ReFLConfig], tmp_path: Path) -> None:
    whole, _ = one_step(config_of(), tmp_path / "whole")
    assert apart(one_step(config_of(train_batch_size=size), tmp_path / "pieces")[0], whole) < 1e-5


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing(
    weights: str, config_of: Callable[..., ReFLConfig], tmp_path: Path
) -> None:
    found = []
    for frugal in (True, False):
        policy = {"gradient_checkpointing": frugal, "weights": weights}
        config = config_of(x0="denoise", differentiable_steps=2, policy=policy)
        found.append(one_step(config, tmp_path / str(frugal))[0])
    assert apart(*found) < 1e-5


def test_an_image_that_is_good_enough_is_left_alone(config_of: Callable[..., ReFLConfig], tmp_path: Path) -> None:
    """With a target between the totals, the gradient is that of the images below it, and a mean over all."""
    totals: list[Tensor] = []

    def watched(images: Tensor, prompts: Sequence[str], metadata: Any = None, /) -> RemoteTotals:
        answer = Quality()(images, prompts)
        totals.append(answer.total.detach())
        return answer

    _, batch = one_step(config_of(), tmp_path / "look", watched)
    total = torch.cat(totals)
    middle = float(total.sort().values[1:3].mean())
    low = [row for row in range(4) if total[row] < middle]
    assert len(low) == 2
    config = config_of(target=middle, step_range=(3, 3))
    found, _ = one_step(config, tmp_path / "run")
    expected = naive_gradient(config, tmp_path / "naive", batch, low, 3, predict=True) / 2
    assert apart(found, expected) < 1e-4
    satisfied, _ = one_step(config_of(target=float(total.min()) - 1), tmp_path / "satisfied")
    assert (satisfied == 0).all()


@pytest.mark.parametrize("size", [1, 4])
def test_a_failed_image_changes_nothing_for_the_others(
    size: int, config_of: Callable[..., ReFLConfig], tmp_path: Path
) -> None:
    config = config_of(train_batch_size=size, step_range=(2, 2))
    whole, batch = one_step(config, tmp_path / "whole")
    failed = batch.prompts[1].text
    found, _ = one_step(config, tmp_path / "failed", Quality(frozenset({failed})))
    others = [row for row in range(4) if batch.prompts[row].text != failed]
    expected = naive_gradient(config, tmp_path / "naive", batch, others, 2, predict=True)
    assert apart(found, expected) < 1e-4
    assert apart(whole, expected) > 0.01


def test_a_step_without_any_reward_ends_the_run(config_of: Callable[..., ReFLConfig], tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"step 0: not one image has a reward.*model_error: broken"):
        train(config_of(), tmp_path / "run", make_rewards=local(Quality(frozenset(PROMPTS))))


def test_the_penalty_is_the_squared_distance_from_the_reference(
    config_of: Callable[..., ReFLConfig], tmp_path: Path
) -> None:
    """Of predictions; where every image is good enough it is all that is left."""
    config = config_of(target=-1e6, step_range=(2, 2))
    out = []
    for naive in (False, True):
        with started(config, tmp_path / f"run{naive}", kl_weight=0.5) as run:
            with torch.no_grad():
                for k, parameter in enumerate(run.parameters):
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k))
                    parameter.add_(0.02 * noise)
            denoising, batch = denoising_of(run.policy, config.sampling), run.next_batch()
            if naive:
                told = run.conditioning(batch.prompts)
                with torch.no_grad():
                    x = denoising.carry(run.policy.initial_latents(batch.generators, 32, 32), range(2), told, [])
                    with run.policy.reference():
                        reference = denoising.predict(x, 2, told)
                (0.5 * (denoising.predict(x, 2, told) - reference).square().mean()).backward()
            else:
                learn_rewards(run, denoising, batch, 0)
            out.append(gradients(run))
    assert apart(*out) < 1e-5


# -- the run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "expected"), [(40, (30, 39)), (10, (7, 9)), (1, (0, 0))])
def test_the_late_step_is_within_its_range(
    steps: int, expected: tuple[int, int], config_of: Callable[..., ReFLConfig]
) -> None:
    config = config_of(sampling={"steps": steps})
    drawn = [differentiated(config, torch.Generator().manual_seed(k)) for k in range(200)]
    assert all(len(one) == 1 for one in drawn)
    assert {one.start for one in drawn} == set(range(expected[0], expected[1] + 1))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"step_range": (2, 4)}, "step_range is 2 to 4, and the denoising steps are 0 to 3"),
        ({"step_range": (2, 1)}, "step_range is 2 to 1"),
        ({"step_range": (-1, 1)}, "step_range is -1 to 1"),
        ({"differentiable_steps": 5}, "differentiable_steps is 5 of 4"),
        ({"differentiable_steps": 0}, "differentiable_steps"),
    ],
)
def test_steps_that_do_not_exist_are_refused(
    values: dict[str, Any], match: str, config_of: Callable[..., ReFLConfig]
) -> None:
    with pytest.raises(ConfigError, match=match):
        config_of(**values)


def test_a_reward_without_gradient_is_refused(config_of: Callable[..., ReFLConfig], tmp_path: Path) -> None:
    with serving({"mean": "sha256:feed"}) as server:
        server.play(server.changed(lambda answer: answer["models"][0].update(differentiable=False)))
        config = config_of(rewards={"services": [server.url]})
        with pytest.raises(ConfigError, match="mean has no gradient"):
            train(config, tmp_path / "run")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_runs_of_one_seed_are_equal_and_one_goes_on_after_a_stop(
    config_of: Callable[..., ReFLConfig], tmp_path: Path
) -> None:
    """Over HTTP, with the fault-free test service; the images of pre-training have their noise from the seed too."""
    values: dict[str, Any] = {
        "updates_per_step": 2, "train_batch_size": 1, "beta": 0.1, "optimizer": {"lr": 1e-3},
        "pretraining": {"images": str(captioned(tmp_path / "images")), "batch_size": 2},
    }  # fmt: skip
    finals = []
    for name, stops in (("whole", [3]), ("again", [3]), ("parts", [1, 3])):
        for number, steps in enumerate(stops):
            train(config_of(**values, steps=steps), tmp_path / name, resume=number > 0)
        finals.append((final_weights(tmp_path / name), rows_of(tmp_path / name)))
    (weights, rows), *others = finals
    told = ("reward/total", "loss", "pretraining_loss", "kl", "grad_norm")
    for other_weights, other_rows in others:
        assert weights.keys() == other_weights.keys()
        assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
        assert [[row[name] for name in told] for row in rows] == [[row[name] for name in told] for row in other_rows]
    assert rows[-1]["updates"] == 6
    assert rows[-1]["kl"] > 0
    assert rows[-1]["wire/bytes_sent"] > 4 * 3 * 32 * 32 * 4


def final_weights(folder: Path) -> dict[str, Tensor]:
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {
        f"{file.name}/{key}": value
        for file in sorted(last.rglob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def brightness(images_B3HW: Tensor, prompts: Sequence[str], metadata: Any = None, /) -> RemoteTotals:
    total = images_B3HW.mean((1, 2, 3))
    return RemoteTotals(total, torch.ones(len(total), dtype=torch.bool), {"mean": total.detach()}, [])


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_training_raises_the_reward(kind: str, config_of: Callable[..., ReFLConfig], tmp_path: Path) -> None:
    config = config_of(kind, steps=10, optimizer={"lr": 3e-3}, step_range=(2, 3), grad_scale=1.0)
    train(config, tmp_path / "run", make_rewards=local(brightness))
    rewards = [row["reward/total"] for row in rows_of(tmp_path / "run")]
    assert rewards[-1] > rewards[0] + 0.03


def test_what_a_reward_raises_ends_the_run(config_of: Callable[..., ReFLConfig], tmp_path: Path) -> None:
    def broken(images: Tensor, prompts: Sequence[str], metadata: Any = None, /) -> RemoteTotals:
        raise ProtocolError("no sense in that")

    with pytest.raises(ProtocolError, match="no sense"):
        train(config_of(), tmp_path / "run", make_rewards=local(broken))
    assert "no sense" in (tmp_path / "run" / "events.jsonl").read_text()


def test_the_next_images_are_sampled_while_rewards_are_on_their_way(
    config_of: Callable[..., ReFLConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reward is not given before the second piece is sampled: a trainer that waited first would never end."""
    sampled = threading.Semaphore(0)
    carry = Denoising.carry

    def told(*args: Any, **options: Any) -> Tensor:
        x = carry(*args, **options)
        sampled.release()
        return x

    answers: list[bool] = []

    def patient(images: Tensor, prompts: Sequence[str], metadata: Any = None, /) -> RemoteTotals:
        if not answers:
            answers.extend([sampled.acquire(timeout=60), sampled.acquire(timeout=60)])
        return Quality()(images, prompts)

    expected, _ = one_step(config_of(train_batch_size=2), tmp_path / "calm")
    monkeypatch.setattr(Denoising, "carry", told)
    found, _ = one_step(config_of(train_batch_size=2), tmp_path / "run", patient)
    assert answers == [True, True]
    assert torch.equal(found, expected)


def test_two_ranks_train_as_one(config_of: Callable[..., ReFLConfig], tmp_path: Path) -> None:
    """Five images and three of pre-training on two ranks, in two optimizer steps a step, one prompt failing."""
    values: dict[str, Any] = {
        "steps": 2, "prompts_per_step": 5, "updates_per_step": 2, "train_batch_size": 2, "beta": 0.1,
        "pretraining": {"images": str(captioned(tmp_path / "images")), "batch_size": 3},
        # So large an epsilon makes AdamW's step proportional to the gradient: signs of noise would be compared else.
        "optimizer": {"lr": 0.5, "eps": 1.0, "weight_decay": 0.0},
    }  # fmt: skip
    config = config_of(**values)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, refl_ranks.__file__, *(str(tmp_path / name) for name in ("config.json", "two", "meet"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank), "2"], env=environment, stderr=subprocess.PIPE) for rank in range(2)]
    try:
        errors = [rank.communicate(timeout=240)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    train(config, tmp_path / "one", make_rewards=local(Quality(FAILS)))
    train(config_of(**values | {"steps": 1, "optimizer": {"lr": 1e-30}}), tmp_path / "still")
    one, two, still = (trained(tmp_path / name) for name in ("one", "two", "still"))
    assert apart(two - still, one - still) < 1e-4
    told = ("reward/total", "reward_std/mean", "failed_ratio", "loss", "below_target", "kl", "pretraining_loss")
    rows = zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True)
    for alone, together in rows:
        assert [together[name] for name in told] == pytest.approx([alone[name] for name in told], rel=1e-4)
        assert 0 < alone["failed_ratio"] < 1


def trained(folder: Path) -> Tensor:
    """The trained weights of the last checkpoint in one vector."""
    found = final_weights(folder)
    return torch.cat([found[key].double().flatten() for key in sorted(found) if "weights" in key])


# -- pre-training -----------------------------------------------------------------------------------------------------


def captioned(folder: Path, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for k in range(count):
        Image.new("RGB", (40, 32), (80 * k, 40, 200)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"picture {k}\n")
    return folder


def naive_pretraining_loss(policy: Policy, x0: Tensor, noise: Tensor, place: int, told: Conditioning) -> Tensor:
    """MSE of velocity, noise or v, at a level that training knows."""
    if isinstance(policy, FlowPolicy):
        sigma = policy.sigmas(1000, 32, 32)[place]
        return ((policy.velocity((1 - sigma) * x0 + sigma * noise, sigma, told) - (noise - x0)) ** 2).mean()
    assert isinstance(policy, DDPMPolicy)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)[place].float()
    said = policy.prediction(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, place, told)
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    return ((said - (noise if policy.prediction_type == "epsilon" else v)) ** 2).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_pretraining_loss_is_the_mean_squared_error(
    kind: str, config_of: Callable[..., ReFLConfig], tmp_path: Path
) -> None:
    config = config_of(kind)
    with started(config, tmp_path / "run") as run:
        denoising = denoising_of(run.policy, config.sampling)
        generator = torch.Generator().manual_seed(0)
        x0, noise = torch.randn(2, 3, 4, 16, 16, generator=generator)
        places = torch.tensor([0, 417, 999])
        told = run.policy.encode_prompts(PROMPTS[:3])
        found = denoising.pretraining_loss(x0, noise, places, told)
        for k, place in enumerate(places.tolist()):
            expected = naive_pretraining_loss(run.policy, x0[[k]], noise[[k]], place, told[[k]])
            torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_pretraining_is_a_mean_over_the_images_of_a_step(
    config_of: Callable[..., ReFLConfig], tmp_path: Path
) -> None:
    images = load_captioned(captioned(tmp_path / "images"))
    found = []
    for size in (1, 4):
        settings = {"images": str(tmp_path / "images"), "batch_size": 4, "weight": 3.0}
        config = config_of(train_batch_size=size, pretraining=settings)
        with started(config, tmp_path / f"run{size}") as run:
            learn_pretraining(run, denoising_of(run.policy, config.sampling), images, 0)
            found.append(gradients(run))
    assert apart(*found) < 1e-5


@pytest.mark.parametrize("mix", ["sum", "alternate"])
def test_pretraining_is_added_or_alternates(mix: str, config_of: Callable[..., ReFLConfig], tmp_path: Path) -> None:
    config = config_of(steps=2, pretraining={"images": str(captioned(tmp_path / "images")), "mix": mix})
    train(config, tmp_path / "run", make_rewards=local(Quality()))
    rows = rows_of(tmp_path / "run")
    assert [row["updates"] for row in rows] == ([1, 2] if mix == "sum" else [2, 4])
    assert all(row["pretraining_loss"] > 0 for row in rows)


def test_images_come_with_captions_from_files_or_a_listing(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "images")
    from_files = load_captioned(folder)
    assert [(image.path.name, image.prompt.text) for image in from_files] == [
        (f"{k}.png", f"picture {k}") for k in range(3)
    ]
    rows = [{"file_name": "2.png", "text": "blue"}, {"image": "0.png", "prompt": "dark"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source in (folder, folder / "metadata.jsonl"):
        found = [(image.path, image.prompt.text) for image in load_captioned(source)]
        assert found == [(folder / "2.png", "blue"), (folder / "0.png", "dark")]


def test_images_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "images")
    (folder / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"1\.txt: cannot be read"):
        load_captioned(folder)
    (folder / "1.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"1\.txt: is empty"):
        load_captioned(folder)
    for row, match in (({"prompt": "a"}, "entry 1: none of the fields"), ({"prompt": "a", "image": "9.png"}, "9.png")):
        (folder / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=match):
            load_captioned(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        load_captioned(tmp_path / "none")


def test_images_cover_the_size_and_keep_their_middle(tmp_path: Path) -> None:
    """A wide picture with a green middle loses its red sides; height 8 of 16 is the smaller scale."""
    image = Image.new("RGB", (64, 16), (255, 0, 0))
    image.paste((0, 255, 0), (24, 0, 40, 16))
    image.save(tmp_path / "wide.png")
    pixels = read_image(tmp_path / "wide.png", 8, 8)
    assert pixels.shape == (3, 8, 8)
    assert (pixels[1, :, 1:-1] > 0.9).all()
    assert (pixels[0, :, 1:-1] < 0.1).all()


def test_every_image_is_drawn_once_before_one_is_drawn_again() -> None:
    drawn = list(shuffled(5, 0, range(20)))
    epochs = [drawn[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert list(shuffled(5, 0, range(7, 13))) == drawn[7:13]
    assert list(shuffled(5, 1, range(20))) != drawn
