"""The order of prompts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_client.prompt_order import PromptOrder


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(0, 2**40), st.lists(st.integers(0, 9), max_size=6), st.integers(0, 30))
def test_an_order_resumed_anywhere_goes_on_the_same(size: int, seed: int, takes: list[int], then: int) -> None:
    prompts = [f"prompt {i}" for i in range(size)]
    order, whole = PromptOrder(prompts, seed), PromptOrder(prompts, seed)
    taken = [index for count in takes for index in order.take(count)]
    resumed = PromptOrder(prompts, seed)
    resumed.load_state_dict(json.loads(json.dumps(order.state_dict())))
    assert taken + resumed.take(then) == whole.take(sum(takes) + then)


def test_every_epoch_has_every_prompt_once_in_another_order() -> None:
    order = PromptOrder([str(i) for i in range(50)], 7)
    epochs = [order.take(50) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert PromptOrder([str(i) for i in range(50)], 8).take(50) != epochs[0]
    assert PromptOrder(["a", "b", "c"], 7, shuffle=False).take(4) == [0, 1, 2, 0]


def test_an_order_refuses_the_state_of_another() -> None:
    saved = PromptOrder(["a", "b"], 1).state_dict()
    for other in (PromptOrder(["a", "c"], 1), PromptOrder(["a", "b"], 2), PromptOrder(["a", "b"], 1, shuffle=False)):
        with pytest.raises(ValueError, match="differ"):
            other.load_state_dict(saved)
