"""``reward-trainer evaluate`` on the embedded policy, against a service whose reward is the mean of an image's bytes:
every score can be checked on the picture that it is said to be of."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from models.shapes.policy import DIRECTORY
from tests.trainer_client.conftest import RewardServer
from trainer_client.config import ConfigError
from trainer_client.distributed import derived_seed
from trainer_client.eval_statistics import paired_difference
from trainer_client.evaluate import evaluate_command
from trainer_client.evaluation import EvaluationConfig, PolicySource, draw, evaluate, image_name, image_seeds
from trainer_client.policies import from_pretrained
from trainer_client.prompts import Prompt, load_prompts

PROMPTS = ["a red circle", "two blue squares", "a star above a cross", "a green triangle", "a pink star"]
TAGS = ["colors", "counting", "position", "colors", "colors"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "tag": t}) for p, t in zip(PROMPTS, TAGS, strict=True)))
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LoRA that changes the images."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    policy = from_pretrained(DIRECTORY, max_sequence_length=0)
    weights = policy.train_lora(rank=2, alpha=4)
    with torch.no_grad():
        for tensor in weights.tensors():
            tensor.add_(0.05 * torch.randn(tensor.shape))
    policy.save_lora(folder)
    return folder


def config(server: RewardServer, prompts: Path, out: Path, **changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {
        "policy": PolicySource(str(DIRECTORY)), "prompts": str(prompts), "rewards": ("mean",), "out": out,
        "services": (server.url,), "seeds": 3, "steps": 3, "batch_size": 4, "max_sequence_length": 0, "patience": 20.0,
    }  # fmt: skip
    return EvaluationConfig(**values | changes)


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command("evaluate")(evaluate_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def means(out: Path, label: str, seeds: int = 3) -> np.ndarray:
    """The reward of the written images, computed here: [P, S]."""
    folder = out / "images" / label
    files = [[folder / image_name(p, s) for s in range(seeds)] for p in range(len(PROMPTS))]
    return np.array([[np.asarray(Image.open(file)).mean() / 255 for file in row] for row in files])


# ---------------------------------------------------------------------------------------------------- what is found


def test_every_score_is_that_of_its_picture(
    server: RewardServer, prompts: Path, adapters: Path, tmp_path: Path
) -> None:
    """15 images in batches of 4, so that batches cut prompts in two; both policies; tags; the judge."""
    out = tmp_path / "out"
    found = evaluate(
        config(
            server, prompts, out, policy=PolicySource(str(DIRECTORY), adapters), against=PolicySource(str(DIRECTORY)),
            judge="mean",
        )
    )  # fmt: skip
    document = json.loads((out / "evaluation.json").read_text())
    assert document == found.document
    own, other = means(out, "policy"), means(out, "against")
    np.testing.assert_allclose(document["scores"]["policy"]["mean"], own, rtol=1e-12)
    np.testing.assert_allclose(document["scores"]["against"]["mean"], other, rtol=1e-12)
    assert np.abs(own - other).min() > 0  # the adapters changed every image
    expected = paired_difference(own, other)
    compared = document["comparison"]["mean"]
    assert compared["p_value"] == pytest.approx(expected.p_value)
    assert compared["difference"]["low"] == pytest.approx(expected.difference.low)
    assert compared["tags"]["counting"]["difference"]["mean"] == pytest.approx((own - other)[1].mean())
    assert compared["tags"]["counting"]["difference"]["low"] is None  # one prompt tells no interval
    # the service prefers by the same means: sigmoid of their difference
    np.testing.assert_allclose(document["judge"]["probabilities"], 1 / (1 + np.exp(other - own)), rtol=1e-9)
    assert document["policies"]["policy"]["trained"] == str(adapters)
    assert document["rewards"] == {"mean": {"fingerprint": "sha256:feed"}}
    assert document["prompts"]["texts"] == PROMPTS


def test_a_prompt_travels_once_for_the_images_of_a_batch(server: RewardServer, prompts: Path, tmp_path: Path) -> None:
    evaluate(config(server, prompts, tmp_path / "out", batch_size=6))
    asked = [received.request for received in server.asked()]
    items = [[item["prompt"] for item in request["items"]] for request in asked if request is not None]
    assert sorted(items) == sorted([PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]])
    metadata = [item["metadata"] for request in asked if request is not None for item in request["items"]]
    assert {row["tag"] for row in metadata} == set(TAGS)


def test_a_policy_against_itself_differs_by_nothing(server: RewardServer, prompts: Path, tmp_path: Path) -> None:
    """Same prompts, same noise: the same pictures, bit by bit."""
    source = PolicySource(str(DIRECTORY))
    found = evaluate(config(server, prompts, tmp_path / "out", policy=source, against=source))
    for file in sorted((tmp_path / "out" / "images" / "policy").iterdir()):
        assert file.read_bytes() == (tmp_path / "out" / "images" / "against" / file.name).read_bytes()
    compared = found.document["comparison"]["mean"]
    assert (compared["difference"]["mean"], compared["p_value"], compared["tied"]) == (0.0, 1.0, 1.0)
    assert compared["seeds"] == [{"won": 0, "tied": 5, "lost": 0}] * 3


def test_samples_without_a_score_are_left_out_and_counted(server: RewardServer, prompts: Path, tmp_path: Path) -> None:
    def fail_the_first(answer: dict[str, Any]) -> None:
        first = answer["results"][0]
        first["scores"]["mean"][0] = first["total"][0] = None
        first["errors"][0] = [{"model": "mean", "code": "torn", "message": "torn apart"}]

    answered = server.default

    def play(handler: Any, received: Any) -> None:
        chosen = server.changed(fail_the_first) if received.path == "/score" else answered
        chosen(handler, received)

    server.default = play
    found = evaluate(config(server, prompts, tmp_path / "out"))
    result = found.document["results"]["policy"]["mean"]
    assert (result["failed"], result["samples"]) == (4, 11)  # one of each of the four batches
    assert found.document["failures"]["policy"] == {"mean: torn: torn apart": 4}
    known = means(tmp_path / "out", "policy")
    scores = np.array(found.document["scores"]["policy"]["mean"], float)
    assert np.isnan(scores).sum() == 4
    np.testing.assert_allclose(scores[~np.isnan(scores)], known[~np.isnan(scores)], rtol=1e-12)
    assert result["mean"] == pytest.approx(np.nanmean(np.nanmean(scores, axis=1)))


def test_the_grid_shows_the_pictures(server: RewardServer, prompts: Path, tmp_path: Path) -> None:
    evaluate(config(server, prompts, tmp_path / "out", count=2, seeds=2))
    sheet = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    for name in (image_name(0, 0), image_name(1, 1)):
        picture = Image.open(tmp_path / "out" / "images" / "policy" / name).convert("RGB")
        large = np.asarray(picture.resize((128, 128), Image.Resampling.NEAREST))
        corners = np.argwhere((sheet[:-127, :-127] == large[0, 0]).all(axis=2))
        assert any(np.array_equal(sheet[y : y + 128, x : x + 128], large) for y, x in corners)


# ---------------------------------------------------------------------------------------------------- images


def test_an_image_depends_on_its_prompt_and_seed_and_not_on_its_batch(server: RewardServer, tmp_path: Path) -> None:
    policy = from_pretrained(DIRECTORY, max_sequence_length=0)
    listed = load_prompts("shapes:heldout")[::60]
    drawn = {}
    for size in (1, 5):
        made = config(server, tmp_path, tmp_path, batch_size=size)
        parts = list(draw(policy, listed, made))
        assert max(len(part.places) for part in parts) == size
        places = [place for part in parts for place in part.places]
        assert places == [(p, s) for p in range(4) for s in range(3)]
        drawn[size] = torch.cat([part.images for part in parts]).int()
    assert (drawn[1] - drawn[5]).abs().max() <= 1  # a level of 255: float32 sums in another order
    expected = policy.sample([listed[2].text], [image_seeds(4, 3, 1_000_003)[2][1]], steps=3)
    assert (drawn[1][2 * 3 + 1] - (expected[0] * 255).round().int()).abs().max() <= 1


def test_guidance_steers_away_from_the_negative_prompt(server: RewardServer, tmp_path: Path) -> None:
    policy = from_pretrained(DIRECTORY, max_sequence_length=0)
    made = config(server, tmp_path, tmp_path, seeds=1, guidance=3.0, negative="a blue star")
    [drawn] = draw(policy, [Prompt("a red circle")], made)
    [seed] = image_seeds(1, 1, made.seed)[0]
    told = policy.sample(["a red circle"], [seed], steps=3, guidance_scale=3.0, negative="a blue star")
    torch.testing.assert_close(drawn.images[0], (told[0] * 255).round().byte(), rtol=0, atol=1)
    untold = policy.sample(["a red circle"], [seed], steps=3)
    assert (drawn.images[0].int() - (untold[0] * 255).round().int()).abs().max() > 10


def test_noise_is_each_images_own_and_that_of_a_runs_evaluation() -> None:
    few, many = image_seeds(3, 2, 7), image_seeds(50, 8, 7)
    assert [row[:2] for row in many[:3]] == few
    assert len({seed for row in many for seed in row}) == 400
    assert few[2][1] == derived_seed("evaluation", 7 + 1, 2)


# ---------------------------------------------------------------------------------------------------- command line


def test_the_command_prints_tables_and_writes_the_folder(
    server: RewardServer, prompts: Path, adapters: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = (DIRECTORY, "--lora", adapters, "--against", DIRECTORY, "--prompts", prompts, "--rewards", "mean")
    small = ("--seeds", 2, "--steps", 2, "--max-sequence-length", 0, "--services", server.url, "--out", out)
    result = run(*arguments, *small, "--judge", "mean")
    assert result.exit_code == 0, result.output
    for part in ("policy: 5 prompts x 2 seeds", "policy minus against", "counting", "win rate", f"written to {out}"):
        assert part in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "grid.png", "images"]
    assert len(list((out / "images" / "against").iterdir())) == 10
    again = run(*arguments, *small)
    assert (again.exit_code, again.stderr) == (
        2,
        f"reward-trainer: {out} holds an evaluation already: take another folder\n",
    )


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--prompts": "EMPTY"}, "empty.txt: has no prompts"),
        ({"--prompts": "no_such_file.txt"}, "no_such_file.txt: No such file or directory"),
        ({"--rewards": "pickscore"}, "'pickscore': offered by none of http://127.0.0.1"),
        ({"--services": closed_port()}, "http://127.0.0.1:"),
        ({"--services": "localhost:8000"}, "a service is addressed as http://host:port"),
        ({"POLICY": "no_such_folder"}, "policy no_such_folder: no such folder, and a hub id is written namespace/name"),
        ({"--against": "EMPTY_FOLDER"}, "no file named model_index.json"),
        ({"--lora": "no_such_folder"}, "no_such_folder holds no adapters"),
        ({"--lora": "ADAPTERS", "--ema": None}, "are adapters alone; averaged weights are in a checkpoint"),
        ({"--ema": None}, "averaged weights are those of a checkpoint: name it"),
        ({"--against-lora": "ADAPTERS"}, "say more of the policy that --against names"),
        ({"--judge": "mean"}, "a judge compares two policies: name the other one (--against)"),
        ({"--height": "33"}, "sides of multiples of"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    server: RewardServer, prompts: Path, adapters: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    server.offered = {"mean": "sha256:feed"}
    (tmp_path / "empty.txt").write_text("\n  \n")
    words = {"EMPTY": str(tmp_path / "empty.txt"), "ADAPTERS": str(adapters), "EMPTY_FOLDER": str(tmp_path)}
    values: dict[str, Any] = {
        "POLICY": str(DIRECTORY), "--prompts": str(prompts), "--rewards": "mean", "--services": server.url,
        "--out": str(tmp_path / "out"), "--patience": "0.2", "--steps": "1",
    } | changes  # fmt: skip
    policy = values.pop("POLICY")
    options = [part for name, value in values.items() for part in (name, words.get(value, value)) if part is not None]
    result = run(policy, *options)
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len([line for line in lines if line.startswith("reward-trainer: ")]) == 1
    assert said in lines[-1]
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()  # told before anything was drawn


def test_a_configuration_that_makes_no_sense_is_refused(server: RewardServer, prompts: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"rewards": ()}, "at least one"), ({"rewards": ("mean", "mean")}, "none twice"), ({"seeds": 0}, "at least 1"),
        ({"judge": "mean"}, "name the other one"), ({"count": 0}, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            config(server, prompts, tmp_path, **changes)


def test_help_waits_for_no_torch() -> None:
    code = "import sys, trainer_client.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
