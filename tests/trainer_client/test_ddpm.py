"""DDPM's schedule, predictions and ancestral steps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_client.ddpm import (
    ancestral_transition,
    leading_timesteps,
    predict_x0_epsilon,
    predict_x0_v,
    scaled_linear_alpha_bar,
    to_image,
)
from trainer_client.sampling import draw

SHAPE = (2, 3, 4)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_schedule_is_the_product_of_its_betas() -> None:
    found, product = scaled_linear_alpha_bar(1000), 1.0
    for t in range(1000):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999
        product *= 1 - root**2
        assert found[t].item() == pytest.approx(product, rel=1e-4)


def test_timesteps_fall_by_equal_steps_to_the_offset() -> None:
    assert leading_timesteps(4, train_steps=1000, offset=1).tolist() == [751, 501, 251, 1]
    assert leading_timesteps(40).tolist()[::13] == [976, 651, 326, 1]


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 0.999))
def test_predictions_invert_the_forward_process(seed: int, alpha_bar: float) -> None:
    x0, eps = normal(seed, 2, *SHAPE)
    ab = torch.tensor(alpha_bar, dtype=torch.float64)
    x = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    torch.testing.assert_close(predict_x0_epsilon(x, eps, ab), x0)
    torch.testing.assert_close(predict_x0_v(x, ab.sqrt() * eps - (1 - ab).sqrt() * x0, ab), x0)
    assert torch.equal(predict_x0_epsilon(x, eps, ab, clip=0.5), predict_x0_epsilon(x, eps, ab).clamp(-0.5, 0.5))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 0.9), st.floats(0.01, 1.0))
def test_an_ancestral_step_is_bayes_rule(seed: int, alpha_bar: float, share: float) -> None:
    """N(x'; sqrt(ab') x0, 1 - ab') times N(x; sqrt(a) x', 1 - a), completed to a square in x'."""
    following = alpha_bar + share * (1 - alpha_bar)
    x, x0 = normal(seed, 2, *SHAPE)
    step = ancestral_transition(x, x0, *torch.tensor([alpha_bar, following], dtype=torch.float64))
    a = alpha_bar / following
    if following == 1:
        torch.testing.assert_close(step.mean, x0)
        assert not step.std.any()
        return
    precision = 1 / (1 - following) + a / (1 - a)
    mean = (math.sqrt(following) * x0 / (1 - following) + math.sqrt(a) * x / (1 - a)) / precision
    torch.testing.assert_close(step.mean, mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(step.std.flatten(), torch.full((2,), precision**-0.5).double(), rtol=1e-5, atol=1e-7)


def test_a_step_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler.config.timestep_spacing = "leading"
    x, eps = normal(0, 2, *SHAPE).float()
    alpha_bar = scaled_linear_alpha_bar()
    torch.testing.assert_close(alpha_bar, scheduler.alphas_cumprod)
    theirs = scheduler.step(eps, 500, x, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    x0 = predict_x0_epsilon(x, eps, alpha_bar[500])
    torch.testing.assert_close(x0, theirs.pred_original_sample)
    mine = draw(ancestral_transition(x, x0, alpha_bar[500], alpha_bar[499]), noise)
    torch.testing.assert_close(mine, theirs.prev_sample, rtol=1e-4, atol=1e-4)


def test_pixels_lie_in_the_unit_range_and_beyond_it_have_no_gradient() -> None:
    decoded = torch.tensor([-2.0, -1.0, 0.0, 0.5, 3.0], requires_grad=True)
    pixels = to_image(decoded)
    assert pixels.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]
    (gradient,) = torch.autograd.grad(pixels.sum(), decoded)
    assert gradient[[0, 4]].tolist() == [0.0, 0.0]
    assert gradient[[2, 3]].tolist() == [0.5, 0.5]
