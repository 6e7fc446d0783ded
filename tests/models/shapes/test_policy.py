"""The embedded policy: an ordinary diffusers pipeline, trained reproducibly, that draws what it is asked for."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

pytest.importorskip("diffusers", reason="the policy needs the extra: pip install '.[policy]'")

from diffusers import StableDiffusion3Pipeline

from models.shapes.oracle import examine
from models.shapes.policy import (
    DIRECTORY,
    IMAGE_SIZE,
    NULL_TOKENS,
    TEXT_LENGTH,
    build_autoencoder,
    build_pipeline,
    build_tokenizer,
    counted_attention,
    encode_text,
    load_pipeline,
    save_pipeline,
    to_latents,
    tokenize,
    trained_parts,
)
from models.shapes.policy_evaluation import draw, evaluate, evaluation_prompts, grid, tabulate
from models.shapes.prompts import TASKS
from models.shapes.rules import Verdict
from models.shapes.scenes import random_prompt, right_scene
from models.shapes.train_policy import PolicyConfig, PolicyTraining, draw_batch, flow_loss, main, train
from models.shapes.world import render_batch

SMALL = replace(PolicyConfig(), batch=8, width=64, layers=2, probed_layer=0, warm_up=2)
LONGEST = "a photo showing a single orange-colored star that is to the left of a circle that is blue."


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def policy() -> StableDiffusion3Pipeline:
    return load_pipeline()


def pictures(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return render_batch([right_scene(random_prompt(rng), rng) for _ in range(count)], IMAGE_SIZE)


# --------------------------------------------------------------------------------------------------------- parts


def test_every_word_of_the_grammar_is_one_token_and_every_prompt_fits() -> None:
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(0)
    for i in range(300):
        text = random_prompt(rng, TASKS[i % 6]).text
        words = text.replace("-", " - ").split()
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert tokens == ["<|startoftext|>", *(f"{word}</w>" for word in words), "<|endoftext|>"]
    assert len(tokenizer(LONGEST)["input_ids"]) <= TEXT_LENGTH
    unknown = tokenizer("A Dachshund")["input_ids"]
    assert len(unknown) > 4
    assert tokenizer.decode(unknown, skip_special_tokens=True).strip() == "a dachshund"


def test_the_text_towers_pool_at_the_first_end_token() -> None:
    pipeline = build_pipeline(64, 2)
    config = pipeline.text_encoder.config
    assert (config.eos_token_id, config.pad_token_id) == (pipeline.tokenizer.eos_token_id,) * 2
    tokens = tokenize(pipeline.tokenizer, ["a red circle"])
    with torch.inference_mode():
        _, pooled = encode_text(trained_parts(pipeline), tokens)
        _, shorter = encode_text(trained_parts(pipeline), tokens[:, :5])
    assert torch.allclose(pooled, shorter, atol=1e-6)


def test_the_autoencoder_hands_the_picture_through() -> None:
    autoencoder = build_autoencoder()
    noise = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    flat = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    rendered = torch.from_numpy(pictures(4, 1)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        for pixels in (noise, flat, rendered):
            latent = autoencoder.encode(pixels).latent_dist.sample()
            assert (autoencoder.decode(latent).sample - pixels).abs().max() < 2e-4
        scaled = (latent - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    assert torch.allclose(scaled, to_latents(torch.from_numpy(pictures(4, 1))), atol=5e-4)


def test_latents_have_mean_zero_and_deviation_one() -> None:
    latents = to_latents(torch.from_numpy(pictures(2000, 2)))
    assert latents.mean().item() == pytest.approx(0.0, abs=0.05)
    assert latents.std().item() == pytest.approx(1.0, abs=0.03)


def test_the_oracle_reads_pictures_of_the_policys_size() -> None:
    rng = np.random.default_rng(3)
    prompts = [random_prompt(rng, TASKS[i % 6]) for i in range(120)]
    rendered = render_batch([right_scene(prompt, rng) for prompt in prompts], IMAGE_SIZE)
    assert [
        p.text for p, x in zip(prompts, rendered, strict=True) if not examine(p, PILImage.fromarray(x))[0].exact
    ] == []


def _awake(pipeline: StableDiffusion3Pipeline) -> None:
    """Random values where the untrained transformer has zeros, so that every path reaches the output."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("null_tokens", [0, 1, NULL_TOKENS])
def test_text_and_attention_of_the_training_are_those_of_the_pipeline(null_tokens: int) -> None:
    torch.manual_seed(0)
    pipeline = build_pipeline(64, 2)
    _awake(pipeline)
    prompts = ["a red circle left of a blue square", "three stars"]
    latents = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    time_ = torch.tensor([300.0, 900.0])
    with torch.inference_mode():
        expected, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=null_tokens
        )
        sequence, own_pooled = encode_text(trained_parts(pipeline), tokenize(pipeline.tokenizer, prompts))
        assert torch.allclose(expected[:, :TEXT_LENGTH], sequence, atol=1e-6)
        assert torch.allclose(pooled, own_pooled, atol=1e-6)
        plain = pipeline.transformer(latents, expected, pooled, time_).sample
        if null_tokens:
            sequence = torch.cat([sequence, torch.zeros(2, 1, 64)], dim=1)
        with counted_attention(pipeline.transformer, null_tokens):
            counted = pipeline.transformer(latents, sequence, pooled, time_).sample
        without = pipeline.transformer(latents, sequence[:, :TEXT_LENGTH], pooled, time_).sample
    assert torch.allclose(plain, counted, atol=2e-5)
    assert null_tokens == 0 or (plain - without).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------ training


def test_training_lowers_the_losses_and_reaches_every_part() -> None:
    training = PolicyTraining(SMALL)
    fixed = draw_batch(training.pipeline.tokenizer, replace(SMALL, batch=64), 10**6)
    before = {name: value.clone() for name, value in training.model.named_parameters()}
    with torch.no_grad():
        first = flow_loss(training.model, fixed, SMALL.probed_layer)
    for _ in range(60):
        training.advance()
    with torch.no_grad():
        last = flow_loss(training.model, fixed, SMALL.probed_layer)
    assert last["flow"] < 0.7 * first["flow"]
    assert last["slots"] < 0.95 * first["slots"]
    assert last["cells"] < 0.95 * first["cells"]
    unchanged = [name for name, value in training.model.named_parameters() if torch.equal(value, before[name])]
    # The last block's text tokens are keys and values only.
    assert unchanged == ["parts.transformer.transformer_blocks.1.attn.add_q_proj.bias"]


def test_a_batch_is_that_of_its_step_and_keeps_its_labels() -> None:
    tokenizer = build_tokenizer()
    first, again, other = (draw_batch(tokenizer, SMALL, step) for step in (4, 4, 5))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise)
    empty = draw_batch(tokenizer, replace(SMALL, batch=200, empty_prompts=0.5), 0)
    end = tokenizer.eos_token_id
    assert torch.equal(empty.tokens[:, 1] != end, empty.told)
    assert 60 < int(empty.told.sum()) < 140
    assert ((empty.sigma > 0) & (empty.sigma < 1)).all()
    assert {draw_batch(tokenizer, SMALL, step).null_tokens for step in range(12)} == {0, NULL_TOKENS}


def digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


RUN = """
import sys, torch
from pathlib import Path
from models.shapes.train_policy import PolicyConfig, train
torch.set_num_threads(1)
train(PolicyConfig(**{config}), 10**6, Path(sys.argv[1]), save_every=2, show=lambda *_: None)
"""


def test_a_killed_training_resumes_to_the_same_files(tmp_path: Path) -> None:
    killed = tmp_path / "killed.safetensors"
    process = subprocess.Popen([sys.executable, "-c", RUN.format(config=asdict(SMALL)), str(killed)])
    try:
        while not killed.exists():
            assert process.poll() is None, "the training ended before its first checkpoint"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = PolicyTraining(SMALL)
    resumed.resume(killed)
    reached = resumed.step
    assert reached >= 2
    steps = reached + 3
    save_pipeline(
        train(SMALL, steps, killed, save_every=100, show=lambda *_: None).averaged_pipeline(), tmp_path / "killed"
    )
    whole = train(SMALL, steps, tmp_path / "whole.safetensors", save_every=100, show=lambda *_: None)
    save_pipeline(whole.averaged_pipeline(), tmp_path / "whole")
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    other = train(replace(SMALL, seed=31), steps, tmp_path / "other.safetensors", save_every=100, show=lambda *_: None)
    save_pipeline(other.averaged_pipeline(), tmp_path / "other")
    assert digests(tmp_path / "other") != digests(tmp_path / "whole")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    train(SMALL, 2, path, save_every=1, show=lambda *_: None)
    assert not path.with_suffix(".partial").exists()
    with pytest.raises(ValueError, match="beyond 1"):
        train(SMALL, 1, path, save_every=1, show=lambda *_: None)
    with pytest.raises(ValueError, match="another configuration"):
        train(replace(SMALL, seed=1), 3, path, save_every=1, show=lambda *_: None)


def test_the_command_writes_a_folder_that_loads_and_its_measured_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "policy"
    arguments = ["--output", str(output), "--checkpoint", str(tmp_path / "run.safetensors"), "--images-per-task=1"]
    monkeypatch.setattr("sys.argv", ["train_policy", *arguments, "--steps=1", "--seed=3"])
    main()
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["training"]["config"]["seed"] == 3
    assert report["n"] == 6
    assert report["sampling"]["guidance_scale"] == 1.0
    assert '"exact"' in capsys.readouterr().out
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = StableDiffusion3Pipeline.from_pretrained(output, text_encoder_3=None, tokenizer_3=None, dtype=dtype)
        assert {pipeline.transformer.dtype, pipeline.text_encoder.dtype, pipeline.vae.dtype} == {dtype}
        assert draw(pipeline, ["a star"], 0, num_inference_steps=2)[0].size == (IMAGE_SIZE, IMAGE_SIZE)


# ---------------------------------------------------------------------------------------------------- evaluation


def test_the_table_counts_each_task() -> None:
    prompts = evaluation_prompts(0, 3)
    assert [prompt.task for prompt in prompts] == [task for task in TASKS for _ in range(3)]
    assert prompts == evaluation_prompts(0, 3)
    right, lax, wrong = Verdict(1.0, 1.0, 1.0, ""), Verdict(0.0, 1.0, 0.5, ""), Verdict(0.0, 0.0, 0.0, "")
    table = tabulate(prompts, [right, lax, wrong] * 5 + [right] * 3)
    assert (table["exact"], table["n"]) == (pytest.approx(8 / 18, abs=1e-4), 18)
    assert table["ci95"][0] < table["exact"] < table["ci95"][1]
    assert table["tasks"]["color_attr"]["exact"] == 1.0
    assert table["tasks"]["counting"] == {
        "exact": 0.3333, "n": 3, "ci95": [0.0615, 0.7923], "geneval": 0.6667, "soft": 0.5,
    }  # fmt: skip


def test_a_sheet_shows_every_picture() -> None:
    colors = [(10 * i, 0, 0) for i in range(5)]
    sheet = grid([PILImage.new("RGB", (4, 4), color) for color in colors], 3, 8)
    assert sheet.size == (36, 24)
    assert [sheet.getpixel((12 * (i % 3) + 4, 12 * (i // 3) + 4)) for i in range(5)] == colors


# ------------------------------------------------------------------------------------------------ stored weights


def test_the_stored_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in DIRECTORY.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert 1e6 < sum(path.stat().st_size for path in files) < 12e6


def test_the_stored_results_cover_every_task() -> None:
    report = json.loads(DIRECTORY.with_suffix(".json").read_text())
    assert set(report["tasks"]) == set(TASKS)
    assert all(row["exact"] > 0 and row["n"] >= 100 for row in report["tasks"].values())
    assert report["training"]["config"] == asdict(PolicyConfig())
    assert report["sampling"] == {"num_inference_steps": 20, "guidance_scale": 1.0, "max_sequence_length": 0}


def test_the_policy_draws_as_well_as_its_results_say(policy: StableDiffusion3Pipeline) -> None:
    recorded = json.loads(DIRECTORY.with_suffix(".json").read_text())["exact"]
    per_task = 8
    measured = evaluate(policy, per_task=per_task, seed=99, num_inference_steps=10)
    count = per_task * len(TASKS)
    assert measured["exact"] > recorded - 4 * (recorded * (1 - recorded) / count) ** 0.5
    assert measured["exact"] > 0.1


def test_a_picture_depends_on_its_seed_and_not_on_its_neighbours(policy: StableDiffusion3Pipeline) -> None:
    texts = ["a red circle", "two blue stars", "a cross"]
    call = {"num_inference_steps": 4}
    together, again = ([np.asarray(image, int) for image in draw(policy, texts, 7, **call)] for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(together, again, strict=True))
    alone = [np.asarray(draw(policy, [text], 7 + i, **call)[0], int) for i, text in enumerate(texts)]
    assert max(np.abs(one - other).max() for one, other in zip(together, alone, strict=True)) <= 1
    elsewhere = np.asarray(draw(policy, texts[:1], 8, **call)[0], int)
    assert np.abs(elsewhere - together[0]).max() > 50
