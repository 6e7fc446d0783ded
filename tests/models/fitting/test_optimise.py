"""Steps of the shared core are those of a plain loop, in parts or whole, and the schedules rise and fall as said."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from models.fitting.optimise import Descent, cosine, descend, muon_and_adamw, trapezoid

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
STEPS = 5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    loss: Tensor = (model(inputs).squeeze(-1) - inputs.sum(-1)).square().mean()
    return loss


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    return muon_and_adamw(
        model, lambda name: name.startswith("0."), muon_learning_rate=0.01, learning_rate=0.05, weight_decay=0.1
    )


def test_steps_are_those_of_a_plain_loop_to_the_last_bit() -> None:
    model, plain = network(), network()
    schedule = partial(trapezoid, steps=STEPS, warm_up=2)
    descent = Descent(optimizers(model), list(model.parameters()), schedule, 0.5)
    told = list(descend(descent, range(STEPS), lambda step: [loss_of(model, INPUTS[step : step + 8])]))

    chosen, found = optimizers(plain), []
    for step in range(STEPS):
        for optimizer, rate in zip(chosen, (0.01, 0.05), strict=True):
            optimizer.param_groups[0]["lr"] = rate * schedule(step)
        loss = loss_of(plain, INPUTS[step : step + 8])
        found.append(loss.item())
        plain.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for optimizer in chosen:
            optimizer.step()
    assert told == found
    assert descent.done == STEPS
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
    assert not any(
        torch.equal(one, other) for one, other in zip(model.parameters(), network().parameters(), strict=True)
    )


def test_parts_of_a_batch_add_up_to_the_batch() -> None:
    whole, parted = network(), network()
    found = []
    for model, size in ((whole, 24), (parted, 6)):
        descent = Descent(optimizers(model), list(model.parameters()), lambda step: 1.0)
        parts = [INPUTS[start : start + size] for start in range(0, 24, size)]

        def losses(_: int, model: nn.Module = model, parts: list[Tensor] = parts) -> list[Tensor]:
            return [loss_of(model, part) * (len(part) / 24) for part in parts]

        found.append(list(descend(descent, range(STEPS), losses)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    for one, other in zip(whole.parameters(), parted.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_part_is_made_when_the_one_before_it_is_done() -> None:
    """Else all parts of a batch would be in memory at once."""
    model = network()
    descent = Descent(optimizers(model), list(model.parameters()), lambda step: 1.0)
    gradients = []

    def parts() -> Iterator[Tensor]:
        for start in (0, 12):
            gradient = model[0].weight.grad
            gradients.append(None if gradient is None else gradient.clone())
            yield loss_of(model, INPUTS[start : start + 12])

    descent.step(parts())
    assert gradients[0] is None
    assert gradients[1] is not None


def test_without_a_loss_nothing_changes() -> None:
    model = network()
    descent = Descent(optimizers(model), list(model.parameters()), lambda step: 1.0)
    assert descent.step([]) == 0.0
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), network().parameters(), strict=True))


def test_muon_takes_inner_matrices_and_adamw_the_rest_that_is_trained() -> None:
    model = network()
    model[2].bias.requires_grad_(False)
    muon, adamw = optimizers(model)
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model[0].weight)]
    assert [id(p) for p in adamw.param_groups[0]["params"]] == [id(model[0].bias), id(model[2].weight)]


@given(st.integers(1, 400), st.integers(1, 100), st.floats(0.05, 1.0))
def test_a_trapezoid_rises_holds_and_falls(steps: int, warm_up: int, fall: float) -> None:
    factors = [trapezoid(step, steps, warm_up, fall) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[0] == min(1.0, 1 / warm_up, 1 / fall)
    assert factors[-1] <= max(1 / (fall * steps), factors[0])
    top = max(factors)
    first, last = factors.index(top), steps - 1 - factors[::-1].index(top)
    assert factors[: first + 1] == sorted(factors[: first + 1])
    assert factors[last:] == sorted(factors[last:], reverse=True)
    assert len(set(factors[first : last + 1])) == 1


@given(st.integers(1, 400), st.floats(0.0, 0.99))
def test_a_cosine_rises_and_falls_to_nothing(steps: int, warm_up: float) -> None:
    factors = [cosine(step, steps, warm_up) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert cosine(steps, steps, warm_up) == pytest.approx(0, abs=1e-12)
    first = factors.index(max(factors))
    assert factors[first:] == sorted(factors[first:], reverse=True)
    assert factors[0] == pytest.approx(min(1.0, 1 / max(1.0, warm_up * steps)))
