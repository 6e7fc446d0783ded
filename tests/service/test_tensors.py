"""The safetensors reader on untrusted bytes: the library's own files come back, everything else is a typed error."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from service import tensors
from service.errors import BadRequest, PayloadTooLarge, ServiceError
from tests.service.bodies import raw_safetensors

MAX_HEADER = 1 << 16

names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)
arrays = npst.arrays(st.sampled_from([np.uint8, np.float32]), shapes)
files = st.dictionaries(names, arrays, max_size=5)
# at least one: with neither tensors nor metadata the library writes a header that it cannot read itself (0.8)
metadata = st.dictionaries(st.text(max_size=8), st.text(max_size=40), min_size=1, max_size=3)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
VALID = safetensors.numpy.save({"x": IMAGE, "y": np.ones(3, np.float32)}, {"request": "{}"})


def parse_or_refuse(body: bytes) -> dict[str, Any] | None:
    """The tensors, or None when the body was refused as it should be; anything else is raised."""
    refusal: ServiceError | None = None
    try:
        found, texts = tensors.parse(body, MAX_HEADER)
    except (BadRequest, PayloadTooLarge) as error:
        refusal = error
    if refusal is not None:
        assert refusal.code in ("malformed_safetensors", "unsupported_tensor_dtype", "header_too_large")
        assert len(refusal.detail) < 200
        return None
    assert all(isinstance(text, str) for text in texts.values())
    return found


@given(files, metadata)
def test_files_of_the_library_come_back(given_arrays: dict[str, np.ndarray], texts: dict[str, str]) -> None:
    body = safetensors.numpy.save(given_arrays, texts)
    found, found_texts = tensors.parse(body, MAX_HEADER)
    assert found_texts == texts
    assert found.keys() == given_arrays.keys()
    for name, array in given_arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()  # bits, NaNs included


@given(files, metadata)
def test_the_library_reads_ours(given_arrays: dict[str, np.ndarray], texts: dict[str, str]) -> None:
    found = safetensors.numpy.load(tensors.serialize(given_arrays, texts))
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in given_arrays.items()
    }


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_tensors_are_read_only_views_of_the_body(kind: type) -> None:
    body = kind(VALID)
    found, _ = tensors.parse(body, MAX_HEADER)
    whole = np.frombuffer(body, np.uint8)
    for array in found.values():
        assert np.shares_memory(array, whole)
        assert not array.flags.writeable


@given(st.binary(max_size=200))
def test_random_bytes(body: bytes) -> None:
    parse_or_refuse(body)


@given(st.integers(0, len(VALID)), st.integers(0, 40), st.binary(max_size=20))
def test_mutations_of_a_good_file(start: int, cut: int, put: bytes) -> None:
    """Whatever is accepted lies inside the body and has the size that its shape says."""
    body = VALID[:start] + put + VALID[start + cut :]
    found = parse_or_refuse(body)
    if found is not None:
        length = int.from_bytes(body[:8], "little")
        assert sum(array.nbytes for array in found.values()) == len(body) - 8 - length


@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=junk,
)
def test_lying_entries(field: str, value: Any) -> None:
    entry = {"dtype": "U8", "shape": [4, 4, 3], "data_offsets": [0, 48]}
    found = parse_or_refuse(raw_safetensors({"x": entry | {field: value}}, bytes(48)))
    if found is not None:  # another shape of as many bytes is no lie
        assert found["x"].nbytes == 48


@given(junk)
def test_lying_headers(header: Any) -> None:
    parse_or_refuse(raw_safetensors(header))
    parse_or_refuse(raw_safetensors({"x": header}))
    parse_or_refuse(raw_safetensors({"__metadata__": header}))


@given(st.integers(0, 2**64 - 1))
def test_lying_lengths(length: int) -> None:
    body = length.to_bytes(8, "little") + b'{"x": {}}'
    assert parse_or_refuse(body) is None


@pytest.mark.parametrize(
    "entries",
    [
        {"a": [0, 8], "b": [4, 12]}, {"a": [0, 8], "b": [0, 8]}, {"a": [0, 4], "b": [8, 12]}, {"a": [4, 12]},
        {"a": [0, 8]}, {"a": [0, 16]}, {},
    ],
)  # fmt: skip
def test_overlaps_gaps_and_ends(entries: dict[str, list[int]]) -> None:
    """Twelve bytes of data must be covered exactly once: nothing is read twice, nothing travels unseen."""
    header = {name: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for name, (b, e) in entries.items()}
    assert parse_or_refuse(raw_safetensors(header, bytes(12))) is None


@pytest.mark.parametrize("size", [MAX_HEADER, MAX_HEADER + 1])
def test_the_cap_on_the_header(size: int) -> None:
    header = json.dumps({"__metadata__": {"request": "a" * 1000}}).encode().ljust(size)
    body = raw_safetensors(header)
    if size <= MAX_HEADER:
        assert tensors.parse(body, MAX_HEADER)[1] == {"request": "a" * 1000}
    else:
        with pytest.raises(PayloadTooLarge):
            tensors.parse(body, MAX_HEADER)
