"""t4_diffusion_nft: DiffusionNFT's loss with its gradient, decays of the old policy and of evaluation weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.parity.comparing import FLOAT32, FLOAT64, Case, Comparisons, case_kind, register_folder
from models.parity import Topic, parity_kind
from trainer_client import ema
from trainer_client.losses import mean_squared_difference
from trainer_client.nft_losses import (
    AdvantageMode,
    adaptive_error,
    forward_noising,
    negative_prediction,
    nft_loss,
    nft_probability,
    positive_prediction,
)

register_folder("t4_diffusion_nft")


@case_kind("diffusion_nft_loss")
def diffusion_nft_loss(case: Case, compare: Comparisons) -> None:
    limit, close = case.cfg["adv_clip_max"], FLOAT64 if case["x0"].dtype == torch.float64 else FLOAT32
    _nft(case, compare, (-limit, limit), limit, case.cfg["adv_mode"] or "all")
    positive = positive_prediction(case["v_theta"], case["v_old"], case.cfg["nft_beta"])
    negative = negative_prediction(case["v_theta"], case["v_old"], case.cfg["nft_beta"])
    compare.add("positive prediction", positive, case["positive_prediction"], close)
    compare.add("negative prediction", negative, case["implicit_negative_prediction"], close)
    x0, xt, t = case["x0"].double(), case["xt"], case["t"]
    for side, name in ((positive, "positive_weight"), (negative, "negative_weight")):
        squared = (xt.double() - t.double().reshape(-1, 1, 1, 1) * side.double() - x0).flatten(1).square().mean(1)
        compare.add("weight", squared / adaptive_error(case["x0"], xt, t, side), case[name], close)


@case_kind("flow_factory_nft_loss")
def flow_factory_nft_loss(case: Case, compare: Comparisons) -> None:
    low, high = case.cfg["adv_clip_range"]
    _nft(case, compare, (low, high), high, "all")


def _nft(case: Case, compare: Comparisons, clip: tuple[float, float], scale: float, mode: AdvantageMode) -> None:
    close = FLOAT64 if case["x0"].dtype == torch.float64 else FLOAT32
    t, beta, v = case["timesteps"] / 1000, case.cfg["nft_beta"], case["v_theta"].clone().requires_grad_()
    xt = forward_noising(case["x0"], case["noise"], t)
    r = nft_probability(case["advantages"], clip=clip, mode=mode)
    found = nft_loss(case["x0"], xt, t, v, case["v_old"], r, beta=beta, scale=scale)
    kl = mean_squared_difference(v, case["v_ref"])
    total = found.loss + case.cfg["kl_beta"] * kl
    r64 = r.double()
    per_sample = (r64 * found.positive_B + (1 - r64) * found.negative_B) / beta
    compare.add("x_t", xt, case["xt"], close)
    compare.add("r", r, case["r"], close)
    compare.add("positive loss", found.positive_B, case["positive_loss"], close)
    compare.add("negative loss", found.negative_B, case["negative_loss"], close)
    compare.add("per sample", per_sample, case["per_sample_policy_loss"], close)
    compare.add("policy loss", found.loss, case["policy_loss_pure"], close)
    if "kl_div_loss" in case:
        compare.add("kl", kl, case["kl_div_loss"], close)
    elif case.cfg["kl_beta"]:
        compare.add("kl", kl, case["kl_div_per_sample"].mean(), close)
    compare.add("total", total, case["total_loss"], close)
    (gradient,) = torch.autograd.grad(total, v)
    compare.add("gradient by v_theta", gradient, case["grad_v_theta"], close)


@parity_kind("t4_diffusion_nft/ema_schedules.json")
def ema_schedules(file: Path) -> Sequence[Topic]:
    """Decays by step of every schedule."""
    document, compare = json.loads(file.read_text("utf-8")), Comparisons()
    for schedule, values in document["return_decay"].items():
        found = [ema.old_policy_decay(step, int(schedule)) for step, _ in values]
        compare.add(f"old policy, type {schedule}", found, [decay for _, decay in values], FLOAT64)
    for limit, values in document["ema_wrapper_decay_flow_grpo_and_nft"].items():
        found = [ema.power_decay(step, float(limit)) for step, _ in values]
        compare.add("evaluation weights", found, [decay for _, decay in values], FLOAT64)
    for case in document["flow_factory"]:
        options = dict(case["cfg"])
        schedule = _FLOW_FACTORY[options.pop("schedule_type")]
        found = [schedule(step, **options) for step, _ in case["values"]]
        compare.add("Flow-Factory's", found, [decay for _, decay in case["values"]], FLOAT64)
    return compare.topics()


def _constant(step: int, decay: float) -> float:
    return decay


_FLOW_FACTORY: dict[str, Callable[..., float]] = {
    "constant": _constant,
    "power": ema.power_decay,
    "linear": ema.linear_decay,
    "piecewise_linear": ema.piecewise_linear_decay,
    "cosine": ema.cosine_decay,
    "warmup_cosine": ema.warmup_cosine_decay,
}


@case_kind("ema_updates")
def ema_updates(case: Case, compare: Comparisons) -> None:
    steps = [int(step) for step in case["global_step"]]
    rows = case["current_params_per_update"]
    for schedule in (0, 1, 2):
        found = _averages(case["initial_old"], rows, [ema.old_policy_decay(step, schedule) for step in steps])
        compare.add(f"old policy, type {schedule}", found, case[f"old_after_update_type{schedule}"], FLOAT32)
    for name in (name for name in case.arrays if name.startswith("ema_")):
        limit, interval = (float(word[n:]) for word, n in zip(name.split("_")[-2:], (1, 3), strict=True))
        decays = [
            1.0 if (step + 1) % int(interval) else limit if "pref" in name else ema.power_decay(step, limit)
            for step in steps
        ]
        compare.add("evaluation weights", _averages(case["initial_old"], rows, decays), case[name], FLOAT32)


def _averages(start: Tensor, rows: Tensor, decays: Sequence[float]) -> Tensor:
    average, found = start.clone(), []
    for row, decay in zip(rows, decays, strict=True):
        ema.ema_update_([average], [row], decay)
        found.append(average.clone())
    return torch.stack(found)
