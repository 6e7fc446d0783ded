"""Chat models from folders: what loads, what is refused and how."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.backbones.vlm_loading import FAMILIES, load_chat, write_random_chat
from models.base import LoadOptions, WeightsError
from tests.models.backbones.vlm_chats import chat_of, folder, question


def test_a_folder_that_is_no_judge_says_why(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_chat(tmp_path, LoadOptions())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(WeightsError) as other:
        load_chat(tmp_path, LoadOptions())
    assert all(name in str(other.value) for name in FAMILIES.values())
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(WeightsError, match="safetensors"):
        load_chat(tmp_path, LoadOptions())


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors.pop("lm_head.weight")
    save_file(tensors, path, metadata={"format": "pt"})


def quantised(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "awq"}}))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", cut_off, "cannot be read"),
        ("model.safetensors", lambda path: path.write_text("version https://git-lfs\n"), "cannot be read"),
        ("model.safetensors", without_a_tensor, r"lm_head\.weight"),
        ("config.json", quantised, "quantised"),
        ("tokenizer.json", lambda path: path.write_text("{}"), "cannot be read"),
        ("processor_config.json", lambda path: path.write_text("[]"), "cannot be read"),
        ("processor_config.json", Path.unlink, "cannot be read"),
        ("chat_template.jinja", Path.unlink, "no chat template"),
        ("chat_template.jinja", lambda path: path.write_text("{% for %}"), "cannot show an image"),
        ("chat_template.jinja", lambda path: path.write_text("{{ messages[0]['role'] }}"), "cannot show an image"),
    ],
)
def test_a_damaged_folder_is_a_weights_error(
    tmp_path: Path, name: str, damage: Callable[[Path], object], said: str
) -> None:
    copied = shutil.copytree(folder("qwen2_vl"), tmp_path / "chat")
    load_chat(copied, LoadOptions())
    damage(copied / name)
    with pytest.raises(WeightsError, match=said):
        load_chat(copied, LoadOptions())


def test_the_hashes_name_the_tensors_and_the_rest(tmp_path: Path) -> None:
    copied = shutil.copytree(folder("qwen2_vl"), tmp_path / "chat")
    first, again = chat_of("qwen2_vl"), load_chat(copied, LoadOptions())
    assert (again.weights_hash, again.identity) == (first.weights_hash, first.identity)
    template = copied / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    other = load_chat(copied, LoadOptions())
    assert other.weights_hash == first.weights_hash
    assert other.identity != first.identity
    assert chat_of("qwen3_vl").weights_hash != first.weights_hash


def test_the_area_of_images_can_be_set() -> None:
    small = load_chat(folder("qwen2_vl"), LoadOptions(options={"max_pixels": 56 * 56}))
    large = chat_of("qwen2_vl")
    turn = question(0, 2)
    assert small.prepare(turn).tokens < large.prepare(turn).tokens
    assert small.identity != large.identity
    assert small.weights_hash == large.weights_hash
    for options in ({"max_pixels": "many"}, {"max_pixels": True}, {"min_pixels": 9000, "max_pixels": 4000}):
        with pytest.raises(ValueError, match="pixels"):
            load_chat(folder("qwen2_vl"), LoadOptions(options=options))
    with pytest.raises(ValueError, match="takes no max_pixels"):
        load_chat(folder("internvl"), LoadOptions(options={"max_pixels": 4000}))


def test_it_loads_in_the_dtype_that_is_asked_for() -> None:
    assert load_chat(folder("qwen2_vl"), LoadOptions(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_random_checkpoint_is_the_same_each_time(tmp_path: Path) -> None:
    again = load_chat(write_random_chat(tmp_path / "again"), LoadOptions())
    assert again.weights_hash == chat_of("qwen2_vl").weights_hash
    assert again.identity == chat_of("qwen2_vl").identity
