"""``reward-trainer``: what cannot work is said in one line, before the first step, with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.trainer_client.conftest import RewardServer
from tests.trainer_client.policies.tiny_pipelines import build
from tests.trainer_client.scripts import tiny_run
from trainer_client.cli import ALGORITHMS, app, chosen, rows

REFUSED_PORT = "http://127.0.0.1:9"
"""discard: nothing listens there."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with tiny_run.rewards() as server:
        yield server


@dataclass
class Trial:
    """A run that would work, to be spoilt."""

    settings: dict[str, Any]
    out: Path
    folder: Path

    def run(self, *more: str, algorithm: str = "flow-grpo") -> Result:
        arguments = tiny_run.arguments(self.settings, self.out, *more, algorithm=algorithm)
        return CliRunner(env={"COLUMNS": "1000"}).invoke(app, arguments)

    def refused(self, *more: str, algorithm: str = "flow-grpo") -> str:
        """The one line; nothing was trained."""
        before = len(tiny_run.rows(self.out)) if (self.out / "metrics.jsonl").exists() else 0
        result = self.run(*more, algorithm=algorithm)
        assert result.exit_code == 2, result.output
        [line] = [line for line in result.stderr.splitlines() if "reward-trainer: " in line]
        assert "Traceback" not in result.stderr
        after = len(tiny_run.rows(self.out)) if (self.out / "metrics.jsonl").exists() else 0
        assert after == before
        return line.removeprefix("reward-trainer: ")


@pytest.fixture
def trial(policy: Path, server: RewardServer, tmp_path: Path) -> Trial:
    settings = tiny_run.values(tmp_path, policy, server.url, steps=1, prompts_per_step=1, group_size=2)
    return Trial(settings, tmp_path / "run", tmp_path)


def spoil(section: str | None, **values: Any) -> Callable[[Trial], None]:
    def change(trial: Trial) -> None:
        (trial.settings if section is None else trial.settings[section]).update(values)

    return change


def write_prompts(text: str) -> Callable[[Trial], None]:
    return lambda trial: (trial.folder / "prompts.txt").write_text(text) and None


def not_a_policy(trial: Trial) -> None:
    (trial.folder / "empty").mkdir()
    trial.settings["policy"]["source"] = str(trial.folder / "empty")


def another_pipeline(trial: Trial) -> None:
    (trial.folder / "other").mkdir()
    index = {"_class_name": "PixArtAlphaPipeline", "_diffusers_version": "0.40.0"}
    (trial.folder / "other" / "model_index.json").write_text(json.dumps(index))
    trial.settings["policy"]["source"] = str(trial.folder / "other")


def a_ddpm(trial: Trial) -> None:
    build("sd").save_pretrained(trial.folder / "sd")
    trial.settings["policy"] = {"source": str(trial.folder / "sd"), "device": "cpu"}


BAD: dict[str, tuple[Callable[[Trial], None], str]] = {
    "unknown reward": (spoil("rewards", models={"meann": 1.0}), "'meann': offered by none of http://127.0.0.1:"),
    "half precision without a scaled loss": (spoil("policy", dtype="float16"), "float16 needs a scaled loss"),
    "unknown held-out reward": (
        lambda trial: trial.settings.update(
            evaluation={"prompts": trial.settings["prompts"], "heldout": ["nothing"]}
        ),
        "'nothing': offered by none of",
    ),
    "no service": (spoil("rewards", services=[REFUSED_PORT], start_patience=0.1), "http://127.0.0.1:9: ConnectError"),
    "empty prompt file": (write_prompts("\n \n"), "prompts.txt: has no prompts"),
    "missing prompt file": (spoil(None, prompts="/nowhere/p.txt"), "/nowhere/p.txt: No such file"),
    "group of one": (spoil(None, group_size=1), "group_size is 1: an image alone in its group teaches nothing"),
    "more steps than the scheduler has": (
        spoil("sampling", steps=1001), "sampling.steps is 1001, and the scheduler of the policy has 1000 timesteps"
    ),
    "impossible size": (spoil("sampling", height=33), "sampling: images of sd3 have sides of multiples of 4, not 33x"),
    "unknown key": (spoil("optimizer", rate=1), "optimizer.rate: Extra inputs are not permitted"),
    "wrong value": (spoil("optimizer", lr=-1), "optimizer.lr: Input should be greater than 0"),
    "no policy": (not_a_policy, "empty: Error no file named model_index.json found in directory"),
    "no such layers": (
        spoil("policy", weights="lora", lora_targets=["nothing"]), "policy: Target modules {'nothing'} not found"
    ),
    "no such adapters": (spoil("policy", weights="lora", start="/nowhere"), "policy.start /nowhere: "),
    "a pipeline without a policy": (
        another_pipeline, "is a PixArtAlphaPipeline; there are policies for StableDiffusion3Pipeline, FluxPipeline, "
    ),
    "no flow": (a_ddpm, "flow_grpo trains rectified flows (SD3, FLUX, Qwen-Image), not "),
    "acting guard without eyes": (
        spoil(None, guard={"mode": "act"}), "guard.mode 'act' needs evaluation.prompts, evaluation.heldout"
    ),
    "unknown limit": (
        lambda trial: trial.settings.update(
            guard={"limits": {"nonsense": 1.0}},
            evaluation={"prompts": trial.settings["prompts"], "heldout": ["heldout"]},
        ),
        "guard.limits: there is no limit 'nonsense'; there are agreement_fall, ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_said_in_one_line(case: str, trial: Trial) -> None:
    change, said = BAD[case]
    change(trial)
    assert said in trial.refused()
    assert not (trial.out / "metrics.jsonl").exists() or not tiny_run.rows(trial.out)


def test_a_refused_run_leaves_its_folder_free(trial: Trial) -> None:
    """The mended command is taken, whether or not the log had been opened."""
    trial.out.mkdir(parents=True)
    (trial.out / "metrics.jsonl").touch()
    (trial.out / "events.jsonl").write_text('{"step": 0, "time": "t", "kind": "stop", "text": "ConfigError"}\n')
    assert trial.run().exit_code == 0
    assert len(tiny_run.rows(trial.out)) == 1


def test_a_reward_without_a_gradient(trial: Trial, server: RewardServer) -> None:
    healthy = server.default

    def dull(answer: dict[str, Any]) -> None:
        for row in answer.get("models", []):
            if isinstance(row, dict):
                row["differentiable"] = False

    server.default = server.changed(dull)
    for key in ("group_size", "noise_level"):
        del trial.settings[key]
    try:
        line = trial.refused(algorithm="refl")
    finally:
        server.default = healthy
    assert "refl differentiates through its rewards, and mean has no gradient" in line


def test_a_judge_that_no_service_has(trial: Trial) -> None:
    trial.settings["judge"] = "nobody"
    assert "'nobody': offered by none of" in trial.refused(algorithm="pref-grpo")


def test_unknown_algorithm(trial: Trial) -> None:
    line = trial.refused(algorithm="ppo")
    assert line == "there is no algorithm 'ppo'; there are flow-grpo, pref-grpo, nft, refl"


def test_a_missing_configuration_file(trial: Trial) -> None:
    assert "none.toml: " in trial.refused("--config", str(trial.folder / "none.toml"))


def test_a_folder_that_holds_a_run(trial: Trial, policy: Path) -> None:
    result = trial.run()
    assert result.exit_code == 0, result.output
    assert f"report: {trial.out / 'report.html'}" in result.stdout
    assert (trial.out / "report.html").stat().st_size > 1000
    assert "holds a run already: go on with --resume, or take another folder" in trial.refused()

    trial.settings["optimizer"]["lr"] = 0.25
    line = trial.refused("--resume")
    assert "the checkpoint is of another run: configuration.optimizer.lr was 0.5 and is 0.25" in line
    trial.settings["optimizer"]["lr"] = 0.5

    other = build("sd3", text_encoder_3=False)
    other.transformer.proj_out.bias.data.add_(1.0)
    other.save_pretrained(trial.folder / "other")
    trial.settings["policy"]["source"] = str(trial.folder / "other")
    line = trial.refused("--resume")
    assert "the checkpoint is of another run: base_weights was " in line
    trial.settings["policy"]["source"] = str(policy)

    trial.settings["steps"] = 2
    assert trial.run("--resume").exit_code == 0
    assert [row["step"] for row in tiny_run.rows(trial.out)] == [1, 2]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_options_are_listed(name: str) -> None:
    _, kind = chosen(name)
    listed = {row[0]: row for row in rows(kind)}
    assert listed["prompts"][1] == "needed"
    assert listed["optimizer.lr"][2].startswith("learning rate")
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["options", name])
    assert result.exit_code == 0
    assert all(key in result.stdout for key in listed)


def test_the_command_as_a_process(trial: Trial) -> None:
    """Standard error holds the line and nothing else."""
    trial.settings["group_size"] = 1
    arguments = tiny_run.arguments(trial.settings, trial.out)
    done = subprocess.run(
        [sys.executable, "-m", "trainer_client", *arguments], capture_output=True, text=True, cwd=tiny_run.ROOT,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "reward-trainer: configuration: group_size is 1: an image alone in its group teaches nothing; take 2 or more"
    ]
    assert done.stdout == ""
