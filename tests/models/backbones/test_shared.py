"""Towers are held once, for as long as somebody holds them, and only weights that fit are loaded."""

import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch

from models.backbones import shared
from models.backbones.clip import VIT_H_14, VIT_L_14, ClipSize
from models.backbones.shared import LoadedClip, shared_clip
from models.base import LoadOptions, WeightsError, WeightSource
from models.parity_recipe import write_checkpoint
from tests.models.clip_checkpoints import checkpoint, tensors

HF = "manifests/pickscore_small.json"
OPEN_CLIP = "manifests/hpsv2_small.json"
SOURCE = WeightSource("hf:nobody/nothing/model.safetensors")


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> LoadedClip:
    return shared_clip(SOURCE, LoadOptions(dtype=dtype, weights=str(path)), VIT_H_14, "test")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Path(checkpoint(tmp_path, HF, "model.safetensors"))


def test_the_same_file_is_one_module_by_whatever_path(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file.parent, target_is_directory=True)
    first = load(file)
    assert load(tmp_path / "link" / file.name).towers is first.towers
    assert load(file, torch.bfloat16).towers is not first.towers


def test_a_replaced_file_is_loaded_again(file: Path) -> None:
    first = load(file)
    changed = dict(tensors(HF))
    changed["logit_scale"] = torch.tensor(1.0)
    write_checkpoint(changed, file)
    os.utime(file, ns=(1, 1))
    second = load(file)
    assert second.towers.logit_scale == 1
    assert second.weights_hash != first.weights_hash
    assert first.towers.logit_scale != 1  # a copy: the file under it may go


def test_towers_go_when_nobody_holds_them(file: Path) -> None:
    first = load(file)
    alive = weakref.ref(first.towers)
    del first
    gc.collect()
    assert alive() is None


def test_threads_that_ask_at_once_get_one_copy(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Path] = []
    load_clip = shared.load_clip

    def counted(path: Path, *rest: object) -> LoadedClip:
        loads.append(path)
        return load_clip(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shared, "load_clip", counted)
    together = Barrier(4)

    def ask(_: int) -> LoadedClip:
        together.wait(20)
        return load(file)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert len({id(entry.towers) for entry in found}) == 1
    assert len(loads) == 1


def test_legacy_counters_change_nothing_not_even_the_hash(file: Path, tmp_path: Path) -> None:
    first = load(file)
    counters = {f"{tower}_model.embeddings.position_ids": torch.arange(3)[None] for tower in ("text", "vision")}
    second = load(write_checkpoint(tensors(HF) | counters, tmp_path / "legacy.safetensors"))
    assert second.weights_hash == first.weights_hash


def test_forms_and_dtypes_of_files_load_alike(tmp_path: Path) -> None:
    halved = {name: tensor.half() for name, tensor in tensors(OPEN_CLIP).items()}
    flat = load(write_checkpoint(halved, tmp_path / "flat.pt")).towers
    nested = load(write_checkpoint(halved, tmp_path / "nested.pt", nested="state_dict")).towers
    for name, tensor in flat.clip.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, nested.clip.state_dict()[name])


@pytest.mark.parametrize("form", [HF, OPEN_CLIP], ids=["hf", "open_clip"])
@pytest.mark.parametrize("change", ["missing", "unknown", "misshapen"])
def test_any_tensor_that_does_not_fit_is_named(tmp_path: Path, form: str, change: str) -> None:
    wrong = dict(tensors(form))
    name = next(name for name in wrong if name.endswith(("layers.1.mlp.fc2.bias", "resblocks.1.mlp.c_proj.bias")))
    if change == "missing":
        del wrong[name]
    elif change == "misshapen":
        wrong[name] = torch.zeros(7)
    else:
        name = "text_model.adapter.weight"
        wrong[name] = torch.zeros(7)
    if form == OPEN_CLIP and change == "unknown":
        del wrong[name]
        name = "visual.adapter.weight"
        wrong[name] = torch.zeros(7)
    with pytest.raises(WeightsError, match=f"(?s)test.*{change}.*{name}"):
        load(write_checkpoint(wrong, tmp_path / "wrong.safetensors"))


@pytest.mark.parametrize("gone", ["visual_projection.weight", "vision_model.encoder."])
def test_tensors_that_tell_the_sizes_are_asked_for(tmp_path: Path, gone: str) -> None:
    wrong = {name: tensor for name, tensor in tensors(HF).items() if not name.startswith(gone)}
    with pytest.raises(WeightsError, match="not those of test"):
        load(write_checkpoint(wrong, tmp_path / "wrong.safetensors"))


def test_another_architecture_is_refused(file: Path) -> None:
    options = LoadOptions(weights=str(file))
    assert shared_clip(SOURCE, options, VIT_H_14, "test").name == "vit-h-14"
    with pytest.raises(WeightsError, match="160 channels do not split into heads of 64"):
        shared_clip(SOURCE, options, VIT_L_14, "test")
    # The widths of the full ViT-H/14 split into heads of 64 too: there the sizes tell.
    with pytest.raises(WeightsError, match="wants weights of vit-l-14; these are of vit-h-14"):
        shared._refuse_another_architecture(VIT_H_14.published, VIT_L_14, "test")
    shared._refuse_another_architecture(ClipSize(32, 128, 2, 64, 2), VIT_L_14, "test")


def test_missing_weights_are_a_weights_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="absent"):
        load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("tower", "prefix"), [("image", "vision_model.encoder.layers.2."), ("text", "text_model.encoder.layers.1.")]
)
def test_a_file_that_lost_the_last_layer_of_a_published_tower_is_refused(
    tower: str, prefix: str, tmp_path: Path
) -> None:
    """It would load as a smaller model; only the published number of layers tells."""
    small = ClipSize(embed_dim=128, vision_width=160, vision_layers=3, text_width=128, text_layers=2)
    architecture = replace(VIT_H_14, published=small)
    whole = write_checkpoint(dict(tensors(HF)), tmp_path / "whole.safetensors")
    shared_clip(SOURCE, LoadOptions(weights=str(whole)), architecture, "test")
    rest = {name: tensor for name, tensor in tensors(HF).items() if not name.startswith(prefix)}
    cut = write_checkpoint(rest, tmp_path / "cut.safetensors")
    with pytest.raises(WeightsError, match=f"the {tower} tower has"):
        shared_clip(SOURCE, LoadOptions(weights=str(cut)), architecture, "test")


def test_a_tensor_without_elements_is_refused(tmp_path: Path) -> None:
    empty = {**tensors(OPEN_CLIP), "visual.conv1.weight": torch.zeros(160, 3, 0, 0)}
    file = write_checkpoint(empty, tmp_path / "empty.pt")
    with pytest.raises(WeightsError, match="conv1"):
        load(file)
