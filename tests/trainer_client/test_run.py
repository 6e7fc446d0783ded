"""What the algorithms share: updates, averages, failures, evaluation, what a run leaves behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from tests.trainer_client.conftest import Handler, Received, RewardServer, answer_well
from tests.trainer_client.scripts import tiny_run
from trainer_client.distributed import derived_seed
from trainer_client.ema import power_decay
from trainer_client.flow_grpo import FlowGRPOConfig, train
from trainer_client.policies import from_pretrained
from trainer_client.run import Run
from trainer_client.run_scoring import RunFailed


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with tiny_run.rewards() as server:
        yield server


# -- the export -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_the_export_is_the_averaged_policy(weights: str, policy: Path, server: RewardServer, tmp_path: Path) -> None:
    """Diffusers' own pipeline with the checkpoint's lora/ or transformer/ draws what the run's last evaluation drew."""
    adapters = {"lora_rank": 2, "lora_alpha": 8} if weights == "lora" else {}
    config = tiny_run.config(
        tmp_path, policy, server.url, steps=3, policy={"weights": weights, **adapters},
        optimizer={"lr": 200.0 if weights == "lora" else 5.0}, checkpoints={"every": 1},
        ema={"every": 1, "decay": 0.5},
        evaluation={"prompts": str(tmp_path / "prompts.txt"), "count": 2, "seeds": 1},
    )  # fmt: skip
    out = train(config, tmp_path / "run")
    pipeline = StableDiffusion3Pipeline.from_pretrained(policy, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)

    def drawn() -> list[Tensor]:
        images = []
        for place, prompt in enumerate(tiny_run.PROMPTS[:2]):
            seed = derived_seed("evaluation", config.evaluation.seed, place)
            generator = torch.Generator().manual_seed(seed)
            [image] = pipeline(
                prompt, num_inference_steps=4, guidance_scale=1.0, generator=generator, output_type="pt",
                max_sequence_length=0,
            ).images  # fmt: skip
            images.append(image)
        return images

    def logged(step: int) -> list[Tensor]:
        folder = out / "samples" / f"step-{step:08d}"
        files = [np.asarray(Image.open(folder / f"{place:03d}-00.png")) for place in range(2)]
        return [torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 for pixels in files]

    before = drawn()
    if weights == "lora":
        pipeline.load_lora_weights(tiny_run.checkpoint(out, 3) / "lora")
    else:
        assert not (tiny_run.checkpoint(out, 2) / "transformer").exists(), (
            "the whole network is written at the end only"
        )
        pipeline.transformer = SD3Transformer2DModel.from_pretrained(tiny_run.checkpoint(out, 3) / "transformer")
    after = drawn()
    for place in range(2):
        assert float((before[place] - logged(0)[place]).abs().max()) < 0.51 / 255
        assert float((after[place] - logged(3)[place]).abs().max()) < 0.51 / 255
        assert float((after[place] - before[place]).abs().max()) > 5 / 255, "training must have changed the images"
    averaged, trained = (tiny_run.tensors(out, 3, part) for part in ("ema", "weights"))
    assert any(not torch.equal(averaged[name], trained[name]) for name in trained)


def test_a_run_that_cannot_begin_closes_its_queues(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, policy, server.url, steps=1)
    out = tmp_path / "run"
    out.mkdir()
    (out / "events.jsonl").write_text("{}\n")  # of another run, which is seen after the queues are opened
    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(FileExistsError, match="holds the log of a run"):
        make_run(config, out)
    assert {thread.name for thread in threading.enumerate()} == before


# -- updates ----------------------------------------------------------------------------------------------------------


def test_averages_follow_the_trained_weights(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    weights = []
    for steps in (1, 2, 3):
        config = tiny_run.config(tmp_path, policy, server.url, steps=steps, ema={"every": 2, "decay": 0.9})
        weights.append(tiny_run.tensors(train(config, tmp_path / f"{steps}"), steps))
    found = tiny_run.tensors(tmp_path / "3", 3, "ema")
    first = tiny_run.first_weights(tmp_path / "3")
    decay = power_decay(2, 0.9)
    assert 0 < decay < 0.9
    for name, average in found.items():
        torch.testing.assert_close(average, decay * first[name] + (1 - decay) * weights[1][name], rtol=1e-6, atol=1e-7)


def make_run(config: FlowGRPOConfig, out: Path) -> Run[FlowGRPOConfig]:
    return Run("flow_grpo", config, out)


def test_no_gradient_is_a_gradient_of_zero(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    """AdamW's moments and weight decay go on, as they do on a rank among several that has no sample left."""
    config = tiny_run.config(tmp_path, policy, server.url, optimizer={"weight_decay": 0.1, "lr": 0.1})
    starts, ends = [], []
    for name, explicit in (("none", False), ("zero", True)):
        with make_run(config, tmp_path / name) as run:
            for step in run.steps():
                if step == 1:
                    starts.append([parameter.detach().clone() for parameter in run.parameters])
                for parameter in run.parameters:
                    parameter.grad = torch.ones_like(parameter) if run.step == 0 else None
                    if explicit and run.step == 1:
                        parameter.grad = torch.zeros_like(parameter)
                run.update()
            ends.append([parameter.detach().clone() for parameter in run.parameters])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert all(not torch.equal(start, end) for start, end in zip(starts[0], ends[0], strict=True))


def update_with_faults(run: Run[FlowGRPOConfig], healthy: tuple[int, ...]) -> None:
    """Steps with a gradient of ones, and one NaN in it at the others."""
    for step in run.steps():
        before = [parameter.detach().clone() for parameter in run.parameters]
        for parameter in run.parameters:
            parameter.grad = torch.ones_like(parameter)
        if step not in healthy:
            run.parameters[0].grad = torch.full_like(run.parameters[0], torch.nan)
        run.update()
        assert all(torch.equal(*pair) != (step in healthy) for pair in zip(before, run.parameters, strict=True))


def test_gradients_that_are_not_finite_are_left_out_and_end_a_run(
    policy: Path, server: RewardServer, tmp_path: Path
) -> None:
    run = make_run(tiny_run.config(tmp_path, policy, server.url, steps=9), tmp_path / "run")
    with pytest.raises(RunFailed, match="step 5: the gradient was not finite 3 times in a row"), run:
        update_with_faults(run, healthy=(0, 2))
    assert run.counters["updates"] == 2
    assert run.counters["skipped"] == 4
    assert len(tiny_run.events(tmp_path / "run", "warning")) == 4
    assert "RunFailed: step 5" in tiny_run.events(tmp_path / "run", "failure")[0]
    trace = (tmp_path / "run" / "failures.txt").read_text()
    assert trace.startswith("step 5, ")
    assert "in update_with_faults" in trace
    assert "RunFailed: step 5: the gradient" in trace


def test_the_learning_rate_warms_up(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, policy, server.url, steps=4, optimizer={"lr": 0.2, "warmup_steps": 2})
    assert [row["lr"] for row in tiny_run.rows(train(config, tmp_path / "run"))] == [0.1, 0.2, 0.2, 0.2]


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_batch_without_a_single_reward_ends_the_run(policy: Path, tmp_path: Path) -> None:
    def dark(answer: dict[str, Any]) -> dict[str, Any]:
        for result in answer.get("results", []):
            count = len(result["total"])
            result["scores"]["mean"] = result["total"] = [None] * count
            failure = {"model": "mean", "code": "model_error", "message": "it is dark"}
            result["errors"] = [[failure] for _ in range(count)]
        return answer

    with tiny_run.rewards() as server:
        server.default = lambda handler, received: answer_well(handler, received, dark)
        config = tiny_run.config(tmp_path, policy, server.url)
        with pytest.raises(RunFailed, match="step 0: not one image has a reward; the first reason: mean: model_error"):
            train(config, tmp_path / "run")


def test_a_model_that_loads_is_waited_for(policy: Path, tmp_path: Path) -> None:
    with tiny_run.rewards() as server:
        healthy, asked = server.default, [0]

        def loading(handler: Handler, received: Received) -> None:
            asked[0] += 1
            if asked[0] > 2:
                healthy(handler, received)
                return

            def edit(answer: dict[str, Any]) -> dict[str, Any]:
                for row in answer["models"]:
                    row["ready"] = False
                return answer

            answer_well(handler, received, edit)

        server.default = loading
        train(tiny_run.config(tmp_path, policy, server.url, steps=1), tmp_path / "run")
        assert asked[0] > 2


# -- what a run leaves behind -----------------------------------------------------------------------------------------


def test_a_run_folder(policy: Path, server: RewardServer, tmp_path: Path) -> None:
    config = tiny_run.config(
        tmp_path, policy, server.url, steps=3,
        evaluation={"prompts": str(tmp_path / "prompts.txt"), "count": 3, "seeds": 2, "every": 2,
                    "heldout": ["heldout"], "weights": "trained"},
    )  # fmt: skip
    out = train(config, tmp_path / "run")
    about = json.loads((out / "config.json").read_text())
    assert about["algorithm"] == "flow_grpo"
    assert about["configuration"] == config.model_dump(mode="json")
    assert about["rewards"] == tiny_run.FINGERPRINTS
    assert about["policy"]["family"] == "sd3"
    evaluations = tiny_run.rows(out, "eval")
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert [row["images"] for row in tiny_run.rows(out)] == [8, 16, 24]
    for row in evaluations:
        assert row["eval/mean"] == row["eval/heldout"] == row["eval/total"]
        assert row["eval/mean/low"] < row["eval/mean"] < row["eval/mean/high"]
        told = json.loads((out / "samples" / f"step-{row['step']:08d}" / "samples.json").read_text())
        assert np.mean(told["scores"]["mean"]) == pytest.approx(row["eval/mean"])
        assert told["prompts"] == list(tiny_run.PROMPTS[:3])
    for row in tiny_run.rows(out):
        stages = sum(row[f"time/{stage}"] for stage in ("sample", "decode", "reward_wait", "train"))
        assert 0 < stages <= row["time/step"]
        assert row["wire/bytes_sent"] > 8 * 3 * 32 * 32


def test_evaluation_draws_with_the_averaged_weights_or_the_trained_ones(
    policy: Path, server: RewardServer, tmp_path: Path
) -> None:
    """The last picture is the one of those weights, put into a fresh policy."""
    for kind, part in (("ema", "ema"), ("trained", "weights")):
        config = tiny_run.config(
            tmp_path, policy, server.url, steps=2, ema={"every": 1, "decay": 0.9}, optimizer={"lr": 5.0},
            evaluation={"prompts": str(tmp_path / "prompts.txt"), "count": 1, "seeds": 1, "weights": kind},
        )  # fmt: skip
        out = train(config, tmp_path / kind)
        fresh = from_pretrained(policy, max_sequence_length=0)
        fresh.train_full().load(tiny_run.tensors(out, 2, part))
        seed = derived_seed("evaluation", config.evaluation.seed, 0)
        [image] = fresh.sample([tiny_run.PROMPTS[0]], [seed], steps=4)
        pixels = np.asarray(Image.open(out / "samples" / "step-00000002" / "000-00.png"))
        expected = (image * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(pixels - expected).max() <= 1
    one, other = (tmp_path / kind / "samples" / "step-00000002" / "000-00.png" for kind in ("ema", "trained"))
    assert one.read_bytes() != other.read_bytes()
