"""t6_refl: DDPM sampling to a late step, its clean prediction, ReFL's loss and gradient."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity.comparing import EXACT, FLOAT32, FLOAT64, Case, Comparisons, case_kind, register_folder
from models.parity import Topic, parity_kind
from models.preprocessing import normalize
from trainer_client.ddpm import (
    ancestral_transition,
    leading_timesteps,
    predict_x0_epsilon,
    predict_x0_v,
    scaled_linear_alpha_bar,
    to_image,
)
from trainer_client.losses import refl_loss
from trainer_client.sampling import draw, predict_x0

register_folder("t6_refl")


@parity_kind("t6_refl/reward_loss.json")
def reward_loss(file: Path) -> Sequence[Topic]:
    """Loss and gradient by the rewards, also at the target itself."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        double = case["dtype"] == "torch.float64"
        rewards = torch.tensor(case["rewards"], dtype=torch.float64 if double else torch.float32, requires_grad=True)
        loss = refl_loss(rewards, grad_scale=case["grad_scale"])
        (gradient,) = torch.autograd.grad(loss, rewards)
        close = FLOAT64 if double else FLOAT32
        compare.add("loss", loss, case["loss"], close)
        compare.add("gradient", gradient, case["grad_rewards"], close)
    return compare.topics()


def _alpha_bar(scheduler: dict[str, Any]) -> Tensor:
    return scaled_linear_alpha_bar(
        scheduler["num_train_timesteps"], beta_start=scheduler["beta_start"], beta_end=scheduler["beta_end"]
    )


@case_kind("refl_loop")
def refl_loop(case: Case, compare: Comparisons) -> None:
    cfg, scheduler = case.cfg, case.cfg["scheduler"]
    alpha_bar = _alpha_bar(scheduler)
    train_steps, steps = scheduler["num_train_timesteps"], cfg["num_inference_steps"]
    timesteps = leading_timesteps(steps, train_steps=train_steps, offset=scheduler["steps_offset"])
    compare.add("alpha_bar", alpha_bar, case["alphas_cumprod"], FLOAT32)
    compare.add("timesteps", timesteps, case["timesteps"], EXACT)
    compare.add("timesteps", timesteps[: cfg["mid_timestep_index"] + 1], case["unet_call_timesteps"], EXACT)
    w, b = (torch.tensor(cfg[name], requires_grad=True) for name in ("toy_w", "toy_b"))
    x, last = case["initial_latents"], cfg["mid_timestep_index"]
    for i in range(last + 1):
        t = int(timesteps[i])
        compare.add("latents", x, case["latents_at_call"][i], FLOAT32)
        with torch.set_grad_enabled(i == last):
            x0 = predict_x0_epsilon(x, w * x + b * t / 1000, alpha_bar[t])
        compare.require("gradient in the last call only", x0.requires_grad == bool(case["unet_call_has_grad"][i]))
        compare.add("x0", x0, case["pred_original_sample_at_call"][i], FLOAT32)
        if i < last:
            before = t - train_steps // steps
            following = alpha_bar[before] if before >= 0 else torch.tensor(1.0)
            x = draw(ancestral_transition(x, x0, alpha_bar[t], following), case["variance_noise"][i])
    compare.add("x0", x0, case["final_pred_original_sample"], FLOAT32)
    rewards = (x0 * case["reward_weight"]).flatten(1).sum(1) + cfg["reward_bias"]
    loss = refl_loss(rewards, grad_scale=cfg["grad_scale"])
    compare.add("rewards", rewards, case["rewards"].flatten(), FLOAT32)
    compare.add("loss", loss, case["loss"], FLOAT32)
    for name, gradient in zip(("w", "b"), torch.autograd.grad(loss, (w, b), retain_graph=True), strict=True):
        compare.add(f"gradient by {name}", gradient, case[f"grad_{name}"], FLOAT32)
    by_x0, by_rewards = torch.autograd.grad(loss, (x0, rewards))
    compare.add("gradient by x0", by_x0, case["grad_pred_original_sample"], FLOAT32)
    compare.add("gradient by rewards", by_rewards, case["grad_rewards"].flatten(), FLOAT32)


@case_kind("refl_postprocess")
def refl_postprocess(case: Case, compare: Comparisons) -> None:
    x0 = case["pred_original_sample"].clone().requires_grad_()
    pixels = to_image(x0 / case.cfg["scaling_factor"])
    # The reference's tensor path, which unlike a reward of this project doesn't cut off overshoots as PIL does.
    size = tuple(case["reward_input_shape"][-2:].tolist())
    resized = normalize(F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True))
    rewards = 2 * resized.flatten(1).mean(1)
    loss = refl_loss(rewards)
    compare.add("shape of the image", resized.shape, case["reward_input_shape"], EXACT)
    compare.add("image", resized[..., ::16, ::16], case["reward_input_image_every16"], FLOAT32)
    compare.add("mean of the image", resized.flatten(2).mean(2), case["reward_input_image_mean"], FLOAT32)
    compare.add("rewards", rewards, case["rewards"].flatten(), FLOAT32)
    compare.add("loss", loss, case["loss"], FLOAT32)
    (gradient,) = torch.autograd.grad(loss, x0)
    compare.add("gradient by x0", gradient, case["grad_pred_original_sample"], FLOAT32)


@case_kind("x0_prediction")
def x0_prediction(case: Case, compare: Comparisons) -> None:
    alpha_bar = _alpha_bar(case.cfg["scheduler"])
    compare.add("alpha_bar", alpha_bar[case["ddpm_t"]], case["ddpm_alpha_bar"], FLOAT32)
    for i, t in enumerate(case["ddpm_t"].tolist()):
        x, output = case["x_t"][i], case["model_output"][i].clone().requires_grad_()
        x0 = predict_x0_epsilon(x, output, alpha_bar[t])
        (gradient,) = torch.autograd.grad(x0.sum(), output)
        compare.add("from epsilon", x0, case["x0_epsilon"][i], FLOAT32)
        compare.add("from epsilon, gradient", gradient, case["grad_sum_x0_wrt_epsilon"][i], FLOAT32)
        clipped = predict_x0_epsilon(x, output, alpha_bar[t], clip=1.0)
        compare.add("from epsilon, clipped", clipped, case["x0_epsilon_clipped"][i], FLOAT32)
        compare.add("from v", predict_x0_v(x, output, alpha_bar[t]), case["x0_v_prediction"][i], FLOAT32)
        flow = predict_x0(x, output, case["flow_sigma"][i])
        (gradient,) = torch.autograd.grad(flow.sum(), output)
        compare.add("from velocity", flow, case["x0_flow"][i], FLOAT32)
        compare.add("from velocity, gradient", gradient, case["grad_sum_x0_wrt_velocity"][i], FLOAT32)
