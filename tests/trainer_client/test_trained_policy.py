"""Trained weights are found in adapters, checkpoints and runs, and are those that were saved; else one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.shapes.policy import DIRECTORY
from trainer_client.checkpoint import CheckpointDamaged, CheckpointMissing, Checkpoints, RunIdentity
from trainer_client.policies import Policy, from_pretrained
from trainer_client.run_state import RunState
from trainer_client.trained_policy import TrainedWeights, apply, locate, read_part

IDENTITY = RunIdentity("flow-grpo", "network", "c0", "b0", {})


def fresh() -> Policy:
    return from_pretrained(DIRECTORY, max_sequence_length=0)


def disturb(tensors: dict[str, Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))


def images(policy: Policy) -> Tensor:
    return policy.sample(["a red circle", "two blue squares"], [1, 2], steps=4)


def trained(*, full: bool = False) -> Policy:
    """A policy with trained weights and an average that differ from the start and from each other."""
    policy = fresh()
    weights = policy.train_full() if full else policy.train_lora(rank=2, alpha=4)
    weights.add("ema")
    for seed, name in enumerate(("default", "ema")):
        disturb(weights.named_tensors(name), seed)
    return policy


def save_run(policy: Policy, run: Path, *, steps: tuple[int, ...] = (3,), ema: bool = True) -> Path:
    """The checkpoints that a run writes: averaged adapters are exported, as users take them."""
    checkpoints = Checkpoints(run / "checkpoints", keep=3)
    weights = policy.weights
    parts = {"weights": weights.named_tensors(), **({"ema": weights.named_tensors("ema")} if ema else {})}
    lora = hasattr(policy.network, "peft_config")
    exports = {"lora": lambda folder: policy.save_lora(folder, "ema" if ema else "default")} if lora else {}
    for step in steps:
        RunState(**parts, counters={"step": step}).save(checkpoints, step, IDENTITY, exports=exports)
    return run


def test_adapters_alone_make_the_images_that_they_made(tmp_path: Path) -> None:
    policy = trained()
    policy.save_lora(tmp_path)
    expected, start = images(policy), images(fresh())
    assert (expected - start).abs().max() > 0.05
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        found = locate(path)
        assert found == TrainedWeights(path)
        loaded = fresh()
        apply(loaded, found)
        torch.testing.assert_close(images(loaded), expected, rtol=0, atol=0)


@pytest.mark.parametrize("full", [False, True])
def test_a_run_gives_its_weights_or_their_average(tmp_path: Path, full: bool) -> None:
    policy = trained(full=full)
    found = locate(save_run(policy, tmp_path))
    assert found.checkpoint == tmp_path / "checkpoints" / "step-00000003"
    assert (found.adapters is None) == full
    with policy.use("ema"):
        averaged = images(policy)
    for expected, wanted in ((images(policy), False), (averaged, True)):
        loaded = fresh()
        apply(loaded, found, averaged=wanted)
        torch.testing.assert_close(images(loaded), expected, rtol=0, atol=0)
    assert not torch.equal(images(policy), averaged)


def test_a_run_means_its_last_checkpoint_and_a_checkpoint_itself(tmp_path: Path) -> None:
    save_run(trained(), tmp_path, steps=(5, 12))
    last = tmp_path / "checkpoints" / "step-00000012"
    for path in (tmp_path, tmp_path / "checkpoints", last):
        assert locate(path) == TrainedWeights(last / "lora", last)
    first = tmp_path / "checkpoints" / "step-00000005"
    assert locate(first) == TrainedWeights(first / "lora", first)
    assert locate(last / "lora") == TrainedWeights(last / "lora")


def test_where_nothing_was_trained_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for path in (tmp_path, tmp_path / "no_such_folder"):
        with pytest.raises(CheckpointMissing, match=r"holds no adapters .*, no checkpoint and no run with one"):
            locate(path)


def test_an_average_that_was_not_kept_is_no_other_weights(tmp_path: Path) -> None:
    policy = trained()
    policy.save_lora(tmp_path / "adapters")
    with pytest.raises(CheckpointMissing, match="are adapters alone; averaged weights are in a checkpoint"):
        apply(fresh(), locate(tmp_path / "adapters"), averaged=True)
    run = save_run(policy, tmp_path / "run", ema=False)
    with pytest.raises(CheckpointMissing, match="has no averaged weights"):
        apply(fresh(), locate(run), averaged=True)


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    checkpoint = locate(save_run(trained(), tmp_path)).checkpoint
    assert checkpoint is not None
    file = checkpoint / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # still a safetensors file, with another last weight
    file.write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=r"weights\.safetensors is not what was written"):
        read_part(checkpoint, "weights")
    assert read_part(checkpoint, "ema")
    assert read_part(checkpoint, "old") == {}
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(CheckpointDamaged):
        read_part(checkpoint, "ema")


def test_adapters_of_another_network_are_refused(tmp_path: Path) -> None:
    """diffusers would only warn of them and go on without."""
    for name, key in (("unet", "unet.block"), ("elsewhere", "transformer.no_such_layer")):
        pair = {f"{key}.lora_A.weight": torch.zeros(2, 8), f"{key}.lora_B.weight": torch.zeros(8, 2)}
        save_file(pair, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=r"has no adapters of SD3Transformer2DModel|not found in the base model"):
            apply(fresh(), locate(tmp_path / f"{name}.safetensors"))


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    run = save_run(trained(), tmp_path)
    found = locate(run)
    wider = fresh()
    wider.train_lora(rank=4, alpha=8)
    wider.save_lora(tmp_path / "wider")
    with pytest.raises(ValueError, match="the weights don't fit"):
        apply(fresh(), TrainedWeights(tmp_path / "wider", found.checkpoint))
