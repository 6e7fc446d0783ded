"""make parity for the trainer's mathematics: it agrees, and every number that it reads matters."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.parity.__main__ import main, merged
from benchmarks.parity.comparing import topics_of_npz
from models import parity
from models.parity import Report, Topic

ROOT = Path(__file__).parents[2]
RL = ROOT / "tests" / "fixtures" / "rl"

# One case of every kind, and the arrays of it that nothing reads or that only say what other arrays say.
ONE_OF_EACH: dict[str, set[str]] = {
    "t1_sde_step/flowgrpo_n10_nl0.7.npz": {"timesteps"},
    "t1_sde_step/flowgrpo_mixed_timesteps.npz": {"timestep", "timesteps"},
    "t1_sde_step/flowfactory_Flow-SDE_n10_nl0.7.npz": {"dt"},
    "t1_sde_step/flowfactory_CPS_n10_nl0.3.npz": {"dt"},
    "t1_sde_step/flowfactory_ODE_n10_nl0.7.npz": {"dt", "noise", "given_next_latents"},
    "t1_sde_step/prefgrpo_dance_n8_eta0.3.npz": {"dt"},
    "t2_advantages/tracker_unequal.npz": set(),
    "t2_advantages/ff_three_rewards.npz": set(),
    "t2_advantages/pg_flex_gdpo.npz": set(),
    "t3_grpo_loss/fg_clip0.2_beta0.01_f64.npz": {"clipped_advantages"},
    "t3_grpo_loss/ff_guard.npz": {
        "logged_policy_loss", "kl_div", "noise_pred", "noise_pred_ref", "prev_sample_mean_ref",
    },
    "t3_grpo_loss/pg_plain_kl.npz": {"dt", "old_prev_sample_mean"},
    "t4_diffusion_nft/nft_beta0.1_kl1.npz": {
        "clipped_advantages", "logged_policy_loss", "unweighted_policy_loss",
        "old_deviate", "old_deviate_max", "old_kl_div", "x0_norm", "x0_norm_max",
    },
    "t4_diffusion_nft/ff_nft_sym.npz": {"logged_policy_loss"},
    "t4_diffusion_nft/ema_updates.npz": set(),
    "t6_refl/refl_mid30_off1.npz": set(),
    "t6_refl/refl_post_square.npz": set(),
    "t6_refl/x0_formulas.npz": set(),
}  # fmt: skip


def run(folder: Path) -> tuple[int, str]:
    text = io.StringIO()
    status = main([str(folder)], Console(file=text, width=200))
    return status, text.getvalue()


def changed(array: Any) -> Any:
    """Numbers a little off, beyond every tolerance and by different amounts: advantages forgive a common one."""
    if array.dtype.kind in "iu":
        other = array.copy()
        other.flat[0] += 1
        return other
    if array.dtype == bool:
        return ~array
    wave = np.cos(np.arange(array.size)).reshape(array.shape)
    return (array + 0.01 * wave * (1 + np.abs(array))).astype(array.dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(RL, tmp_path / "rl")
    return tmp_path / "rl"


def test_the_fixtures_are_what_they_were() -> None:
    manifest = json.loads((RL / "MANIFEST.json").read_text("utf-8"))
    files = {path.relative_to(RL).as_posix(): path for path in RL.glob("*/*")}
    assert set(files) == set(manifest)
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == manifest


def test_the_trainers_mathematics_agrees_with_the_references() -> None:
    status, text = run(RL)
    assert status == 0
    assert "nobody handles yet" not in text
    cases = {name for file in RL.glob("*/index.json") for name in json.loads(file.read_text("utf-8"))}
    assert len(cases) == len(list(RL.glob("*/*.npz")))


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "benchmarks.parity", str(RL / "t3_grpo_loss")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    assert "gradient by log_prob" in done.stdout


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_array_that_is_changed_is_noticed(folder: Path, name: str) -> None:
    file = folder / name
    with np.load(file) as stored:
        arrays = {key: stored[key] for key in stored.files}
    assert all(topic.ok for topic in topics_of_npz(file))
    unnoticed = set()
    for key in arrays:
        np.savez(file, **(arrays | {key: changed(arrays[key])}))
        try:
            noticed = not all(topic.ok for topic in topics_of_npz(file))
        except (ValueError, IndexError):  # indices out of range are noticed too
            noticed = True
        if not noticed:
            unnoticed.add(key)
    assert unnoticed == ONE_OF_EACH[name]


def change_noise(document: Any) -> None:
    document["cases"][0]["prev_sample"][0][0][0][0] += 1e-3


def change_zero_noise(document: Any) -> None:
    document["cases"][0]["log_prob"] = [0.0, 1e-3]


def change_window(document: Any) -> None:
    document[1]["per_seed"][0]["current_sde_steps"].reverse()


def change_sigma(document: Any) -> None:
    document[0]["sigmas"][3] *= 1.001


def change_total(document: Any) -> None:
    document[0]["avg"][2] += 1e-5


def change_decay(document: Any) -> None:
    document["return_decay"]["2"][2][1] += 1e-5


def change_cosine(document: Any) -> None:
    document["flow_factory"][-1]["values"][10][1] += 1e-5


def change_gradient(document: Any) -> None:
    document[0]["grad_rewards"][2] = -2e-4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("t1_sde_step/edge_cases.json", change_noise),
        ("t1_sde_step/edge_cases.json", change_zero_noise),
        ("t1_sde_step/flow_factory_sde_windows.json", change_window),
        ("t1_sde_step/sigma_schedules.json", change_sigma),
        ("t2_advantages/flow_grpo_multi_score.json", change_total),
        ("t4_diffusion_nft/ema_schedules.json", change_decay),
        ("t4_diffusion_nft/ema_schedules.json", change_cosine),
        ("t6_refl/reward_loss.json", change_gradient),
    ],
)
def test_a_changed_number_of_a_document_is_off(tmp_path: Path, name: str, change: Callable[[Any], None]) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    document = json.loads((RL / name).read_text("utf-8"))
    file.write_text(json.dumps(document), "utf-8")
    assert run(tmp_path)[0] == 0
    change(document)
    file.write_text(json.dumps(document), "utf-8")
    status, text = run(tmp_path)
    assert status == 1
    assert "off" in text


def test_a_lost_row_and_a_not_a_number_are_off(folder: Path) -> None:
    file = folder / "t6_refl" / "x0_formulas.npz"
    with np.load(file) as stored:
        arrays = {key: stored[key] for key in stored.files}
    bad = arrays["x0_flow"].copy()
    bad[3, 0, 0, 0, 0] = np.nan
    for other in (bad, arrays["x0_flow"][..., :-1]):
        np.savez(file, **(arrays | {"x0_flow": other}))
        assert [topic.name for topic in topics_of_npz(file) if not topic.ok] == ["x0_prediction: from velocity"]


def test_cases_that_the_index_does_not_know_are_errors(folder: Path) -> None:
    stray = folder / "t6_refl" / "stray.npz"
    shutil.copy(folder / "t6_refl" / "x0_formulas.npz", stray)
    with pytest.raises(ValueError, match="not in the index"):
        run(folder / "t6_refl")
    stray.unlink()
    index = folder / "t6_refl" / "index.json"
    document = json.loads(index.read_text("utf-8"))
    document["x0_formulas"]["kind"] = "unheard_of"
    index.write_text(json.dumps(document), "utf-8")
    with pytest.raises(ValueError, match="unknown kind 'unheard_of'"):
        run(folder / "t6_refl")


def test_cases_of_one_folder_are_shown_together_and_the_worst_counts() -> None:
    npz, other = Path("a/1.npz"), Path("a/2.npz")
    topics = ((npz, Topic("x", 2, 0.1, 1.0)), (other, Topic("x", 3, 2.0, 1.0)), (Path("a/b.json"), Topic("x", 1, 0, 1)))
    found = merged(Report(topics, (Path("c.json"),)))
    assert found.topics == ((Path("a"), Topic("x", 5, 2.0, 1.0)), (Path("a/b.json"), Topic("x", 1, 0, 1)))
    assert found.exit_status == 1
    assert found.unhandled == (Path("c.json"),)


def test_rewards_and_trainer_share_one_command(tmp_path: Path) -> None:
    """The embedded rewards' cases run beside the trainer's, and a folder with neither fails."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "pointwise" / "images", tmp_path / "pointwise" / "images")
    for name in ("inputs.json", "jpeg.json"):
        shutil.copy(ROOT / "tests" / "fixtures" / "pointwise" / name, tmp_path / "pointwise")
    shutil.copytree(RL / "t6_refl", tmp_path / "rl" / "t6_refl")
    status, text = run(tmp_path)
    assert status == 0
    assert "incompressibility" in text
    assert "refl_loop: gradient by w" in text
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty")[0] == 2
    assert parity.run(tmp_path / "empty").topics == ()
