"""States through JSON and tensors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_client._state_files import pack, unpack

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
STATES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


@settings(deadline=None)
@given(STATES)
def test_states_come_back_as_they_were(value: Any) -> None:
    tree, tensors = pack(value)
    back = unpack(json.loads(json.dumps(tree, allow_nan=False)), tensors)
    assert back == value
    assert repr(back) == repr(value)  # tells a tuple from a list, True from 1 and -0.0 from 0.0


def test_a_nan_comes_back_and_two_tensors_of_one_name_do_not_pass() -> None:
    tree, _ = pack([float("nan"), float("-inf")])
    back = unpack(json.loads(json.dumps(tree, allow_nan=False)), {})
    assert np.isnan(back[0])
    assert back[1] == -np.inf
    with pytest.raises(ValueError, match="two tensors of state are called a/b"):
        pack({"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}})
