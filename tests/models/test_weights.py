"""Weights come from safetensors or fail with a message that helps, and their hash names exactly their content."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from models.base import WeightsError
from models.weights import hash_files, hash_tensors, load_safetensors


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
