"""t1_sde_step: steps of flow_grpo, Flow-Factory and Pref-GRPO, their windows and schedules."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity.comparing import (
    DANCE,
    EXACT,
    FLOAT32,
    FLOAT64,
    LOG_PROB,
    Case,
    Comparisons,
    Tolerance,
    case_kind,
    numbers,
    register_folder,
)
from models.parity import Topic, parity_kind
from trainer_client.sampling import (
    Dynamics,
    Transition,
    draw,
    flow_match_sigmas,
    linspace_sigmas,
    log_prob,
    predict_x0,
    transition,
)
from trainer_client.windows import eligible_steps, random_steps, window_noise_levels

_DYNAMICS: dict[str, Dynamics] = {"ODE": "ode", "Flow-SDE": "flow-sde", "Dance-SDE": "dance-sde", "CPS": "cps"}
# The reference subtracts log(2 pi) / 2 as a float32, also where all else is float64.
_FLOAT32_CONSTANT = math.log(2 * math.pi) / 2 - torch.tensor(math.log(2 * math.pi) / 2).item()
_DEFAULT_NOISE_LEVEL = 0.7  # the references', in the edge cases
_ZERO_NOISE_NOTE = "reference gives NaN, here 0"

register_folder("t1_sde_step")


def _latents(dynamics: Dynamics) -> Tolerance:
    return DANCE if dynamics == "dance-sde" else FLOAT32


def _given(
    dynamics: Dynamics, i: int, x: Tensor, v: Tensor, sigmas: Tensor, level: float, given: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability of a given next sample, and its gradient by the velocity."""
    v = v.clone().requires_grad_()
    result = log_prob(transition(dynamics, x, v, sigmas[i], sigmas[i + 1], level), given)
    (gradient,) = torch.autograd.grad(result.sum(), v, allow_unused=True)
    return result.detach(), torch.zeros_like(v) if gradient is None else gradient


@case_kind("flow_grpo_sde")
def flow_grpo_sde(case: Case, compare: Comparisons) -> None:
    sigmas, level = case["sigmas"], case.cfg["noise_level"]
    compare.add("schedule", flow_match_sigmas(case.cfg["num_steps"], case.cfg["shift"]), sigmas, FLOAT32)
    for i in range(len(sigmas) - 1):
        x, v, noise = case["sample"][i], case["model_output"][i], case["noise"][i]
        step = transition("flow-sde", x, v, sigmas[i], sigmas[i + 1], level)
        drawn = draw(step, noise)
        compare.add("mean", step.mean, case["prev_sample_mean"][i], FLOAT32)
        compare.add("diffusion", step.diffusion[:1], case["std_dev_t"][i][None].reshape(1, 1, 1, 1), FLOAT32)
        compare.add("next latent", drawn, case["prev_sample"][i], FLOAT32)
        compare.add("log_prob", log_prob(step, drawn), case["log_prob"][i], LOG_PROB)
        if case.cfg["chain"] and i + 1 < len(sigmas) - 1:
            compare.add("rollout", drawn, case["sample"][i + 1], FLOAT32)
        given, gradient = _given("flow-sde", i, x, v, sigmas, level, case["given_prev_sample"][i])
        compare.add("given log_prob", given, case["given_log_prob"][i], LOG_PROB)
        compare.add("gradient", gradient, case["given_grad_model_output"][i], FLOAT32)
        exact = transition("flow-sde", x.double(), v.double(), sigmas[i].double(), sigmas[i + 1].double(), level)
        compare.add("mean, float64", exact.mean, case["prev_sample_mean_f64"][i], FLOAT64)
        _exact_log_prob(exact, noise, case["log_prob_f64"][i], compare)
        given, gradient = _given(
            "flow-sde", i, x.double(), v.double(), sigmas.double(), level, case["given_prev_sample"][i].double()
        )
        compare.add("given log_prob, float64", given + _FLOAT32_CONSTANT, case["given_log_prob_f64"][i], FLOAT64)
        compare.add("gradient, float64", gradient, case["given_grad_model_output_f64"][i], FLOAT64)


@case_kind("flow_grpo_sde_mixed")
def flow_grpo_sde_mixed(case: Case, compare: Comparisons) -> None:
    steps, sigmas, level = case["step_index"], case["sigmas"], case.cfg["noise_level"]
    step = transition("flow-sde", case["sample"], case["model_output"], sigmas[steps], sigmas[steps + 1], level)
    drawn = draw(step, case["noise"])
    compare.add("mean", step.mean, case["prev_sample_mean"], FLOAT32)
    compare.add("diffusion", step.diffusion, case["std_dev_t"], FLOAT32)
    compare.add("next latent", drawn, case["prev_sample"], FLOAT32)
    compare.add("log_prob", log_prob(step, drawn), case["log_prob"], LOG_PROB)
    x, v, exact_sigmas = case["sample"].double(), case["model_output"].double(), sigmas.double()
    exact = transition("flow-sde", x, v, exact_sigmas[steps], exact_sigmas[steps + 1], level)
    compare.add("mean, float64", exact.mean, case["prev_sample_mean_f64"], FLOAT64)
    _exact_log_prob(exact, case["noise"], case["log_prob_f64"], compare)


def _exact_log_prob(step: Transition, noise: Tensor, wanted: Tensor, compare: Comparisons) -> None:
    found = log_prob(step, draw(step, noise.double())) + _FLOAT32_CONSTANT
    compare.add("log_prob, float64", found, wanted, FLOAT64)


@case_kind("flow_factory_sde")
def flow_factory_sde(case: Case, compare: Comparisons) -> None:
    dynamics, level, sigmas = _DYNAMICS[case.cfg["dynamics_type"]], case.cfg["noise_level"], case["sigmas"]
    steps, close = len(sigmas) - 1, _latents(dynamics)
    dtype = torch.bfloat16 if case.cfg["latents_dtype"].startswith("bfloat16") else torch.float32
    name = f"{case.cfg['dynamics_type']} "
    window = window_noise_levels(steps, eligible_steps(steps), level)
    compare.add("noise levels", window, case["noise_levels_default_window"], FLOAT32)
    compare.add("noise levels", window, case["auto_noise_level"].flatten(), FLOAT32)
    for i in range(steps):
        x, v = case["latents"][i].to(dtype), case["model_output"][i]
        step = transition(dynamics, x, v, sigmas[i], sigmas[i + 1], level)
        drawn = draw(step, case["noise"][i], dtype)
        compare.add(name + "mean", step.mean, case["next_latents_mean"][i], close)
        compare.add(name + "diffusion", step.diffusion, case["std_dev_t"][i], FLOAT32)
        compare.add(name + "next latent", drawn, case["next_latents"][i], close)
        compare.add(name + "log_prob", log_prob(step, drawn), case["log_prob"][i], LOG_PROB)
        given, gradient = _given(dynamics, i, x, v, sigmas, level, case["given_next_latents"][i])
        compare.add(name + "given log_prob", given, case["given_log_prob"][i], LOG_PROB)
        if dynamics != "ode":
            compare.add(name + "gradient", gradient, case["given_grad_model_output"][i], close)
    i = int(case["tn_step_index"])
    sigma, following = case["timesteps"][i] / 1000, case["timesteps"][i + 1] / 1000
    step = transition(dynamics, case["latents"][i].to(dtype), case["model_output"][i], sigma, following, level)
    drawn = draw(step, case["noise"][i])  # the reference doesn't round on this way
    compare.add(name + "mean from timesteps", step.mean, case["tn_next_latents_mean"], close)
    compare.add(name + "from timesteps", drawn, case["tn_next_latents"], close)
    compare.add(name + "log_prob from timesteps", log_prob(step, drawn), case["tn_log_prob"], LOG_PROB)


@case_kind("pref_grpo_step")
def pref_grpo_step(case: Case, compare: Comparisons) -> None:
    dance = "ode_prev_sample" in case
    dynamics: Dynamics = "dance-sde" if dance else "flow-sde"
    sigmas, level, close = case["sigmas"], case.cfg["eta"], _latents(dynamics)
    compare.add("schedule", linspace_sigmas(case.cfg["num_steps"], case.cfg["shift"]), sigmas, FLOAT32)
    compare.add("network's timesteps", (1000 * sigmas[:-1]).int(), case["model_timestep"], EXACT)
    for i in range(len(sigmas) - 1):
        x, v = case["sample"][i], case["model_output"][i]
        step = transition(dynamics, x, v, sigmas[i], sigmas[i + 1], level)
        drawn = draw(step, case["noise"][i])
        compare.add(f"{dynamics} mean", step.mean, case["prev_sample_mean"][i], close)
        compare.add(f"{dynamics} std", step.std.flatten()[0], case["noise_scale"][i], FLOAT32)
        compare.add(f"{dynamics} next latent", drawn, case["prev_sample"][i], close)
        compare.add(f"{dynamics} x0", predict_x0(x, v, sigmas[i]), case["pred_original_sample"][i], FLOAT32)
        compare.add(f"{dynamics} log_prob", log_prob(step, drawn), case["log_prob"][i], LOG_PROB)
        given, gradient = _given(dynamics, i, x, v, sigmas, level, case["given_prev_sample"][i])
        compare.add(f"{dynamics} given log_prob", given, case["given_log_prob"][i], LOG_PROB)
        compare.add(f"{dynamics} gradient", gradient, case["given_grad_model_output"][i], close)
        if dance:
            euler = transition("ode", x, v, sigmas[i], sigmas[i + 1])
            compare.add("ode", euler.mean, case["ode_prev_sample"][i], FLOAT32)


@parity_kind("t1_sde_step/edge_cases.json")
def edge_cases(file: Path) -> Sequence[Topic]:
    """Noise level 0, schedules of one and two steps, noise levels that a window gives."""
    document = json.loads(file.read_text("utf-8"))
    x, v, noise = (numbers(document[name]) for name in ("sample", "model_output", "noise"))
    compare = Comparisons()
    for case in document["cases"]:
        _edge_case(case, x, v, noise, compare)
    return compare.topics()


def _edge_case(case: dict[str, Any], x: Tensor, v: Tensor, noise: Tensor, compare: Comparisons) -> None:
    words, i, steps = case["case"].split(), case["step"], case["num_steps"]
    sigmas = flow_match_sigmas(steps, case["shift"])
    from_factory = words[0] == "flow_factory"
    dynamics: Dynamics = _DYNAMICS[words[1].rstrip(",")] if from_factory else "flow-sde"
    window = eligible_steps(steps) if from_factory else [i]
    off = "eval mode" in case["case"] or "noise_level=0" in case["case"]
    level = window_noise_levels(steps, [] if off else window, _DEFAULT_NOISE_LEVEL)[i]
    step = transition(dynamics, x, v, sigmas[i], sigmas[i + 1], level)
    drawn, prefix = draw(step, noise), "next_latents" if from_factory else "prev_sample"
    compare.add("mean", step.mean, numbers(case[f"{prefix}_mean"]), _latents(dynamics))
    compare.add("next latent", drawn, numbers(case[prefix]), _latents(dynamics))
    compare.add("diffusion", step.diffusion.flatten()[: len(case["std_dev_t"])], numbers(case["std_dev_t"]), FLOAT32)
    _edge_log_prob(step, drawn, numbers(case["log_prob"]), compare)
    if "sigmas" in case:
        compare.add("schedule", sigmas, numbers(case["sigmas"]), FLOAT32)


def _edge_log_prob(step: Transition, drawn: Tensor, wanted: Tensor, compare: Comparisons) -> None:
    if bool(wanted.isnan().all()):
        compare.add("log_prob without noise", log_prob(step, drawn), torch.zeros_like(wanted), EXACT, _ZERO_NOISE_NOTE)
    else:
        compare.add("log_prob", log_prob(step, drawn), wanted, LOG_PROB)


@parity_kind("t1_sde_step/flow_factory_sde_windows.json")
def windows(file: Path) -> Sequence[Topic]:
    """Which steps a seed draws, and their noise levels."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        steps, given = case["num_steps"], case["sde_steps_arg"]
        compare.add("eligible steps", eligible_steps(steps, given), case["eligible_steps"], EXACT)
        for seeded in case["per_seed"]:
            generator = torch.Generator().manual_seed(seeded["seed"])
            drawn = random_steps(steps, case["num_sde_steps_arg"], generator, given)
            compare.add("window", drawn, seeded["current_sde_steps"], EXACT)
            levels = window_noise_levels(steps, drawn, case["noise_level"])
            compare.add("noise levels", levels, numbers(seeded["noise_levels"]), EXACT)
    return compare.topics()


@parity_kind("t1_sde_step/sigma_schedules.json")
def schedules(file: Path) -> Sequence[Topic]:
    """Sigmas of both conventions and the timesteps that the network sees."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        make = {"diffusers_flow_match_euler": flow_match_sigmas, "pref_grpo_linspace_shift": linspace_sigmas}
        sigmas = make[case["kind"]](case["num_steps"], case["shift"])
        compare.add(f"{case['kind']}: sigmas", sigmas, numbers(case["sigmas"]), FLOAT32)
        if "timesteps" in case:
            compare.add("timesteps", 1000 * sigmas[:-1], numbers(case["timesteps"]), FLOAT32)
        else:
            compare.add("truncated timesteps", (1000 * sigmas[:-1]).int(), case["model_timesteps"], EXACT)
    return compare.topics()
