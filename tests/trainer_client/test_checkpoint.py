"""Checkpoints on disk: whole or not there, kept by rule, refused by another run."""

from __future__ import annotations

import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_client._state_files import pack
from trainer_client.checkpoint import (
    CheckpointDamaged,
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointNotWritten,
    Checkpoints,
    RunIdentity,
    package_versions,
    policy_identity,
    weights_digest,
)

IDENTITY = RunIdentity(
    "flow_grpo", "SD3Transformer2DModel", "c0", "b0", {"seed": 1, "optimizer": {"lr": 1e-4, "betas": (0.9, 0.999)}},
    fingerprints={"pickscore": "f0"}, versions={"torch": "2.9"},
)  # fmt: skip


def state(value: float = 1.0) -> dict[str, Any]:
    return {"weights": {"a.lora_A": torch.full((3,), value)}, "counters": {"step": 4}}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_saves_killed_at_any_instant_leave_only_whole_checkpoints(tmp_path: Path) -> None:
    """A child saves as fast as it can and is killed, again and again; what is left always loads, and moves on."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    reached = []
    for _ in range(12):
        first = (checkpoints.latest() or 0) + 1
        child = os.fork()
        if child == 0:
            try:
                for step in range(first, first + 10_000):
                    checkpoints.save(step, state(float(step)), IDENTITY)
            finally:
                os._exit(1)
        while (checkpoints.latest() or 0) <= first:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, 9)
        assert os.waitpid(child, 0)[1] == 9
        for step in checkpoints.steps():
            loaded = checkpoints.load(IDENTITY, step=step)
            assert loaded.state["weights"]["a.lora_A"].tolist() == [float(step)] * 3
        reached.append(checkpoints.latest())
    assert reached == sorted(set(reached))


# What is kept


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in ((0, 0.1), (10, 0.9), (20, None), (30, 0.9), (40, -1.0), (50, 0.2)):
        checkpoints.save(step, state(step), IDENTITY, score=score)
    assert checkpoints.steps() == [10, 40, 50]
    assert (checkpoints.best(), checkpoints.latest()) == (10, 50)
    loaded = checkpoints.load(IDENTITY)
    assert (loaded.step, loaded.score, loaded.state["counters"]) == (50, 0.2, {"step": 4})
    assert checkpoints.load(IDENTITY, step=10).state["weights"]["a.lora_A"].tolist() == [10.0] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000010", "step-00000040", "step-00000050"}


def test_going_back_needs_to_be_said(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), IDENTITY)
    for step in (2, 3):
        with pytest.raises(ValueError, match="is not after 3"):
            checkpoints.save(step, state(), IDENTITY)
    checkpoints.rewind(1)
    assert checkpoints.steps() == [1]
    checkpoints.save(2, state(), IDENTITY)
    with pytest.raises(CheckpointMissing, match=r"step 9 .* there are \[1, 2\]"):
        checkpoints.rewind(9)


def test_exports_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(5, state(), IDENTITY, exports={"lora": lambda into: (into / "x.txt").write_text("made")})
    assert (path / "lora" / "x.txt").read_text() == "made"
    (path / "lora" / "x.txt").write_text("mad")
    with pytest.raises(CheckpointDamaged, match=r"lora/x\.txt is not what was written"):
        checkpoints.load(IDENTITY)


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(ValueError, match="finite"):
        checkpoints.save(1, state(), IDENTITY, score=float("nan"))
    with pytest.raises(ValueError, match="plain names"):
        checkpoints.save(1, {"../x": 1}, IDENTITY)
    with pytest.raises(TypeError, match="optimizer/f is a function"):
        checkpoints.save(1, {"optimizer": {"f": pack}}, IDENTITY)
    with pytest.raises(ValueError, match="at least the last"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(CheckpointMissing):
        checkpoints.load(IDENTITY)
    assert not (tmp_path / "run").exists()


def test_tied_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    Checkpoints(tmp_path).save(1, {"weights": {"a": tied, "b": tied, "t": tied.T}}, IDENTITY)
    loaded = Checkpoints(tmp_path).load(IDENTITY).state["weights"]
    assert torch.equal(loaded["a"], tied)
    assert torch.equal(loaded["b"], tied)
    assert torch.equal(loaded["t"], tied.T)


# Faults of the disk


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "run.json"])
@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, fault: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(), IDENTITY)
    path = checkpoints.save(2, state(), IDENTITY) / name
    content = bytearray(path.read_bytes())
    content[0] ^= 0x55
    path.unlink()
    if fault != "missing":
        path.write_bytes(content if fault == "flipped" else content[: len(content) // 2])
    with pytest.raises(CheckpointDamaged, match=f"step-00000002/{name} is not what was written"):
        checkpoints.load(IDENTITY)
    assert checkpoints.load(IDENTITY, step=1).step == 1


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), IDENTITY)

    def onto_a_full_device(into: Path) -> None:
        (into / "adapter").symlink_to("/dev/full")
        (into / "adapter").write_text("x" * 100_000)

    with pytest.raises(CheckpointNotWritten, match=r"step 2 could not .*No space left on device.*steps \[1\]"):
        checkpoints.save(2, state(2), IDENTITY, exports={"lora": onto_a_full_device})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.load(IDENTITY).state["weights"]["a.lora_A"].tolist() == [1.0] * 3
    checkpoints.save(2, state(2), IDENTITY)
    assert checkpoints.latest() == 2


def test_tensors_that_do_not_fit_leave_the_checkpoint_before(tmp_path: Path) -> None:
    """The kernel refuses files above 1 MB: what a quota does, inside the library that writes tensors."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(), IDENTITY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(CheckpointNotWritten, match=r"step 2 could not .*File too large.*steps \[1\]"):
            checkpoints.save(2, {"weights": {"w": torch.zeros(1 << 20)}}, IDENTITY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that others may enter and read; pytest's own are closed to all but its user."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_folder_is_named(public_folder: Path) -> None:
    checkpoints = Checkpoints(public_folder)
    checkpoints.save(1, state(), IDENTITY)
    public_folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:  # nothing is read-only to root
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointNotWritten, match=r"step 2 could not .*Permission denied.*steps \[1\]"):
            checkpoints.save(2, state(), IDENTITY)
        assert checkpoints.load(IDENTITY).step == 1
    finally:
        if is_root:
            os.seteuid(0)


# Whose checkpoint it is


@pytest.mark.parametrize(
    ("change", "name", "was", "now"),
    [
        ({"algorithm": "nft"}, "algorithm", "'flow_grpo'", "'nft'"),
        ({"policy": "Flux"}, "policy", "'SD3Transformer2DModel'", "'Flux'"),
        ({"policy_config": "c1"}, "policy_config", "'c0'", "'c1'"),
        ({"base_weights": "b1"}, "base_weights", "'b0'", "'b1'"),
        ({"configuration": {"seed": 2, "optimizer": {"lr": 1e-4, "betas": [0.9, 0.999]}}},
         "configuration.seed", "1", "2"),
        ({"configuration": {"seed": 1, "optimizer": {"lr": 2e-4, "betas": [0.9, 0.999]}}},
         "configuration.optimizer.lr", "0.0001", "0.0002"),
        ({"fingerprints": {"pickscore": "f1"}}, "fingerprints.pickscore", "'f0'", "'f1'"),
        ({"fingerprints": {"pickscore": "f0", "hpsv3": "h"}}, "fingerprints.hpsv3", "None", "'h'"),
    ],
)  # fmt: skip
def test_another_run_is_refused_in_one_line(tmp_path: Path, change: Any, name: str, was: str, now: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(), IDENTITY)
    other = replace(IDENTITY, **change)
    with pytest.raises(CheckpointMismatch) as caught:
        checkpoints.load(other)
    message = str(caught.value)
    assert f"{name} was {was} and is {now}" in message
    assert "\n" not in message
    assert message.count(" was ") == 1
    assert checkpoints.load(other, allow=[name]).step == 3
    assert checkpoints.load(other, allow=[name.split(".")[0]]).step == 3
    with pytest.raises(CheckpointMismatch):
        checkpoints.load(other, allow=[name[:-1]])


def test_other_versions_are_logged_and_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(), IDENTITY)
    assert checkpoints.load(replace(IDENTITY, versions={"torch": "3.0"})).step == 3
    assert "versions.torch 3.0; the checkpoint was written with 2.9" in caplog.text
    assert package_versions("torch", "no-such-package").keys() == {"torch"}
    assert torch.__version__.startswith(package_versions()["torch"].split("+")[0])


def test_the_identity_of_a_policy_is_its_class_configuration_and_bits() -> None:
    def network(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Linear(3, 2)

    same, other = policy_identity(network(0), {"w": 3}), policy_identity(network(1), {"w": 3})
    assert policy_identity(network(0), {"w": 3}) == same
    assert {key for key in same if same[key] != other[key]} == {"base_weights"}
    config = policy_identity(network(0), {"w": 4})
    assert {key for key in same if same[key] != config[key]} == {"policy_config"}


def test_a_digest_sees_names_shapes_dtypes_and_every_bit() -> None:
    base = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(2, dtype=torch.bfloat16)}
    digests = [
        weights_digest(each)
        for each in (
            base,
            {"a": base["a"], "c": base["b"]},
            {"a": base["a"].reshape(1, 2), "b": base["b"]},
            {"a": base["a"].view(torch.int32), "b": base["b"]},
            {"a": torch.tensor([-0.0, 1.0]), "b": base["b"]},
        )
    ]
    assert len(set(digests)) == len(digests)
    assert weights_digest(dict(reversed(base.items()))) == digests[0]
    strided = torch.tensor([[0.0, 9.0], [1.0, 9.0]])[:, 0]
    assert weights_digest({"a": strided, "b": base["b"]}) == digests[0]
