"""Weights come from safetensors or fail with a message that helps, and their hash names exactly their content."""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from models.base import WeightsError
from models.weights import (
    checkpoint_file,
    fit,
    hash_files,
    hash_tensors,
    load_checkpoint,
    load_safetensors,
    verify_sha256,
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(5, generator=generator).bfloat16(),
        "c": torch.arange(6),
        "scale": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "w.safetensors")
    loaded = load_safetensors(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert hash_tensors(loaded) == hash_tensors(tensors())


def test_missing_file_names_path_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nothing\.safetensors: not a file.*\.safetensors file"):
        load_safetensors(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("kept", [0, 7, 60, -1])
def test_truncated_file_is_a_weights_error(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "w.safetensors"
    save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match="damaged"):
        load_safetensors(path)


def test_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    torch.save(tensors(), path)
    with pytest.raises(WeightsError, match="not in the safetensors format"):
        load_safetensors(path)


def test_hash_ignores_order_and_strides() -> None:
    reversed_order = dict(reversed(tensors().items()))
    assert hash_tensors(reversed_order) == hash_tensors(tensors())
    strided = tensors() | {"a": tensors()["a"].t().contiguous().t()}
    assert strided["a"].stride() != tensors()["a"].stride()
    assert hash_tensors(strided) == hash_tensors(tensors())


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.nextafter(tensors()["a"], torch.tensor(9.0))},
        {"a": tensors()["a"].reshape(4, 3)},
        {"b": tensors()["b"].float()},
        {"c": tensors()["c"].int()},
        {"scale": torch.tensor([2.5])},
        {"empty": torch.zeros(3, 0)},
        {"another": torch.zeros(0)},
    ],
)
def test_hash_sees_bits_shapes_dtypes_and_names(change: dict[str, torch.Tensor]) -> None:
    assert hash_tensors(tensors() | change) != hash_tensors(tensors())


@given(st.dictionaries(st.text(max_size=5), st.binary(max_size=4), max_size=3), st.data())
def test_different_mappings_have_different_hashes(first: dict[str, bytes], data: st.DataObject) -> None:
    second = data.draw(st.dictionaries(st.sampled_from([*first, "x"]), st.binary(max_size=4), max_size=3))

    def mapping(content: dict[str, bytes]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(list(raw), dtype=torch.uint8) for name, raw in content.items()}

    assert (hash_tensors(mapping(first)) == hash_tensors(mapping(second))) == (first == second)


def test_file_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    before = hash_files(one, two)
    assert before == hash_files(two, one)
    two.write_bytes(b"3")
    assert hash_files(one, two) != before
    with pytest.raises(WeightsError, match=r"three\.onnx"):
        hash_files(one, tmp_path / "three.onnx")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return hash_tensors(first) == hash_tensors(second)


def save(content: Any, path: Path, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin", "w.ckpt"])
def test_every_published_form_is_loaded(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save_file(tensors(), path) if path.suffix == ".safetensors" else save(tensors(), path)
    assert same(load_checkpoint(path), tensors())
    assert same(load_checkpoint(tmp_path), tensors())
    assert same(load_checkpoint(str(path), ("state_dict", "model")), tensors())


def test_files_from_before_the_zip_format_are_loaded(tmp_path: Path) -> None:
    assert same(load_checkpoint(save(tensors(), tmp_path / "w.pt", legacy=True)), tensors())


def test_zip_files_are_mapped_and_not_read(tmp_path: Path) -> None:
    path = save({"a": torch.zeros(1 << 20)}, tmp_path / "w.pt")
    loaded = load_checkpoint(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert loaded["a"].shape == (1 << 20,)


@pytest.mark.parametrize("legacy", [True, False])
def test_nested_tensors_are_found_in_the_order_of_the_keys(legacy: bool, tmp_path: Path) -> None:
    other = {"other": torch.zeros(2)}
    path = save({"epoch": 3, "state_dict": tensors(), "model": other}, tmp_path / "w.pt", legacy=legacy)
    assert same(load_checkpoint(path, ("state_dict", "model")), tensors())
    assert same(load_checkpoint(path, ("model", "state_dict")), other)
    assert same(load_checkpoint(path, ("absent", "epoch", "model")), other)


def test_what_is_not_a_tensor_is_left_out(tmp_path: Path) -> None:
    extras = {"epoch": 3, "args": {"lr": 0.1, "name": "x"}, "best": None, "steps": [1, 2]}
    path = save(tensors() | extras, tmp_path / "w.pt")
    assert same(load_checkpoint(path, ("state_dict", "args")), tensors())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"state_dict": {"a": torch.zeros(1)}},
            r"no tensors at the top or under model; its keys: 'state_dict'",
        ),
        ({"epoch": 3}, "no tensors.*keys: 'epoch'"),
        ({}, "no tensors"),
        ([torch.zeros(1)], "not tensors by name but a list"),
        (torch.zeros(1), "not tensors by name but a Tensor"),
    ],
)
def test_a_file_without_named_tensors_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=words):
        load_checkpoint(save(content, tmp_path / "w.pt"), ("model",))


class Evil:
    """What a pickle of somebody else may do: call anything when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_that_wants_code_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    path = save(tensors() | {"extra": Evil(tmp_path / "harm")}, tmp_path / "w.pt", legacy=legacy)
    with pytest.raises(WeightsError, match=r"w\.pt are refused: the pickle wants the code \w+\.mkdir.*safetensors"):
        load_checkpoint(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"a": torch.zeros(1), "args": argparse.Namespace(lr=1)}, r"argparse\.Namespace"),
        ({"a": torch.zeros(1), "loss": np.float64(1)}, r"numpy\._core\.multiarray\.scalar"),
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_harmless_looking_code_is_refused_by_its_name(content: Any, code: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"wants the code {code}, .*to .safetensors"):
        load_checkpoint(save(content, tmp_path / "w.bin"))


@pytest.mark.filterwarnings("ignore:.torch.jit")  # it is on its way out; its files are not
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="refused: a TorchScript archive is a program"):
        load_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "legacy.pt"])
@pytest.mark.parametrize("kept", [0, 1, 7, 60, 0.5, -1])
def test_truncated_checkpoints_are_damaged(name: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / name
    save_file(tensors(), path) if path.suffix == ".safetensors" else save(tensors(), path, legacy="legacy" in name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept == 0.5 else int(kept)])
    with pytest.raises(WeightsError, match=f"{name} are damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><title>Sign in</title>", "web page"),
        (b"\n <HTML><body>", "web page"),
        (b"<?xml version='1.0'?><Error>", "web page"),
        (b"Entry not found", "damaged"),
        (b'{"error": "gated"}', "damaged"),
        (bytes(100), "damaged"),
    ],
)
def test_what_is_saved_in_place_of_weights_is_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        load_checkpoint(tmp_path / name)


def shard(folder: Path, suffix: str) -> Path:
    """Tensors spread over two files and their index, as the hub's large models are."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map = {}
    for number, names in enumerate((("a", "b"), ("c", "scale", "empty")), 1):
        path = folder / f"{stem}-0000{number}-of-00002{suffix}"
        part = {name: tensors()[name] for name in names}
        save_file(part, path) if suffix == ".safetensors" else save(part, path)
        weight_map |= dict.fromkeys(names, path.name)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_weights_are_put_together(suffix: str, tmp_path: Path) -> None:
    index = shard(tmp_path, suffix)
    assert same(load_checkpoint(tmp_path), tensors())
    assert same(load_checkpoint(index), tensors())
    next(tmp_path.glob(f"*-00002-of-00002{suffix}")).unlink()
    with pytest.raises(WeightsError, match=r"-00002-of-00002.*neither a file nor a folder"):
        load_checkpoint(tmp_path)


def test_of_a_folder_the_one_checkpoint_is_taken(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)
    torch_file = save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_file(tmp_path) == torch_file
    save_file(tensors(), tmp_path / "model.safetensors")
    assert same(load_checkpoint(tmp_path), tensors())
    save_file(tensors(), tmp_path / "another.safetensors")
    with pytest.raises(WeightsError, match=r"several checkpoints \(another\.safetensors, model\.safetensors\)"):
        load_checkpoint(tmp_path)


def test_missing_and_unknown_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent\.pt: neither a file nor a folder"):
        load_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"w\.h5 has no known suffix of weights: \.safetensors"):
        load_checkpoint(tmp_path / "w.h5")


def test_tensors_that_fit_pass_whatever_their_dtype() -> None:
    fit(tensors(), {name: tensor.double() for name, tensor in reversed(tensors().items())}, "a-model")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_quantised_copies_do_not_fit(dtype: torch.dtype) -> None:
    with pytest.raises(WeightsError, match=rf"1 mistyped \(a {dtype} instead of torch\.float32\)"):
        fit({"a": torch.zeros(2, 2)}, {"a": torch.zeros(2, 2).to(dtype)}, "m")


def test_names_of_a_foreign_file_cannot_steer_the_terminal() -> None:
    with pytest.raises(WeightsError) as caught:
        fit({}, {"a\n\x1b[31mb": torch.zeros(1)}, "m")
    assert str(caught.value).isprintable()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.eye(3).to_sparse(), "w is sparse"),
        (torch.zeros(3, device="meta"), "w is without data"),
        (torch.zeros(1).expand(10**12), "w repeats its numbers"),
    ],
)
def test_tensors_that_are_not_plain_are_refused(tensor: torch.Tensor, words: str, tmp_path: Path) -> None:
    torch.save({"good": torch.zeros(2), "w": tensor}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=words):
        load_checkpoint(tmp_path / "w.pt")


def test_views_of_a_shared_storage_are_loaded(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"whole": whole, "transposed": whole.T, "row": whole[1]}, tmp_path / "w.pt")
    loaded = load_checkpoint(tmp_path / "w.pt")
    assert torch.equal(loaded["transposed"], whole.T)
    assert torch.equal(loaded["row"], whole[1])


def test_what_does_not_fit_is_named() -> None:
    found = tensors() | {"a": torch.zeros(4, 3), "x1": torch.zeros(1)}
    del found["scale"]
    with pytest.raises(WeightsError) as caught:
        fit(tensors(), found, "a-model")
    assert str(caught.value) == (
        "the weights are not those of a-model: 1 missing (scale); 1 unknown (x1); "
        "1 misshapen (a [4, 3] instead of [3, 4])"
    )
    with pytest.raises(WeightsError, match=r"9 unknown \(x0, x1, x2, \.\.\.\)$"):
        fit({}, {f"x{i}": torch.zeros(1) for i in range(9)}, "a-model")


def test_ignored_names_may_be_missing_or_unknown_but_not_misshapen() -> None:
    ids = "text_model.embeddings.position_ids"
    with_ids = tensors() | {ids: torch.arange(4)}
    for expected, found in ((tensors(), with_ids), (with_ids, tensors())):
        fit(expected, found, "a-model", ("*.position_ids",))
        with pytest.raises(WeightsError, match=ids):
            fit(expected, found, "a-model", ("position_ids",))
    with pytest.raises(WeightsError, match="1 misshapen"):
        fit(with_ids, tensors() | {ids: torch.arange(5)}, "a-model", ("*.position_ids",))


def test_a_file_is_known_by_its_sha256(tmp_path: Path) -> None:
    path = save(tensors(), tmp_path / "w.pt")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    for form in (expected, expected.upper(), f"sha256:{expected}"):
        verify_sha256(path, form)
    verify_sha256(tmp_path, expected)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(WeightsError, match=f"w.pt is not the expected one: sha256 [0-9a-f]{{64}}, expected {expected}"):
        verify_sha256(path, expected)
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards", ".safetensors")
    with pytest.raises(WeightsError, match="sharded"):
        verify_sha256(tmp_path / "shards", expected)
